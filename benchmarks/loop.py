"""The distillation loop at work: what a step of each stage costs, where, and what the whole schedule comes to.

The field is fitted to a ball first and its learning rates are zero, so that every render has the samples of a
finished object; the weights of the model do not matter to the time. ``ours`` replays captured steps in half
precision. ``reference`` is the plain loop: one operation after the other, float32 weights under autocast,
networks without this package's kernels, and the prompt conditioned anew in every step, as in the released code;
only its renderer is this package's own. The rungs between them add one optimisation each; they all wait for the
host, so what kernels save the device shows in ``ours without kernels``, which replays captured steps as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.backends import Backends
from ..engine.captured import LOOK_EVERY, CapturedDistillation
from ..engine.condition_bank import GreyBank
from ..engine.conditioning import Conditioner
from ..engine.config import FusionConfig, Stage
from ..engine.config import preset as preset_named
from ..engine.distill import MultiViewGuidance
from ..engine.draws import StepTensors
from ..engine.field_state import FieldState
from ..engine.files import write_json
from ..engine.fuse import Fusion
from ..engine.graphed import GraphedStep
from ..engine.layers import use_kernels
from ..engine.model import MultiViewModel
from ..engine.nerf.field import Field
from ..engine.warmup import disc
from ..engine.weights import load_model
from ..kernels._triton import KernelBackend
from . import ball
from .harness import OURS, need_cuda, time_us, versions
from .plot import loop_figure, write_figure

SEED = 0

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class StageRow:
    """One stage of the schedule; times in milliseconds on the device, ``host`` of the host, never waiting for it."""

    loop: str
    resolution: int
    views: int
    steps: int
    """Of the schedule, not of this measurement."""
    mean_ms: float
    p50_ms: float
    p95_ms: float
    host_ms: float | None
    busy_share: float | None
    """Share of the time in which a kernel runs."""
    candidates: int | None
    samples: int | None
    peak_gib: float
    parts_ms: dict[str, float]


@dataclass(frozen=True)
class Rung:
    """A loop that calls one operation after the other."""

    name: str
    dtype: torch.dtype
    """Of the weights; float32 ones run under autocast to half precision."""
    remembers: bool
    """Whether the prompt's conditions are kept from step to step."""
    kernels: bool
    """Whether UNet and VAE use this package's kernels."""


WITHOUT_KERNELS = f"{OURS} without kernels"
"""With PyTorch's operations in UNet and VAE."""
REFERENCE = "reference"
LADDER = (
    Rung(REFERENCE, torch.float32, False, False),
    Rung("+ conditions kept", torch.float32, True, False),
    Rung("+ half-precision weights", torch.float16, True, False),
    Rung("+ kernels", torch.float16, True, True),
)
"""Each with what the ones above it have; :data:`OURS` has all, in one CUDA graph a step."""


