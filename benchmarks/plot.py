"""Pictures of benchmark runs: bars."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.files import replacing
from .harness import OURS, Report, Row

if TYPE_CHECKING:
    from .loop import LoopReport

DPI = 110
BAR_INCHES, CASE_GAP = 0.22, 0.6
"""Height of a bar, and the space between cases in bars."""


def write_figure(path: Path, draw: Callable[[], Any]) -> list[Path]:
    """The matplotlib figure that ``draw`` makes as a file: ``[path]``, or nothing without matplotlib.

    Raises :class:`InputError` if the folder cannot be written.
    """
    with contextlib.suppress(ImportError):
        drawn = draw()
        with replacing(path) as partial:
            drawn.savefig(partial)
        return [path]
    return []


def kernels_figure(report: Report) -> Any:
    """For each case a bar per contender, against the device's ceiling; a panel per kernel.

    A matplotlib figure of a report that has rows. ``ImportError`` without matplotlib.
    """
    from matplotlib.figure import Figure

    panels = [(kernel, list(rows)) for kernel, rows in groupby(report.rows, lambda row: row.kernel)]
    contenders = list(dict.fromkeys(row.contender for row in report.rows if row.contender != OURS))
    colours = {name: f"C{number % 9 + 1}" for number, name in enumerate(contenders)} | {OURS: "black"}
    heights = [len(rows) + CASE_GAP * len({row.case for row in rows}) + 4 for _, rows in panels]
    drawn = Figure(figsize=(10, BAR_INCHES * sum(heights)), layout="constrained", dpi=DPI)
    for axes, (kernel, rows) in zip(
        drawn.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0], panels, strict=True
    ):
        _panel(axes, kernel, rows, colours)
    drawn.suptitle(f"{report.device}, PyTorch {report.versions['torch']}")
    return drawn


def _panel(axes: Any, kernel: str, rows: list[Row], colours: dict[str, str]) -> None:
    unit, ceiling, position, ticks = rows[0].unit, rows[0].ceiling, 0.0, []
    for case, contenders in groupby(rows, lambda row: row.case):
        start = position
        for row in contenders:
            axes.barh(position, row.rate or 0.0, height=0.9, color=colours[row.contender])
            time = "no time" if row.median_us is None else f"{row.median_us:.1f} µs"
            axes.text(row.rate or 0.0, position, f" {row.contender}  {time}", va="center", fontsize=7)
            position += 1
        ticks.append(((start + position - 1) / 2, case))
        position += CASE_GAP
    axes.axvline(ceiling, color="grey", linestyle="--", linewidth=0.8)
    axes.set_yticks([middle for middle, _ in ticks], [case for _, case in ticks], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, ceiling * 1.25)
    axes.set_title(f"{kernel}: {unit}, ceiling {ceiling:.4g}", loc="left", fontsize=9)


def loop_figure(report: LoopReport) -> Any:
    """A bar per loop: minutes of the whole schedule, in parts by stage. ``ImportError`` without matplotlib."""
    from matplotlib.figure import Figure

    loops = list(report.schedule_min)
    drawn = Figure(figsize=(9, 1.2 + 0.5 * len(loops)), layout="constrained", dpi=DPI)
    axes = drawn.subplots()
    ends = [0.0] * len(loops)
    stages = list(dict.fromkeys((row.views, row.resolution) for row in report.rows))
    for number, (views, resolution) in enumerate(stages):
        minutes = [
            sum(
                row.steps * row.mean_ms / 60e3
                for row in report.rows
                if (row.loop, row.views, row.resolution) == (loop, views, resolution)
            )
            for loop in loops
        ]
        axes.barh(loops, minutes, left=ends, color=f"C{number}", label=f"{views} views of {resolution}²")
        ends = [end + part for end, part in zip(ends, minutes, strict=True)]
    for place, end in enumerate(ends):
        axes.text(end, place, f" {end:.1f} min", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, max(ends) * 1.15)
    axes.set_xlabel("minutes of the whole schedule")
    axes.legend(fontsize=8)
    drawn.suptitle(f"{report.model}, {report.device}, PyTorch {report.versions['torch']}", fontsize=10)
    return drawn
