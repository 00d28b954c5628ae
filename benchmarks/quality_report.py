"""What a run of :mod:`.quality` comes to: tables, whether two loops agree, what one preset gains on another, a plot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median, stdev, variance
from typing import Any, Literal

Loop = Literal["ours", "reference"]
FIGURES = ("psnr_db", "iou", "chamfer")
"""Of a fused object: PSNR and silhouette IoU from 16 unseen cameras, Chamfer distance of its mesh."""

BASELINES = ("official-adapted", "official")
"""What other presets are compared with."""


@dataclass(frozen=True)
class Task:
    """One fusion."""

    preset: str
    loop: Loop
    seed: int
    object: int
    """Counted from the first that training never saw."""


@dataclass(frozen=True)
class Row(Task):
    """What came of it; ``problem`` says why there are no figures."""

    psnr_db: float | None = None
    iou: float | None = None
    chamfer: float | None = None
    fuse_s: float | None = None
    """Of the fusion, its diffused views included; it shares the device with the other workers."""
    mesh_s: float | None = None
    problem: str | None = None

    @property
    def task(self) -> Task:
        return Task(self.preset, self.loop, self.seed, self.object)


@dataclass(frozen=True)
class Conditions:
    """Rows are compared only if they came about under the same ones."""

    model: str
    device: str
    dtype: str
    """Of the networks in our loop; the plain one is in float32."""
    versions: dict[str, str]
    presets: dict[str, Any]
    """The settings of each."""


@dataclass(frozen=True)
class Summary:
    """A preset by one loop: means over all its rows, standard deviations over objects, median times."""

    preset: str
    loop: Loop
    objects: int
    seeds: int
    failed: int
    psnr_db: float
    iou: float
    chamfer: float
    psnr_std: float
    iou_std: float
    chamfer_std: float
    fuse_s: float
    mesh_s: float


@dataclass(frozen=True)
class Agreement:
    """Whether two loops are equally good by one figure, on the same objects and seeds.

    ``difference`` is the mean of ours minus reference over all objects and seeds. ``spread`` is what chance does to
    one object: the square root of the variance over seeds (unbiased), averaged over objects and both loops. If the
    loops differ by chance alone, the standard deviation of the difference of their means is
    ``spread * sqrt(2 / pairs)``; ``bound`` is twice that.
    """

    figure: str
    objects: int
    seeds: int
    ours: float
    reference: float
    difference: float
    spread: float
    bound: float

    @property
    def within(self) -> bool:
        return abs(self.difference) <= self.bound


@dataclass(frozen=True)
class Gain:
    """A preset against another by one figure: mean over the objects that both have, and its standard error."""

    preset: str
    against: str
    figure: str
    objects: int
    difference: float
    error: float | None
    """None with a single object."""


@dataclass(frozen=True)
class QualityReport:
    """All rows, and what they come to."""

    conditions: Conditions
    workers: int
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self.conditions),
            "workers": self.workers,
            "summaries": [asdict(one) for one in summaries(self.rows)],
            "agreements": {
                preset: [{**asdict(one), "within": one.within} for one in found]
                for preset, found in self.agreements().items()
            },
            "gains": [asdict(one) for one in self.gains()],
            "rows": [asdict(row) for row in self.rows],
        }

    def agreements(self) -> dict[str, list[Agreement]]:
        """Of every preset that both loops ran, with at least two seeds."""
        found = {preset: agreement(self.rows, preset) for preset in self._presets("reference")}
        return {preset: figures for preset, figures in found.items() if figures}

    def gains(self) -> list[Gain]:
        """Every other preset against each of :data:`BASELINES` that has rows, by our loop."""
        names = self._presets("ours")
        return [
            one
            for against in BASELINES
            if against in names
            for name in names
            if name not in BASELINES
            for one in gain(self.rows, name, against)
        ]

    def _presets(self, loop: Loop) -> list[str]:
        return list(dict.fromkeys(row.preset for row in self.rows if row.loop == loop))


def summaries(rows: Iterable[Row]) -> list[Summary]:
    """One of each preset and loop that has figures, in the rows' order."""
    kinds: dict[tuple[str, Loop], list[Row]] = {}
    for row in rows:
        kinds.setdefault((row.preset, row.loop), []).append(row)
    found = []
    for (preset, loop), of_kind in kinds.items():
        sound = [row for row in of_kind if row.problem is None]
        if not sound:
            continue
        means = {name: fmean(_values(sound, name)) for name in FIGURES}
        # What a process does first takes longer.
        means |= {name: median(_values(sound, name)) for name in ("fuse_s", "mesh_s")}
        deviations = {
            f"{name.removesuffix('_db')}_std": _deviation(_by_object(sound, name).values())
            for name in FIGURES
        }
        objects, seeds = ({getattr(row, name) for row in sound} for name in ("object", "seed"))
        failed = len(of_kind) - len(sound)
        found.append(Summary(preset, loop, len(objects), len(seeds), failed, **means, **deviations))
    return found


