"""Shading and compositing as in a step of distillation: forward, and backward to density, albedo and normal."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..engine.nerf.volume import volume_backend
from ..kernels.composite import Composite, composite, composite_reference
from ..kernels.prune import prune
from ..kernels.ray_march import march
from ..kernels.samples import midpoints
from ..kernels.shade import Shading
from .ball import ALPHA_LEAST, STEP, TRANSMITTANCE_STOP, Ball, balls, density
from .harness import OURS, Case


def cases() -> Iterator[Case]:
    for ball in balls():
        yield _case(ball)


def _case(ball: Ball) -> Case:
    rays = (ball.origins, ball.directions)
    met = march(*rays, ball.occupied, STEP, ball.near)
    samples = prune(density(midpoints(*rays, met)), met, TRANSMITTANCE_STOP, ALPHA_LEAST)
    points = midpoints(*rays, samples)
    learnt = (density(points), torch.rand_like(points), torch.nn.functional.normalize(points + 0.3))
    sigma, albedo, normal = (part.requires_grad_() for part in learnt)
    # As in the later stages of the schedule: one light for each view.
    lights = torch.nn.functional.normalize(ball.origins) * 1.5 + 0.5
    shading = Shading(*(torch.tensor([x], device=sigma.device) for x in (0.3, 0.7, 0.0)))
    grads = tuple(torch.randn(len(lights), *size, device=sigma.device) for size in ((3,), (), ()))

    def both_ways(function: Callable[..., Composite]) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            with torch.enable_grad():
                seen = function(sigma, albedo, normal, samples, *rays, lights, shading)
                assert seen.facing_away is not None
                results = (seen.colour, seen.opacity, seen.facing_away)
                return seen.colour.detach(), *torch.autograd.grad(results, (sigma, albedo, normal), grads)

        return run

    reference = both_ways(composite_reference)
    return Case(
        kernel="composite",
        name=ball.name,
        contenders={
            OURS: both_ways(composite),
            "PyTorch": reference,
            "torch.compile": both_ways(torch.compile(composite_reference, dynamic=False)),
            "nerfacc": both_ways(lambda *given: volume_backend("nerfacc").composite(*given)),
        },
        reference=reference,
        tolerance=1e-4,
        # Read: density, two distances, albedo, normal; written: three gradients. Per ray two integers, its origin,
        # direction and light, the results and their gradients.
        work=len(sigma) * 64.0 + len(lights) * 104.0,
        unit="TB/s",
        captured={"nerfacc": False},
    )
