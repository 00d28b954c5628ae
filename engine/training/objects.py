"""Procedural coloured objects for training and measuring the embedded model.

An object is up to :data:`PARTS` solids, decided by one integer seed alone. All draws are vectorised over seeds and
counter-based, so that object 17 is the same object on every device and in every batch. Objects look to -y, z is up,
and fit in a ball of radius :data:`RADIUS` round the origin. Seeds from :data:`TEST_SEEDS` up are never trained on.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .shapes import contains, surface_samples

PARTS = 16
RADIUS = 0.56
TEST_SEEDS = 10**9

SOLID, STRIPES_Z, STRIPES_X, CHECKER, SPOTS, TWO_TONE = range(6)


@dataclass
class Objects:
    """N objects as tensors; unused part slots have size 0."""

    seed: Tensor
    """[N] int64."""
    kind: Tensor
    """[N] int64, index into ``KINDS`` of :mod:`~.kinds`."""
    colour_name: Tensor
    """[N] int64, index into :data:`COLOURS`: the caption's colour."""
    solid: Tensor
    """[N, P] int64: ellipsoid, box or frustum."""
    centre: Tensor
    """[N, P, 3]."""
    size: Tensor
    """[N, P, 3] half extents."""
    rotation: Tensor
    """[N, P, 3, 3], local to world."""
    taper: Tensor
    """[N, P]."""
    colour: Tensor
    """[N, P, 2, 3] RGB in [0, 1]: main and second colour of the pattern."""
    pattern: Tensor
    """[N, P] int64."""
    frequency: Tensor
    """[N, P] pattern repeats over the part."""

    def __len__(self) -> int:
        return len(self.seed)

    def __getitem__(self, index: slice | Tensor | list[int]) -> Objects:
        return Objects(*(getattr(self, f.name)[index] for f in fields(self)))

    def to(self, device: torch.device | str) -> Objects:
        return Objects(*(getattr(self, f.name).to(device) for f in fields(self)))

    def to_local(self, points: Tensor) -> Tensor:
        """World points [N, ..., 3] in every part's frame: [N, P, ..., 3]."""
        extra = points.dim() - 2
        expand = (slice(None), slice(None), *([None] * extra))
        offset = points.unsqueeze(1) - self.centre[expand]
        local = torch.einsum("npji,np...j->np...i", self.rotation, offset)
        return local / self.size.clamp_min(1e-6)[expand]

    def inside(self, points: Tensor) -> Tensor:
        """Which world points [N, K, 3] lie inside the union of the parts; [N, K] bool."""
        return self._inside_parts(points).any(1)

    def _inside_parts(self, points: Tensor) -> Tensor:
        kind = self.solid.unsqueeze(-1)
        return contains(self.to_local(points), kind, self.taper.unsqueeze(-1)) & (self.size[..., :1] > 0)

    def surface_points(self, per_part: int, generator: torch.Generator) -> Tensor:
        """World samples [N, P, per_part, 3] of every part's surface (also where another part covers it)."""
        local = surface_samples(self.solid, self.taper, per_part, generator)
        return torch.einsum(
            "npij,npkj->npki", self.rotation, local * self.size.unsqueeze(2)
        ) + self.centre.unsqueeze(2)

    def visible_surface(self, count: int, seed: int = 0) -> list[Tensor]:
        """For each object about ``count`` points [K, 3] on the outside of the union, spread by area (for Chamfer)."""
        generator = torch.Generator().manual_seed(seed)
        dense = self.surface_points(4 * count, generator)
        s = self.size
        area = s[..., 0] * s[..., 1] + s[..., 1] * s[..., 2] + s[..., 0] * s[..., 2]
        result = []
        for i in range(len(self)):
            share = (area[i] / area[i].sum() * 3 * count).long().clamp_max(4 * count)
            points = torch.cat([dense[i, p, : int(share[p])] for p in range(PARTS)])
            shrunk = self[i : i + 1]
            shrunk.size = shrunk.size * 0.995  # a point on its own part's surface must not count as inside it
            points = points[~shrunk.inside(points[None])[0]]
            order = torch.randperm(len(points), generator=generator)[:count].to(points.device)
            result.append(points[order])
        return result


class Draws:
    """Counter-based random numbers: draw k of seed s is the same wherever and however often it is made."""

    def __init__(self, seeds: Tensor, stream: int = 0) -> None:
        self.seeds, self.count = seeds.long(), stream * 1000

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """[N] float32 in [low, high)."""
        self.count += 1
        offset = (self.count * 0xBF58476D1CE4E5B9 + 2**63) % 2**64 - 2**63  # as a wrapped int64
        x = (self.seeds + 1) * -7046029254386353131 + offset
        for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
            x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
        unit = ((x >> 40) & 0xFFFFFF).float() / 2**24
        return low + (high - low) * unit

    def integer(self, count: int) -> Tensor:
        """[N] int64 in [0, count)."""
        return (self.uniform() * count).long().clamp_max(count - 1)

    def flag(self, probability: float) -> Tensor:
        return self.uniform() < probability


COLOURS = (
    "red",
    "orange",
    "yellow",
    "green",
    "teal",
    "blue",
    "purple",
    "pink",
    "white",
    "grey",
    "black",
    "brown",
)
_HUES = torch.tensor([0.0, 0.075, 0.145, 0.33, 0.48, 0.61, 0.76, 0.91, 0.1, 0.6, 0.6, 0.065])
_SATURATION = torch.tensor([0.85, 0.9, 0.85, 0.7, 0.75, 0.8, 0.6, 0.5, 0.06, 0.06, 0.1, 0.65])
_VALUE = torch.tensor([0.85, 0.95, 0.95, 0.65, 0.7, 0.85, 0.7, 0.95, 0.95, 0.55, 0.15, 0.5])


def hsv_to_rgb(h: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """[N] each in [0, 1] to RGB [N, 3]."""
    k = (torch.tensor([5.0, 3.0, 1.0], device=h.device) + 6 * h.unsqueeze(-1)) % 6
    ramp = torch.minimum(k, 4 - k).clamp(0, 1)
    return v.unsqueeze(-1) * (1 - s.unsqueeze(-1) * ramp)


def named_colour(draws: Draws, index: Tensor) -> Tensor:
    """A shade of colour ``index`` [N]; RGB [N, 3]."""
    device = index.device
    hue = (_HUES.to(device)[index] + draws.uniform(-0.02, 0.02)) % 1
    saturation = (_SATURATION.to(device)[index] * draws.uniform(0.85, 1.1)).clamp(0, 1)
    value = (_VALUE.to(device)[index] * draws.uniform(0.88, 1.08)).clamp(0, 1)
    return hsv_to_rgb(hue, saturation, value)
