"""Training groups, rendered on the fly: four views of a procedural object and a prompt picture (paper section 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import DRAFT
from ..model import VIEWS
from ..picture import OBJECT_FRACTION
from .kinds import make_objects
from .objects import Objects
from .raycast import prompt_window, render

CAMERA = DRAFT.camera
"""The cameras that the embedded model learns are those that its fusion preset draws."""
PROMPT_AZIMUTH_DEG = (-90.0, 90.0)
PROMPT_ELEVATION_DEG = (-5.0, 30.0)
PROMPT_FOVY_DEG = (30.0, 55.0)


@dataclass
class Groups:
    """N training groups as pictures."""

    views: Tensor
    """[N, 4, px, px, 3] uint8."""
    prompt: Tensor
    """[N, px, px, 3] uint8, over the same background as the views."""
    camera: Tensor
    """[N, 4, 16]."""
    kind: Tensor
    """[N]."""
    colour_name: Tensor
    """[N]."""


def look_at_origin(azimuth_deg: Tensor, elevation_deg: Tensor, distance: Tensor) -> Tensor:
    """Camera-to-world matrices [..., 4, 4]; the batched form of :func:`~..cameras.orbit_cameras`."""
    azimuth, elevation = torch.deg2rad(azimuth_deg - 90), torch.deg2rad(elevation_deg)
    sa, ca, se, ce = azimuth.sin(), azimuth.cos(), elevation.sin(), elevation.cos()
    zero, one = torch.zeros_like(sa), torch.ones_like(sa)
    right = torch.stack((-sa, ca, zero), -1)
    up = torch.stack((-se * ca, -se * sa, ce), -1)
    back = torch.stack((ce * ca, ce * sa, se), -1)
    top = torch.stack((right, up, back, back * distance.unsqueeze(-1)), -1)
    return torch.cat((top, torch.stack((zero, zero, zero, one), -1).unsqueeze(-2)), -2)


class GroupSampler:
    """Draws groups on one device; one generator decides objects, cameras and backgrounds."""

    def __init__(
        self, picture_px: int, device: torch.device, generator: torch.Generator, *, max_seed: int, chunk: int
    ) -> None:
        """``chunk`` groups come with every call: one shape, so that the renderer is compiled once."""
        self.px, self.device, self.generator = picture_px, device, generator
        self.max_seed, self.chunk = max_seed, chunk
        self._render = torch.compile(render, dynamic=False) if device.type == "cuda" else render
        self._stock: list[Objects] = []

    def _uniform(self, n: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=self.generator, device=self.device)

    def _objects(self) -> Objects:
        if not self._stock:
            # making an object is many tiny operations whatever the batch, so make many at once
            count = self.chunk * (32 if self.device.type == "cuda" else 1)
            seeds = torch.randint(self.max_seed, (count,), generator=self.generator, device=self.device)
            made = make_objects(seeds)
            self._stock = [made[i : i + self.chunk] for i in range(0, count, self.chunk)]
        return self._stock.pop()

    @torch.no_grad()
    def sample(self) -> Groups:
        """``chunk`` groups of fresh objects."""
        n, objects = self.chunk, self._objects()
        c2w, fovy, camera = self._view_cameras(n)
        prompt_c2w, prompt_fovy, window = self._prompt_cameras(objects, n)
        whole = torch.tensor([0.0, 0.0, 1.0], device=self.device).expand(n, VIEWS, 3)
        rgba = self._render(
            objects,
            torch.cat((c2w, prompt_c2w), 1),
            torch.cat((fovy, prompt_fovy), 1),
            self.px,
            window=torch.cat((whole, window), 1),
        )
        pictures = _uint8(_over(rgba, self._backgrounds(n)[:, None]))
        return Groups(pictures[:, :VIEWS], pictures[:, VIEWS], camera, objects.kind, objects.colour_name)

    def _view_cameras(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        fovy_deg = self._uniform(n, *CAMERA.fovy_deg)
        distance = self._uniform(n, *CAMERA.relative_distance) / torch.tan(torch.deg2rad(fovy_deg) / 2)
        low = self._uniform(n, 0.0, 5.0)
        wide = self._uniform(n, *CAMERA.elevation_deg)
        elevation = torch.where(self._uniform(n, 0, 1) < 0.4, low, wide)
        offset = self._uniform(n, 0.0, 360.0) * (self._uniform(n, 0, 1) > 0.25)
        azimuth = offset[:, None] + torch.arange(VIEWS, device=self.device) * 90.0
        c2w = look_at_origin(
            azimuth, elevation[:, None].expand_as(azimuth), distance[:, None].expand_as(azimuth)
        )
        unit = c2w.clone()
        unit[..., :3, 3] /= distance[:, None, None]
        return c2w, torch.deg2rad(fovy_deg)[:, None].expand(n, VIEWS), unit.flatten(2)

    def _prompt_cameras(self, objects: Objects, n: int) -> tuple[Tensor, Tensor, Tensor]:
        fovy_deg = self._uniform(n, *PROMPT_FOVY_DEG)
        distance = 0.75 / torch.tan(torch.deg2rad(fovy_deg) / 2)
        c2w = look_at_origin(
            self._uniform(n, *PROMPT_AZIMUTH_DEG), self._uniform(n, *PROMPT_ELEVATION_DEG), distance
        )[:, None]
        fovy = torch.deg2rad(fovy_deg)[:, None]
        window = prompt_window(render(objects, c2w, fovy, 64, supersample=1), OBJECT_FRACTION)
        # people's pictures are never cut exactly: a little off in place and size
        jitter = torch.stack(
            [self._uniform(n, -0.02, 0.02) for _ in range(2)] + [self._uniform(n, 0.0, 0.05)], -1
        )
        return c2w, fovy, window + jitter[:, None] * window[..., 2:]

    def _backgrounds(self, n: int) -> Tensor:
        grey = self._uniform(n, 0.0, 1.0)[:, None].expand(n, 3)
        colour = torch.rand((n, 3), generator=self.generator, device=self.device)
        return torch.where(self._uniform(n, 0, 1)[:, None] < 0.6, grey, colour)


def _over(premultiplied: Tensor, background: Tensor) -> Tensor:
    """RGBA [N, ..., H, W, 4] over one colour for each leading index."""
    return premultiplied[..., :3] + (1 - premultiplied[..., 3:]) * background[..., None, None, :]


def _uint8(picture: Tensor) -> Tensor:
    return (picture.clamp(0, 1) * 255 + 0.5).to(torch.uint8)


def signed(pictures: Tensor) -> Tensor:
    """uint8 [..., H, W, 3] as the codec takes it: [-1, 1], [..., 3, H, W]."""
    return pictures.movedim(-1, -3).float() / 127.5 - 1


def unit_distance(fovy_deg: float) -> float:
    """Distance at which the middle of the trained range of sizes is seen."""
    return sum(CAMERA.relative_distance) / 2 / math.tan(math.radians(fovy_deg) / 2)
