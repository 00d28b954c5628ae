"""How good the embedded model is, on objects that it was never trained on and whose truth is known exactly.

Each object is shown to the whole pipeline as one picture, from the right and a little above; views, NeRF and mesh are
then measured against renders and surface points of the object itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from scipy.spatial import cKDTree
from torch import Tensor
from trimesh import Trimesh

from ..cameras import Cameras, orbit_cameras
from ..config import FusionConfig
from ..errors import InputError
from ..fused_field import FusedField
from ..mesh import extract_mesh
from ..picture import PreparedPicture, prepare
from ..warm_start import silhouettes
from .dataset import unit_distance
from .kinds import caption, make_objects
from .objects import TEST_SEEDS, Objects
from .raycast import render

if TYPE_CHECKING:
    from ..pipeline import ImageTo3D

PROMPT_AZIMUTH_DEG, PROMPT_ELEVATION_DEG = 30.0, 15.0
GREY = 0.5
FOVY_DEG = 47.5
UNSEEN_VIEWS = 16
SURFACE_POINTS = 4000
PICTURE_PX = 128
MASK_CONTRAST = 2 / 9
"""Masks of the diffused views begin at a fixed difference of 0.1 from the background: no figure follows the fit."""


@dataclass(frozen=True)
class FusedScore:
    """A fused object and its mesh; higher is better but for ``chamfer`` and the seconds."""

    psnr_db: float
    """Mean over 16 unseen views of the NeRF, over white."""
    iou: float
    """Silhouettes of the same views."""
    chamfer: float
    """Mean distance between mesh and true surface, both ways averaged; objects have a radius of 0.56."""
    fuse_s: float
    """Seconds of the fusion, its diffused views included."""
    mesh_s: float
    """Seconds of the mesh with its texture, at their usual sizes."""


@dataclass(frozen=True)
class Score:
    """One object: its diffused views, and what is fused of them (as in :class:`FusedScore`)."""

    seed: int
    caption: str
    views_psnr_db: float
    """Mean over the four views, over the whole picture."""
    views_iou: float
    """Silhouettes of the four views."""
    fused_psnr_db: float
    fused_iou: float
    chamfer: float
    fuse_s: float
    mesh_s: float

    @property
    def seconds(self) -> float:
        """From the prepared picture to the asset."""
        return self.fuse_s + self.mesh_s


def example_picture(seed: int, px: int = 512) -> Image.Image:
    """An RGBA picture of object ``seed``, as a user would bring it."""
    objects = make_objects(torch.tensor([seed]))
    camera = orbit_cameras([PROMPT_AZIMUTH_DEG], PROMPT_ELEVATION_DEG, 45.0, 1.8)
    rgba = render(objects, camera.c2w[None], camera.fovy_rad[None], px)[0, 0]
    alpha = rgba[..., 3:]
    straight = torch.cat((rgba[..., :3] / alpha.clamp_min(1e-3), alpha), -1)
    return Image.fromarray((straight.clamp(0, 1) * 255).round().byte().numpy(), "RGBA")


def evaluate(
    pipe: ImageTo3D,
    count: int,
    config: FusionConfig,
    *,
    skip: int = 0,
    seed: int = 0,
    pictures: Path | None = None,
) -> Iterator[Score]:
    """Scores of ``count`` test objects, from ``TEST_SEEDS + skip`` on, one after the other.

    With ``pictures`` a sheet per object is written there: prompt, four views and the NeRF beside the truth.
    Raises :class:`InputError` for a count below 1.
    """
    if count < 1 or skip < 0:
        raise InputError(f"--objects is {count} and --skip is {skip}; they must be at least 1 and 0")
    for object_seed in range(TEST_SEEDS + skip, TEST_SEEDS + skip + count):
        objects = make_objects(torch.tensor([object_seed]))
        picture = prepare(example_picture(object_seed, 256))
        views, views_truth = _score_views(pipe, objects, picture, seed, config.guidance_scale)
        fused, shown, white = measure_fusion(
            object_seed, lambda picture: pipe.fuse(picture, preset=config, seed=seed).nerf
        )
        if pictures is not None:
            _write_sheet(pictures / f"{object_seed}.png", views, views_truth, shown[::4], white[::4])
        yield Score(
            seed=object_seed,
            caption=caption(objects, 0),
            views_psnr_db=_psnr(views, views_truth[..., :3] + GREY * (1 - views_truth[..., 3:])),
            views_iou=_iou(_view_masks(views), views_truth[..., 3] > 0.5),
            fused_psnr_db=fused.psnr_db,
            fused_iou=fused.iou,
            chamfer=fused.chamfer,
            fuse_s=fused.fuse_s,
            mesh_s=fused.mesh_s,
        )


def measure_fusion(
    object_seed: int, fuse: Callable[[PreparedPicture], FusedField]
) -> tuple[FusedScore, Tensor, Tensor]:
    """What ``fuse`` makes of one picture of an object, with its mesh; and renders beside the truth over white.

    Both pictures are [16, 128, 128, 3], from cameras that no fusion sees.
    """
    objects = make_objects(torch.tensor([object_seed]))
    picture = prepare(example_picture(object_seed, 256))
    start = time.perf_counter()
    fused = fuse(picture)
    if fused.device.type == "cuda":
        torch.cuda.synchronize(fused.device)
    fused_at = time.perf_counter()
    mesh = extract_mesh(fused).mesh
    meshed_at = time.perf_counter()
    cameras = orbit_cameras(
        [(k + 0.5) * 360 / UNSEEN_VIEWS for k in range(UNSEEN_VIEWS)],
        [0.0, 10.0, 20.0, 5.0] * (UNSEEN_VIEWS // 4),
        FOVY_DEG,
        unit_distance(FOVY_DEG),
    )
    truth = _truth(objects, cameras)
    shown = fused.render(cameras, PICTURE_PX)
    shown_rgb, shown_opacity = shown.rgb.cpu(), shown.opacity.cpu()
    white = truth[..., :3] + 1 - truth[..., 3:]
    score = FusedScore(
        psnr_db=_psnr(shown_rgb, white),
        iou=_iou(shown_opacity[..., 0] > 0.5, truth[..., 3] > 0.5),
        chamfer=_chamfer(mesh, objects),
        fuse_s=fused_at - start,
        mesh_s=meshed_at - fused_at,
    )
    return score, shown_rgb, white


def summary(scores: list[Score]) -> dict[str, Any]:
    """Mean and standard deviation over objects of every figure, and the objects themselves."""
    rows = [asdict(score) for score in scores]
    figures = [name for name, value in rows[0].items() if isinstance(value, float)]
    return {
        "objects": len(rows),
        "mean": {name: mean(row[name] for row in rows) for name in figures},
        "std": {name: stdev([row[name] for row in rows]) if len(rows) > 1 else 0.0 for name in figures},
        "rows": rows,
    }


def _score_views(
    pipe: ImageTo3D, objects: Objects, picture: PreparedPicture, seed: int, guidance_scale: float
) -> tuple[Tensor, Tensor]:
    images = pipe.views(picture, seed=seed, guidance_scale=guidance_scale, grey=GREY).images
    cameras = orbit_cameras([0.0, 90.0, 180.0, 270.0], 0.0, FOVY_DEG, unit_distance(FOVY_DEG))
    return torch.from_numpy(images).float() / 255, _truth(objects, cameras)


def _truth(objects: Objects, cameras: Cameras) -> Tensor:
    """Premultiplied RGBA [V, H, W, 4]."""
    return render(objects, cameras.c2w[None], cameras.fovy_rad[None], PICTURE_PX)[0]


def _view_masks(views: Tensor) -> Tensor:
    """What is not background in pictures over even grey, with enclosed areas of the background's colour."""
    seen = silhouettes(views, contrast=MASK_CONTRAST)
    return (seen.coverage > 0.5) | (seen.certainty == 0)


