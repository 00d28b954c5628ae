"""Ragged samples along rays: the packed intervals that marching finds and compositing sums up.

Samples are packed ray after ray, front to back, with ``packed_info`` [R, 2] = (first sample, count). They lie
in arrays of exactly their number, or in buffers of a fixed capacity with their number on the device, which
needs no host synchronisation and so fits into a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._triton import KernelBackend, jit, tl, use_triton

MOST_SAMPLES = 2**31 - 1
"""Kernels count in 32 bits."""

ALLOTTED = 8192
"""Rays, or sums over blocks of them, that :func:`allot` looks at together."""

POINTS = 512
"""Midpoints that one program computes."""


@dataclass(frozen=True)
class Samples:
    """Packed intervals of R rays, in N rows. Integers are int64, or int32 from the kernels."""

    ray_indices: Tensor
    """[N], ascending over the valid rows."""
    t_starts: Tensor
    """[N], distance from the ray's origin."""
    t_ends: Tensor
    """[N]"""
    packed_info: Tensor
    """[R, 2]: where the ray's samples begin, and how many they are."""
    count: Tensor | None = None
    """int32 [1] of buffers with a fixed capacity N: rows from ``count`` on mean nothing, and may hold anything. None:
    all rows are valid."""
    found: Tensor | None = None
    """int32 [1] with ``count``: how many samples there were before the capacity cut the farthest off."""

    def __len__(self) -> int:
        return self.ray_indices.shape[0]

    def trim(self) -> Samples:
        """Arrays of exactly the valid rows. Waits for the device if the capacity is fixed."""
        if self.count is None:
            return self
        rows = slice(int(self.count))
        return Samples(self.ray_indices[rows], self.t_starts[rows], self.t_ends[rows], self.packed_info)

    def within(self, capacity: int) -> Samples:
        """The same samples in buffers of ``capacity`` rows; the nearest ones if they are more."""
        if self.count is not None:
            raise ValueError("these samples lie in buffers of a fixed capacity already")
        kept = self.nearest(capacity)
        room = (0, capacity - len(kept))
        count, found = (
            torch.tensor([n], dtype=torch.int32, device=self.t_starts.device) for n in (len(kept), len(self))
        )
        return Samples(
            pad(kept.ray_indices, room),
            pad(kept.t_starts, room),
            pad(kept.t_ends, room),
            kept.packed_info,
            count,
            found,
        )

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
    counts.index_add_(0, ray_indices, torch.ones_like(ray_indices, dtype=torch.int64))
    return Samples(ray_indices, t_starts, t_ends, torch.stack((counts.cumsum(0) - counts, counts), dim=1))


