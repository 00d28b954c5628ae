"""From a density to a closed triangle mesh: sampled volume, threshold from silhouettes, marching cubes.

The released exporter (threestudio) takes the level set at density 25 whatever the field; here the level is
the one whose silhouette agrees best with the rendered opacity.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from .cameras import Cameras
from .errors import FusionError

Density = Callable[[Tensor], Tensor]
"""points [N, 3] -> density [N], not negative."""

POINTS_AT_ONCE = 2**18
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Volume:
    """Densities on the nodes of a regular grid of cubes."""

    values: Tensor
    """[nx, ny, nz] float32."""
    lower: tuple[float, float, float]
    """World position of node (0, 0, 0)."""
    spacing: float
    """Side of a cube, in world units."""

    @property
    def upper(self) -> tuple[float, float, float]:
        nx, ny, nz = (
            low + self.spacing * (n - 1) for low, n in zip(self.lower, self.values.shape, strict=True)
        )
        return nx, ny, nz


def sample_volume(
    density: Density,
    lower: NDArray[np.float64],
    upper: NDArray[np.float64],
    resolution: int,
    device: torch.device,
) -> Volume:
    """The density on a grid over the box from ``lower`` to ``upper`` ([3] each), ``resolution`` cubes along
    its longest side.

    The grid is centred in the box and covers it. Raises :class:`FusionError` for densities that are not
    finite.
    """
    extent = upper - lower
    spacing = float(extent.max()) / resolution
    counts = np.ceil(extent / spacing - 1e-6).astype(int)
    start = 0.5 * (lower + upper) - 0.5 * spacing * counts
    axes = [
        torch.arange(n + 1, device=device, dtype=torch.float32) * spacing + float(begin)
        for n, begin in zip(counts, start, strict=True)
    ]
    values = torch.empty([len(axis) for axis in axes], device=device)
    rows = max(1, POINTS_AT_ONCE // (len(axes[1]) * len(axes[2])))
    for first in range(0, len(axes[0]), rows):
        grid = torch.meshgrid(axes[0][first : first + rows], axes[1], axes[2], indexing="ij")
        points = torch.stack(grid, dim=-1)
        values[first : first + rows] = density(points.reshape(-1, 3)).reshape(points.shape[:-1])
    if not bool(values.isfinite().all()):
        raise FusionError(
            "the density of the NeRF is not finite everywhere, so no surface can be taken from it"
        )
    x, y, z = (float(begin) for begin in start)
    return Volume(values, (x, y, z), spacing)


def greatest_on_rays(volume: Volume, cameras: Cameras, resolution: int) -> Tensor:
    """[V, H, W]: the greatest density that each pixel's ray meets in the volume, 0 where it misses it.

    The level set at t covers exactly the pixels where this is at least t (up to the sampling of the ray,
    half a cube).
    """
    device = volume.values.device
    rays = cameras.to(device).rays(resolution)
    origins, directions = rays.origins.reshape(-1, 3), rays.directions.reshape(-1, 3)
    lower, upper = (torch.tensor(corner, device=device) for corner in (volume.lower, volume.upper))
    safe = torch.where(directions.abs() < 1e-9, 1e-9, directions)
    to_lower, to_upper = (lower - origins) / safe, (upper - origins) / safe
    near = torch.minimum(to_lower, to_upper).amax(-1).clamp(min=0.0)
    far = torch.maximum(to_lower, to_upper).amin(-1)
    hit = (far > near).nonzero()[:, 0]
    greatest = torch.zeros(len(origins), device=device)
    if not len(hit):
        return greatest.view(rays.origins.shape[:-1])

    # In grid_sample's coordinates, where the box is [-1, 1]^3 and the order is (z, y, x).
    start = (origins[hit] + near[hit, None] * directions[hit] - lower) / (upper - lower) * 2 - 1
    way = directions[hit] * (far - near)[hit, None] / (upper - lower) * 2
    start, way = start.flip(-1), way.flip(-1)
    steps = int(float((far - near)[hit].max()) / (0.5 * volume.spacing)) + 1
    best = torch.zeros(len(hit), device=device)
    for step in range(steps):
        points = start + way * ((step + 0.5) / steps)
        found = torch.nn.functional.grid_sample(
            volume.values[None, None], points[None, None, None], align_corners=True, padding_mode="border"
        )
        best = torch.maximum(best, found.view(-1))
    greatest[hit] = best
    return greatest.view(rays.origins.shape[:-1])


def choose_threshold(greatest: Tensor, opaque: Tensor) -> tuple[float, float]:
    """The level whose silhouette {``greatest`` >= level} overlaps best with ``opaque``, and that overlap
    (IoU).

    Both [V, H, W], of density and of bool. Where many levels do equally well, as on a sharp field, the one
    in the middle (in ratio). Raises :class:`FusionError` if there is no density or nothing is opaque.
    """
    peak = float(greatest.max())
    covered = int(opaque.sum())
    if covered == 0 or peak <= 0.0:
        raise FusionError(
            f"the NeRF is empty: {covered} pixels of the test views are opaque and the highest density that "
            f"their rays meet is {peak:.3g}; fuse again with more steps or another seed"
        )
    levels = torch.logspace(-4, 0, 512, dtype=torch.float64) * peak
    inside, outside = (part.double().cpu().sort().values for part in (greatest[opaque], greatest[~opaque]))
    hits = len(inside) - torch.searchsorted(inside, levels)
    extra = len(outside) - torch.searchsorted(outside, levels)
    overlap = hits / (covered + extra)
    best = int(overlap.argmax())
    good = overlap >= overlap[best] - 0.002
    first = last = best
    while first > 0 and good[first - 1]:
        first -= 1
    while last < len(levels) - 1 and good[last + 1]:
        last += 1
    middle = (first + last) // 2
    return float(levels[middle]), float(overlap[middle])


def box_of_object(volume: Volume, threshold: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lower and upper corner of what lies above the threshold, without specks, enlarged by a tenth of its
    extent.

    The margin per side is the released exporter's, but at least one cube. Specks are the parts of less than a
    thousandth of the largest one's volume, which is about a hundredth of its surface.
    """
    inside = (volume.values >= threshold).cpu().numpy()
    labels, count = ndimage.label(inside, structure=np.ones((3, 3, 3)))
    if count == 0:
        raise FusionError(
            f"the NeRF has no surface: its density is below {threshold:.3g} everywhere in the box"
        )
    sizes = np.bincount(labels.ravel())[1:]
    nodes = np.argwhere(np.isin(labels, 1 + np.flatnonzero(sizes >= 1e-3 * sizes.max())))
    low, high = (np.array(volume.lower) + volume.spacing * corner for corner in (nodes.min(0), nodes.max(0)))
    margin = np.maximum(0.1 * (high - low), volume.spacing)
    limit_low, limit_high = np.array(volume.lower), np.array(volume.upper)
    return np.maximum(low - margin, limit_low), np.minimum(high + margin, limit_high)


