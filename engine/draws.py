"""What chance decides in a distillation step, but for noise and jitter: cameras, light, background, timestep.

The draws come from streams on the CPU and depend on nothing that the device computes, so a loop may make them
ahead of time; :func:`pack` then lays one step's out as one row of numbers, which a captured graph reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.shade import ALBEDO, Shading
from .cameras import Cameras, sample_cameras
from .config import FusionConfig
from .distill import timestep_range
from .model import VIEWS
from .random_streams import RandomStreams

CAMERA_WIDTH = 16 + 1 + 3
"""Numbers of a view: camera-to-world matrix, field of view, light position."""


@dataclass(frozen=True)
class StepDraws:
    """The draws of one step, on the CPU."""

    cameras: Cameras
    shading: Shading
    background: Tensor | None
    """[3] RGB that replaces the background network, or None."""
    t: int
    """Timestep of all views."""


def draw_step(config: FusionConfig, step: int, streams: RandomStreams) -> StepDraws:
    """The draws of step ``step``; takes the same number from every stream whatever comes out."""
    least, greatest = timestep_range(config, step)
    groups = config.stage_at(step).views // VIEWS
    return StepDraws(
        sample_cameras(config.camera, groups, streams["cameras"]),
        draw_shading(config, step, streams),
        draw_background(config, streams),
        int(torch.randint(least, greatest + 1, (), generator=streams["timesteps"])),
    )


def draw_shading(config: FusionConfig, step: int, streams: RandomStreams) -> Shading:
    """Albedo at first; later albedo, textureless or shaded, with diffuse light d ~ U[0, 1) and ambient 1 - d.

    Three draws a step whatever comes out. Source: released ``diffuse_with_point_light_material``.
    """
    diffuse, albedo, textureless = (streams.uniform("shading") for _ in range(3))
    if step < config.albedo_only_until or albedo < config.albedo_probability:
        return ALBEDO
    return Shading(1.0 - diffuse, diffuse, textureless < config.textureless_probability)


def draw_background(config: FusionConfig, streams: RandomStreams) -> Tensor | None:
    """One random colour [3] on the CPU for the whole step with probability ``random_background``, else None."""
    chosen = streams.uniform("background") < config.random_background
    colour = torch.rand(3, generator=streams["background"])
    if config.background_colours == "grey":
        colour = colour[:1].expand(3)
    return colour if chosen else None


class StepTensors(NamedTuple):
    """One step's draws as tensors: views into one row, so that writing the row changes them all."""

    c2w: Tensor
    """[V, 4, 4]"""
    fovy_rad: Tensor
    """[V]"""
    light_positions: Tensor
    """[V, 3]"""
    colour: Tensor
    """[3], and whether it replaces the background network:"""
    replaced: Tensor
    """[1] 1 or 0"""
    ambient: Tensor
    """[1]"""
    diffuse: Tensor
    """[1]"""
    textureless: Tensor
    """[1] 1 or 0"""
    t: Tensor
    """[1] timestep, as float32 (exact)"""
    lambda_orient: Tensor
    """[1] weight of the orientation loss"""

    @property
    def cameras(self) -> Cameras:
        return Cameras(self.c2w, self.fovy_rad, self.light_positions)


SCALARS = 3 + 6
"""Numbers of a step beside its views: a colour and the six single ones."""


def row_width(views: int) -> int:
    """Numbers in the row of a step with that many views."""
    return views * CAMERA_WIDTH + SCALARS


def pack(draws: StepDraws, lambda_orient: float) -> Tensor:
    """The row [row_width(V)], float32 on the CPU, that :func:`unpack` reads."""
    cameras, shading, background = draws.cameras, draws.shading, draws.background
    assert cameras.light_positions is not None
    colour = torch.zeros(3) if background is None else background
    rest = [
        float(background is not None),
        float(shading.ambient),
        float(shading.diffuse),
        float(shading.textureless),
        float(draws.t),
        lambda_orient,
    ]
    parts = (cameras.c2w, cameras.fovy_rad, cameras.light_positions, colour, torch.tensor(rest))
    return torch.cat([part.flatten() for part in parts])


def unpack(row: Tensor, views: int) -> StepTensors:
    """Views into ``row`` [row_width(views)]."""
    sizes = [16 * views, views, 3 * views, 3, 1, 1, 1, 1, 1, 1]
    c2w, fovy, light, *rest = row.split(sizes)
    return StepTensors(c2w.view(views, 4, 4), fovy, light.view(views, 3), *rest)
