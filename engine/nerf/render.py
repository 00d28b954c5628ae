"""Rendering a field: march, drop what cannot be seen, evaluate, shade, composite over the background."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ...kernels._triton import use_triton
from ...kernels.prune import prune
from ...kernels.ray_march import LATTICE_POINTS, lattice_points, march
from ...kernels.samples import Samples, midpoints, pack
from ...kernels.shade import ALBEDO, Shading
from ..config import RenderConfig
from .background import Background
from .field import Field
from .occupancy import OccupancyGrid
from .volume import TORCH, VolumeBackend

if TYPE_CHECKING:
    from ..cameras import Rays


MOST_CANDIDATES = 2**25
"""Rows that the candidates of one render may have at most."""


class Capacity(NamedTuple):
    """Rows of the buffers of a render that never waits for the device."""

    candidates: int
    """Samples in occupied cells."""
    kept: int
    """Samples worth a gradient."""


@dataclass(frozen=True)
class SampleBatch:
    """The N samples that a render kept."""

    ray_indices: Tensor
    """[N] integers, into the flattened rays."""
    weights: Tensor
    """[N] part of the ray's light that comes from the sample."""
    sigma: Tensor
    """[N]"""
    t_starts: Tensor
    """[N]"""
    t_ends: Tensor
    """[N]"""
    count: Tensor | None = None
    """int32 [1] in buffers of a fixed capacity: only so many first rows are samples, the others may hold anything.
    None: all are."""
    found: Tensor | None = None
    """int32 [2] with ``count``: candidates and samples there were, also if the capacity cut some off."""

    def __len__(self) -> int:
        return self.ray_indices.shape[0]


@dataclass(frozen=True)
class RenderOutput:
    """Pictures over the rays' shape: [V, H, W] from :func:`render`, [R] from :func:`render_rays`."""

    rgb: Tensor
    """[..., 3] foreground over background."""
    foreground_rgb: Tensor
    """[..., 3] light from the object alone."""
    background_rgb: Tensor
    """[..., 3] what is behind, also where it is hidden."""
    opacity: Tensor
    """[..., 1]"""
    depth: Tensor
    """[..., 1] sum of weight times distance, not divided by the opacity."""
    z_variance: Tensor
    """[..., 1] sum of weight times (distance - depth)^2."""
    normal_sum: Tensor | None
    """[..., 3] sum of weight times unit normal; where asked for."""
    facing_away: Tensor | None
    """[..., 1] sum of weight (without gradient) times max(normal . direction, 0)^2; with the normals."""
    samples: SampleBatch
    """Empty (``len(samples) == 0``) if no ray met any matter."""

    @property
    def normal(self) -> Tensor | None:
        """[..., 3] unit mean normal, zero where nothing is seen; where asked for."""
        return None if self.normal_sum is None else nn.functional.normalize(self.normal_sum, dim=-1)


def sample_rays(
    field: Field,
    occupancy: OccupancyGrid,
    origins: Tensor,
    directions: Tensor,
    near: Tensor | None,
    config: RenderConfig,
    volume: VolumeBackend = TORCH,
) -> Samples:
    """Samples of rays [R, 3] worth a gradient: in occupied cells, still lit, and not transparent.

    ``near`` [R] is where each ray's lattice begins. Without gradient. Warns when more than
    ``config.max_samples`` are left and the farthest are dropped.
    """
    n_rays = origins.shape[0]
    # Plain PyTorch holds much for each candidate; the kernels hold little, and like many of them.
    limit = n_rays if use_triton("auto", origins) else LATTICE_POINTS // lattice_points(config.step_size)
    chunk = max(1, limit)
    kept = []
    with torch.no_grad():
        alpha_least = occupancy.alpha_threshold
        for start in range(0, max(n_rays, 1), chunk):
            rows = slice(start, start + chunk)
            found = volume.march(
                origins[rows],
                directions[rows],
                occupancy.occupied,
                config.step_size,
                None if near is None else near[rows],
            )
            sigma = field.lit_density(origins[rows], directions[rows], found, config.transmittance_stop)
            found = prune(sigma, found, config.transmittance_stop, alpha_least)
            kept.append(replace(found, ray_indices=found.ray_indices + start))
    samples = kept[0]
    if len(kept) > 1:
        samples = pack(
            torch.cat([part.ray_indices for part in kept]),
            torch.cat([part.t_starts for part in kept]),
            torch.cat([part.t_ends for part in kept]),
            n_rays,
        )
    if len(samples) > config.max_samples:
        warnings.warn(
            f"a render of {n_rays} rays has {len(samples)} samples;"
            f" only the nearest {config.max_samples} are used",
            stacklevel=2,
        )
        samples = samples.nearest(config.max_samples)
    return samples


