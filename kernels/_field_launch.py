"""How the radiance field's kernels are launched: as many programs as run at once, each over its share of the points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._field_kernels import backward_kernel, forward_kernel
from ._field_network import count_levels, field_levels
from ._grid_lookup import GridLevel, adds_vectors
from ._tuning import Launch

FORWARD = Launch.of(BLOCK=64, warps=4, stages=1)
BACKWARD = Launch.of(GROUPS=16, RUN=4, warps=8, stages=1)
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 8, 2
"""Programs on each multiprocessor, at least as many as fit."""


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


def _programs(points: Tensor, block: int, per_processor: int) -> int:
    """As many programs as run at once: each goes over its share of the blocks."""
    blocks = -(-len(points) // block)
    if not points.is_cuda:
        return min(blocks, 3)
    return min(blocks, per_processor * torch.cuda.get_device_properties(points.device).multi_processor_count)


def launch_forward(
    points: Tensor,
    entries: Tensor,
    weights: Sequence[Any],
    count: Tensor | None,
    settings: Settings,
    results: Sequence[Tensor | None],
) -> None:
    if not len(points):
        return
    parameters = field_levels(settings.levels, points.device)
    bias = settings.blob_strength, settings.blob_radius
    forward_kernel[(_programs(points, FORWARD["BLOCK"], FORWARD_PROGRAMS),)](
        *(points, entries, parameters, *weights, count, *results, len(points), *bias),
        **settings.constants(weights[0]),
        **FORWARD.options,
    )


def launch_backward(
    saved: Sequence[Any],
    upstream: Sequence[Tensor | None],
    settings: Settings,
) -> tuple[Tensor | None, ...]:
    """Gradients by the table and the four matrices; None for a colour without a gradient."""
    points, entries, *others = saved
    weights = others[:4]
    upstream = [None if grad is None else grad.contiguous() for grad in upstream]
    learnt: list[Tensor | None] = [entries, *weights]
    if upstream[1] is None:
        learnt[3:] = [None, None]
    grads = [None if tensor is None else torch.zeros_like(tensor, dtype=torch.float32) for tensor in learnt]
    if len(points):
        parameters = field_levels(settings.levels, points.device)
        block = BACKWARD["GROUPS"] * BACKWARD["RUN"]
        backward_kernel[(_programs(points, block, BACKWARD_PROGRAMS),)](
            *(points, entries, parameters, *weights, *others[4:], *upstream, *grads, len(points)),
            **settings.constants(weights[0]),
            PAIRS=adds_vectors(points.device),
            **BACKWARD.options,
        )
    return tuple(grads)
