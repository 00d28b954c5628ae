"""Warming up: a short run of everything a job does, so that kernels are compiled and tuned before the first job."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..kernels._triton import obstacle
from ..kernels._tuning import cache_file, compiled_folder, tuned_count
from .config import FusionConfig
from .config import preset as preset_named
from .model import MultiViewModel, Progress
from .picture import PreparedPicture

if TYPE_CHECKING:
    from .pipeline import ImageTo3D

PICTURE_PX = 512
OPAQUE_BLOB = 1000.0
"""Initial density that makes the untrained field a solid ball: it renders as many samples as a finished object."""


def warm_up(
    pipe: ImageTo3D, preset: str | FusionConfig | None = None, *, on_progress: Progress | None = None
) -> None:
    """Run two diffusion steps, and of the preset's fusion the first steps of every stage, on a made-up picture.

    Two, because the second one of a shape captures the graph that this very ``pipe`` then replays. ``preset`` None
    is the model's default. Raises :class:`~.errors.InputError` for an unknown preset.
    """
    config = preset_named(pipe.default_preset if preset is None else preset)
    picture = made_up_prompt(pipe.model)
    stages = _short_fusions(config)
    pipe.views(picture, "a ball", steps=2)
    for number, short in enumerate(stages, start=1):
        if on_progress is not None:
            on_progress("warm-up", number, len(stages) + 1)
        pipe.fuse(picture, "a ball", short)
    if on_progress is not None:
        on_progress("warm-up", len(stages) + 1, len(stages) + 1)


def cache_report(device: torch.device) -> dict[str, Any]:
    """Where the choices for a CUDA device and what was compiled are kept, JSON-ready; empty without kernels."""
    if obstacle(device) is not None:
        return {}
    return {
        "tuned": str(cache_file(device)),
        "configurations": tuned_count(device),
        "compiled": str(compiled_folder()),
        "inductor": os.environ.get("TORCHINDUCTOR_CACHE_DIR"),
    }


def _short_fusions(config: FusionConfig) -> list[FusionConfig]:
    """One for each stage; the first with the warm start, if there is one."""
    warm = config.warm_start and replace(config.warm_start, view_sets=1, ddim_steps=1, fit_steps=1)
    solid = replace(config.field, blob_strength=OPAQUE_BLOB)
    return [
        config.changed(
            steps=2, stages=(replace(stage, start=0),), field=solid, warm_start=warm if number == 0 else None
        )
        for number, stage in enumerate(config.stages)
    ]


def made_up_prompt(model: MultiViewModel) -> PreparedPicture | None:
    """The disc for a model that takes pictures, None for one that takes text only."""
    return None if model.card.controller == "none" else disc()


def disc() -> PreparedPicture:
    """A grey disc before nothing, where any picture will do."""
    y, x = np.indices((PICTURE_PX, PICTURE_PX)) - (PICTURE_PX - 1) / 2
    inside = np.hypot(x, y) < 0.4 * PICTURE_PX
    grey = np.array([128, 128, 128, 255], dtype=np.uint8)
    return PreparedPicture(np.where(inside[..., None], grey, np.uint8(0)))
