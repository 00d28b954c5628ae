"""A fusion that takes milliseconds a step, and a teacher without weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from imagedream_rt.engine.cameras import Cameras
from imagedream_rt.engine.config import (
    DRAFT,
    FieldConfig,
    FusionConfig,
    HashGridConfig,
    RenderConfig,
    Stage,
    WarmStart,
)

TINY = replace(
    DRAFT,
    name="tiny",
    steps=8,
    stages=(Stage(0, 8, 8), Stage(4, 12, 4)),
    field=FieldConfig(HashGridConfig(levels=3, log2_table=10, base_resolution=4), hidden=16),
    render=RenderConfig(
        samples_per_ray=32, occupancy_resolution=16, occupancy_every=3, occupancy_warmup_steps=3
    ),
    albedo_only_until=2,
    warm_start=None,
    checkpoint_every=100,
)
TINY_WARM = replace(
    TINY, name="tiny warm", warm_start=WarmStart(view_sets=2, ddim_steps=1, fit_steps=6, rays=64)
)


class StubGuidance:
    """Pulls towards random latents; calls ``before(step)`` when asked for a target and notes what it was
    given."""

    def __init__(self, before: Callable[[int], None] | None = None, name: str = "stub") -> None:
        self.identity = {"teacher": name}
        self.before = before
        self.pictures: list[tuple[int, ...]] = []
        self.colours: list[tuple[float, float, float]] = []
        self.timesteps: list[int] = []

    def encode(self, rgb: Tensor, generator: torch.Generator) -> Tensor:
        self.pictures.append(tuple(rgb.shape))
        small = F.adaptive_avg_pool2d(rgb.permute(0, 3, 1, 2), 4)
        return torch.cat([small, small.mean(1, keepdim=True)], dim=1)

    def target(
        self,
        latents: Tensor,
        cameras: Cameras,
        colour: tuple[float, float, float],
        t: int,
        generator: torch.Generator,
    ) -> Tensor:
        if self.before is not None:
            self.before(len(self.timesteps))
        self.colours.append(colour)
        self.timesteps.append(t)
        return latents + 0.1 * torch.randn(latents.shape, generator=generator)


def grey_views(config: FusionConfig) -> Callable[..., Tensor]:
    """A source of views: a dark disc on grey, whichever view is asked for."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing="ij")
    disc = (x.square() + y.square() < 0.3)[..., None]
    picture = torch.where(disc, torch.tensor([200, 40, 20]), torch.tensor(128)).to(torch.uint8)
    return lambda views, on_progress, cancel: picture.expand(4, 16, 16, 3)
