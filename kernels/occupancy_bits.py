"""An occupancy grid as bits: small enough to stay in a processor's first cache while rays walk through it.

Cell (x, y, z) of the G^3 cells is bit c mod 32 of word c div 32, with c = (x G + y) G + z. Behind these words
come, laid out alike, those of a grid of blocks of 4^3 cells, where a bit says that any of its cells is
occupied: with it a ray crosses empty space in few steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import max_pool3d, pad

from ._triton import KernelBackend, jit, tl, use_triton

EDGE = 4
"""Cells along the edge of a block."""


@dataclass(frozen=True)
class OccupancyBits:
    """The bits of G^3 cells, and of the blocks of EDGE^3 cells that hold them."""

    words: Tensor
    """int32 [word_count(G) + word_count(ceil(G / EDGE))]"""
    resolution: int
    """G"""


def word_count(resolution: int) -> int:
    """Words that hold the bits of ``resolution``^3 cells."""
    return -(-(resolution**3) // 32)


def pack_occupancy(occupied: Tensor, *, backend: KernelBackend = "auto") -> OccupancyBits:
    """The bits of a grid ``occupied`` bool [G, G, G], on its device, without waiting for it.

    Raises ``ValueError`` for another shape or dtype.

    >>> occupied = torch.zeros(2, 2, 2, dtype=torch.bool)
    >>> occupied[0, 1, 1] = occupied[1, 0, 0] = True
    >>> pack_occupancy(occupied).words
    tensor([24,  1], dtype=torch.int32)
    """
    if occupied.dim() != 3 or occupied.dtype != torch.bool or len(set(occupied.shape)) != 1:
        raise ValueError(f"occupied is {occupied.dtype} {tuple(occupied.shape)}; it must be bool [G, G, G]")
    if use_triton(backend, occupied, dtypes=(torch.bool,)):
        return _pack_triton(occupied.contiguous())
    return pack_occupancy_reference(occupied)


def pack_occupancy_reference(occupied: Tensor) -> OccupancyBits:
    """The same in plain PyTorch."""
    blocks = max_pool3d(occupied[None].float(), EDGE, ceil_mode=True)[0]
    return OccupancyBits(torch.cat((_words(occupied), _words(blocks))), len(occupied))


def _words(grid: Tensor) -> Tensor:
    bits = grid.reshape(-1).long()
    bits = pad(bits, (0, -len(bits) % 32)).view(-1, 32)
    # The highest bit is the sign of an int32, which the conversion wraps to.
    return (bits << torch.arange(32, device=grid.device)).sum(1).to(torch.int32)


def _pack_triton(occupied: Tensor) -> OccupancyBits:
    grid = len(occupied)
    cells, blocks = word_count(grid), word_count(-(-grid // EDGE))
    words = torch.empty(cells + blocks, dtype=torch.int32, device=occupied.device)
    for edge, own in ((1, words[:cells]), (EDGE, words[cells:])):
        block = max(1, 32 // edge)
        launch = (-(-len(own) // block),)
        _pack_kernel[launch](occupied, own, len(own), grid, -(-grid // edge), EDGE=edge, WORDS=block)
    return OccupancyBits(words, grid)


@jit
def _pack_kernel(p_occupied, p_words, n_words, grid, blocks, EDGE: tl.constexpr, WORDS: tl.constexpr):
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    bit = tl.arange(0, 32)
    block = word[:, None] * 32 + bit[None, :]
    x, y, z = block // (blocks * blocks) * EDGE, block // blocks % blocks * EDGE, block % blocks * EDGE
    any_cell = tl.zeros((WORDS, 32), dtype=tl.int32)
    for dx in range(EDGE):
        for dy in range(EDGE):
            for dz in range(EDGE):
                m = (x + dx < grid) & (y + dy < grid) & (z + dz < grid)
                cell = ((x + dx) * grid + y + dy) * grid + z + dz
                any_cell |= tl.load(p_occupied + cell, mask=m, other=0).to(tl.int32)
    # Each bit is there once, so that the sum sets them all; the highest is the sign.
    tl.store(p_words + word, tl.sum(any_cell << bit[None, :], axis=1), mask=word < n_words)
