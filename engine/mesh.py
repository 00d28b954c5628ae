"""A fused NeRF as a textured triangle mesh."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
import trimesh
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from trimesh.visual.material import PBRMaterial

from .bake import bake_albedo, unwrap, visible_points
from .cameras import Cameras, orbit_cameras
from .errors import Cancelled, InputError
from .iso_surface import (
    Volume,
    box_of_object,
    choose_threshold,
    greatest_on_rays,
    level_set,
    sample_volume,
)
from .model import Cancel, Progress
from .raster import silhouettes
from .simplify import decimate, drop_small_parts, is_closed

SILHOUETTE_PX = 96
REACH = 1.5
"""How far below the surface its colour is looked for, in cubes of the grid."""


class Rendered(Protocol):
    """What :meth:`DensityField.render` returns."""

    @property
    def rgb(self) -> Tensor:
        """[V, H, W, 3] in [0, 1]."""

    @property
    def opacity(self) -> Tensor:
        """[V, H, W, 1] in [0, 1]."""


class DensityField(Protocol):
    """What is needed of a fused NeRF; :class:`~.fused_field.FusedField` is one."""

    @property
    def device(self) -> torch.device:
        """Where its points must lie."""

    def density(self, points: Tensor) -> Tensor:
        """[N, 3] in the box [-1, 1]^3 -> [N], not negative."""

    def albedo(self, points: Tensor) -> Tensor:
        """[N, 3] -> [N, 3] in [0, 1], sRGB as the pictures are."""

    def render(
        self, cameras: Cameras, resolution: int, background: tuple[float, float, float] = (1.0, 1.0, 1.0)
    ) -> Rendered:
        """Pictures from the V cameras."""


@dataclass(frozen=True)
class MeshReport:
    """How a mesh came out."""

    threshold: float
    """The density whose level set it is."""
    silhouette_iou: float
    """Overlap (intersection over union) of the finished mesh with the NeRF's opacity > 0.5, over eight
    views."""
    faces: int
    vertices: int
    """Without the copies along texture seams."""
    watertight: bool
    """Whether each edge has two faces, seams apart."""
    components_removed: int
    """Loose parts with less than 1 % of the largest one's faces."""
    bounds: tuple[tuple[float, float, float], tuple[float, float, float]]
    """Lower and upper corner, in the mesh's axes: y up, front to +z."""
    texture_px: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class MeshResult:
    """A textured mesh in glTF's axes and what is known about it."""

    mesh: trimesh.Trimesh
    report: MeshReport


def check_mesh_settings(faces: int, texture_px: int, resolution: int = 128) -> None:
    """Raise :class:`InputError` for settings that :func:`extract_mesh` refuses; asked before long work."""
    for name, value, low, high in (
        ("faces", faces, 100, 10_000_000),
        ("texture_px", texture_px, 16, 16_384),
        ("resolution", resolution, 16, 1024),
    ):
        if not low <= value <= high:
            raise InputError(f"mesh setting {name} is {value}; it must be between {low} and {high}")