@dataclass(frozen=True)
class LoopReport:
    """All stages, and the schedule projected from their mean times."""

    model: str
    device: str
    versions: dict[str, str]
    rows: list[StageRow]
    prepare_s: float
    """Conditions of every grey level, once for each picture."""
    schedule_min: dict[str, float]
    """Minutes of the whole schedule by loop."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(
    model: str = "random:full",
    preset: str = "official",
    *,
    steps: int = 48,
    reference: bool = False,
    on_row: Callable[[StageRow], None] | None = None,
) -> LoopReport:
    """Measure the loop on the current CUDA device; ``reference`` measures the plain loops as well.

    Raises :class:`InputError` without a CUDA device.
    """
    need_cuda()
    config = replace(preset_named(preset), warm_start=None, albedo_only_until=0)
    rows = []

    def note(found: Iterator[StageRow]) -> None:
        for row in found:
            rows.append(row)
            if on_row:
                on_row(row)
        torch.cuda.empty_cache()

    with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
        field = _fitted_field(config)
        for rung in LADDER if reference else ():
            note(_plain_rows(rung, model, config, field, max(4, steps // 6)))
        loaded = load_model(model, device="cuda", dtype=torch.float16)
        guidance = ball_guidance(loaded, config)
        start = time.perf_counter()
        bank = GreyBank(guidance.conditioner)
        torch.cuda.synchronize()
        prepare_s = time.perf_counter() - start
        with loaded.encoders_parked(vision=True):
            if reference:
                _use_kernels(loaded, "torch")
                note(_captured_rows(WITHOUT_KERNELS, config, guidance, bank, field, steps))
                _use_kernels(loaded, "auto")
            note(_captured_rows(OURS, config, guidance, bank, field, steps))
    return LoopReport(
        model, torch.cuda.get_device_name(), versions(), rows, prepare_s, schedule_minutes(rows)
    )


def write(report: LoopReport, folder: Path) -> list[Path]:
    """``loop.json`` and, where matplotlib is installed, ``loop.png`` in ``folder``; the files written.

    Raises :class:`InputError` if ``folder`` cannot be written.
    """
    path = folder / "loop.json"
    write_json(path, report.to_dict())
    return [path, *write_figure(folder / "loop.png", lambda: loop_figure(report))]


def schedule_minutes(rows: list[StageRow]) -> dict[str, float]:
    """Minutes of the whole schedule by loop: every stage's steps at its mean time."""
    loops = dict.fromkeys(row.loop for row in rows)
    return {loop: sum(row.steps * row.mean_ms for row in rows if row.loop == loop) / 60e3 for loop in loops}


def _stages(config: FusionConfig) -> Iterator[tuple[Stage, int]]:
    ends = [stage.start for stage in config.stages[1:]] + [config.steps]
    for stage, end in zip(config.stages, ends, strict=True):
        yield replace(stage, start=0), end - stage.start


def _fitted_field(config: FusionConfig) -> Weights:
    field = Field(config.field).cuda()
    ball.fit(field)
    return field.state_dict()


def _hold(state: FieldState, field: Weights) -> None:
    """The field as fitted, whatever the steps do."""
    state.field.load_state_dict(field)
    state.set_learning_rates(grid=0.0, networks=0.0)


def ball_guidance(model: MultiViewModel, config: FusionConfig) -> MultiViewGuidance:
    """Guidance by a picture of a ball."""
    return MultiViewGuidance(model, Conditioner(model, disc(), "a ball"), config)


def _use_kernels(model: MultiViewModel, backend: KernelBackend) -> None:
    for network in (model.unet, model.vae):
        use_kernels(network, backend)


def _captured_rows(
    name: str,
    config: FusionConfig,
    guidance: MultiViewGuidance,
    bank: GreyBank,
    field: Weights,
    steps: int,
) -> Iterator[StageRow]:
    for stage, count in _stages(config):
        yield _captured_row(name, config, stage, count, guidance, bank, field, steps)


def _captured_row(
    name: str,
    config: FusionConfig,
    stage: Stage,
    count: int,
    guidance: MultiViewGuidance,
    bank: GreyBank,
    field: Weights,
    steps: int,
) -> StageRow:
    torch.cuda.reset_peak_memory_stats()
    state = FieldState(replace(config, stages=(stage,)), SEED, torch.device("cuda"))
    _hold(state, field)
    loop = CapturedDistillation(state.config, state, guidance, bank)
    # Until two looks at the sample counts have settled the size of the buffers.
    for step in range(2 * LOOK_EVERY - 1):
        loop.advance(step)
    found = loop.sample_counts()
    loop.advance(2 * LOOK_EVERY - 1)
    times = _step_times(loop.advance, 2 * LOOK_EVERY, steps)
    host = _host_ms(loop.advance, 2 * LOOK_EVERY + steps)
    busy = _busy_share(loop.advance, 3 * LOOK_EVERY + steps)
    parts = _parts(loop)
    return StageRow(
        name,
        stage.resolution,
        stage.views,
        count,
        *_summary(times),
        host,
        busy,
        *found,
        torch.cuda.max_memory_reserved() / 2**30,
        parts,
    )


