"""The commands about speed: ``bench kernels`` measures the kernels, ``warmup`` tunes them beforehand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from . import cli_options as opt
from .cli_job import load_pipeline, work
from .cli_output import print_files, print_json, print_outcome

if TYPE_CHECKING:
    from ..benchmarks.harness import Row
    from ..benchmarks.loop import StageRow
    from ..benchmarks.schedule import Line
    from ..benchmarks.start import Start, StartReport
    from ..benchmarks.views import ViewsReport, ViewsRow
    from .backends import UNetName

bench = typer.Typer(no_args_is_help=True, help="Measure speed against the strongest peers, and quality.")


@bench.command()
def kernels(
    names: Annotated[
        list[str] | None, typer.Argument(help="Kernels to measure. Default: all.", show_default=False)
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for kernels.json and kernels.png.")
    ] = Path("out/bench"),
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Every kernel against other implementations at ImageDream's shapes; each result is checked before it is timed."""
    rows = _Rows(None if as_json else sys.stdout)
    with work(debug):
        from ..benchmarks.kernels import draw, run
        from .files import check_writable_folder

        check_writable_folder(output)
        report = run(output, names or (), rows)
        written = draw(report, output)
        if len(written) == 1:
            print("note: no picture: matplotlib is not installed (extra bench)", file=sys.stderr)
    if as_json:
        print_outcome(written, report.to_dict())
        return
    print()
    contents = {".json": "every figure, with device and versions", ".png": "the same as bars"}
    print_files({path: contents[path.suffix] for path in written})


