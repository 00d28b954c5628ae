"""A field in closed form for mesh and file tests: a box with six colours under a ball, with a chosen
density."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from imagedream_rt.engine.cameras import Cameras

BOX_HALF = (0.35, 0.25, 0.3)
BALL_CENTRE, BALL_RADIUS = (0.0, 0.0, 0.4), 0.22
RED, GREEN, BLUE, YELLOW = (0.9, 0.1, 0.1), (0.1, 0.8, 0.2), (0.1, 0.2, 0.9), (0.9, 0.8, 0.1)
"""Of the box: the front (-y), the back, the left (-x) and the right side."""
GREY = (0.5, 0.5, 0.5)
"""Of the ball, and of the box's top and bottom."""
UNSEEN = (1.0, 0.0, 1.0)
"""Where there is next to no matter: no colour of a surface may be taken from there."""


@dataclass
class AnalyticField:
    """Density falls linearly from ``peak`` to 0 over ``softness`` scene units around the surface, half of
    it each side."""

    peak: float = 80.0
    softness: float = 0.03
    speck: bool = False
    """A tiny ball beside the object."""
    hollow: bool = False
    """An empty ball inside the box."""

    device = torch.device("cpu")

    def distance(self, points: Tensor) -> Tensor:
        """[N] signed distance to the surface, negative inside (exact near it)."""
        outside = points.abs() - torch.tensor(BOX_HALF)
        box = outside.clamp(min=0).norm(dim=-1) + outside.amax(-1).clamp(max=0)
        ball = (points - torch.tensor(BALL_CENTRE)).norm(dim=-1) - BALL_RADIUS
        found = torch.minimum(box, ball)
        if self.speck:
            found = torch.minimum(found, (points - torch.tensor([-0.55, 0.3, 0.4])).norm(dim=-1) - 0.03)
        if self.hollow:
            found = torch.maximum(found, 0.15 - points.norm(dim=-1))
        return found

    def density(self, points: Tensor) -> Tensor:
        return self.peak * (0.5 - self.distance(points) / self.softness).clamp(0, 1)

    def albedo(self, points: Tensor) -> Tensor:
        scaled = points / torch.tensor(BOX_HALF)
        axis = scaled.abs().argmax(-1)
        positive = scaled.gather(1, axis[:, None])[:, 0] > 0
        sides = torch.tensor([[LEFT, RIGHT] for LEFT, RIGHT in ((BLUE, YELLOW), (RED, GREEN), (GREY, GREY))])
        colour = sides[axis, positive.long()]
        above = points[:, 2] > BOX_HALF[2]
        colour = torch.where(above[:, None], torch.tensor(GREY), colour)
        thin = self.density(points) < 0.1 * self.peak
        return torch.where(thin[:, None], torch.tensor(UNSEEN), colour)

    def render(
        self, cameras: Cameras, resolution: int, background: tuple[float, float, float] = (1.0, 1.0, 1.0)
    ) -> SimpleNamespace:
        rays = cameras.rays(resolution)
        centre = rays.origins.norm(dim=-1).amax()
        light = torch.ones(rays.origins.shape[:-1])
        rgb = torch.zeros_like(rays.origins)
        step = 0.02
        for t in torch.arange(float(centre) - 0.8, float(centre) + 0.8, step):
            points = (rays.origins + t * rays.directions).reshape(-1, 3)
            alpha = (1 - torch.exp(-self.density(points) * step)).view(light.shape)
            rgb += (light * alpha)[..., None] * self.albedo(points).view(rgb.shape)
            light = light * (1 - alpha)
        return SimpleNamespace(
            rgb=rgb + light[..., None] * torch.tensor(background), opacity=1 - light[..., None]
        )
