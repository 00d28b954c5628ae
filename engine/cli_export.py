"""The commands for production: ``export`` to ONNX and TensorRT, ``refit`` a plan, ``verify`` what was exported."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from . import cli_options as opt
from .cli_job import work
from .cli_output import Stages, print_files, print_json
from .errors import InputError


def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="builtin:nano, a checkpoint file, a model folder, or a Hub id; or an ONNX file that export "
            "wrote, to build plans of it."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the files. Default: out/export.", show_default=False),
    ] = None,
    controller: opt.Controller = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float16",
    components: Annotated[
        str | None,
        typer.Option(
            help="Some of unet, unet_cached, key_values, image_adaptor, vae_encoder, vae_decoder, image_encoder, "
            "text_encoder, with commas. Default: all.",
            show_default=False,
        ),
    ] = None,
    tensorrt: Annotated[
        str | None,
        typer.Option(help="Build plans with tensorrt or tensorrt_rtx, for this GPU.", show_default=False),
    ] = None,
    sm: Annotated[
        str | None,
        typer.Option(
            "--sm",
            help="Build plans for these architectures, such as 80,86,89,120; tensorrt_rtx needs no GPU for it.",
            show_default=False,
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            help="Batches of the plans, min,opt,max. Default: the one that the engine uses.",
            show_default=False,
        ),
    ] = None,
    refit: Annotated[bool, typer.Option("--refit", help="Plans whose weights can be changed later.")] = False,
    strip_weights: Annotated[
        bool, typer.Option("--strip-weights", help="Plans without weights, which refit puts in.")
    ] = False,
    timing_cache: Annotated[
        Path | None,
        typer.Option("--timing-cache", help="File of kernel timings to reuse.", show_default=False),
    ] = None,
    optimization_level: Annotated[
        int, typer.Option("--builder-optimization-level", help="How long TensorRT searches, 0 to 5.")
    ] = 3,
    server_repo: Annotated[
        Path | None,
        typer.Option(
            "--server-repo", help="Folder for a Triton Inference Server repository too.", show_default=False
        ),
    ] = None,
    report: Annotated[
        bool,
        typer.Option("--report", help="Then verify all of it and time the UNet, in report.json, to send."),
    ] = False,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """A checkpoint's networks as ONNX files, checked against PyTorch, and as TensorRT plans."""
    with work(debug) as on_progress:
        from ..export.request import ExportRequest, run
        from ..export.trt_plan import PlanOptions

        request = ExportRequest(
            checkpoint=checkpoint,
            folder=output,
            controller=controller,
            dtype=dtype,
            components=_words(components),
            flavour=tensorrt,
            architectures=_words(sm),
            options=PlanOptions(_profile(profile), refit, strip_weights, timing_cache, optimization_level),
            server_repo=server_repo,
        )
        made = run(request, on_progress)
        lines = {**made.lines(), **(_write_report(made.folder, on_progress) if report else {})}
    if as_json:
        print_json(made.figures())
        return
    print_files(lines)
    for name in made.served:
        print(f"{server_repo}/{name}")


def _write_report(folder: Path, on_progress: Stages) -> dict[Path, str]:
    """Parity and latency on this machine in one file."""
    from ..benchmarks.export import run as measure
    from ..export.verify import verify_folder
    from .files import write_json

    found = verify_folder(folder, on_progress=on_progress)
    timed = measure(folder) if (folder / "unet.onnx").is_file() else None
    path = folder / "report.json"
    write_json(path, {"verify": found.to_dict(), "bench": timed})
    failed = sum(not finding.passed for finding in found.findings)
    return {
        path: f"{len(found.findings)} files compared, {failed} failed, {len(found.skipped)} for other GPUs"
    }


def refit(
    plan: Annotated[Path, typer.Argument(help="A plan that was built with --refit.")],
    checkpoint: Annotated[str, typer.Argument(help="Whose weights to put in: as for export.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The new plan. Default: in place of the old.", show_default=False
        ),
    ] = None,
    controller: opt.Controller = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """New weights into a plan without building it again, on a GPU that the plan runs on."""
    with work(debug):
        from ..export.refit import refit_from_checkpoint

        written = refit_from_checkpoint(plan, checkpoint, output or plan, controller)
    if as_json:
        print_json({"files": [str(written)]})
        return
    print_files({written: f"with the weights of {checkpoint}"})


def verify(
    folder: Annotated[Path, typer.Argument(help="What export wrote: a folder.")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="The checkpoint, if it has moved since.", show_default=False),
    ] = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Plans, ONNX files and PyTorch on the same inputs on this machine; verify.json is a report to send."""
    with work(debug) as on_progress:
        from ..export.verify import verify_folder

        report = verify_folder(folder, model, on_progress)
    if as_json:
        print_json(report.to_dict())
    else:
        print("\n".join(report.lines()))
    report.raise_if_failed()


def bench_export(
    folder: Annotated[Path, typer.Argument(help="What export wrote: a folder.")],
    component: Annotated[str, typer.Option(help="Which component to time.")] = "unet",
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="The checkpoint, if it has moved since.", show_default=False),
    ] = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Latency of PyTorch, onnxruntime and TensorRT in one run, whichever are there; bench.json is a report to send."""
    out = sys.stdout
    with work(debug):
        from ..benchmarks.export import run as measure

        report = measure(
            folder, component, model, None if as_json else lambda row: print(row.line(), file=out, flush=True)
        )
    if as_json:
        print_json(report)


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


def _profile(text: str | None) -> tuple[int, int, int] | None:
    """``min,opt,max`` batches, or one number for all three."""
    if text is None:
        return None
    try:
        numbers = [int(word) for word in text.split(",")]
        least, usual, most = numbers * 3 if len(numbers) == 1 else numbers
    except ValueError:
        raise InputError(
            f"profile {text!r}: give the least, usual and greatest batch, for example 1,2,8"
        ) from None
    return least, usual, most