@torch.no_grad()
def extract_mesh(
    fused: DensityField,
    *,
    faces: int = 20_000,
    texture_px: int = 1024,
    resolution: int = 128,
    on_progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> MeshResult:
    """The surface of ``fused`` with its albedo as texture, in glTF's axes: (x, y, z) becomes (x, z, -y).

    The surface is a level set of the density, taken on a grid of ``resolution`` cubes along the longest
    side of the object's box, at the threshold whose silhouettes agree best with the rendered opacity; loose
    parts are dropped, the rest is decimated to at most ``faces`` triangles, unwrapped, and the unshaded
    albedo is baked into a square texture of ``texture_px``. Like the pictures, the texture is sRGB, as glTF
    wants a base colour.

    Raises :class:`InputError` for settings out of range, :class:`FusionError` for a NeRF without a surface,
    and :class:`Cancelled`.
    """
    check_mesh_settings(faces, texture_px, resolution)
    stages = ("opacity", "volume", "surface", "unwrap", "bake")

    def step(name: str) -> None:
        if cancel is not None and cancel():
            raise Cancelled(f"the mesh was cancelled before its {name} stage")
        if on_progress is not None:
            on_progress("mesh", stages.index(name), len(stages))

    step("opacity")
    cameras = _test_views()
    opaque = fused.render(cameras, SILHOUETTE_PX).opacity[..., 0] > 0.5
    step("volume")
    volume, threshold = _volume_and_threshold(fused, cameras, opaque, resolution)
    step("surface")
    vertices, triangles = level_set(volume, threshold)
    vertices, triangles, removed = drop_small_parts(vertices, triangles)
    vertices, triangles = decimate(vertices, triangles, faces)
    step("unwrap")
    cut = unwrap(vertices, triangles, texture_px)
    step("bake")
    normals = np.asarray(trimesh.Trimesh(vertices, triangles, process=False).vertex_normals)
    # About as far as marching cubes and decimation may have left the level set; deeper, colours mix at edges.
    points = visible_points(fused.density, vertices, normals, REACH * volume.spacing, fused.device)
    texture = bake_albedo(
        fused.albedo,
        points[cut.source],
        cut,
        texture_px,
        fused.device,
        is_matter=lambda points: fused.density(points) >= 0.5 * threshold,
    )

    seen = silhouettes(vertices, triangles, cameras, SILHOUETTE_PX)
    expected = opaque.cpu().numpy()
    mesh = _textured(to_gltf(vertices)[cut.source], cut.faces, to_gltf(normals)[cut.source], cut.uv, texture)
    report = MeshReport(
        threshold=threshold,
        silhouette_iou=float((seen & expected).sum() / (seen | expected).sum()),
        faces=len(triangles),
        vertices=len(vertices),
        watertight=is_closed(triangles),
        components_removed=removed,
        bounds=_bounds(to_gltf(vertices)),
        texture_px=texture_px,
    )
    if on_progress is not None:
        on_progress("mesh", len(stages), len(stages))
    return MeshResult(mesh, report)


def to_gltf(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N, 3] from z up, front to -y, to y up, front to +z."""
    return np.stack([vectors[:, 0], vectors[:, 2], -vectors[:, 1]], axis=1)


def _test_views() -> Cameras:
    """Eight views around the object, framed as widely as any training view of the released configuration."""
    tangent = np.tan(np.deg2rad(0.5 * 47.5))
    return orbit_cameras([45.0 * k for k in range(8)], [0.0, 15.0] * 4, 47.5, 0.75 / float(tangent))


def _volume_and_threshold(
    fused: DensityField, cameras: Cameras, opaque: Tensor, resolution: int
) -> tuple[Volume, float]:
    """The object's box sampled finely, after a coarse pass over the whole scene that finds the box."""
    corner = np.ones(3)
    coarse = sample_volume(fused.density, -corner, corner, min(64, resolution), fused.device)
    opaque = opaque.to(fused.device)
    threshold, _ = choose_threshold(greatest_on_rays(coarse, cameras, SILHOUETTE_PX), opaque)
    # Half the threshold: what is thinner than a coarse cube shows there with less than its density.
    lower, upper = box_of_object(coarse, 0.5 * threshold)
    volume = sample_volume(fused.density, lower, upper, resolution, fused.device)
    threshold, _ = choose_threshold(greatest_on_rays(volume, cameras, SILHOUETTE_PX), opaque)
    return volume, threshold


def _textured(
    vertices: NDArray[np.float64],
    faces: NDArray[np.int64],
    normals: NDArray[np.float64],
    uv: NDArray[np.float64],
    texture: NDArray[np.uint8],
) -> trimesh.Trimesh:
    material = PBRMaterial(
        name="albedo", baseColorTexture=Image.fromarray(texture), roughnessFactor=1.0, metallicFactor=0.0
    )
    visual = trimesh.visual.TextureVisuals(uv=uv, material=material)
    return trimesh.Trimesh(vertices, faces, vertex_normals=normals, visual=visual, process=False)


def _bounds(
    vertices: NDArray[np.float64],
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    low, high = (tuple(float(value) for value in corner) for corner in (vertices.min(0), vertices.max(0)))
    return (low[0], low[1], low[2]), (high[0], high[1], high[2])
