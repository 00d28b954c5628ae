"""The whole job behind one class: a loaded model that turns pictures into views, fused fields and assets."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .asset import Asset, write_views_png
from .cameras import official_views, orbit_cameras
from .checkpoint import config_to_json
from .conditioning import Conditioner
from .config import FusionConfig
from .config import preset as preset_named
from .distill import MultiViewGuidance
from .errors import InputError
from .files import staged, write_json
from .fuse import Fusion
from .fused_field import FusedField
from .mesh import extract_mesh
from .model import Cancel, Controller, MultiViewModel, Progress
from .picture import PreparedPicture, Source, composite, prepare
from .record import Record
from .sampler import decode_views, sample_views
from .warm_start import DiffusedViews
from .weights import _device, load_model

NEGATIVE_PROMPT_VIEWS = (
    "uniform low no texture ugly, boring, bad anatomy, blurry, pixelated,  obscure, unnatural colors, "
    "poor lighting, dull, and unclear."
)
"""What the released multi-view demo steers away from."""

NEGATIVE_PROMPT_FUSION = (
    "ugly, bad anatomy, blurry, pixelated obscure, unnatural colors, poor lighting, dull, and unclear, "
    "cropped, lowres, low quality, artifacts, duplicate, morbid, mutilated, poorly drawn face, deformed, "
    "dehydrated, bad proportions"
)
"""What the released fusion configuration steers away from."""

PROMPT_SUFFIX = ", 3d asset"
"""The released demo appends it to the prompt of the views; the released fusion does not."""

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


@dataclass(frozen=True)
class _Job:
    """What all stages of one job share."""

    record: Record
    picture: PreparedPicture | None
    prompt: str
    negative_prompt: str | None
    seed: int
    on_progress: Progress | None
    cancel: Cancel | None


class ImageTo3D:
    """One picture of an object in; four views, a fused NeRF or a textured mesh out.

    >>> pipe = ImageTo3D.from_pretrained("builtin:nano")  # doctest: +SKIP
    >>> asset = pipe.generate("robot.png", seed=0)  # doctest: +SKIP
    >>> asset.save("robot.glb")  # doctest: +SKIP

    ``image`` is in all methods a path, bytes, a Pillow picture, an array or a tensor (what
    :func:`~.picture.load_picture` reads) or an already prepared picture; None for a checkpoint that takes
    text only. ``on_progress(stage, done, total)`` is called as the work goes on, and ``cancel()`` is asked
    between steps. All methods raise :class:`InputError` for what cannot be used and :class:`Cancelled` when
    ``cancel`` said so.
    """

    def __init__(self, model: MultiViewModel) -> None:
        self.model = model

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "builtin:nano",
        device: str = "auto",
        dtype: torch.dtype | None = None,
        controller: Controller | None = None,
    ) -> ImageTo3D:
        """Load a checkpoint; arguments and errors are those of :func:`~.weights.load_model`."""
        return cls(load_model(model, device=device, dtype=dtype, controller=controller))

    @property
    def default_preset(self) -> str:
        """``draft`` for the embedded model, too small for the released schedule; else ``official``."""
        return "draft" if self._small else "official"

    @property
    def _small(self) -> bool:
        """Not one of the released sizes, which the released prompts and schedules were made for."""
        return self.model.card.family == "nano"

    def views(
        self,
        image: Source | PreparedPicture | None,
        prompt: str = "",
        seed: int = 0,
        steps: int = 30,
        guidance_scale: float = 5.0,
        *,
        negative_prompt: str | None = None,
        scheduler: str = "ddim",
        elevation_deg: float = 0.0,
        grey: float = 0.5,
        keep_background: bool = False,
        on_progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> Views:
        """Four views at azimuth 0 (front), 90, 180 and 270 degrees.

        ``negative_prompt`` None takes the released one; ``scheduler`` is ``ddim`` (the reference) or the name
        of a scheduler class of diffusers; ``grey`` in [0, 1] lies behind the picture.
        """
        job = self._begin(image, prompt, negative_prompt, seed, keep_background, on_progress, cancel)
        return self._views(job, steps, guidance_scale, scheduler, elevation_deg, grey)

    def fuse(
        self,
        image: Source | PreparedPicture | None,
        prompt: str = "",
        preset: str | FusionConfig | None = None,
        seed: int = 0,
        *,
        negative_prompt: str | None = None,
        keep_background: bool = False,
        checkpoint: str | Path | None = None,
        resume: bool = False,
        on_progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> Fused:
        """Multi-view score distillation into a NeRF, without a mesh.

        ``preset`` is a name of :data:`~.config.PRESETS`, a configuration, or None for :attr:`default_preset`.
        With ``checkpoint`` (a file's path) the state is saved regularly and on interrupt; ``resume``
        continues from it with the same random streams. Raises :class:`FusionError` for a NaN or an empty
        field.
        """
        config = self._config(preset)
        job = self._begin(image, prompt, negative_prompt, seed, keep_background, on_progress, cancel)
        return self._fuse(job, config, checkpoint, resume)

    def generate(
        self,
        image: Source | PreparedPicture | None,
        prompt: str = "",
        preset: str | FusionConfig | None = None,
        seed: int = 0,
        *,
        view_steps: int = 30,
        negative_prompt: str | None = None,
        keep_background: bool = False,
        faces: int = 20_000,
        texture_px: int = 1024,
        checkpoint: str | Path | None = None,
        resume: bool = False,
        on_progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> Asset:
        """The whole road: views, fusion, mesh. The views are guided as strongly as the preset's fusion.

        Arguments are those of :meth:`views`, :meth:`fuse` and :func:`~.mesh.extract_mesh`.
        """
        config = self._config(preset)
        job = self._begin(image, prompt, negative_prompt, seed, keep_background, on_progress, cancel)
        views = self._views(job, view_steps, config.guidance_scale)
        fused = self._fuse(job, config, checkpoint, resume)
        return make_asset(
            fused, views=views, faces=faces, texture_px=texture_px, on_progress=on_progress, cancel=cancel
        )

    def _config(self, preset: str | FusionConfig | None) -> FusionConfig:
        return preset_named(self.default_preset if preset is None else preset)

    def _begin(
        self,
        image: Source | PreparedPicture | None,
        prompt: str,
        negative_prompt: str | None,
        seed: int,
        keep_background: bool,
        on_progress: Progress | None,
        cancel: Cancel | None,
    ) -> _Job:
        if self.model.card.controller == "none" and not prompt.strip():
            raise InputError(f"{self.model.card.name} is conditioned on text alone, and the prompt is empty")
        record = Record(self.model.device)
        record.metadata |= {"seed": seed, "prompt": prompt}
        record.note_model(self.model)
        with record.timed("prepare"):
            if image is None or isinstance(image, PreparedPicture):
                picture = image
            else:
                picture = prepare(image, keep_background=keep_background)
        record.note_picture(picture)
        if on_progress is not None:
            on_progress("prepare", 1, 1)
        return _Job(record, picture, prompt, negative_prompt, seed, on_progress, cancel)

    def _views(
        self,
        job: _Job,
        steps: int,
        guidance_scale: float,
        scheduler: str = "ddim",
        elevation_deg: float = 0.0,
        grey: float = 0.5,
    ) -> Views:
        negative = job.negative_prompt
        if negative is None:
            negative = "" if self._small else NEGATIVE_PROMPT_VIEWS
        prompt = job.prompt if self._small else job.prompt + PROMPT_SUFFIX
        if not -90.0 <= elevation_deg <= 90.0:
            raise InputError(f"elevation_deg is {elevation_deg}; it must lie in [-90, 90]")
        job.record.metadata["views"] = {
            "steps": steps,
            "guidance_scale": guidance_scale,
            "scheduler": scheduler,
            "elevation_deg": elevation_deg,
            "grey": grey,
            "negative_prompt": negative,
        }
        with job.record.timed("views"):
            conditioner = Conditioner(self.model, job.picture, prompt, negative)
            latents = sample_views(
                self.model,
                conditioner,
                camera=official_views(elevation_deg).to(self.model.device),
                steps=steps,
                guidance_scale=guidance_scale,
                seed=job.seed,
                scheduler=scheduler,
                grey=grey,
                on_progress=job.on_progress,
                cancel=job.cancel,
            )
            images = decode_views(self.model, latents)
        level = 255 * grey
        prompt_seen = None if job.picture is None else composite(job.picture.rgba, (level, level, level))
        return Views(images, prompt_seen, job.record.metadata)

    def _fuse(self, job: _Job, config: FusionConfig, checkpoint: str | Path | None, resume: bool) -> Fused:
        negative = job.negative_prompt
        if negative is None:
            negative = "" if self._small else NEGATIVE_PROMPT_FUSION
        job.record.metadata["fusion"] = {
            **config_to_json(config),
            "negative_prompt": negative,
            "resumed": resume,
        }
        with job.record.timed("fuse"):
            conditioner = Conditioner(self.model, job.picture, job.prompt, negative)
            fusion = Fusion(
                config,
                MultiViewGuidance(self.model, conditioner, config),
                seed=job.seed,
                device=self.model.device,
                views=DiffusedViews(self.model, conditioner, config, job.seed) if config.warm_start else None,
            )
            if resume:
                if checkpoint is None:
                    raise InputError("resume needs the checkpoint to continue from")
                fusion.resume(checkpoint)
            nerf = fusion.run(on_progress=job.on_progress, cancel=job.cancel, checkpoint_path=checkpoint)
        return Fused(nerf, job.record.metadata)


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
    nerf = FusedField.load(path, _device(device))
    config = config_to_json(nerf.config)
    try:
        beside = json.loads(Path(path).with_name("metadata.json").read_text(encoding="utf-8"))
        same = config.items() <= beside["fusion"].items()
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        same = False
    return Fused(nerf, beside if same else {"fusion": config})
