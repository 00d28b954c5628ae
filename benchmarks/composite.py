"""Compositing colours and normals: forward, and backward to densities and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..engine.nerf.volume import volume_backend
from ..kernels.composite import Composite, composite, composite_reference
from ..kernels.prune import prune
from ..kernels.ray_march import march
from ..kernels.samples import midpoints
from .ball import ALPHA_LEAST, STEP, TRANSMITTANCE_STOP, Ball, balls, density
from .harness import OURS, Case

CHANNELS = 6
"""Colour and normal."""


def cases() -> Iterator[Case]:
    for ball in balls():
        yield _case(ball)


def _case(ball: Ball) -> Case:
    rays = (ball.origins, ball.directions)
    met = march(*rays, ball.occupied, STEP, ball.near)
    samples = prune(density(midpoints(*rays, met)), met, TRANSMITTANCE_STOP, ALPHA_LEAST)
    sigma = density(midpoints(*rays, samples)).requires_grad_()
    values = torch.rand(len(samples), CHANNELS, device=sigma.device, requires_grad=True)
    grads = tuple(torch.randn(len(ball.origins), *size, device=sigma.device) for size in ((CHANNELS,), ()))

    def both_ways(function: Callable[[], Composite]) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            with torch.enable_grad():
                seen = function()
                results = torch.autograd.grad((seen.values, seen.opacity), (sigma, values), grads)
            return seen.values.detach(), *results

        return run

    compiled = torch.compile(composite_reference, dynamic=False)
    return Case(
        kernel="composite",
        name=ball.name,
        contenders={
            OURS: both_ways(lambda: composite(sigma, values, samples)),
            "PyTorch": both_ways(lambda: composite_reference(sigma, values, samples)),
            "torch.compile": both_ways(lambda: compiled(sigma, values, samples)),
            "nerfacc": both_ways(lambda: volume_backend("nerfacc").composite(sigma, values, samples)),
        },
        reference=both_ways(lambda: composite_reference(sigma, values, samples)),
        tolerance=1e-4,
        # Read: density, two distances, values; written: weight and both gradients. Per ray two integers, the
        # results and their gradients.
        work=len(sigma) * (20.0 + 8.0 * CHANNELS) + len(ball.origins) * (24.0 + 8.0 * CHANNELS),
        unit="TB/s",
        captured={"nerfacc": False},
    )
