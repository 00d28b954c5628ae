"""What a whole job gives: mesh, NeRF, views and record in one object, and the files they are written to."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from numpy.typing import NDArray
from PIL import Image
from trimesh.visual.material import SimpleMaterial

from .cameras import Cameras, orbit_cameras
from .errors import InputError, MissingDependency
from .files import replacing, staged, write_json
from .mesh import DensityField, MeshReport, Rendered
from .model import Progress

VIEWS_GAP_PX = 8
_WHITE = (1.0, 1.0, 1.0)


@dataclass
class Asset:
    """A textured mesh, the fused NeRF that it was taken from, and how they came about.

    Mesh files have glTF's axes (y up, front to +z); cameras and the NeRF have z up and the front to -y.
    """

    mesh: trimesh.Trimesh
    """With texture coordinates and a PBR material whose base colour is the albedo."""
    report: MeshReport
    fused: DensityField
    metadata: dict[str, Any] = field(default_factory=dict)
    """Plain JSON values; ``report`` is added under ``mesh``."""
    views: NDArray[np.uint8] | None = None
    """[4, H, W, 3] at azimuth 0 (front), 90, 180 and 270 degrees; None for a mesh of a saved NeRF."""
    prompt: NDArray[np.uint8] | None = None
    """[H, W, 3]: the prepared picture over the grey that the model saw; None without a picture."""

    def __post_init__(self) -> None:
        self.metadata = {**self.metadata, "mesh": self.report.to_dict()}

    def render(
        self, cameras: Cameras, resolution: int = 256, background: tuple[float, float, float] = _WHITE
    ) -> Rendered:
        """The NeRF's albedo from V cameras: ``.rgb`` [V, H, W, 3], ``.opacity`` [V, H, W, 1], in [0, 1]."""
        return self.fused.render(cameras, resolution, background)

    def save(self, path: str | Path) -> None:
        """Write the mesh by the path's suffix; an existing file is replaced whole or not at all.

        ``.glb``: with normals, texture and material. ``.obj``: with an ``.mtl`` and an ``_albedo.png``
        beside it. ``.ply``: the closed mesh without texture seams, coloured by vertex. Raises
        :class:`InputError` for any other suffix and for a place that cannot be written to.
        """
        path = Path(path)
        writer = _WRITERS.get(path.suffix.lower())
        if writer is None:
            raise InputError(f"mesh file {path}: its suffix must be one of {', '.join(_WRITERS)}")
        with replacing(path) as partial:
            writer(self.mesh, partial)

    def turntable(
        self,
        path: str | Path,
        *,
        seconds: float = 2.0,
        fps: int = 24,
        resolution: int | None = None,
        elevation_deg: float = 10.0,
        on_progress: Progress | None = None,
    ) -> None:
        """One turn around the NeRF over white, from the front, as an H.264 film for any player (``.mp4``).

        ``round(seconds * fps)`` frames of ``resolution`` pixels square, rounded up to an even number; by
        default 256, or 160 where the NeRF is on a CPU. Raises :class:`InputError`.
        """
        path, frames = Path(path), round(seconds * fps)
        if resolution is None:
            # A frame of 256 pixels takes a CPU core about a second.
            resolution = 160 if self.fused.device.type == "cpu" else 256
        if path.suffix.lower() != ".mp4":
            raise InputError(f"film {path}: its suffix must be .mp4")
        if frames < 1 or fps < 1 or resolution < 16:
            raise InputError(
                f"a film of {seconds} s at {fps} frames per second and {resolution} pixels cannot be made; "
                "it needs at least one frame of 16 pixels"
            )
        resolution += resolution % 2
        # The camera of the released code's validation renders, but for its elevation.
        cameras = orbit_cameras([360.0 * k / frames for k in range(frames)], elevation_deg, 40.0, 2.0)
        with replacing(path) as partial, _film(partial, resolution, fps) as add_frame:
            for index in range(frames):
                rgb = self.render(cameras[index : index + 1], resolution).rgb[0]
                add_frame((rgb.clamp(0.0, 1.0) * 255).round().byte().cpu().numpy())
                if on_progress is not None:
                    on_progress("files", index + 1, frames)

    def save_all(
        self,
        folder: str | Path,
        *,
        turntable_seconds: float = 2.0,
        turntable_px: int | None = None,
        on_progress: Progress | None = None,
    ) -> list[Path]:
        """Write ``views.png`` (where there are views), ``turntable.mp4``, ``asset.glb`` and
        ``metadata.json``.

        All of them or, if one fails, none; files of these names that were there before are replaced.
        Returns their paths. Raises :class:`InputError` for a place that cannot be written to.
        """
        names = ["views.png", "turntable.mp4", "asset.glb", "metadata.json"]
        with staged(folder) as stage:
            if self.views is None:
                names.remove("views.png")
            else:
                write_views_png(stage / "views.png", self.prompt, self.views)
            self.save(stage / "asset.glb")
            write_json(stage / "metadata.json", self.metadata)
            self.turntable(
                stage / "turntable.mp4",
                seconds=turntable_seconds,
                resolution=turntable_px,
                on_progress=on_progress,
            )
        return [Path(folder) / name for name in names]


