"""The commands that make and measure the embedded model: ``train``, ``evaluate``, and ``bench quality``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import cli_options as opt
from .cli_job import dtype_named, fusion_config, load_pipeline, work
from .cli_output import print_files, print_outcome

if TYPE_CHECKING:
    from ..benchmarks.quality_report import QualityReport, Row
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
    backend: opt.Backend = None,
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
        pipe = load_pipeline(model, None, device, None, backend)
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


def bench_quality(
    presets: Annotated[
        list[str] | None,
        typer.Option(
            "--preset", help="A preset, or official-adapted; may be given several times.", show_default=False
        ),
    ] = None,
    reference: Annotated[
        list[str] | None,
        typer.Option(
            help="A preset that the plain loop runs too; may be given several times.", show_default=False
        ),
    ] = None,
    objects: Annotated[int, typer.Option(help="How many unseen objects.")] = 16,
    skip: Annotated[int, typer.Option(help="Leave out that many first.")] = 0,
    seeds: Annotated[int, typer.Option(help="Fusions of each object.")] = 2,
    workers: Annotated[int, typer.Option(help="Objects at a time, each in a process of its own.")] = 1,
    model: opt.Model = "builtin:nano",
    device: opt.Device = "auto",
    dtype: opt.Dtype = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for quality.json and quality.png; rows in it stay.")
    ] = Path("out/quality"),
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Presets by quality and seconds on unseen objects; with --reference, the fast loop against the plain one."""
    with work(debug):
        from ..benchmarks.quality import configuration, draw, plan, run
        from .files import check_writable_folder
        from .open_model import open_model

        check_writable_folder(output)
        family = open_model(model, None).card.family
        names = list(dict.fromkeys([*(presets or ()), *(reference or ())])) or ["draft"]
        report = run(
            output,
            [configuration(name, family) for name in names],
            plan(names, reference or (), objects=objects, skip=skip, seeds=seeds),
            model=model,
            device=device,
            dtype=dtype_named(dtype),
            workers=workers,
            on_row=_say,
        )
        written = [output / "quality.json", *draw(report, output)]
    if as_json:
        print_outcome(written, report.to_dict())
        return
    _print_quality(report)
    contents = {".json": "every figure of every object, with device and versions", ".png": "the means"}
    print_files({path: contents[path.suffix] for path in written})


def _say(row: Row) -> None:
    name = f"{row.preset:<10} {row.loop:<9} object {row.object:>3} seed {row.seed}"
    if row.problem is not None:
        print(f"{name}  {row.problem}", file=sys.stderr)
        return
    print(
        f"{name}  {row.psnr_db:5.2f} dB  IoU {row.iou:.3f}  Chamfer {row.chamfer:.4f}  {row.fuse_s:.1f} s and"
        f" {row.mesh_s:.1f} s for the mesh",
        file=sys.stderr,
    )


def _print_quality(report: QualityReport) -> None:
    from ..benchmarks.quality_report import summaries

    columns = "{:<10} {:<9} {:>7} {:>5} {:>14} {:>15} {:>15} {:>7} {:>6}"
    print(
        columns.format("preset", "loop", "objects", "seeds", "PSNR dB", "IoU", "Chamfer", "fuse s", "mesh s")
    )
    for one in summaries(report.rows):
        spread = (
            f"{one.psnr_db:.2f} ± {one.psnr_std:.2f}",
            f"{one.iou:.3f} ± {one.iou_std:.3f}",
            f"{one.chamfer:.4f} ± {one.chamfer_std:.4f}",
        )
        times = f"{one.fuse_s:.1f}", f"{one.mesh_s:.1f}"
        print(columns.format(one.preset, one.loop, one.objects, one.seeds, *spread, *times))
        if one.failed:
            print(f"  {one.failed} fusions failed")
    for preset, figures in report.agreements().items():
        for found in figures:
            verdict = "within" if found.within else "BEYOND"
            print(
                f"{preset}, ours - reference, {found.figure}: {found.difference:+.4f}, {verdict} the"
                f" ±{found.bound:.4f} that seeds explain ({found.objects} objects, {found.seeds} seeds, spread"
                f" {found.spread:.4f})"
            )
    for gained in report.gains():
        error = "" if gained.error is None else f" ± {gained.error:.4f}"
        print(
            f"{gained.preset} - {gained.against}, {gained.figure}: {gained.difference:+.4f}{error} on"
            f" {gained.objects} objects"
        )
