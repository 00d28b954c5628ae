"""The hash grid inside Triton kernels: device functions that look features up and scatter gradients back.

Shared by the encoding itself and by the kernels that need features on the way to something else. A caller
keeps its points in registers and says how levels and points are arranged, by the shapes that it passes: S is
the broadcast of the two, [BLOCK] for one level in a program and [BLOCK, LEVELS] for all at once. Features
come as a last axis behind it::

    number = tl.arange(0, LEVELS)[None, :]  # a power of two >= the number of levels; or one scalar
    level = load_levels(p_levels, number, LEVELS)  # p_levels from level_parameters(levels, device)
    m = m_points[:, None] & exists(level)  # [BLOCK, LEVELS]: features of a padding level are zero
    cell, fraction = locate(x[:, None], y[:, None], z[:, None], level)
    value, dx, dy, dz = lookup_with_slopes(p_table, cell, fraction, level, m, F)  # each [BLOCK, LEVELS, F]
    features = tl.reshape(value, (BLOCK, LEVELS * F))  # level-major, as hash_encode orders them

    shares = corner_shares(fraction, level, g, (gx, gy, gz))  # or None in place of the three slopes
    add_to_corners(p_grad, cell, level, m, shares, F, PAIRS)

With one level at a time and one point to a thread (BLOCK = 32 times the warps) nothing moves between
threads; otherwise layouts of look-ups, additions and results differ and pass through shared memory.
Additions to the same entry wait for each other: neighbours in one cell had better be summed first, and
programs that run at the same time be far apart, as ``_hash_grid_kernels.scatter_kernel`` does it.

Coordinates are float32 in the unit cube, features and slopes float32 whatever the table is stored in, and
slopes are derivatives by those coordinates. Cells and fractions are those of the plain PyTorch functions in
``hash_grid``, bit for bit.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ._triton import constant, jit, tl

PRIMES = (1, 2654435761, 805459861)
"""Multipliers of the spatial hash (Mueller et al. 2022, equation 4)."""

MOST_NUMBERS = 2**31
"""Kernels number a table's features with 32 bits, for the registers' sake: rows x features stays below this."""

UNITS = 2.0**44
"""Of a gradient that is summed in whole numbers: they span +-2^19 in steps of 2^-44."""
_UNITS = constant(UNITS)


@dataclass(frozen=True)
class GridLevel:
    """One level: where its entries lie in the table and how they are indexed."""

    scale: float
    resolution: int
    offset: int
    entries: int
    hashed: bool


def padded(levels: Sequence[GridLevel]) -> int:
    """The number of levels as kernels count them: a power of two."""
    return 1 << (len(levels) - 1).bit_length()


@lru_cache(maxsize=64)
def level_parameters(levels: tuple[GridLevel, ...], device: torch.device) -> Tensor:
    """What :func:`load_levels` reads: int32 [7, padded(levels)], all zeros for a level that is not there.

    Rows: scale (the bits of a float32), highest cell, multipliers of y and z, entries, first row in the
    table, whether hashed. Made once for each grid and device, because the copy cannot be captured in a CUDA
    graph.
    """
    columns = []
    for level in levels:
        by_y, by_z = PRIMES[1:] if level.hashed else (level.resolution, level.resolution**2)
        (scale,) = struct.unpack("i", struct.pack("f", level.scale))
        numbers = (scale, level.resolution - 1, by_y, by_z, level.entries, level.offset, int(level.hashed))
        columns.append([(number + 2**31) % 2**32 - 2**31 for number in numbers])
    columns += [[0] * 7] * (padded(levels) - len(levels))
    return torch.tensor(columns, dtype=torch.int32).t().contiguous().to(device)


def adds_vectors(device: torch.device) -> bool:
    """Whether one atomic operation adds up to four neighbouring numbers: since Hopper."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@jit