def _step_times(advance: Callable[[int], object], first: int, steps: int) -> list[float]:
    """Milliseconds from step to step on the device."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for number in range(steps):
        advance(first + number)
        events[number + 1].record()
    torch.cuda.synchronize()
    return [one.elapsed_time(other) for one, other in pairwise(events)]


def _host_ms(advance: Callable[[int], object], first: int, steps: int = 12) -> float:
    """Median milliseconds that the host takes to begin a step while the device's queue has room.

    A full queue, after half a dozen graphs, holds the host up until the device has done one: that is no work.
    """
    found = []
    for number in range(first, first + steps):
        if (number - first) % 3 == 0:
            torch.cuda.synchronize()
        start = time.perf_counter()
        advance(number)
        found.append((time.perf_counter() - start) * 1e3)
    return float(np.median(found))


def _summary(times: list[float]) -> tuple[float, float, float]:
    return float(np.mean(times)), float(np.median(times)), float(np.quantile(times, 0.95))


def _busy_share(advance: Callable[[int], object], first: int, steps: int = 8) -> float:
    """Share of the time between the first kernel's start and the last one's end in which some kernel ran."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for number in range(steps):
            advance(first + number)
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in found.events() or []
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / (reached - spans[0][0])


def _parts(loop: CapturedDistillation) -> dict[str, float]:
    """Milliseconds of a step's parts, each in a graph of its own."""
    guidance, state, inputs = loop.guidance, loop.state, loop.inputs
    rgb = loop.render(inputs).rgb.detach()

    def encode() -> Tensor:
        pixels = rgb.clone().requires_grad_()
        latents = guidance.encode(pixels, state.streams["vae"])
        return torch.autograd.grad(latents, pixels, torch.ones_like(latents))[0]

    def render() -> None:
        state.optimizer.zero_grad(set_to_none=True)
        loop.render(inputs).rgb.sum().backward()

    def target(latents: Tensor, step: StepTensors) -> Tensor:
        conditioning = loop.conditions.at(rgb)
        timestep = step.t.long()[0]
        return guidance.target_given(
            conditioning, latents, step.cameras.embedding(), timestep, state.streams["noise"]
        )

    latents = guidance.encode(rgb, state.streams["vae"]).detach()
    render()
    generators = [state.streams[name] for name in ("jitter", "vae", "noise")]
    named: dict[str, Callable[[], object]] = {
        "render + backward": render,
        "VAE encode + backward": encode,
        "noise, UNet, guidance": lambda: target(latents, inputs),
        "AdamW": state.optimizer.step,
    }
    found = {}
    for name, part in named.items():
        replay = GraphedStep(part, state.device, generators, warmup=1)
        found[name] = time_us(replay, graph=False, repeats=20)[1] * 1e-3
    return found


def _plain_rows(
    rung: Rung, model: str, config: FusionConfig, field: Weights, steps: int
) -> Iterator[StageRow]:
    loaded = load_model(model, device="cuda", dtype=rung.dtype)
    if not rung.kernels:
        _use_kernels(loaded, "torch")
    guidance = ball_guidance(loaded, config)
    if not rung.remembers:
        guidance = Forgetful(loaded, guidance.conditioner, config)
    for stage, count in _stages(config):
        torch.cuda.reset_peak_memory_stats()
        fusion = Fusion(
            replace(config, stages=(stage,), steps=10**6),
            guidance,
            seed=SEED,
            device="cuda",
            backends=Backends(loop="eager"),
        )
        _hold(fusion.state, field)
        with torch.autocast("cuda", dtype=torch.float16, enabled=rung.dtype == torch.float32):
            for step in range(2):
                fusion.distill(step)
            times = _step_times(fusion.distill, 2, steps)
        peak = torch.cuda.max_memory_reserved() / 2**30
        yield StageRow(
            rung.name,
            stage.resolution,
            stage.views,
            count,
            *_summary(times),
            None,
            None,
            None,
            None,
            peak,
            {},
        )


class Forgetful(MultiViewGuidance):
    """Conditions on the prompt anew in every step."""

    def target(self, *arguments: Any) -> Tensor:
        self.conditioner.forget()
        return super().target(*arguments)
