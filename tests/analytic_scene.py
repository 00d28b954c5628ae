"""A known coloured object for fusion tests: a two-coloured ball on a box, ray cast in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from imagedream_rt.engine.cameras import Cameras

BALL_CENTRE = (0.0, 0.0, 0.19)
BALL_RADIUS = 0.27
BOX_CENTRE = (0.04, -0.04, -0.22)
BOX_HALF = (0.3, 0.22, 0.15)
RED, YELLOW = (0.85, 0.15, 0.12), (0.95, 0.8, 0.2)
FACE_COLOURS = ((0.1, 0.3, 0.8), (0.15, 0.65, 0.3), (0.85, 0.85, 0.9))
"""Of the faces across x, y and z."""


def render_scene(
    cameras: Cameras, resolution: int, background: Tensor, supersample: int = 2
) -> tuple[Tensor, Tensor]:
    """Pictures [V, H, W, 3] over ``background`` ([3] or a picture of that shape) and coverage [V, H, W,
    1]."""
    origins, directions = cameras.rays(resolution * supersample)
    colour, hit = _cast(origins, directions)
    coverage = _shrink(hit[..., None].float(), supersample)
    premultiplied = _shrink(colour * hit[..., None], supersample)
    return premultiplied + (1 - coverage) * background, coverage


def _shrink(pictures: Tensor, factor: int) -> Tensor:
    return torch.nn.functional.avg_pool2d(pictures.permute(0, 3, 1, 2), factor).permute(0, 2, 3, 1)


def _cast(origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Colour [..., 3] of the nearest hit and whether there is one [...]."""
    ball_t, ball_colour = _ball(origins, directions)
    box_t, box_colour = _box(origins, directions)
    nearest = torch.minimum(ball_t, box_t)
    return torch.where((ball_t < box_t)[..., None], ball_colour, box_colour), nearest.isfinite()


def _ball(origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    from_centre = origins - torch.tensor(BALL_CENTRE)
    b = (from_centre * directions).sum(-1)
    discriminant = b.square() - from_centre.square().sum(-1) + BALL_RADIUS**2
    t = torch.where(discriminant > 0, -b - discriminant.clamp(min=0).sqrt(), torch.inf)
    left = (from_centre + t.nan_to_num(posinf=0.0)[..., None] * directions)[..., :1] < 0
    return t, torch.where(left, torch.tensor(RED), torch.tensor(YELLOW))


def _box(origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    direction = torch.where(directions.abs() < 1e-9, 1e-9, directions)
    first = (torch.tensor(BOX_CENTRE) - origins - torch.tensor(BOX_HALF) * direction.sign()) / direction
    last = (torch.tensor(BOX_CENTRE) - origins + torch.tensor(BOX_HALF) * direction.sign()) / direction
    entry, axis = first.max(dim=-1)
    t = torch.where(entry < last.amin(-1), entry, torch.inf)
    return t, torch.tensor(FACE_COLOURS)[axis]
