"""How the radiance field's kernels are launched: as many programs as run at once, each over its share of the points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ._field_kernels import UNITS, backward_kernel, forward_kernel
from ._field_network import count_levels, field_levels
from ._grid_lookup import GridLevel
from ._tuning import Launch, Tuned

PROGRAMS = 8
"""Programs on each multiprocessor, at least as many as fit."""

MANY = 2**17
"""With fewer points than these a launch matters little, and is not looked for."""


def _forward_candidates(normals: bool, levels: int, hidden: int, number: int, many: bool) -> list[Launch]:
    """For a table of numbers of ``number`` bytes."""
    sizes = ((64, 4), (32, 4), (64, 8), (128, 8)) if many else ((64, 4),)
    return [Launch.of(BLOCK=block, warps=warps, stages=1) for block, warps in sizes]


def _backward_candidates(normals: bool, levels: int, hidden: int, number: int, many: bool) -> list[Launch]:
    sizes = ((16, 4, 8), (16, 4, 4), (32, 2, 8), (64, 1, 8), (32, 4, 8)) if many else ((16, 4, 8),)
    return [Launch.of(GROUPS=groups, RUN=run, warps=warps, stages=1) for groups, run, warps in sizes]


FORWARD = Tuned("radiance_field", forward_kernel, _forward_candidates)
BACKWARD = Tuned("radiance_field_backward", backward_kernel, _backward_candidates)


@dataclass(frozen=True)
class Settings:
    """What a call's kernels need beside tensors."""

    levels: tuple[GridLevel, ...]
    blob_strength: float
    blob_radius: float
    lookup: torch.dtype

    def constants(self, inner: Tensor) -> dict[str, int]:
        hidden, features = inner.shape
        padded = max(16, 1 << (hidden - 1).bit_length())
        return {"LEVELS": count_levels(self.levels), "WIDTH_IN": features, "H": hidden, "HIDDEN": padded}


def _key(
    points: Tensor, entries: Tensor, normal: Tensor | None, constants: dict[str, int]
) -> tuple[Any, ...]:
    sizes = constants["LEVELS"], constants["HIDDEN"], entries.element_size()
    return normal is not None, *sizes, len(points) >= MANY


def _programs(points: Tensor, block: int) -> tuple[int]:
    """As many programs as run at once: each goes over its share of the blocks."""
    blocks = -(-len(points) // block)
    if not points.is_cuda:
        return (min(blocks, 3),)
    return (min(blocks, PROGRAMS * torch.cuda.get_device_properties(points.device).multi_processor_count),)


def launch_forward(
    points: Tensor,
    entries: Tensor,
    weights: Sequence[Any],
    count: Tensor | None,
    settings: Settings,
    results: Sequence[Tensor | None],
) -> None:
    """Write density, albedo, normal and 1 / |g|, those that there are tensors for."""
    if not len(points):
        return
    parameters, constants = field_levels(settings.levels, points.device), settings.constants(weights[0])
    bias = settings.blob_strength, settings.blob_radius

    def run(launch: Launch) -> None:
        forward_kernel[_programs(points, launch["BLOCK"])](
            *(points, entries, parameters, *weights, count, *results, len(points), *bias),
            **constants,
            **launch.options,
        )

    run(FORWARD.choose(points.device, _key(points, entries, results[2], constants), run))


def launch_backward(
    saved: Sequence[Any],
    upstream: Sequence[Tensor | None],
    settings: Settings,
) -> tuple[Tensor | None, ...]:
    """Gradients by the table and the four matrices; None for a colour without a gradient.

    Under :func:`torch.use_deterministic_algorithms` they are summed in whole numbers, which takes no order.
    """
    points, entries, *others = saved
    weights = others[:4]
    upstream = [None if grad is None else grad.contiguous() for grad in upstream]
    learnt: list[Tensor | None] = [entries, *weights]
    if upstream[1] is None:
        learnt[3:] = [None, None]

    whole = torch.are_deterministic_algorithms_enabled()
    dtype = torch.int64 if whole else torch.float32

    def zeros() -> list[Tensor | None]:
        return [None if tensor is None else torch.zeros_like(tensor, dtype=dtype) for tensor in learnt]

    grads = zeros()
    if len(points):
        parameters, constants = field_levels(settings.levels, points.device), settings.constants(weights[0])

        def run(targets: Sequence[Tensor | None], launch: Launch) -> None:
            backward_kernel[_programs(points, launch["GROUPS"] * launch["RUN"])](
                *(points, entries, parameters, *weights, *others[4:], *upstream, *targets, len(points)),
                **constants,
                WHOLE=whole,
                **launch.options,
            )

        scratch = cache(zeros)
        key = _key(points, entries, upstream[2], constants)
        run(grads, BACKWARD.choose(points.device, key, lambda launch: run(scratch(), launch)))
    if whole:
        grads = [None if grad is None else (grad.double() / UNITS).float() for grad in grads]
    return tuple(grads)
