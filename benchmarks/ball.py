"""A ball before the cameras of the official schedule: what the renderer is measured on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.cameras import orbit_cameras
from ..engine.config import OFFICIAL
from ..engine.nerf.field import Field

STEP = OFFICIAL.render.step_size
TRANSMITTANCE_STOP = OFFICIAL.render.transmittance_stop
ALPHA_LEAST = 0.01
RADIUS = 0.48
EDGE, OPAQUE = 100.0, 150.0
"""The density falls from OPAQUE to nothing within a few times 1 / EDGE around the radius."""


@dataclass(frozen=True)
class Ball:
    """Rays of one stage, and the cells of the occupancy grid that the ball lies in."""

    name: str
    origins: Tensor
    """[R, 3]"""
    directions: Tensor
    """[R, 3]"""
    near: Tensor
    """[R] where the lattices begin."""
    occupied: Tensor
    """[G, G, G]"""


def density(points: Tensor) -> Tensor:
    """[N] at points [N, 3]."""
    return OPAQUE * torch.sigmoid((RADIUS - points.norm(dim=1)) * EDGE)


def balls() -> Iterator[Ball]:
    """For the three stages of the official schedule, on the GPU."""
    device, config = torch.device("cuda"), OFFICIAL
    grid = config.render.occupancy_resolution
    centre = (torch.arange(grid, device=device) + 0.5) * (2 / grid) - 1
    distance = torch.stack(torch.meshgrid(centre, centre, centre, indexing="ij")).norm(dim=0)
    for stage in config.stages:
        azimuths = [360.0 * view / stage.views for view in range(stage.views)]
        rays = orbit_cameras(azimuths, 2.5, 47.5, 1.53).to(device).rays(stage.resolution)
        origins, directions = (part.reshape(-1, 3).contiguous() for part in rays)
        near = torch.rand(len(origins), device=device) * STEP
        # A cell is occupied if the ball may reach into it.
        occupied = distance < RADIUS + 1.5 / grid
        yield Ball(f"{stage.views} x {stage.resolution}²", origins, directions, near, occupied)


def fit(field: Field, *, steps: int = 600, points: int = 2**17) -> None:
    """Train a field until its density is the ball's, as sharp as that of an object after its distillation."""
    device = next(field.parameters()).device
    optimizer = torch.optim.Adam(field.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator(device).manual_seed(0)
    for _ in range(steps):
        anywhere = torch.rand(points, 3, generator=generator, device=device) * 2 - 1
        direction = torch.nn.functional.normalize(anywhere[::2])
        depth = torch.randn(len(direction), 1, generator=generator, device=device) * (2 / EDGE)
        x = torch.cat((anywhere[1::2], direction * (RADIUS + depth)))
        loss = (field.density(x).log1p() - density(x).log1p()).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad(set_to_none=True)