def _psnr(a: Tensor, b: Tensor) -> float:
    error = (a - b).square().flatten(1).mean(1).clamp_min(1e-10)
    return float((-10 * error.log10()).mean())


def _iou(a: Tensor, b: Tensor) -> float:
    union = (a | b).flatten(1).sum(1).clamp_min(1)
    return float(((a & b).flatten(1).sum(1) / union).mean())


def _chamfer(mesh: Trimesh, objects: Objects) -> float:
    made = np.asarray(mesh.sample(SURFACE_POINTS, seed=0), dtype=np.float64)
    ours = np.stack((made[:, 0], -made[:, 2], made[:, 1]), 1)  # glTF's axes back to z up
    true = objects.visible_surface(SURFACE_POINTS)[0].numpy()
    return 0.5 * float(cKDTree(true).query(ours)[0].mean() + cKDTree(ours).query(true)[0].mean())


def _write_sheet(path: Path, views: Tensor, views_truth: Tensor, fused: Tensor, fused_truth: Tensor) -> None:
    over_grey = views_truth[..., :3] + GREY * (1 - views_truth[..., 3:])
    rows = [torch.cat(list(row), 1) for row in (over_grey, views, fused_truth, fused)]
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = torch.cat(rows).clamp(0, 1) * 255
    Image.fromarray(sheet.round().byte().numpy()).save(path)