def midpoints(
    origins: Tensor, directions: Tensor, samples: Samples, *, backend: KernelBackend = "auto"
) -> Tensor:
    """Points [N, 3] in the middle of the samples of rays with origins and directions [R, 3].

    Not differentiable by the kernel, for which the rays are constants. In buffers of a fixed capacity the points
    behind the samples are undefined.

    >>> samples = pack(torch.tensor([0]), torch.tensor([1.0]), torch.tensor([2.0]), 1)
    >>> midpoints(torch.tensor([[0.0, -2.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]]), samples)
    tensor([[ 0.0000, -0.5000,  0.0000]])
    """
    if use_triton(backend, origins, directions, samples.t_starts, dtypes=(torch.float32,)):
        points = torch.empty(len(samples), 3, device=origins.device)
        intervals = (samples.ray_indices, samples.t_starts, samples.t_ends)
        grid = (-(-len(samples) // POINTS),)
        _midpoint_kernel[grid](
            *(x.contiguous() for x in (origins, directions, *intervals)),
            *(samples.count, points, len(samples)),
            BLOCK=POINTS,
        )
        return points
    exact = samples.trim()
    middle = (exact.t_starts + exact.t_ends) / 2.0
    rays = exact.ray_indices
    points = origins.index_select(0, rays) + directions.index_select(0, rays) * middle[:, None]
    return pad(points, (0, 0, 0, len(samples) - len(exact)))


@jit
def _midpoint_kernel(
    p_origins,
    p_directions,
    p_ray_indices,
    p_t_starts,
    p_t_ends,
    p_count,
    p_points,
    n_samples,
    BLOCK: tl.constexpr,
):
    if p_count is not None:
        n_samples = tl.minimum(n_samples, tl.load(p_count))
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = row < n_samples
    ray = tl.load(p_ray_indices + row, mask=m, other=0)
    middle = (tl.load(p_t_starts + row, mask=m) + tl.load(p_t_ends + row, mask=m)) * 0.5
    for axis in tl.static_range(3):
        origin = tl.load(p_origins + ray * 3 + axis, mask=m)
        direction = tl.load(p_directions + ray * 3 + axis, mask=m)
        tl.store(p_points + row * 3 + axis, origin + direction * middle, mask=m)


class Allotment(NamedTuple):
    """Where blocks of consecutive rays write their samples."""

    begins: Tensor
    """int32 [blocks]: each block's first row."""
    totals: Tensor
    """int32 [3]: number of samples kept, number found, and the most that one ray keeps."""


def allot(counts: Tensor, sums: Tensor, rays_per_block: int, capacity: int | None) -> Allotment:
    """Rows for the samples of R rays, at most ``capacity`` in all if given; nothing leaves the device.

    counts int32 [R] and ``sums`` int32 [blocks], their sums over blocks of rays. If there are more than
    ``capacity``, every ray keeps the same number of its nearest samples, or all that it has, as in
    :meth:`Samples.nearest`.
    """
    begins, totals = torch.empty_like(sums), sums.new_empty(3)
    _allot_kernel[(1,)](
        counts,
        sums,
        begins,
        totals,
        len(counts),
        len(sums),
        MOST_SAMPLES if capacity is None else capacity,
        RAYS=rays_per_block,
        BLOCKS=ALLOTTED // rays_per_block,
        BLOCK=ALLOTTED,
        num_warps=16,
    )
    return Allotment(begins, totals)


def buffers(allotment: Allotment, n_rays: int, capacity: int | None) -> Samples:
    """Where the kernels write: ``capacity`` rows, or without it just the rows that are needed, which waits
    for the device. ``packed_info`` is to be written as well."""
    totals = allotment.totals
    exact = capacity is None
    rows = int(totals[0]) if capacity is None else capacity
    return Samples(
        totals.new_empty(rows),
        totals.new_empty(rows, dtype=torch.float32),
        totals.new_empty(rows, dtype=torch.float32),
        totals.new_empty(n_rays, 2),
        None if exact else totals[:1],
        None if exact else totals[1:2],
    )


@jit
def share_out(p_counts, p_begins, p_totals, p_packed_info, ray, m_ray):
    """How many samples each of the program's rays may write, and from which row; notes both down."""
    share = tl.minimum(tl.load(p_counts + ray, mask=m_ray, other=0), tl.load(p_totals + 2))
    begin = tl.load(p_begins + tl.program_id(0)) + tl.cumsum(share) - share
    tl.store(p_packed_info + ray * 2, begin, mask=m_ray)
    tl.store(p_packed_info + ray * 2 + 1, share, mask=m_ray)
    return share, begin


@jit
def _sums_under(p_counts, block, n_rays, cap, RAYS: tl.constexpr, BLOCKS: tl.constexpr):
    """What BLOCKS blocks of rays keep if no ray keeps more than ``cap``."""
    rays = (block + tl.arange(0, BLOCKS))[:, None] * RAYS + tl.arange(0, RAYS)[None, :]
    counts = tl.load(p_counts + rays, mask=rays < n_rays, other=0)
    return tl.sum(tl.minimum(counts, cap), axis=1)


@jit
def _allot_kernel(
    p_counts,
    p_sums,
    p_begins,
    p_totals,
    n_rays,
    n_blocks,
    capacity,
    RAYS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    found = 0
    first = 0
    while first < n_blocks:
        blocks = first + tl.arange(0, BLOCK)
        found += tl.sum(tl.load(p_sums + blocks, mask=blocks < n_blocks, other=0))
        first += BLOCK
    begin = 0
    cap = found
    first = 0
    if found <= capacity:
        while first < n_blocks:
            blocks = first + tl.arange(0, BLOCK)
            sums = tl.load(p_sums + blocks, mask=blocks < n_blocks, other=0)
            tl.store(p_begins + blocks, begin + tl.cumsum(sums) - sums, mask=blocks < n_blocks)
            begin += tl.sum(sums)
            first += BLOCK
    else:
        # The greatest cap under which they fit, by bisection: under ``cap`` they do, under ``beyond`` not.
        cap = 0
        beyond = found
        while beyond - cap > 1:
            middle = cap + (beyond - cap) // 2
            kept = 0
            first = 0
            while first < n_blocks:
                kept += tl.sum(_sums_under(p_counts, first, n_rays, middle, RAYS, BLOCKS))
                first += BLOCKS
            if kept <= capacity:
                cap = middle
            else:
                beyond = middle
        first = 0
        while first < n_blocks:
            blocks = first + tl.arange(0, BLOCKS)
            sums = _sums_under(p_counts, first, n_rays, cap, RAYS, BLOCKS)
            tl.store(p_begins + blocks, begin + tl.cumsum(sums) - sums, mask=blocks < n_blocks)
            begin += tl.sum(sums)
            first += BLOCKS
    tl.store(p_totals, begin)
    tl.store(p_totals + 1, found)
    tl.store(p_totals + 2, cap)
