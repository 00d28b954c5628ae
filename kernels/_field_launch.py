"""How the radiance field's kernels are launched: forward over all points at once, backward over a part of them after
another, so that what is kept of a part on its way is small and stays in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._field_kernels import backward_kernel, forward_kernel, prepare_kernel
from ._field_network import count_levels, field_levels
from ._grid_lookup import GridLevel
from ._hash_grid_kernels import launch_encode, scatter, summed, zero_sums
from ._tuning import Launch, Tuned

PROGRAMS = 8
"""Programs on each multiprocessor, at least as many as fit."""

FEW_PROGRAMS = 2
"""Backward: as many on each as its registers hold: each program has sums of its own to add at its end."""

PART = 2**18
"""Backward: most points of a part. With 16 levels and normals it takes 280 bytes for each."""

ALIGNED = 128
"""Backward: points of a part are a multiple of these, for aligned access."""

PREPARED = 256
"""Points of a program that prepares the backward passes."""

MANY = 2**17
"""With fewer points than these a launch matters little, and is not looked for."""


def _forward_candidates(normals: bool, levels: int, hidden: int, number: int, many: bool) -> list[Launch]:
    """For a table of numbers of ``number`` bytes."""
    sizes = ((64, 4), (32, 4), (64, 8), (128, 8)) if many else ((64, 4),)
    return [Launch.of(BLOCK=block, warps=warps, stages=1) for block, warps in sizes]


FORWARD = Tuned("radiance_field", forward_kernel, _forward_candidates)
# With eight warps Triton 3.6 makes a kernel for Hopper that reads where nothing is.
BACKWARD = Launch.of(BLOCK=64, warps=4, stages=1)


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


def programs_at_once(device: torch.device, each: int = PROGRAMS) -> int:
    """With ``each`` on a multiprocessor."""
    return (
        each * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
    )


def _programs(points: Tensor, block: int, each: int = PROGRAMS) -> tuple[int]:
    """As many programs as run at once: each goes over its share of the blocks."""
    return (min(-(-len(points) // block), programs_at_once(points.device, each)),)


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
    points, entries, *weights, count, sigma, albedo, normal, inverse = saved
    learnt = [entries, *weights] if upstream[1] is not None else [entries, *weights[:2]]
    sums = [zero_sums(tensor.shape, tensor.device) for tensor in learnt]
    if len(points):
        by_point = [points, sigma, albedo, normal, inverse]
        by_point += [None if grad is None else grad.contiguous() for grad in upstream]
        _add_parts(by_point, entries, weights, count, settings, sums)
    return (*(summed(total) for total in sums), *(None for _ in range(5 - len(sums))))


def _add_parts(
    by_point: Sequence[Tensor | None],
    entries: Tensor,
    weights: Sequence[Tensor],
    count: Tensor | None,
    settings: Settings,
    sums: Sequence[Tensor],
) -> None:
    """As :func:`_add_part`, a part of the points after another."""
    points = by_point[0]
    assert points is not None
    # Parts of one size, so that what the scatter chooses for one fits all.
    parts = -(-len(points) // PART)
    size = -(-len(points) // (parts * ALIGNED)) * ALIGNED
    starts = range(0, len(points), size)
    counts: Sequence[Tensor | None] = [None] * len(starts)
    if count is not None:
        behind = torch.arange(0, len(points), size, dtype=torch.int32, device=count.device)
        counts = (count - behind).split(1)
    width, normals = weights[0].shape[1], by_point[-1] is not None
    work = points.new_empty((2 if normals else 1) * (width + 3), size)
    for start, valid in zip(starts, counts, strict=True):
        part = [None if tensor is None else tensor[start : start + size] for tensor in by_point]
        _add_part(part, entries, weights, valid, settings, work, sums)


def _add_part(
    by_point: Sequence[Any],
    entries: Tensor,
    weights: Sequence[Tensor],
    count: Tensor | None,
    settings: Settings,
    work: Tensor,
    sums: Sequence[Tensor],
) -> None:
    """Add the gradients of some points to ``sums``; ``work`` [2 (WIDTH_IN + 3) or, without normals, half, size]."""
    points, sigma, albedo, normal, inverse, grad_sigma, grad_albedo, grad_normal = by_point
    n, size, width = len(points), work.shape[1], weights[0].shape[1]
    value, unit = work[:width], work[width : width + 3]
    slope, along = (None, None) if grad_normal is None else (work[-width - 3 : -3], work[-3:])
    constants = settings.constants(weights[0])
    constants["WIDTH"] = 2 * constants.pop("LEVELS")
    targets = [*sums[1:], *(None for _ in range(5 - len(sums)))]
    given = (*weights, count, sigma, albedo, grad_sigma, grad_albedo, *targets)
    prepare_kernel[(-(-n // PREPARED),)](
        *(points, normal, grad_normal, inverse, unit, along, n, size), BLOCK=PREPARED
    )
    x, vectors = unit[:, :n].t(), None if along is None else along[:, :n].t()
    launch_encode(x, entries, settings.levels, count, vectors, value, slope)
    programs = _programs(points, BACKWARD["BLOCK"], FEW_PROGRAMS)
    backward_kernel[programs](value, slope, *given, n, size, **constants, **BACKWARD.options)
    scatter(
        sums[0],
        x,
        settings.levels,
        count,
        vectors,
        value[:, :n],
        None if slope is None else slope[:, :n],
    )
