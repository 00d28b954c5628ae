"""The command ``imagedream-rt``. Exit codes: 0 done, 2 bad input, 1 anything else."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from . import cli_bench, cli_export, cli_training
from . import cli_options as opt
from .cli_job import PROGRAM, fusion_config, load_pipeline, prepared_picture, resumable, work
from .cli_output import MESH_SUFFIXES, print_doctor, print_error, print_info, print_written, set_up_libraries
from .errors import ImageDreamError

if TYPE_CHECKING:
    from .model import Controller

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="One picture of an object in; four consistent views, a fused NeRF and a textured 3D asset out.",
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code; every failure is one sentence on stderr."""
    arguments = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in arguments
    set_up_libraries()
    try:
        return app(args=arguments, prog_name=PROGRAM, standalone_mode=False) or 0
    except Exception as error:
        message, code = _explain(error)
        if _debug(arguments):
            traceback.print_exc()
    except KeyboardInterrupt:
        message, code = "interrupted", 1
    print_error(message, code, as_json)
    return code


def _debug(arguments: list[str]) -> bool:
    return "--debug" in arguments or os.environ.get("IMAGEDREAM_RT_DEBUG", "") not in ("", "0")


def _explain(error: Exception) -> tuple[str, int]:
    """One sentence and the exit code."""
    if isinstance(error, ImageDreamError):
        return str(error), error.exit_code
    if isinstance(error, typer.Abort):
        return "interrupted", 1
    # Wrong usage: typer's own classes, which have moved between its versions.
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        return f"{error.format_message()}{hint}", error.exit_code
    said = " ".join(str(error).split()) or "no message"
    if type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: {said}", 1
    return f"{type(error).__name__}: {said} (a fault of this program; --debug shows where)", 1


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from .. import __version__

        print(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.command()
def generate(
    picture: opt.Picture = None,
    output: opt.Output = Path("out"),
    model: opt.Model = "builtin:nano",
    controller: opt.Controller = None,
    prompt: opt.Prompt = "",
    negative_prompt: opt.NegativePrompt = None,
    preset: opt.Preset = None,
    seed: opt.Seed = 0,
    steps: opt.Steps = None,
    view_steps: opt.ViewSteps = 30,
    guidance_scale: opt.GuidanceScale = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = None,
    backend: opt.Backend = None,
    plans: opt.Plans = None,
    keep_background: opt.KeepBackground = False,
    faces: opt.Faces = 20_000,
    texture_px: opt.TexturePx = 1024,
    checkpoint: opt.Checkpoint = None,
    resume: opt.Resume = False,
    deterministic: opt.Deterministic = False,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """One picture in; views.png, turntable.mp4, asset.glb and metadata.json out."""
    with work(debug) as on_progress:
        fusion_config(None, preset, steps, guidance_scale)
        prepared = prepared_picture(picture, keep_background, output)
        pipe = load_pipeline(model, controller, device, dtype, backend, plans)
        with resumable(output, checkpoint, resume) as state:
            asset = pipe.generate(
                prepared,
                prompt,
                fusion_config(pipe, preset, steps, guidance_scale),
                seed,
                view_steps=view_steps,
                negative_prompt=negative_prompt,
                faces=faces,
                texture_px=texture_px,
                checkpoint=state,
                resume=resume,
                deterministic=deterministic,
                on_progress=on_progress,
            )
            written = asset.save_all(output, on_progress=on_progress)
    print_written(written, asset.metadata, as_json)


@app.command()
def views(
    picture: opt.Picture = None,
    output: opt.Output = Path("out"),
    model: opt.Model = "builtin:nano",
    controller: opt.Controller = None,
    prompt: opt.Prompt = "",
    negative_prompt: opt.NegativePrompt = None,
    seed: opt.Seed = 0,
    view_steps: Annotated[int, typer.Option("--view-steps", "--steps", help="Denoising steps.")] = 30,
    guidance_scale: opt.GuidanceScale = None,
    scheduler: Annotated[str, typer.Option(help="ddim, or a scheduler class of diffusers.")] = "ddim",
    elevation_deg: Annotated[float, typer.Option("--elevation-deg", help="Height of the cameras.")] = 0.0,
    device: opt.Device = "auto",
    dtype: opt.Dtype = None,
    backend: opt.Backend = None,
    plans: opt.Plans = None,
    keep_background: opt.KeepBackground = False,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Four views of the object (front, 90, 180, 270 degrees), to choose a seed before a fusion."""
    with work(debug) as on_progress:
        prepared = prepared_picture(picture, keep_background, output)
        pipe = load_pipeline(model, controller, device, dtype, backend, plans)
        result = pipe.views(
            prepared,
            prompt,
            seed,
            view_steps,
            fusion_config(pipe, None, None, guidance_scale).guidance_scale,
            negative_prompt=negative_prompt,
            scheduler=scheduler,
            elevation_deg=elevation_deg,
            on_progress=on_progress,
        )
        written = result.save_all(output)
    print_written(written, result.metadata, as_json)


@app.command()
def fuse(
    picture: opt.Picture = None,
    output: opt.Output = Path("out"),
    model: opt.Model = "builtin:nano",
    controller: opt.Controller = None,
    prompt: opt.Prompt = "",
    negative_prompt: opt.NegativePrompt = None,
    preset: opt.Preset = None,
    seed: opt.Seed = 0,
    steps: opt.Steps = None,
    guidance_scale: opt.GuidanceScale = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = None,
    backend: opt.Backend = None,
    plans: opt.Plans = None,
    keep_background: opt.KeepBackground = False,
    checkpoint: opt.Checkpoint = None,
    resume: opt.Resume = False,
    deterministic: opt.Deterministic = False,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """A NeRF from a picture, without a mesh: nerf.safetensors, preview.png and metadata.json."""
    with work(debug) as on_progress:
        fusion_config(None, preset, steps, guidance_scale)
        prepared = prepared_picture(picture, keep_background, output)
        pipe = load_pipeline(model, controller, device, dtype, backend, plans)
        with resumable(output, checkpoint, resume) as state:
            fused = pipe.fuse(
                prepared,
                prompt,
                fusion_config(pipe, preset, steps, guidance_scale),
                seed,
                negative_prompt=negative_prompt,
                checkpoint=state,
                resume=resume,
                deterministic=deterministic,
                on_progress=on_progress,
            )
            written = fused.save_all(output)
    print_written(written, fused.metadata, as_json)


@app.command()
def mesh(
    nerf: Annotated[Path, typer.Argument(help="nerf.safetensors of fuse, or a checkpoint of a fusion.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the files, or one .glb, .obj or .ply file.")
    ] = Path("out"),
    device: opt.Device = "auto",
    faces: opt.Faces = 20_000,
    texture_px: opt.TexturePx = 1024,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """A textured mesh from a saved NeRF: turntable.mp4, asset.glb and metadata.json."""
    with work(debug) as on_progress:
        from .files import check_writable_folder
        from .results import load_fused, make_asset

        single = output.suffix.lower() in MESH_SUFFIXES
        check_writable_folder(output.parent if single else output)
        asset = make_asset(
            load_fused(nerf, device), faces=faces, texture_px=texture_px, on_progress=on_progress
        )
        if single:
            asset.save(output)
            written = [output]
        else:
            written = asset.save_all(output, on_progress=on_progress)
    print_written(written, asset.metadata, as_json)


@app.command()
def info(
    model: Annotated[
        str, typer.Argument(help="builtin:nano, a checkpoint file, a model folder, or a Hub id.")
    ],
    controller: opt.Controller = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """What a checkpoint is: family, layout, controller and why that one, frames, sizes."""
    with work(debug):
        from .weights import inspect

        # An unknown controller is refused there, with the list of those there are.
        found = inspect(model, cast("Controller | None", controller))
    print_info(found, as_json)


@app.command()
def doctor(as_json: opt.Json = False, debug: opt.Debug = False) -> None:
    """What this machine offers: devices, versions, optional packages, kernels; and what is missing."""
    with work(debug):
        from .doctor import report

        found = report()
    print_doctor(found, as_json)


app.add_typer(cli_bench.bench, name="bench")
app.command()(cli_bench.warmup)
cli_bench.bench.command("export")(cli_export.bench_export)
cli_bench.bench.command("quality")(cli_training.bench_quality)
app.command()(cli_export.export)
app.command()(cli_export.refit)
app.command()(cli_export.verify)
app.command()(cli_training.train)
app.command()(cli_training.evaluate)


if __name__ == "__main__":
    sys.exit(main())
