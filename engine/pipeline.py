"""The whole job behind one class: a loaded model that turns pictures into views, fused fields and assets."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .asset import Asset
from .backends import OWN, Backends, Plans, apply
from .cameras import official_views
from .checkpoint import config_to_json
from .conditioning import Conditioner
from .config import FusionConfig
from .config import preset as preset_named
from .distill import MultiViewGuidance
from .errors import InputError
from .fuse import Fusion
from .mesh import check_mesh_settings
from .model import Cancel, Controller, MultiViewModel, Progress
from .picture import PreparedPicture, Source, prepare
from .record import Record
from .results import Fused, Views, make_asset
from .run_context import current
from .sampler import decode_views, sample_views
from .weights import load_model

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

    def __init__(
        self, model: MultiViewModel, *, backends: Backends = OWN, plans: Plans | None = None
    ) -> None:
        """``backends`` says who computes what; ``plans`` (see :func:`~..export.plan_model.plans_in`) gives
        TensorRT plans, which components at ``auto`` then take.

        Raises :class:`InputError` for a backend that cannot be used here, and :class:`MissingDependency` for one
        that is not installed.
        """
        self.model, self.used = apply(backends, model, plans)
        self.backends = backends

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "builtin:nano",
        device: str = "auto",
        dtype: torch.dtype | None = None,
        controller: Controller | None = None,
        *,
        backends: Backends = OWN,
        plans: Plans | None = None,
    ) -> ImageTo3D:
        """Load a checkpoint (see :func:`~.weights.load_model`) and choose who computes what."""
        loaded = load_model(model, device=device, dtype=dtype, controller=controller)
        return cls(loaded, backends=backends, plans=plans)

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
        deterministic: bool = False,
        on_progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> Fused:
        """Multi-view score distillation into a NeRF, without a mesh.

        ``preset`` is a name of :data:`~.config.PRESETS`, a configuration, or None for :attr:`default_preset`.
        With ``checkpoint`` (a file's path) the state is saved regularly and on interrupt; ``resume``
        continues from it with the same random streams. ``deterministic`` makes a GPU repeat a fusion bit by bit,
        as a CPU always does (``docs/determinism.md`` has its cost). Raises :class:`FusionError` for a NaN or an empty
        field.
        """
        config = self._config(preset)
        job = self._begin(image, prompt, negative_prompt, seed, keep_background, on_progress, cancel)
        return self._fuse(job, config, checkpoint, resume, deterministic)

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
        deterministic: bool = False,
        on_progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> Asset:
        """The whole road: views, fusion, mesh. The views are guided as strongly as the preset's fusion.

        Arguments are those of :meth:`views`, :meth:`fuse` and :func:`~.mesh.extract_mesh`.
        """
        config = self._config(preset)
        check_mesh_settings(faces, texture_px)
        job = self._begin(image, prompt, negative_prompt, seed, keep_background, on_progress, cancel)
        views = self._views(job, view_steps, config.guidance_scale)
        fused = self._fuse(job, config, checkpoint, resume, deterministic)
        return make_asset(
            fused, views=views, faces=faces, texture_px=texture_px, on_progress=on_progress, cancel=cancel
        )

    def _config(self, preset: str | FusionConfig | None) -> FusionConfig:
        name = self.default_preset if preset is None else preset
        return preset_named(name, family=self.model.card.family)

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
        if not 0 <= seed < 2**63:
            raise InputError(f"seed is {seed}; it must lie in [0, 2^63)")
        if self.model.card.controller == "none" and not prompt.strip():
            raise InputError(f"{self.model.card.name} is conditioned on text alone, and the prompt is empty")
        record = Record(self.model.device)
        record.metadata |= {"seed": seed, "prompt": prompt}
        record.note_model(self.model)
        record.metadata["backends"] = {"asked": asdict(self.backends), "used": asdict(self.used)}
        if image is None or isinstance(image, PreparedPicture):
            picture = image
        else:
            with record.timed("prepare"):
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
        with current(self.model.device), job.record.timed("views"):
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
        seen = conditioner.over([(255 * grey,) * 3])
        prompt_seen = None if seen is None else seen[0].permute(1, 2, 0).contiguous().cpu().numpy()
        return Views(images, prompt_seen, job.record.metadata)

    def _fuse(
        self,
        job: _Job,
        config: FusionConfig,
        checkpoint: str | Path | None,
        resume: bool,
        deterministic: bool,
    ) -> Fused:
        negative = job.negative_prompt
        if negative is None:
            negative = "" if self._small else NEGATIVE_PROMPT_FUSION
        job.record.metadata["fusion"] = {
            **config_to_json(config),
            "negative_prompt": negative,
            "resumed": resume,
            "deterministic": deterministic or self.model.device.type == "cpu",
        }
        with current(self.model.device), job.record.timed("fuse"):
            conditioner = Conditioner(self.model, job.picture, job.prompt, negative)
            fusion = Fusion.guided_by(
                MultiViewGuidance(self.model, conditioner, config),
                seed=job.seed,
                backends=self.backends,
                deterministic=deterministic,
            )
            if resume:
                if checkpoint is None:
                    raise InputError("resume needs the checkpoint to continue from")
                fusion.resume(checkpoint)
            nerf = fusion.run(on_progress=job.on_progress, cancel=job.cancel, checkpoint_path=checkpoint)
        return Fused(nerf, job.record.metadata)
