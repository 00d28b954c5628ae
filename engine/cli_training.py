"""The commands that make and measure the embedded model: ``train`` and ``evaluate``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import cli_options as opt
from .cli_job import fusion_config, load_pipeline, work

if TYPE_CHECKING:
    from .training.evaluate import Score


def train(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoint and model.")] = Path(
        "out/train"
    ),
    minutes: Annotated[float, typer.Option(help="Time budget of the whole training.")] = 20.0,
    batch: Annotated[int, typer.Option(help="Groups of five pictures in a step.")] = 192,
    seed: opt.Seed = 0,
    device: opt.Device = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the checkpoint in the folder.")
    ] = False,
    debug: opt.Debug = False,
) -> None:
    """Train the embedded model from nothing; Ctrl-C saves, --resume continues. The model is in OUTPUT/nano."""
    with work(debug):
        from .files import check_writable_folder
        from .training.trainer import Trainer
        from .weights import pick_device

        check_writable_folder(output)
        trainer = Trainer(output, minutes=minutes, device=pick_device(device), batch=batch, seed=seed)
        if resume:
            trainer.resume()
        folder = trainer.run(lambda line, used: print(f"{used:6.1%}  {line}", file=sys.stderr))
    print(folder)


def evaluate(
    objects: Annotated[int, typer.Option(help="How many unseen objects.")] = 16,
    skip: Annotated[int, typer.Option(help="Leave out that many first: to share the work out.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder for a sheet per object and evaluation.json.", show_default=False
        ),
    ] = None,
    model: opt.Model = "builtin:nano",
    preset: opt.Preset = None,
    seed: opt.Seed = 0,
    steps: opt.Steps = None,
    guidance_scale: opt.GuidanceScale = None,
    device: opt.Device = "auto",
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """PSNR, silhouette IoU and Chamfer distance on procedural objects that training never saw."""
    with work(debug):
        from .files import check_writable_folder, write_json
        from .training.evaluate import evaluate as scores_of
        from .training.evaluate import summary

        if output is not None:
            check_writable_folder(output)
        pipe = load_pipeline(model, None, device, None)
        config = fusion_config(pipe, preset, steps, guidance_scale)
        scores = []
        for score in scores_of(pipe, objects, config, skip=skip, seed=seed, pictures=output):
            scores.append(score)
            print(_line(score), file=sys.stderr)
        found = {
            **summary(scores),
            "preset": config.name,
            "guidance_scale": config.guidance_scale,
            "seed": seed,
        }
        if output is not None:
            write_json(output / "evaluation.json", found)
    if as_json:
        print(json.dumps(found))
        return
    for name, value in found["mean"].items():
        print(f"{name:<16}{value:8.3f} ± {found['std'][name]:.3f}")


def _line(score: Score) -> str:
    return (
        f"{score.caption:<18} views {score.views_psnr_db:5.2f} dB IoU {score.views_iou:.3f}   NeRF "
        f"{score.fused_psnr_db:5.2f} dB IoU {score.fused_iou:.3f}   Chamfer {score.chamfer:.4f}   {score.seconds:.0f} s"
    )
