"""Who marches and composites: this package or nerfacc."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from ...kernels.composite import Composite, Sums, composite, composite_reference, sum_along_rays
from ...kernels.ray_march import march
from ...kernels.samples import Samples, pack
from ...kernels.shade import ALBEDO, Shading
from .._optional import require
from ..errors import InputError

VolumeName = Literal["torch", "nerfacc"]


class March(Protocol):
    """As :func:`~...kernels.ray_march.march`."""

    def __call__(
        self, origins: Tensor, directions: Tensor, occupied: Tensor, step: float, near: Tensor | None = None
    ) -> Samples: ...


class CompositeRays(Protocol):
    """As :func:`~...kernels.composite.composite`."""

    def __call__(
        self,
        sigma: Tensor,
        albedo: Tensor,
        normal: Tensor | None,
        samples: Samples,
        origins: Tensor,
        directions: Tensor,
        light_positions: Tensor | None = None,
        shading: Shading = ALBEDO,
    ) -> Composite: ...


@dataclass(frozen=True)
class VolumeBackend:
    """The two functions that turn rays into samples and samples into pictures."""

    march: March
    composite: CompositeRays


TORCH = VolumeBackend(march, composite)


def volume_backend(name: VolumeName) -> VolumeBackend:
    """Marching and compositing by ``torch`` (this package, by its Triton kernels on CUDA devices and plain
    PyTorch elsewhere) or ``nerfacc`` (>= 0.5.3, CUDA only).

    Raises :class:`~..errors.InputError` for another name and :class:`~..errors.MissingDependency` without
    nerfacc.
    """
    if name == "torch":
        return TORCH
    if name == "nerfacc":
        return _nerfacc()
    raise InputError(f"unknown volume backend {name!r}; it must be 'torch' or 'nerfacc'")


def _nerfacc() -> VolumeBackend:
    nerfacc = require("nerfacc", "nerfacc", "to march and composite with nerfacc")

    def march_rays(
        origins: Tensor, directions: Tensor, occupied: Tensor, step: float, near: Tensor | None = None
    ) -> Samples:
        box = origins.new_tensor([[-1.0, -1.0, -1.0, 1.0, 1.0, 1.0]])
        if near is None:
            near = torch.zeros_like(origins[:, 0])
        with torch.no_grad():
            # Of its results, the third is only there since 0.5.3.
            intervals, samples, *_ = nerfacc.traverse_grids(
                origins.contiguous(),
                directions.contiguous(),
                occupied[None],
                box,
                near_planes=near,
                far_planes=torch.full_like(near, 1e10),
                step_size=step,
                cone_angle=0.0,
            )
            starts, ends = intervals.vals[intervals.is_left], intervals.vals[intervals.is_right]
            return pack(samples.ray_indices.long(), starts, ends, len(origins))

    def sum_rays(sigma: Tensor, values: Tensor, samples: Samples) -> Sums:
        if not len(samples):
            return sum_along_rays(sigma, values, samples)
        rays = {"ray_indices": samples.ray_indices.long(), "n_rays": len(samples.packed_info)}
        weights = nerfacc.render_weight_from_density(samples.t_starts, samples.t_ends, sigma, **rays)[0]
        middle = ((samples.t_starts + samples.t_ends) / 2)[:, None]
        opacity = nerfacc.accumulate_along_rays(weights, None, **rays)[:, 0]
        depth = nerfacc.accumulate_along_rays(weights, middle, **rays)
        spread = (middle - depth[samples.ray_indices]) ** 2
        z_variance = nerfacc.accumulate_along_rays(weights, spread, **rays)[:, 0]
        seen = nerfacc.accumulate_along_rays(weights, values, **rays)
        return Sums(weights, seen, opacity, depth[:, 0], z_variance)

    return VolumeBackend(march_rays, partial(composite_reference, render=sum_rays))
