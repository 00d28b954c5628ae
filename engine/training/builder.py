"""Placing the parts of a batch of procedural objects: colours, patterns, mirrored pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from .objects import COLOURS, SOLID, Draws, named_colour
from .shapes import ELLIPSOID

Value = float | Tensor
Triple = tuple[Value, Value, Value]


class Builder:
    """Collects the parts of a batch of objects of one kind."""

    def __init__(self, seeds: Tensor, stream: int) -> None:
        self.draws = Draws(seeds, stream)
        self.n, self.device = len(seeds), seeds.device
        self.rows: list[dict[str, Tensor]] = []
        u = self.draws
        self.main_name = u.integer(len(COLOURS))
        second = (self.main_name + 1 + u.integer(len(COLOURS) - 1)) % len(COLOURS)
        self.main = named_colour(u, self.main_name)
        self.second = named_colour(u, second)
        self.accent = named_colour(u, u.integer(8))
        self.dark = self.rgb(0.08, 0.08, 0.1)
        self.white = self.rgb(0.95, 0.95, 0.93)
        self.glass = self.rgb(0.55, 0.78, 0.92)
        self.pattern = torch.where(u.flag(0.35), torch.zeros_like(self.main_name), 1 + u.integer(5))
        self.frequency = u.uniform(1.5, 3.5)

    def rgb(self, r: float, g: float, b: float) -> Tensor:
        return torch.tensor([r, g, b], device=self.device).expand(self.n, 3)

    def _column(self, value: Value) -> Tensor:
        if isinstance(value, Tensor):
            return value.float()
        return torch.full((self.n,), float(value), device=self.device)

    def _triple(self, values: Triple) -> Tensor:
        return torch.stack([self._column(v) for v in values], -1)

    def add(
        self,
        solid: int,
        at: Triple,
        size: Triple,
        colour: Tensor,
        *,
        second: Tensor | None = None,
        pattern: Tensor | int = SOLID,
        frequency: Value = 2.0,
        taper: Value = 1.0,
        tilt_deg: Triple = (0.0, 0.0, 0.0),
        where: Tensor | None = None,
    ) -> None:
        """One part. ``tilt_deg`` turns it about x, then y, then z; parts with ``where`` false are left out."""
        extent = self._triple(size)
        if where is not None:
            extent = extent * where.unsqueeze(-1)
        if not isinstance(pattern, Tensor):
            pattern = torch.full((self.n,), pattern, device=self.device)
        self.rows.append(
            {
                "solid": torch.full((self.n,), solid, device=self.device),
                "centre": self._triple(at),
                "size": extent,
                "rotation": _rotation(torch.deg2rad(self._triple(tilt_deg))),
                "taper": self._column(taper),
                "colour": torch.stack((colour, colour if second is None else second), 1),
                "pattern": pattern,
                "frequency": self._column(frequency),
            }
        )

    def body(self, solid: int, at: Triple, size: Triple, **options: object) -> None:
        """A main part: main colour with the object's pattern in the second colour."""
        self.add(
            solid,
            at,
            size,
            self.main,
            second=self.second,
            pattern=self.pattern,
            frequency=self.frequency,
            **options,  # type: ignore[arg-type]
        )

    def pair(
        self,
        solid: int,
        at: Triple,
        size: Triple,
        colour: Tensor,
        tilt_deg: Triple = (0, 0, 0),
        **options: object,
    ) -> None:
        """A part and its mirror image in x."""
        x, y, z = at
        tx, ty, tz = tilt_deg
        self.add(solid, at, size, colour, tilt_deg=tilt_deg, **options)  # type: ignore[arg-type]
        self.add(solid, (-x, y, z), size, colour, tilt_deg=(tx, -ty, -tz), **options)  # type: ignore[arg-type]

    def eyes(self, x: Value, y: Value, z: Value, r: Value) -> None:
        self.pair(ELLIPSOID, (x, y, z), (r, 0.6 * r, r), self.white)
        self.pair(ELLIPSOID, (x, y - 0.45 * r, z), (0.5 * r, 0.4 * r, 0.5 * r), self.dark)

    def finish(self, slots: int) -> dict[str, Tensor]:
        """Every field stacked to [n, slots, ...]; unused slots have size 0."""
        assert len(self.rows) <= slots, f"{len(self.rows)} parts, {slots} slots"
        result = {}
        for name, first in self.rows[0].items():
            stacked = torch.stack([row[name] for row in self.rows], 1)
            pad = torch.zeros(
                (self.n, slots - len(self.rows), *first.shape[1:]), dtype=first.dtype, device=self.device
            )
            result[name] = torch.cat((stacked, pad), 1)
        return result


def _rotation(angles: Tensor) -> Tensor:
    """[N, 3] radians about x, y, z, applied in that order; [N, 3, 3]."""
    cx, cy, cz = angles.cos().unbind(-1)
    sx, sy, sz = angles.sin().unbind(-1)
    rows = (
        torch.stack((cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx), -1),
        torch.stack((sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx), -1),
        torch.stack((-sy, cy * sx, cy * cx), -1),
    )
    return torch.stack(rows, -2)
