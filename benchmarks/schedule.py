"""A preset's whole fusion by the clock on the wall, with its log: a warm start, if it has one, and every step.

What ``bench loop`` projects from a few steps of each stage, seen in full. The field starts as a solid ball and stays
one, so that weights which know no object render the samples of a finished one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..engine.config import preset as preset_named
from ..engine.files import write_json
from ..engine.fuse import FUSE, WARM, Fusion
from ..engine.pipeline import ImageTo3D
from ..engine.warmup import OPAQUE_BLOB
from ..engine.weights import load_model
from .harness import need_cuda, versions
from .loop import SEED, ball_guidance

LINE_EVERY = 500


@dataclass(frozen=True)
class Line:
    """The log: where the fusion stood, ``seconds`` after it began."""

    phase: str
    """``warm-start`` or ``fuse``."""
    step: int
    seconds: float
    loss: float
    reserved_gib: float
    """The most memory held so far."""


@dataclass(frozen=True)
class ScheduleReport:
    """One run; ``seconds`` from the loaded model to the finished field, with the picture's conditions and the views."""

    model: str
    preset: str
    steps: int
    """Of distillation."""
    deterministic: bool
    device: str
    versions: dict[str, str]
    seconds: float
    peak_gib: float
    log: list[Line]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(
    model: str = "random:full",
    preset: str = "official",
    *,
    steps: int | None = None,
    deterministic: bool = False,
    on_line: Callable[[Line], None] | None = None,
) -> ScheduleReport:
    """Run the preset's fusion on the current CUDA device, or the first ``steps`` of its distillation.

    Raises :class:`InputError` without a CUDA device, and what the fusion raises.
    """
    need_cuda()
    config = preset_named(preset)
    solid = replace(config.field, blob_strength=OPAQUE_BLOB)
    config = config.changed(field=solid, steps=steps or config.steps)
    ends = {WARM: config.fitted_steps, FUSE: config.steps}
    log: list[Line] = []
    # With the networks as a job has them.
    loaded = ImageTo3D(load_model(model, device="cuda", dtype=torch.float16)).model
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()

    def note(phase: str, done: int, values: dict[str, float]) -> None:
        if done % LINE_EVERY == 0 or done == ends[phase]:
            held = torch.cuda.max_memory_reserved() / 2**30
            log.append(Line(phase, done, time.perf_counter() - start, values["loss"], held))
            if on_line is not None:
                on_line(log[-1])

    with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
        fusion = Fusion.guided_by(ball_guidance(loaded, config), seed=SEED, deterministic=deterministic)
        fusion.run(on_metrics=note)
    torch.cuda.synchronize()
    return ScheduleReport(
        model,
        config.name,
        config.steps,
        deterministic,
        torch.cuda.get_device_name(),
        versions(),
        time.perf_counter() - start,
        torch.cuda.max_memory_reserved() / 2**30,
        log,
    )


def write(report: ScheduleReport, folder: Path) -> Path:
    """``schedule.json`` in ``folder``. Raises :class:`InputError` if it cannot be written."""
    path = folder / "schedule.json"
    write_json(path, report.to_dict())
    return path
