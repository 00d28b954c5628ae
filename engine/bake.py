"""Texture of a mesh: unwrapped by xatlas, and the field's albedo looked up where each texel lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from .iso_surface import POINTS_AT_ONCE, Density
from .raster import cover

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Albedo = Callable[[Tensor], Tensor]
"""points [N, 3] -> colour [N, 3] in [0, 1], sRGB as the pictures are."""

DEPTHS = 8
"""Samples along the inward normal of each vertex."""


@dataclass(frozen=True)
class Unwrapped:
    """A mesh cut open along its chart borders. Of N vertices and F faces."""

    source: Ints
    """[N] the vertex of the closed mesh that each one is a copy of."""
    faces: Ints
    """[F, 3]"""
    uv: Floats
    """[N, 2] in [0, 1], v upwards."""


def unwrap(vertices: Floats, faces: Ints, texture_px: int) -> Unwrapped:
    """Texture coordinates without overlap, with a gutter of ``texture_px`` / 256 texels (at least 2) around
    charts."""
    import xatlas

    packing = xatlas.PackOptions()
    packing.resolution = texture_px
    packing.padding = max(2, texture_px // 256)
    packing.bilinear = True
    atlas = xatlas.Atlas()
    atlas.add_mesh(vertices.astype(np.float32), faces.astype(np.uint32))
    atlas.generate(pack_options=packing)
    source, cut_faces, uv = atlas[0]
    return Unwrapped(source.astype(np.int64), cut_faces.astype(np.int64), uv.astype(np.float64))


def visible_points(
    density: Density, vertices: Floats, normals: Floats, reach: float, device: torch.device
) -> Floats:
    """[N, 3]: for each vertex the point whose colour is seen there: the mean depth of a ray that enters
    along -normal.

    The colour of a field is only learnt where rays end; a vertex that the grid or the decimation has left a
    little outside would pick a colour that nobody has seen. The ray starts ``reach`` / 8 (world units) above
    the vertex and ends ``reach`` below it; where it meets nothing, the vertex itself is taken.
    """
    depth = (torch.arange(DEPTHS, device=device) + 0.5) / DEPTHS * (1.125 * reach) - 0.125 * reach
    start, inward = (torch.tensor(part, dtype=torch.float32, device=device) for part in (vertices, -normals))
    points = start[:, None] + depth[:, None] * inward[:, None]
    sigma = _in_chunks(density, points.reshape(-1, 3)).view(len(vertices), DEPTHS)
    optical = sigma * (1.125 * reach / DEPTHS)
    weight = torch.exp(optical - optical.cumsum(1)) * (1 - torch.exp(-optical))
    opacity = weight.sum(1)
    mean = torch.where(opacity > 1e-3, (weight * depth).sum(1) / opacity.clamp(min=1e-3), 0.0)
    return (start + mean[:, None] * inward).cpu().numpy().astype(np.float64)


def bake_albedo(
    albedo: Albedo,
    points: Floats,
    mesh: Unwrapped,
    texture_px: int,
    device: torch.device,
    is_matter: Callable[[Tensor], Tensor],
) -> NDArray[np.uint8]:
    """The texture [texture_px, texture_px, 3]: each texel's albedo at its place among the corners'
    ``points``.

    ``points`` [N, 3] has one row per vertex of ``mesh``. Texels of no triangle, and those whose point is no
    matter (``is_matter``: points [M, 3] -> bool [M]), as where a triangle bridges a crease, get the colour of
    the nearest texel that has one.
    """
    pixels = mesh.uv * [texture_px, -texture_px] + [0.0, texture_px]
    covered = cover(pixels[mesh.faces], texture_px, texture_px)
    where = np.einsum("nk,nkd->nd", covered.weights, points[mesh.faces[covered.face]])
    # The texel of each corner goes first: charts thinner than a texel may cover no centre at all.
    corner = np.clip(np.floor(pixels[:, ::-1]), 0, texture_px - 1).astype(np.int64)
    row = np.concatenate([corner[:, 0], covered.row])
    column = np.concatenate([corner[:, 1], covered.column])
    texel_points = np.full((texture_px, texture_px, 3), np.nan, dtype=np.float32)
    texel_points[row, column] = np.concatenate([points, where])
    known = ~np.isnan(texel_points[..., 0])
    sought = torch.from_numpy(texel_points[known]).to(device)
    matter = _in_chunks(is_matter, sought)
    if not bool(matter.any()):
        matter = torch.ones_like(matter)
    colour = _in_chunks(albedo, sought[matter]).clamp(0.0, 1.0)
    known[known] = matter.cpu().numpy()
    texture = np.zeros((texture_px, texture_px, 3), dtype=np.uint8)
    texture[known] = (colour * 255).round().byte().cpu().numpy()
    nearest = ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True)
    return texture[nearest[0], nearest[1]]


def _in_chunks(function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    return torch.cat([function(chunk) for chunk in points.split(POINTS_AT_ONCE)])
