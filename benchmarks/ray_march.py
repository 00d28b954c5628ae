"""Marching: all candidates of the rays of one step, in buffers of a fixed capacity."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..engine.nerf.volume import volume_backend
from ..kernels.ray_march import march
from .ball import STEP, Ball, balls
from .harness import OURS, Case


def cases() -> Iterator[Case]:
    for ball in balls():
        yield _case(ball)


def _case(ball: Ball) -> Case:
    rays = (ball.origins, ball.directions, ball.occupied, STEP, ball.near)
    n_samples = len(march(*rays))

    # Which samples there are decides rounding where a midpoint lies beside a cell border, so that rows cannot
    # be compared, but numbers of samples can.
    def ours() -> Tensor:
        return march(*rays, capacity=n_samples + 1000).packed_info[:, 1]

    def plain() -> Tensor:
        return march(*rays, backend="torch").packed_info[:, 1]

    def nerfacc() -> Tensor:
        return volume_backend("nerfacc").march(*rays).packed_info[:, 1]

    return Case(
        kernel="ray_march",
        name=ball.name,
        contenders={OURS: ours, "PyTorch": plain, "nerfacc": nerfacc},
        reference=plain,
        tolerance=1e-2,
        # A ray is origin, direction, near and two integers; a sample is its ray and two distances.
        work=36.0 * len(ball.origins) + 12.0 * n_samples,
        unit="TB/s",
        # These read from the device how many samples there are.
        captured={"PyTorch": False, "nerfacc": False},
    )
