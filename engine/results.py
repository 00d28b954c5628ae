"""What the stages of a job give: views, a fused NeRF, and the step from there to an asset."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .asset import Asset, write_views_png
from .cameras import orbit_cameras
from .checkpoint import config_to_json
from .files import staged, write_json
from .fused_field import FusedField
from .mesh import extract_mesh
from .model import Cancel, Progress
from .record import Record
from .weights import pick_device

PREVIEW_PX = 256


@dataclass(frozen=True)
class Views:
    """Four views of an object."""

    images: np.ndarray
    """uint8 [4, H, W, 3], at azimuth 0 (front), 90, 180 and 270 degrees."""
    prompt: np.ndarray | None
    """uint8 [H, W, 3]: the prepared picture over the grey that the model saw; None without a picture."""
    metadata: dict[str, Any] = field(repr=False)

    def save(self, path: str | Path) -> None:
        """Write the prompt and the views side by side as PNG. Raises :class:`InputError` if it cannot."""
        write_views_png(path, self.prompt, self.images)

    def save_all(self, folder: str | Path) -> list[Path]:
        """Write ``views.png`` and ``metadata.json``; returns their paths. Both or none."""
        names = ("views.png", "metadata.json")
        with staged(folder) as stage:
            self.save(stage / names[0])
            write_json(stage / names[1], self.metadata)
        return [Path(folder) / name for name in names]


@dataclass(frozen=True)
class Fused:
    """A fused NeRF and the record of how it came about."""

    nerf: FusedField
    metadata: dict[str, Any] = field(repr=False)

    def save_all(self, folder: str | Path) -> list[Path]:
        """Write ``nerf.safetensors``, ``preview.png`` (its four sides) and ``metadata.json``.

        Returns their paths. All of them are there or, if one fails, none. Raises :class:`InputError` for a
        place that cannot be written to.
        """
        names = ("nerf.safetensors", "preview.png", "metadata.json")
        # The camera of the asset's turntable.
        cameras = orbit_cameras([0.0, 90.0, 180.0, 270.0], 10.0, 40.0, 2.0)
        sides = self.nerf.render(cameras, PREVIEW_PX).rgb.clamp(0.0, 1.0)
        with staged(folder) as stage:
            self.nerf.save(stage / names[0])
            write_views_png(stage / names[1], None, (sides * 255).round().byte().cpu().numpy())
            write_json(stage / names[2], self.metadata)
        return [Path(folder) / name for name in names]


def make_asset(
    fused: Fused,
    *,
    views: Views | None = None,
    faces: int = 20_000,
    texture_px: int = 1024,
    on_progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> Asset:
    """The textured mesh of a fused NeRF; errors are those of :func:`~.mesh.extract_mesh`."""
    record = Record(fused.nerf.device, fused.metadata)
    with record.timed("mesh"):
        result = extract_mesh(
            fused.nerf, faces=faces, texture_px=texture_px, on_progress=on_progress, cancel=cancel
        )
    return Asset(
        result.mesh,
        result.report,
        fused.nerf,
        record.metadata,
        views=None if views is None else views.images,
        prompt=None if views is None else views.prompt,
    )


def load_fused(path: str | Path, device: str = "auto") -> Fused:
    """A NeRF that :meth:`Fused.save_all` or a fusion's checkpoint holds, ready for :func:`make_asset`.

    Its record is taken from the ``metadata.json`` beside it if that describes the same fusion. Raises
    :class:`InputError` for a file that is missing, damaged or something else.
    """
    nerf = FusedField.load(path, pick_device(device))
    config = config_to_json(nerf.config)
    try:
        beside = json.loads(Path(path).with_name("metadata.json").read_text(encoding="utf-8"))
        same = config.items() <= beside["fusion"].items()
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        same = False
    return Fused(nerf, beside if same else {"fusion": config})
