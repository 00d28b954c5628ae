"""Which pixels triangles cover, in numpy: for texels of an unwrapped mesh and for silhouettes. No OpenGL."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .cameras import Cameras

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Coverage(NamedTuple):
    """The N (triangle, pixel) pairs in which the pixel's centre lies inside the triangle."""

    face: Ints
    """[N] row of the triangle."""
    row: Ints
    """[N] counted from the top."""
    column: Ints
    """[N]"""
    weights: Floats
    """[N, 3] barycentric coordinates of the pixel's centre."""


def cover(corners: Floats, width: int, height: int) -> Coverage:
    """Scan-converts triangles with ``corners`` [F, 3, 2] given as (x, y) in pixels, y down, either winding.

    A centre on an edge that two triangles share belongs to one of them. Triangles without area cover
    nothing; what lies outside the picture is left out.
    """
    x, y = corners[..., 0], corners[..., 1]
    area = (x[:, 1] - x[:, 0]) * (y[:, 2] - y[:, 0]) - (x[:, 2] - x[:, 0]) * (y[:, 1] - y[:, 0])
    first = np.clip(np.ceil(y.min(1) - 0.5), 0, height).astype(np.int64)
    last = np.clip(np.ceil(y.max(1) - 0.5), 0, height).astype(np.int64)
    span_face, row = _expand(first, np.where(np.abs(area) > 1e-12, last, first))

    # Edge i, opposite corner i: its function a x + b y + c is the weight of corner i, at least 0 inside.
    ahead, behind = [1, 2, 0], [2, 0, 1]
    scale = 1.0 / np.where(area == 0.0, 1.0, area)[:, None]
    a = (y[:, ahead] - y[:, behind]) * scale
    b = (x[:, behind] - x[:, ahead]) * scale
    c = (x[:, ahead] * y[:, behind] - x[:, behind] * y[:, ahead]) * scale
    slope, rest = a[span_face], b[span_face] * (row + 0.5)[:, None] + c[span_face]
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = -rest / slope
    low = np.where(slope > 0, crossing, -np.inf).max(1)
    high = np.where(slope < 0, crossing, np.inf).min(1)
    high = np.where(((slope == 0) & (rest < 0)).any(1), -np.inf, high)
    begin = np.clip(np.ceil(low - 0.5), 0, width).astype(np.int64)
    end = np.clip(np.ceil(high - 0.5), 0, width).astype(np.int64)
    span, column = _expand(begin, end)
    face = span_face[span]
    weights = np.clip(slope[span] * (column + 0.5)[:, None] + rest[span], 0.0, 1.0)
    return Coverage(face, row[span], column, weights / weights.sum(1, keepdims=True))


def silhouettes(vertices: Floats, faces: Ints, cameras: Cameras, resolution: int) -> NDArray[np.bool_]:
    """[V, H, W]: which pixels see the mesh (``vertices`` [N, 3], ``faces`` [F, 3]) in each camera's picture.

    Triangles that reach behind a camera are left out.
    """
    c2w = cameras.c2w.double().cpu().numpy()
    focal_px = 0.5 * resolution / np.tan(0.5 * cameras.fovy_rad.double().cpu().numpy())
    masks = np.zeros((len(cameras), resolution, resolution), dtype=np.bool_)
    for mask, pose, focal in zip(masks, c2w, focal_px, strict=True):
        seen = (vertices - pose[:3, 3]) @ pose[:3, :3]
        depth = np.maximum(-seen[:, 2:], 1e-6)
        pixels = seen[:, :2] * [focal, -focal] / depth + 0.5 * resolution
        in_front = (seen[:, 2] < -1e-3)[faces].all(1)
        coverage = cover(pixels[faces[in_front]], resolution, resolution)
        mask[coverage.row, coverage.column] = True
    return masks


def _expand(first: Ints, last: Ints) -> tuple[Ints, Ints]:
    """For ranges [first, last): the range's row and the value, one pair for each value in each range."""
    counts = np.maximum(last - first, 0)
    owner = np.repeat(np.arange(len(counts)), counts)
    offset = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    return owner, first[owner] + offset
