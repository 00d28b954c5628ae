"""Pruning: of all candidates, those that are seen."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..engine._optional import require
from ..kernels.prune import prune
from ..kernels.ray_march import march
from ..kernels.samples import midpoints
from .ball import ALPHA_LEAST, STEP, TRANSMITTANCE_STOP, Ball, balls, density
from .harness import OURS, Case


def cases() -> Iterator[Case]:
    for ball in balls():
        yield _case(ball)


def _case(ball: Ball) -> Case:
    found = march(ball.origins, ball.directions, ball.occupied, STEP, ball.near)
    sigma = density(midpoints(ball.origins, ball.directions, found))
    limits = (TRANSMITTANCE_STOP, ALPHA_LEAST)
    ray_indices = found.ray_indices.long()
    n_kept = len(prune(sigma, found, *limits))

    # Rounding decides at the thresholds, so that rows cannot be compared, but numbers of samples can.
    def ours() -> Tensor:
        return prune(sigma, found, *limits, capacity=n_kept + 1000).packed_info[:, 1]

    def plain() -> Tensor:
        return prune(sigma, found, *limits, backend="torch").packed_info[:, 1]

    def nerfacc() -> Tensor:
        seen = require("nerfacc", "nerfacc", "to compare with it").render_visibility_from_density(
            found.t_starts,
            found.t_ends,
            sigma,
            ray_indices=ray_indices,
            n_rays=len(ball.origins),
            early_stop_eps=limits[0],
            alpha_thre=limits[1],
        )
        return found.keep(seen).packed_info[:, 1]

    return Case(
        kernel="prune",
        name=ball.name,
        contenders={OURS: ours, "PyTorch": plain, "nerfacc": nerfacc},
        reference=plain,
        tolerance=1e-2,
        # Read: density and two distances; written: ray and two distances. The ray's two integers, both ways.
        work=16.0 * len(ball.origins) + 12.0 * (len(sigma) + n_kept),
        unit="TB/s",
        # These read from the device how many samples there are.
        captured={"PyTorch": False, "nerfacc": False},
    )
