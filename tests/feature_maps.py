"""Inputs of group normalisation in both memory layouts, and the calls to compare."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from rounding import leaf, randn
from torch import Tensor

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}

# (shape, groups): rows and channels that fill no power of two; groups that fill a tile; more groups than a
# program takes, with some left over; one pixel; one group.
SHAPES = [
    ((2, 20, 5, 3), 2),
    ((1, 8, 4, 8), 4),
    ((1, 10, 3, 3), 5),
    ((2, 8, 1, 1), 2),
    ((1, 6, 7, 2), 1),
]

DTYPES_AND_LAYOUTS = [
    (torch.float32, "contiguous"),
    (torch.float32, "channels_last"),
    (torch.float16, "channels_last"),
    (torch.bfloat16, "channels_last"),
]


class Inputs(NamedTuple):
    """Arguments of ``group_norm`` that are differentiable, as leaves."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    shift: Tensor | None

    def call(self, function: Any, **options: Any) -> Tensor:
        return function(self.x, self.weight, self.bias, shift=self.shift, **options)

    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in self if tensor is not None]

    def exact(self) -> Inputs:
        """The same numbers in float64, with x + shift rounded as the kernel rounds it."""
        x = self.x.detach()
        if self.shift is not None:
            # The rounding goes to x, so that shift is added without any: its gradient is a sum over x's.
            shift = self.shift.detach()[:, :, None, None]
            x = (x + shift).to(x.dtype).double() - shift.double()
        double = [None if tensor is None else leaf(tensor.detach(), torch.float64) for tensor in self[1:]]
        return Inputs(leaf(x, torch.float64), *double)


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str,
    layout: str = "channels_last",
    *,
    shift: bool = True,
    parameters: torch.dtype = torch.float32,
    mean: float = 0.5,
) -> Inputs:
    samples, channels = shape[:2]
    x = (randn(*shape, seed=1) + mean).to(device, dtype).contiguous(memory_format=LAYOUTS[layout])
    weight, bias = (randn(channels, seed=seed).to(device) / 2 + (seed == 2) for seed in (2, 3))
    # A slice of a wider product, as all blocks' embeddings in one: rows that are not neighbours.
    wide = randn(samples, channels + 5, seed=4).to(device, dtype)
    return Inputs(
        x.requires_grad_(),
        leaf(weight, parameters),
        leaf(bias, parameters),
        wide[:, 2 : 2 + channels].requires_grad_() if shift else None,
    )