@bench.command()
def loop(
    model: opt.Model = "random:full",
    preset: Annotated[str, typer.Option(help="official, paper, fast, turbo or draft.")] = "official",
    steps: Annotated[int, typer.Option(min=8, help="Measured steps of each stage.")] = 48,
    reference: Annotated[
        bool,
        typer.Option(
            "--reference", help="Measure the plain loop as well, and what each step away from it buys."
        ),
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for loop.json and loop.png.")] = Path(
        "out/bench"
    ),
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """A distillation step of every stage and its parts, and what the whole schedule comes to."""
    console = None if as_json else Console(file=sys.stdout, highlight=False)
    with work(debug):
        from ..benchmarks.loop import run, write
        from .files import check_writable_folder

        check_writable_folder(output)
        report = run(model, preset, steps=steps, reference=reference, on_row=lambda row: _stage(console, row))
        written = write(report, output)
    if console is None:
        print_outcome(written, report.to_dict())
        return
    for name, minutes in report.schedule_min.items():
        print(
            f"{name}: {minutes:.1f} minutes the whole schedule, and {report.prepare_s:.1f} s of preparation"
        )
    contents = {".json": "every figure, with device and versions", ".png": "minutes of every loop"}
    print_files({path: contents[path.suffix] for path in written})


@bench.command()
def schedule(
    model: opt.Model = "random:full",
    preset: Annotated[str, typer.Option(help="One of the presets.")] = "official",
    steps: opt.Steps = None,
    deterministic: opt.Deterministic = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for schedule.json.")] = Path(
        "out/bench"
    ),
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """A preset's whole fusion, its diffused views included, by the clock on the wall."""
    with work(debug):
        from ..benchmarks.schedule import run, write
        from .files import check_writable_folder

        check_writable_folder(output)
        report = run(
            model, preset, steps=steps, deterministic=deterministic, on_line=None if as_json else _log_line
        )
        path = write(report, output)
    if as_json:
        print_outcome([path], report.to_dict())
        return
    print(f"{report.steps} steps in {report.seconds:.1f} s; {report.peak_gib:.1f} GiB")
    print_files({path: "the log, with device and versions"})


def _log_line(line: Line) -> None:
    print(
        f"{line.phase:<10} step {line.step:>6}  {line.seconds:8.1f} s  loss {line.loss:.4g}"
        f"  {line.reserved_gib:.1f} GiB",
        file=sys.stderr,
    )


@bench.command()
def views(
    model: opt.Model = "random:full",
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Measure torch.compile as well, which takes minutes once.")
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 30,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for views.json.")] = Path(
        "out/bench"
    ),
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Four views from a picture, by each backend of the UNet."""
    console = None if as_json else Console(file=sys.stdout, highlight=False)
    with work(debug):
        from ..benchmarks.views import run
        from .files import check_writable_folder, write_json

        check_writable_folder(output)
        unets: tuple[UNetName, ...] = ("eager", "graph", "compiled") if compiled else ("eager", "graph")
        report = run(model, unets, steps=steps, on_row=lambda row: _views(console, row))
        write_json(output / "views.json", report.to_dict())
    _print_written(output / "views.json", report, as_json)


@bench.command()
def start(
    model: opt.Model = "random:full",
    preset: Annotated[str, typer.Option(help="One of the presets.")] = "official",
    device: opt.Device = "auto",
    backend: opt.Backend = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for start.json.")] = Path(
        "out/bench"
    ),
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """From the start of a process to full speed, with empty caches and with those that it leaves to the next."""
    with work(debug):
        from ..benchmarks.start import run
        from .files import check_writable_folder, write_json

        check_writable_folder(output)
        report = run(model, preset, device, backend or (), on_row=None if as_json else _start)
        write_json(output / "start.json", report.to_dict())
    _print_written(output / "start.json", report, as_json)


def _print_written(path: Path, report: StartReport | ViewsReport, as_json: bool) -> None:
    if as_json:
        print_outcome([path], report.to_dict())
    else:
        print_files({path: "every figure, with device and versions"})


def _start(row: Start) -> None:
    """One process, when it has ended."""
    print(
        f"caches {row.caches:<5}  imported after {row.imported_s:.1f} s, model loaded {row.loaded_s:.1f} s, at full"
        f" speed {row.ready_s:.1f} s; four views then {row.views_ms:.0f} ms",
        file=sys.stderr,
    )


def _views(console: Console | None, row: ViewsRow) -> None:
    """One backend as it is measured."""
    if console is not None:
        console.print(
            f"{row.unet:<9} {row.median_ms:6.1f} ms ({row.p10_ms:.1f}-{row.p90_ms:.1f}), denoising"
            f" {row.sampling_ms:.1f}; first call {row.first_s:.1f} s; {row.peak_gib:.1f} GiB; differs by"
            f" {row.difference:.3f} of 255"
        )


def _stage(console: Console | None, row: StageRow) -> None:
    """One stage as it is measured."""
    if console is None:
        return
    busy = "" if row.busy_share is None else f", a kernel runs {row.busy_share:.1%} of it"
    console.print(
        f"{row.loop} {row.views} x {row.resolution}²: {row.mean_ms:.1f} ms a step (p50 {row.p50_ms:.1f}, p95"
        f" {row.p95_ms:.1f}){busy}; {row.peak_gib:.1f} GiB",
        style="bold" if row.loop == "ours" else "",
    )
    for part, time_ms in row.parts_ms.items():
        console.print(f"  {part:<24} {time_ms:7.2f} ms")


def warmup(
    model: opt.Model = "builtin:nano",
    controller: opt.Controller = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = None,
    preset: opt.Preset = None,
    backend: opt.Backend = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Compile and tune the kernels for a model before its first job, by a short run of everything a job does."""
    with work(debug) as on_progress:
        from ..kernels._triton import obstacle
        from .warmup import cache_report, warm_up
        from .weights import pick_device

        target = pick_device(device)
        reason = obstacle(target)
        if reason is None:
            pipe = load_pipeline(model, controller, device, dtype, backend)
            warm_up(pipe, preset, on_progress=on_progress)
        found = cache_report(target)
    if as_json:
        print_json({"nothing_to_do": reason, **found})
    elif reason is not None:
        print(f"nothing to do: {reason}")
    else:
        print(f"{found['tuned']}  {found['configurations']} tuned configurations")
        print(f"{found['compiled']}  compiled kernels")
        if found["inductor"]:
            print(f"{found['inductor']}  what torch.compile made")


class _Rows:
    """Prints the table case by case as it is measured, in columns of fixed widths."""

    def __init__(self, file: object) -> None:
        # The stream as it is now: while a command works, stdout is kept for results.
        self._console = None if file is None else Console(file=file, highlight=False)  # type: ignore[arg-type]
        self._kernel: str | None = None

    def __call__(self, rows: list[Row]) -> None:
        from ..benchmarks.harness import OURS, best_peer

        if self._console is None:
            return
        peer = best_peer(rows)
        if rows[0].kernel != self._kernel:
            self._kernel, unit = rows[0].kernel, rows[0].unit
            self._line(f"\n{self._kernel}", "bold")
            head = ("case", "contender", "median µs", "p10-p90", unit, "of ceiling", "speed")
            self._line(_COLUMNS.format(*head), "dim")
        for row in rows:
            style = "bold" if row.contender == OURS else ""
            if row.median_us is None:
                self._line(f"{row.case:<34} {row.contender:<22} {row.problem}", "yellow")
                continue
            assert row.p10_us is not None
            assert row.p90_us is not None
            assert row.rate is not None
            spread = f"{row.p10_us:.1f}-{row.p90_us:.1f}"
            share = f"{row.rate / row.ceiling:.0%} of {row.ceiling:.3g}"
            speed = "" if peer is None or peer.median_us is None else f"{peer.median_us / row.median_us:.2f}x"
            values = (
                row.case,
                row.contender,
                f"{row.median_us:.1f}",
                spread,
                f"{row.rate:.3g}",
                share,
                speed,
            )
            self._line(_COLUMNS.format(*values), style)

    def _line(self, text: str, style: str) -> None:
        assert self._console is not None
        self._console.print(Text(text, style=style), soft_wrap=True)


_COLUMNS = "{:<34} {:<22} {:>10} {:>17} {:>8} {:>14} {:>7}"
