"""Densities of all candidates of one step's rays, or only as far as light reaches: a ball of the radiance field."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..engine.config import OFFICIAL
from ..kernels.composite import sum_before
from ..kernels.hash_grid import grid_levels
from ..kernels.lit_density import lit_density
from ..kernels.radiance_field import radiance_density
from ..kernels.ray_march import march
from ..kernels.samples import midpoints
from .ball import RADIUS, STEP, TRANSMITTANCE_STOP, Ball, balls
from .harness import OURS, Case

STRENGTH = 400.0
"""Of the density's bias: opaque a few steps behind the ball's surface."""


def cases() -> Iterator[Case]:
    for ball in balls():
        yield _case(ball)


def _case(ball: Ball) -> Case:
    rays = (ball.origins, ball.directions)
    found = march(*rays, ball.occupied, STEP, ball.near)
    points = midpoints(*rays, found)
    config = OFFICIAL.field
    grid = config.grid
    levels = grid_levels(grid.levels, grid.log2_table, grid.base_resolution, grid.growth)
    table = torch.rand(levels[-1].offset + levels[-1].entries, grid.features, device=points.device) - 0.5
    inner = torch.randn(config.hidden, grid.levels * grid.features, device=points.device) / 8
    outer = torch.randn(1, config.hidden, device=points.device) / 8
    field: dict[str, Any] = {"table": table, "levels": levels, "density": (inner, outer)}
    field |= {"blob_strength": STRENGTH, "blob_radius": RADIUS}

    everywhere = radiance_density(points, **field)
    passed = torch.exp(-sum_before(everywhere * (found.t_ends - found.t_starts), found))
    # Just before the light ends rounding decides.
    lit = passed > 1.01 * TRANSMITTANCE_STOP
    del everywhere, passed

    def ours() -> Tensor:
        return lit_density(*rays, found, TRANSMITTANCE_STOP, **field).where(lit, 0.0)

    def in_the_dark_too() -> Tensor:
        return radiance_density(points, **field).where(lit, 0.0)

    def plain() -> Tensor:
        return radiance_density(points, **field, backend="torch").where(lit, 0.0)

    return Case(
        kernel="lit_density",
        name=ball.name,
        contenders={OURS: ours, "radiance_density": in_the_dark_too, "PyTorch": plain},
        reference=plain,
        tolerance=1e-4,
        # Read: two distances, the table; written: density and whether it counts. Origin and direction of each ray.
        work=32.0 * len(ball.origins) + 17.0 * len(points) + table.nbytes,
        unit="TB/s",
        captured={"PyTorch": False},
    )