def agreement(rows: Sequence[Row], preset: str) -> list[Agreement]:
    """How the two loops compare by each figure, on the objects and seeds that both have; none below two seeds."""
    sound = [row for row in rows if row.preset == preset and row.problem is None]
    loops = {
        loop: {(row.object, row.seed): row for row in sound if row.loop == loop}
        for loop in ("ours", "reference")
    }
    pairs = sorted(set(loops["ours"]) & set(loops["reference"]))
    seeds_of: dict[int, list[int]] = {}
    for number, seed in pairs:
        seeds_of.setdefault(number, []).append(seed)
    if not pairs or min(len(seeds) for seeds in seeds_of.values()) < 2:
        return []
    found = []
    for figure in FIGURES:
        values = {
            loop: {pair: getattr(row, figure) for pair, row in held.items()} for loop, held in loops.items()
        }
        spread = math.sqrt(
            fmean(
                variance([held[number, seed] for seed in seeds])
                for held in values.values()
                for number, seeds in seeds_of.items()
            )
        )
        ours, reference = (fmean(held[pair] for pair in pairs) for held in values.values())
        bound = 2 * spread * math.sqrt(2 / len(pairs))
        seeds = max(len(seeds) for seeds in seeds_of.values())
        found.append(
            Agreement(figure, len(seeds_of), seeds, ours, reference, ours - reference, spread, bound)
        )
    return found


def gain(rows: Sequence[Row], preset: str, against: str) -> list[Gain]:
    """One preset against another by each figure, seeds averaged first; none if they share no object."""
    sound = [row for row in rows if row.loop == "ours" and row.problem is None]
    found = []
    for figure in FIGURES:
        one, other = (
            _by_object([row for row in sound if row.preset == name], figure) for name in (preset, against)
        )
        differences = [one[number] - other[number] for number in sorted(set(one) & set(other))]
        if not differences:
            return []
        several = len(differences) > 1
        error = stdev(differences) / math.sqrt(len(differences)) if several else None
        found.append(Gain(preset, against, figure, len(differences), fmean(differences), error))
    return found


def _values(rows: Iterable[Row], figure: str) -> list[float]:
    return [getattr(row, figure) for row in rows]


def _by_object(rows: Sequence[Row], figure: str) -> dict[int, float]:
    """The figure of each object, its mean over seeds."""
    numbers = dict.fromkeys(row.object for row in rows)
    return {number: fmean(_values([r for r in rows if r.object == number], figure)) for number in numbers}


def _deviation(values: Iterable[float]) -> float:
    found = list(values)
    return stdev(found) if len(found) > 1 else 0.0


def figure(report: QualityReport) -> Any:
    """A matplotlib figure: each figure against the seconds of an object. ``ImportError`` without matplotlib."""
    from matplotlib.figure import Figure

    found = summaries(report.rows)
    drawn = Figure(figsize=(4.5 * len(FIGURES), 4.2), layout="constrained", dpi=120)
    colours = {name: f"C{number}" for number, name in enumerate(dict.fromkeys(one.preset for one in found))}
    titles = ("PSNR of unseen views, dB", "silhouette IoU", "Chamfer distance (less is better)")
    for axes, name, title in zip(drawn.subplots(1, len(FIGURES)), FIGURES, titles, strict=True):
        for one in found:
            label = one.preset if one.loop == "ours" else f"{one.preset}, plain loop"
            axes.errorbar(
                one.fuse_s + one.mesh_s,
                getattr(one, name),
                getattr(one, f"{name.removesuffix('_db')}_std") / math.sqrt(one.objects),
                fmt="o",
                capsize=3,
                color=colours[one.preset],
                markerfacecolor=colours[one.preset] if one.loop == "ours" else "white",
                label=f"{label} ({one.objects} objects)",
            )
        axes.set_xscale("log")
        axes.set_xlabel("seconds an object, mesh included")
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(alpha=0.3)
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    drawn.suptitle(
        f"{report.conditions.model} on {report.conditions.device}, ours in {report.conditions.dtype};"
        f" {report.workers} objects at a time, bars: standard error over objects"
    )
    return drawn
