"""The background network over whole pictures: forward, and backward to its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..kernels.background import SHAPES, background, background_reference
from .ball import Ball, balls
from .harness import OURS, Case


def cases() -> Iterator[Case]:
    for ball in balls():
        yield _case(ball)


def _case(ball: Ball) -> Case:
    device = ball.directions.device
    weights = [torch.randn(shape, device=device, requires_grad=True) for shape in SHAPES]
    grad = torch.randn_like(ball.directions)

    def both_ways(function: Callable[[Tensor, Sequence[Tensor]], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            with torch.enable_grad():
                colour = function(ball.directions, weights)
                return colour.detach(), *torch.autograd.grad(colour, weights, grad)

        return run

    reference = both_ways(background_reference)
    return Case(
        kernel="background",
        name=ball.name,
        contenders={
            OURS: both_ways(background),
            "PyTorch": reference,
            "torch.compile": both_ways(torch.compile(background_reference, dynamic=False)),
        },
        reference=reference,
        # A ray on the kink of a ReLU may count or not.
        tolerance=2e-3,
        # Direction, colour and its gradient.
        work=ball.directions.nbytes * 3.0,
        unit="TB/s",
    )