def write_views_png(path: str | Path, prompt: NDArray[np.uint8] | None, views: NDArray[np.uint8]) -> None:
    """The prompt [h, w, 3], scaled to the views' height, and the views [V, H, W, 3] from left to right, as
    PNG.

    Raises :class:`InputError` if the place cannot be written to.
    """
    pictures = [Image.fromarray(view) for view in views]
    if prompt is not None:
        height = pictures[0].height
        width = max(1, round(prompt.shape[1] * height / prompt.shape[0]))
        pictures.insert(0, Image.fromarray(prompt).resize((width, height), Image.Resampling.LANCZOS))
    total = sum(picture.width + VIEWS_GAP_PX for picture in pictures) - VIEWS_GAP_PX
    sheet = Image.new("RGB", (total, pictures[0].height), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + VIEWS_GAP_PX
    with replacing(path) as partial:
        sheet.save(partial, format="PNG")


def _write_glb(mesh: trimesh.Trimesh, path: Path) -> None:
    def clamp(tree: dict[str, Any]) -> None:
        # The default is to repeat, which would blend the texture's opposite borders.
        edge, linear, mipmapped = 33071, 9729, 9987
        sampler = {"wrapS": edge, "wrapT": edge, "magFilter": linear, "minFilter": mipmapped}
        tree["samplers"] = [sampler]
        for texture in tree["textures"]:
            texture["sampler"] = 0

    path.write_bytes(_exported(mesh, file_type="glb", include_normals=True, tree_postprocessor=clamp))


def _write_obj(mesh: trimesh.Trimesh, path: Path) -> None:
    # In MTL files a blank ends a name. The texture must not overwrite the picture that the asset was made of.
    name = re.sub(r"\s+", "_", path.stem)
    uv, texture = _texture(mesh)
    white, black = [255, 255, 255, 255], [0, 0, 0, 255]  # the diffuse colour multiplies the texture
    material = SimpleMaterial(texture, diffuse=white, ambient=white, specular=black, name=f"{name}_albedo")
    plain = trimesh.Trimesh(
        mesh.vertices,
        mesh.faces,
        vertex_normals=mesh.vertex_normals,
        visual=trimesh.visual.TextureVisuals(uv=uv, material=material),
        process=False,
    )
    text, beside = trimesh.exchange.obj.export_obj(
        plain, include_normals=True, return_texture=True, mtl_name=f"{name}.mtl", header=None
    )
    for file_name, data in beside.items():
        (path.parent / file_name).write_bytes(data)
    path.write_text(text, encoding="utf-8")


def _write_ply(mesh: trimesh.Trimesh, path: Path) -> None:
    uv, picture = _texture(mesh)
    texture = np.asarray(picture)
    size = np.array(texture.shape[1::-1])
    column, row = np.clip(uv * [1, -1] * size + [0, size[1]], 0, size - 1).astype(int).T
    positions, first, copy_of = np.unique(mesh.vertices, axis=0, return_index=True, return_inverse=True)
    count = np.bincount(copy_of)[:, None]
    summed = np.zeros((len(positions), 3))
    np.add.at(summed, copy_of, texture[row, column].astype(float))
    plain = trimesh.Trimesh(
        positions,
        copy_of[mesh.faces],
        vertex_normals=mesh.vertex_normals[first],
        vertex_colors=np.rint(summed / count).astype(np.uint8),
        process=False,
    )
    path.write_bytes(_exported(plain, file_type="ply", vertex_normal=True))


def _texture(mesh: trimesh.Trimesh) -> tuple[NDArray[np.float64], Image.Image]:
    visual: Any = mesh.visual
    return visual.uv, visual.material.baseColorTexture


def _exported(mesh: trimesh.Trimesh, **settings: Any) -> bytes:
    data = mesh.export(**settings)
    assert isinstance(data, bytes)
    return data


_WRITERS: dict[str, Callable[[trimesh.Trimesh, Path], None]] = {
    ".glb": _write_glb,
    ".obj": _write_obj,
    ".ply": _write_ply,
}


@contextmanager
def _film(path: Path, resolution: int, fps: int) -> Iterator[Callable[[NDArray[np.uint8]], None]]:
    import imageio_ffmpeg

    try:
        imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise MissingDependency(
            f"film {path.name}: there is no ffmpeg for this system ({error}); install it, or name one in the "
            "environment variable IMAGEIO_FFMPEG_EXE"
        ) from error
    writer = imageio_ffmpeg.write_frames(
        os.fspath(path),
        (resolution, resolution),
        fps=fps,
        codec="libx264",
        pix_fmt_out="yuv420p",
        quality=None,
        macro_block_size=2,
        ffmpeg_log_level="error",
        output_params=["-crf", "18", "-movflags", "+faststart"],
    )
    writer.send(None)
    try:
        yield lambda frame: writer.send(np.ascontiguousarray(frame))
    finally:
        writer.close()
