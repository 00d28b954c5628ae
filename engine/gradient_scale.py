"""Gradients through a network in float16, moved to where its range is widest.

float16 has 11 bits from 6e-5 to 65504 and fewer below; how large a gradient is depends on the loss and its weight.
On its way back it is therefore multiplied by a power of two, chosen by its own greatest element, as it enters the
network, and divided by it as it leaves: both are exact. Nothing waits for the device.

The idea is that of loss scaling (Micikevicius et al. 2018, "Mixed precision training", arXiv 1710.03740, section 3.2),
for each gradient anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

GREATEST = 8.0
"""The greatest element is scaled to between a half of this and this: from there a network may make it 8,000 times as
large, and elements 65,000 times smaller keep all their bits."""
LEAST = 1e-30
"""Gradients below are taken for zero."""


class GradientScale:
    """``leave(network(enter(x)))`` is ``network(x)``, and so is its gradient by ``x``, less what float16 would lose.

    For a network without parameters that take gradients: theirs would be scaled.
    """

    def __init__(self) -> None:
        self.inverse: Tensor | None = None

    def enter(self, x: Tensor) -> Tensor:
        return _Enter.apply(x, self)

    def leave(self, y: Tensor) -> Tensor:
        return _Leave.apply(y, self)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: GradientScale) -> Tensor:
        ctx.scale = scale
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        greatest = torch.linalg.vector_norm(grad, torch.inf, dtype=torch.float32).clamp(min=LEAST)
        # A number over its mantissa in [0.5, 1) is a power of two.
        ctx.scale.inverse = greatest / torch.frexp(greatest).mantissa / GREATEST
        return grad / ctx.scale.inverse, None


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: GradientScale) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale.inverse, None