def load_levels(p_levels, number, COUNT: tl.constexpr):
    """One level (``number`` a scalar) or several at once (a block); COUNT is ``padded(levels)``."""
    scale = tl.load(p_levels + number).to(tl.float32, bitcast=True)
    highest = tl.load(p_levels + COUNT + number).to(tl.float32)
    by_y = tl.load(p_levels + 2 * COUNT + number).to(tl.uint32, bitcast=True)
    by_z = tl.load(p_levels + 3 * COUNT + number).to(tl.uint32, bitcast=True)
    entries = tl.load(p_levels + 4 * COUNT + number).to(tl.uint32, bitcast=True)
    offset = tl.load(p_levels + 5 * COUNT + number)
    hashed = tl.load(p_levels + 6 * COUNT + number) != 0
    return scale, highest, by_y, by_z, entries, offset, hashed


@jit
def exists(level):
    """False for the levels that pad their number to a power of two."""
    return level[4] != 0


@jit
def _split(x, scale, highest):
    # The product is rounded by itself, as PyTorch does it: x * scale + 0.5 would become one fused operation,
    # whose last bit, up to 1/4096 of a cell on the finest level, is another one for some points.
    position = tl.fma(x, scale, 0.0) + 0.5
    cell = tl.floor(position)
    low = tl.minimum(tl.maximum(cell, 0.0), highest)
    return low.to(tl.int32).to(tl.uint32, bitcast=True), position - cell


@jit
def locate(x, y, z, level):
    """Cells of points, for :func:`corner_row`, and the points' places in them: three fractions, each [*S]."""
    cx, fx = _split(x, level[0], level[1])
    cy, fy = _split(y, level[0], level[1])
    cz, fz = _split(z, level[0], level[1])
    return (cx, cy * level[2], cz * level[3]), (fx, fy, fz)


@jit
def corner_row(cell, level, X: tl.constexpr, Y: tl.constexpr, Z: tl.constexpr):
    """Rows of the table, int32 [*S], that hold a corner of the cells: the lower (0) or upper (1) by axis."""
    entries = level[4]
    x = cell[0] + X
    y = cell[1] + Y * level[2]
    z = cell[2] + Z * level[3]
    dense = x + y + z
    # An index behind the last entry starts again at the first; a smaller one wraps around to a huge number.
    dense = tl.minimum(dense, dense - entries)
    index = tl.where(level[6], (x ^ y ^ z) & (entries - 1), dense)
    return level[5] + index.to(tl.int32, bitcast=True)


@jit
def _numbers(row, F: tl.constexpr):
    """Where the features of rows [*S] lie in the table, [*S, F]."""
    return tl.expand_dims(row * F, -1) + tl.arange(0, F)


@jit
def _edge(p_table, cell, fx, level, m, Y: tl.constexpr, Z: tl.constexpr, F: tl.constexpr):
    """Along an edge in x: interpolated features and their difference."""
    m = tl.expand_dims(m, -1)
    lower = tl.load(p_table + _numbers(corner_row(cell, level, 0, Y, Z), F), mask=m, other=0.0)
    upper = tl.load(p_table + _numbers(corner_row(cell, level, 1, Y, Z), F), mask=m, other=0.0)
    lower = lower.to(tl.float32)
    difference = upper.to(tl.float32) - lower
    return lower + fx * difference, difference


@jit
def _face(p_table, cell, fx, fy, level, m, Z: tl.constexpr, F: tl.constexpr):
    """On a face across z: interpolated features, and their slopes in x and y in units of the cell."""
    a, dx_a = _edge(p_table, cell, fx, level, m, 0, Z, F)
    b, dx_b = _edge(p_table, cell, fx, level, m, 1, Z, F)
    dy = b - a
    return a + fy * dy, dx_a + fy * (dx_b - dx_a), dy


@jit
def lookup_with_slopes(p_table, cell, fraction, level, m, F: tl.constexpr):
    """Features and their derivatives by x, y, z: four of [*S, F], zero where not ``m`` [*S]."""
    fx, fy, fz = (
        tl.expand_dims(fraction[0], -1),
        tl.expand_dims(fraction[1], -1),
        tl.expand_dims(fraction[2], -1),
    )
    low, dx_low, dy_low = _face(p_table, cell, fx, fy, level, m, 0, F)
    high, dx_high, dy_high = _face(p_table, cell, fx, fy, level, m, 1, F)
    dz = high - low
    scale = tl.expand_dims(tl.broadcast_to(level[0], fraction[0].shape), -1)
    dx = scale * (dx_low + fz * (dx_high - dx_low))
    dy = scale * (dy_low + fz * (dy_high - dy_low))
    return low + fz * dz, dx, dy, scale * dz


