"""Marching rays through an occupancy grid: which intervals of each ray have to be looked at.

Ray r carries the fixed lattice t_k = near_r + k step. Interval [t_k, t_{k+1}] is a sample if its midpoint
lies in the box [-1, 1]^3 and in an occupied cell. This is the traversal of nerfacc 0.5's ``traverse_grids``
with one level and no cone; it walks cell by cell where this evaluates the whole lattice at once, so that an
interval whose midpoint lies within rounding of a cell border may differ.

Ragged samples are packed: ray after ray, front to back, with ``packed_info`` [R, 2] = (first sample, count).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BOX_DIAGONAL = 2 * math.sqrt(3.0)


@dataclass(frozen=True)
class Samples:
    """Packed intervals of R rays; N in all."""

    ray_indices: Tensor
    """[N] int64, ascending."""
    t_starts: Tensor
    """[N], distance from the ray's origin."""
    t_ends: Tensor
    """[N]"""
    packed_info: Tensor
    """[R, 2] int64: where the ray's samples begin, and how many they are."""

    def __len__(self) -> int:
        return self.ray_indices.shape[0]

    def keep(self, mask: Tensor) -> Samples:
        """The samples where mask [N] is true."""
        chosen = mask.nonzero().squeeze(1)
        return pack(
            self.ray_indices[chosen], self.t_starts[chosen], self.t_ends[chosen], self.packed_info.shape[0]
        )

    def nearest(self, limit: int) -> Samples:
        """At most ``limit`` samples: every ray keeps the same number of its first ones, or all that it
        has."""
        if len(self) <= limit:
            return self
        counts = self.packed_info[:, 1].sort().values
        # With a cap equal to the i-th smallest count, the i rays before keep all and the others keep the cap.
        remaining = torch.arange(len(counts), 0, -1, device=counts.device)
        kept = counts.cumsum(0) - counts + counts * remaining
        full = int((kept <= limit).sum())
        before = int(counts[:full].sum())
        cap = (limit - before) // (len(counts) - full)
        rank = torch.arange(len(self), device=counts.device) - self.packed_info[self.ray_indices, 0]
        return self.keep(rank < cap)


def pack(ray_indices: Tensor, t_starts: Tensor, t_ends: Tensor, n_rays: int) -> Samples:
    """Samples from parallel arrays [N] that are sorted by ray."""
    counts = torch.zeros(n_rays, dtype=torch.int64, device=ray_indices.device)
    counts.index_add_(0, ray_indices, torch.ones_like(ray_indices))
    return Samples(ray_indices, t_starts, t_ends, torch.stack((counts.cumsum(0) - counts, counts), dim=1))


def march(
    origins: Tensor, directions: Tensor, occupied: Tensor, step: float, near: Tensor | None = None
) -> Samples:
    """Samples of rays in the occupied cells of the box [-1, 1]^3.

    origins, directions [R, 3] (unit directions), occupied bool [G, G, G] indexed (x, y, z), ``step`` the
    interval's length in scene units, near [R] where each ray's lattice begins (default 0). Looks at R
    ceil(2 sqrt(3) / step) points at once: the caller splits many rays. Not differentiable. Raises
    ``ValueError`` for shapes that do not fit.

    >>> occupied = torch.ones(1, 1, 1, dtype=torch.bool)
    >>> s = march(torch.tensor([[0.0, -2.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]]), occupied, step=1.0)
    >>> s.t_starts, s.packed_info
    (tensor([1., 2.]), tensor([[0, 2]]))
    """
    if origins.shape != directions.shape or origins.dim() != 2 or origins.shape[1] != 3:
        raise ValueError(
            f"origins {tuple(origins.shape)}, directions {tuple(directions.shape)}; both must be [R, 3]"
        )
    if occupied.dim() != 3 or occupied.dtype != torch.bool or len(set(occupied.shape)) != 1:
        raise ValueError(f"occupied is {occupied.dtype} {tuple(occupied.shape)}; it must be bool [G, G, G]")
    if not step > 0:
        raise ValueError(f"step is {step}; it must be positive")
    if near is not None and near.shape != origins.shape[:1]:
        raise ValueError(f"near is {tuple(near.shape)}; it must be [{origins.shape[0]}]")
    with torch.no_grad():
        return _march(origins, directions, occupied, step, near)


def _march(
    origins: Tensor, directions: Tensor, occupied: Tensor, step: float, near: Tensor | None
) -> Samples:
    n_rays, grid = origins.shape[0], occupied.shape[0]
    if near is None:
        near = origins.new_zeros(n_rays)
    # An axis along which the ray does not move would divide by zero; the slab test only needs a huge
    # quotient.
    safe = torch.where(directions.abs() < 1e-10, torch.full_like(directions, 1e-10), directions)
    to_low, to_high = (-1.0 - origins) / safe, (1.0 - origins) / safe
    enter = torch.minimum(to_low, to_high).amax(dim=1)
    leave = torch.maximum(to_low, to_high).amin(dim=1)
    # One lattice point is added in front and one behind: rounding must not lose the first or the last
    # interval.
    first = ((enter - near) / step - 0.5).ceil().sub_(1.0).clamp_min_(0.0)
    count = math.ceil(BOX_DIAGONAL / step) + 2
    k = first[:, None] + torch.arange(count, device=origins.device, dtype=origins.dtype)
    middle = torch.add(near[:, None], k + 0.5, alpha=step)
    inside = (middle >= enter[:, None]) & (middle < leave[:, None])
    cell = torch.zeros(middle.shape, dtype=torch.int64, device=origins.device)
    for axis in range(3):
        start, slope = (origins[:, axis] + 1.0) * (grid / 2), directions[:, axis] * (grid / 2)
        coordinate = torch.addcmul(start[:, None], slope[:, None], middle).clamp_(0, grid - 1)
        cell.mul_(grid).add_(coordinate.to(torch.int64))
    inside &= occupied.reshape(-1).take(cell)
    ray_indices, column = inside.nonzero(as_tuple=True)
    t_starts = near[ray_indices] + k[ray_indices, column] * step
    return pack(ray_indices, t_starts, t_starts + step, n_rays)