def sample_rays_within(
    capacity: Capacity,
    field: Field,
    occupancy: OccupancyGrid,
    origins: Tensor,
    directions: Tensor,
    near: Tensor | None,
    config: RenderConfig,
) -> tuple[Samples, Tensor]:
    """:func:`sample_rays` in buffers of a fixed capacity, without waiting for the device; no warning.

    -> samples, and what was found: int32 [2], candidates and samples before the capacity cut the farthest
    off.
    """
    with torch.no_grad():
        met = march(
            origins,
            directions,
            occupancy.occupied,
            config.step_size,
            near,
            capacity=capacity.candidates,
        )
        sigma = field.lit_density(origins, directions, met, config.transmittance_stop)
        samples = prune(
            sigma, met, config.transmittance_stop, occupancy.alpha_threshold, capacity=capacity.kept
        )
        assert met.found is not None
        assert samples.found is not None
        return samples, torch.cat((met.found, samples.found))


def render_rays(
    field: Field,
    background: Background,
    occupancy: OccupancyGrid,
    origins: Tensor,
    directions: Tensor,
    *,
    config: RenderConfig,
    light_positions: Tensor | None = None,
    shading: Shading = ALBEDO,
    background_colour: Tensor | None = None,
    jitter: torch.Generator | Tensor | None = None,
    background_replaced: Tensor | None = None,
    with_normals: bool = False,
    volume: VolumeBackend = TORCH,
    capacity: Capacity | None = None,
) -> RenderOutput:
    """Render rays with origins and unit directions [R, 3]; differentiable in the field and the background.

    light_positions [R, 3] per ray; background_colour [3] or [R, 3] replaces the background network, whose
    parameters then get exactly zero gradients, or does so only where ``background_replaced`` [1] is 1 and
    not 0; jitter moves each ray's lattice by a part of a step: a
    generator to draw it from, the parts [R] themselves, or None for none (evaluation). Normals are computed
    if asked for or if the shading needs them. With R = 0, or no sample on any ray, the background shows and
    nothing fails. With a ``capacity`` (own ``volume`` only) nothing waits for the device.
    """
    n_rays = origins.shape[0]
    near = None
    if isinstance(jitter, torch.Generator):
        near = torch.rand(n_rays, generator=jitter, device=jitter.device).to(origins) * config.step_size
    elif jitter is not None:
        near = jitter * config.step_size
    if capacity is None:
        samples, found = sample_rays(field, occupancy, origins, directions, near, config, volume), None
    else:
        samples, found = sample_rays_within(capacity, field, occupancy, origins, directions, near, config)
    points = midpoints(origins, directions, samples)
    out = field(points, with_normal=with_normals or shading.needs_normals, count=samples.count)
    seen = volume.composite(
        out.sigma, out.albedo, out.normal, samples, origins, directions, light_positions, shading
    )

    behind = background(directions)
    if background_colour is not None:
        replaced = 1.0 if background_replaced is None else background_replaced
        behind = behind * (1.0 - replaced) + background_colour * replaced
    opacity = seen.opacity[:, None]
    return RenderOutput(
        rgb=seen.colour + behind * (1.0 - opacity),
        foreground_rgb=seen.colour,
        background_rgb=behind,
        opacity=opacity,
        depth=seen.depth[:, None],
        z_variance=seen.z_variance[:, None],
        normal_sum=seen.normal,
        facing_away=None if seen.facing_away is None else seen.facing_away[:, None],
        samples=SampleBatch(
            samples.ray_indices,
            seen.weights,
            out.sigma,
            samples.t_starts,
            samples.t_ends,
            samples.count,
            found,
        ),
    )


def render(
    field: Field,
    background: Background,
    occupancy: OccupancyGrid,
    rays: Rays,
    *,
    config: RenderConfig,
    light_positions: Tensor | None = None,
    shading: Shading = ALBEDO,
    background_colour: Tensor | None = None,
    jitter: torch.Generator | Tensor | None = None,
    background_replaced: Tensor | None = None,
    with_normals: bool = False,
    volume: VolumeBackend = TORCH,
    capacity: Capacity | None = None,
) -> RenderOutput:
    """Render pictures [V, H, W]: :func:`render_rays` of all pixels, with one light position [V, 3] per
    view."""
    shape = rays.origins.shape[:-1]
    if light_positions is not None:
        light_positions = light_positions[:, None, None].expand(*shape, 3).reshape(-1, 3)
    flat = render_rays(
        field,
        background,
        occupancy,
        rays.origins.reshape(-1, 3),
        rays.directions.reshape(-1, 3),
        config=config,
        light_positions=light_positions,
        shading=shading,
        background_colour=background_colour,
        jitter=jitter,
        background_replaced=background_replaced,
        with_normals=with_normals,
        volume=volume,
        capacity=capacity,
    )
    return RenderOutput(
        rgb=flat.rgb.view(*shape, 3),
        foreground_rgb=flat.foreground_rgb.view(*shape, 3),
        background_rgb=flat.background_rgb.view(*shape, 3),
        opacity=flat.opacity.view(*shape, 1),
        depth=flat.depth.view(*shape, 1),
        z_variance=flat.z_variance.view(*shape, 1),
        normal_sum=None if flat.normal_sum is None else flat.normal_sum.view(*shape, 3),
        facing_away=None if flat.facing_away is None else flat.facing_away.view(*shape, 1),
        samples=flat.samples,
    )