@jit
def lookup(p_table, cell, fraction, level, m, F: tl.constexpr):
    """Features [*S, F] alone, zero where not ``m`` [*S]."""
    return lookup_with_slopes(p_table, cell, fraction, level, m, F)[0]


@jit
def _corner_share(fraction, level, g, slopes, X: tl.constexpr, Y: tl.constexpr, Z: tl.constexpr):
    wx = tl.expand_dims(fraction[0] if X else 1.0 - fraction[0], -1)
    wy = tl.expand_dims(fraction[1] if Y else 1.0 - fraction[1], -1)
    wz = tl.expand_dims(fraction[2] if Z else 1.0 - fraction[2], -1)
    share = wx * wy * wz * g
    if slopes is not None:
        scale = tl.expand_dims(tl.broadcast_to(level[0], fraction[0].shape), -1)
        share += (scale if X else -scale) * (wy * wz) * slopes[0]
        share += (scale if Y else -scale) * (wx * wz) * slopes[1]
        share += (scale if Z else -scale) * (wx * wy) * slopes[2]
    return share


@jit
def corner_shares(fraction, level, g, slopes):
    """Gradients by the entries of the eight corners: a tuple of [*S, F], by z, y, x.

    ``g`` [*S, F] is the gradient by the features and ``slopes`` the three by their derivatives, or None.
    """
    shares = ()
    for corner in tl.static_range(8):
        share = _corner_share(fraction, level, g, slopes, corner & 1, corner >> 1 & 1, corner >> 2)
        shares += (share,)  # type: ignore[assignment]
    return shares


@jit
def add_to(p, value, m):
    """Programs add in any order: to floats, which round on the way, or to int64 in UNITS, which do not."""
    if p.dtype.element_ty == tl.int64:
        value = (value * _UNITS).to(tl.int64)
    tl.atomic_add(p, value, mask=m, sem="relaxed")


@jit
def _add_edge(p_grad, cell, level, m, lower, upper, Y: tl.constexpr, Z: tl.constexpr, F: tl.constexpr):
    """Add to both ends of an edge in x, in one operation where they fill an aligned pair of rows.

    The next vertex in x is the next row of a dense level, and every second vertex differs from the next in
    the last bit of its hash alone: half of all edges are such pairs.
    """
    row, next_row = corner_row(cell, level, 0, Y, Z), corner_row(cell, level, 1, Y, Z)
    apart = next_row // 2 != row // 2
    odd = tl.expand_dims(row % 2 == 1, -1)
    beside = tl.where(tl.expand_dims(apart, -1), 0.0, upper)
    both = tl.trans(tl.join(tl.where(odd, beside, lower), tl.where(odd, lower, beside)))
    p_pair = p_grad + _numbers(row // 2, 2 * F)
    tl.atomic_add(p_pair, tl.reshape(both, p_pair.shape), mask=tl.expand_dims(m, -1), sem="relaxed")
    p_next = p_grad + _numbers(next_row, F)
    tl.atomic_add(p_next, upper, mask=tl.expand_dims(m & apart, -1), sem="relaxed")


@jit
def add_to_corners(p_grad, cell, level, m, shares, F: tl.constexpr, PAIRS: tl.constexpr):
    """Add :func:`corner_shares` to the table's gradient, float32 or int64 as for :func:`add_to`, where ``m`` [*S].

    The additions are atomic and come in any order, so the last bits of floats differ from run to run. What
    limits them is their number, not their width up to four floats: with PAIRS there are six to a point in place
    of eight, on devices that :func:`adds_vectors`.
    """
    if PAIRS:
        for edge in tl.static_range(4):
            lower, upper = shares[2 * edge], shares[2 * edge + 1]
            _add_edge(p_grad, cell, level, m, lower, upper, edge & 1, edge >> 1, F)
    else:
        for corner in tl.static_range(8):
            row = corner_row(cell, level, corner & 1, corner >> 1 & 1, corner >> 2)
            add_to(p_grad + _numbers(row, F), shares[corner], tl.expand_dims(m, -1))
