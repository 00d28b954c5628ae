"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Picture = Annotated[
    Path | None,
    typer.Argument(
        help="A picture of one object, best with a transparent background. None for text-only models.",
        show_default=False,
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the files.")]
Model = Annotated[
    str,
    typer.Option("--model", "-m", help="builtin:nano, a checkpoint file, a model folder, or a Hub id."),
]
Controller = Annotated[
    str | None,
    typer.Option(
        help="pixel, local, local-linear, global or none. Default: guessed from the checkpoint (see info).",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, float16 or bfloat16. Default: by device.", show_default=False),
]
Backend = Annotated[
    list[str] | None,
    typer.Option(
        "--backend",
        metavar="COMPONENT=NAME",
        help="Who computes a component, such as unet=compiled; may be repeated. doctor lists all of them.",
        show_default=False,
    ),
]
Plans = Annotated[
    Path | None,
    typer.Option(
        "--plans", help="UNet and VAE decoder as TensorRT plans: a folder of export.", show_default=False
    ),
]
Prompt = Annotated[str, typer.Option(help="What the object is; may be empty when there is a picture.")]
NegativePrompt = Annotated[
    str | None,
    typer.Option(help="What to steer away from. Default: the released text.", show_default=False),
]
Seed = Annotated[int, typer.Option(help="Same seed, same result.")]
Preset = Annotated[
    str | None,
    typer.Option(
        help="official, paper, fast, turbo or draft. Default: draft for builtin:nano, else official.",
        show_default=False,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(help="Fusion steps; fewer than the preset's end its schedule early.", show_default=False),
]
ViewSteps = Annotated[int, typer.Option("--view-steps", help="Denoising steps of the four views.")]
GuidanceScale = Annotated[
    float | None,
    typer.Option(help="How strongly the prompt is followed. Default: the preset's.", show_default=False),
]
KeepBackground = Annotated[
    bool, typer.Option("--keep-background", help="Use a picture without transparency as it is.")
]
Faces = Annotated[int, typer.Option(help="Most triangles of the mesh.")]
TexturePx = Annotated[int, typer.Option("--texture-px", help="Side of the square texture.")]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        help="Where the fusion saves its state. Default: in the output folder, removed when all is done.",
        show_default=False,
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint of an interrupted run.")]
Deterministic = Annotated[
    bool,
    typer.Option("--deterministic", help="On a GPU too the same fusion to the last bit, a little slower."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the warnings of libraries.")]
