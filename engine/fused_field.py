"""A finished field: rendered, queried for meshing, saved and loaded as one file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .cameras import Cameras
from .checkpoint import (
    config_from_json,
    config_to_json,
    prefixed,
    read_tensors,
    without_prefix,
    write_tensors,
)
from .config import FusionConfig
from .errors import InputError
from .nerf.background import Background
from .nerf.field import Field
from .nerf.occupancy import OccupancyGrid
from .nerf.render import render_rays
from .run_context import current

RAYS_PER_CHUNK = 16_384
POINTS_PER_CHUNK = 2**18

FIELD_KIND = "fused field"
CHECKPOINT_KIND = "fusion checkpoint"


@dataclass(frozen=True)
class Picture:
    """V renders of one resolution, float32."""

    rgb: Tensor
    """[V, H, W, 3], albedo over the background."""
    opacity: Tensor
    """[V, H, W, 1]"""
    depth: Tensor
    """[V, H, W, 1], scene units along the ray, weighted by opacity."""


@dataclass
class FusedField:
    """The NeRF that a fusion made, in the box [-1, 1]^3: z up, front to -y."""

    field: Field
    background: Background
    occupancy: OccupancyGrid
    config: FusionConfig

    @property
    def device(self) -> torch.device:
        return next(self.field.parameters()).device

    def save(self, path: Path | str) -> None:
        """One safetensors file with the configuration in its header, under a temporary name first, then
        renamed."""
        tensors = prefixed("field", self.field.state_dict())
        tensors |= prefixed("background", self.background.state_dict())
        tensors |= prefixed("occupancy", self.occupancy.state_dict())
        write_tensors(Path(path), tensors, {"kind": FIELD_KIND, "config": config_to_json(self.config)})

    @classmethod
    def load(cls, path: Path | str, device: torch.device | str = "cpu") -> FusedField:
        """From a file of :meth:`save`, or from a checkpoint of the fusion. Raises :class:`InputError`."""
        tensors, header = read_tensors(Path(path), (FIELD_KIND, CHECKPOINT_KIND))
        config = config_from_json(header["config"])
        fused = cls(Field(config.field), Background(), OccupancyGrid(config.render), config)
        try:
            fused.field.load_state_dict(without_prefix("field", tensors))
            fused.background.load_state_dict(without_prefix("background", tensors))
            fused.occupancy.load_state_dict(without_prefix("occupancy", tensors))
        except RuntimeError as error:
            raise InputError(f"{path} does not hold the field that its header describes: {error}") from error
        if not all(parameter.isfinite().all() for parameter in fused.field.parameters()):
            raise InputError(f"{path} holds weights that are not finite numbers")
        return fused.to(device)

    def to(self, device: torch.device | str) -> FusedField:
        for module in (self.field, self.background, self.occupancy):
            module.to(device)
        return self

    @torch.no_grad()
    def render(
        self, cameras: Cameras, resolution: int, background: tuple[float, float, float] = (1.0, 1.0, 1.0)
    ) -> Picture:
        """Albedo over one colour, as the released evaluation shades; without jitter, in chunks of rays."""
        rays = cameras.to(self.device).rays(resolution)
        origins, directions = rays.origins.reshape(-1, 3), rays.directions.reshape(-1, 3)
        colour = torch.tensor(background, dtype=torch.float32, device=self.device)
        parts = []
        with current(self.device):
            for begin in range(0, len(origins), RAYS_PER_CHUNK):
                chunk = slice(begin, begin + RAYS_PER_CHUNK)
                out = render_rays(
                    self.field,
                    self.background,
                    self.occupancy,
                    origins[chunk],
                    directions[chunk],
                    background_colour=colour,
                    config=self.config.render,
                )
                parts.append(torch.cat([out.rgb, out.opacity, out.depth], dim=-1))
        pixels = torch.cat(parts).view(len(cameras), resolution, resolution, 5)
        return Picture(pixels[..., :3], pixels[..., 3:4], pixels[..., 4:])

    def density(self, points: Tensor) -> Tensor:
        """sigma [N] at ``points`` [N, 3] in world units, in chunks, without gradient."""
        return self._chunked(self.field.density, points)

    def albedo(self, points: Tensor) -> Tensor:
        """RGB [N, 3] in [0, 1] at ``points`` [N, 3] in world units, in chunks, without gradient."""
        return self._chunked(self.field.albedo, points)

    @torch.no_grad()
    def _chunked(self, function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
        with current(self.device):
            return torch.cat([function(part.to(self.device)) for part in points.split(POINTS_PER_CHUNK)])
