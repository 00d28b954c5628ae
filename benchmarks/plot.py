"""The picture of a benchmark run: for each case a bar per contender, against the device's ceiling."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from .harness import OURS, Report, Row

BAR_INCHES, CASE_GAP = 0.22, 0.6
"""Height of a bar, and the space between cases in bars."""


def figure(report: Report) -> Any:
    """A matplotlib figure of a report that has rows; a panel per kernel. ``ImportError`` without matplotlib."""
    from matplotlib.figure import Figure

    panels = [(kernel, list(rows)) for kernel, rows in groupby(report.rows, lambda row: row.kernel)]
    contenders = list(dict.fromkeys(row.contender for row in report.rows if row.contender != OURS))
    colours = {name: f"C{number % 9 + 1}" for number, name in enumerate(contenders)} | {OURS: "black"}
    heights = [len(rows) + CASE_GAP * len({row.case for row in rows}) + 4 for _, rows in panels]
    drawn = Figure(figsize=(10, BAR_INCHES * sum(heights)), layout="constrained")
    for axes, (kernel, rows) in zip(
        drawn.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0], panels, strict=True
    ):
        _panel(axes, kernel, rows, report.ceilings, colours)
    drawn.suptitle(f"{report.device}, PyTorch {report.versions['torch']}")
    return drawn


def _panel(
    axes: Any, kernel: str, rows: list[Row], ceilings: dict[str, float], colours: dict[str, str]
) -> None:
    unit, position, ticks = rows[0].unit, 0.0, []
    for case, contenders in groupby(rows, lambda row: row.case):
        start = position
        for row in contenders:
            axes.barh(position, row.rate or 0.0, height=0.9, color=colours[row.contender])
            time = "no time" if row.median_us is None else f"{row.median_us:.1f} µs"
            axes.text(row.rate or 0.0, position, f" {row.contender}  {time}", va="center", fontsize=7)
            position += 1
        ticks.append(((start + position - 1) / 2, case))
        position += CASE_GAP
    axes.axvline(ceilings[unit], color="grey", linestyle="--", linewidth=0.8)
    axes.set_yticks([middle for middle, _ in ticks], [case for _, case in ticks], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, ceilings[unit] * 1.25)
    axes.set_title(f"{kernel}: {unit}, ceiling {ceilings[unit]:.4g}", loc="left", fontsize=9)