def level_set(volume: Volume, threshold: float) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Closed surface of {density >= threshold}: vertices [N, 3] in world units, faces [F, 3], normals
    outwards.

    The grid is padded with empty space, so that the surface is closed at the box too, and enclosed hollows,
    which nobody sees, are filled. Raises :class:`FusionError` if nothing is above the threshold.
    """
    # Bounded on both sides alike: a density that jumps from 0 to 500 would otherwise put every vertex
    # on the grid.
    values = torch.nn.functional.pad(volume.values.clamp(max=2 * threshold), (1, 1, 1, 1, 1, 1))
    outside = (values < threshold).cpu().numpy()
    if outside.all():
        raise FusionError(
            f"the NeRF has no surface: its density is below {threshold:.3g} everywhere in the box"
        )
    labels, _ = ndimage.label(outside, structure=np.ones((3, 3, 3)))
    hollow = torch.from_numpy(outside & (labels != labels[0, 0, 0]))
    values[hollow.to(values.device)] = 2 * threshold
    vertices, faces = _marching_cubes(values, threshold)
    triangles = vertices[faces]
    if np.einsum("fi,fi->", triangles[:, 0], np.cross(triangles[:, 1], triangles[:, 2])) < 0:
        faces = faces[:, ::-1]
    return vertices * volume.spacing + np.array(volume.lower) - volume.spacing, np.ascontiguousarray(faces)


def _marching_cubes(values: Tensor, threshold: float) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Vertices in units of the grid, and faces in either winding."""
    if values.is_cuda:
        found = _marching_cubes_gpu(values, threshold)
        if found is not None:
            return found
    from skimage import measure

    vertices, faces, _, _ = measure.marching_cubes(values.cpu().numpy(), threshold)
    return vertices.astype(np.float64), faces.astype(np.int64)


def _marching_cubes_gpu(
    values: Tensor, threshold: float
) -> tuple[NDArray[np.float64], NDArray[np.int64]] | None:
    """With Warp, or None where it cannot: on the CPU scikit-image is eight times as fast and needs no
    compiler."""
    try:
        import warp

        warp.config.log_level = warp.LOG_WARNING  # its greeting goes to stdout, where --json writes
        from warp.geometry import IsoSurfaceMarchingCubes

        field: Any = warp.from_torch(values.contiguous())
        vertices, indices = IsoSurfaceMarchingCubes.extract(field, threshold)
        return vertices.numpy().astype(np.float64), indices.numpy().reshape(-1, 3).astype(np.int64)
    # An older Warp, no compiler, a driver too old, an unwritable kernel cache: all have the same cure.
    except Exception as error:
        _log.warning("Warp cannot extract the surface (%s); scikit-image does it on the CPU", error)
        return None
