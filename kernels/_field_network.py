"""The radiance field inside Triton kernels: device functions for a block of points.

All levels of the hash grid are looked up at once. A point's cell has four edges along x on each level; the two ends
of an edge are neighbours in the table nearly always, so two neighbouring lanes load them, and one cache line
answers both. They are the first axis of what is looked up, [2 ends, BLOCK, LEVELS, 2 features]; what a point has of
both is their sum over that axis, the rows of a matrix [BLOCK, 2 LEVELS].

Products of float32 numbers run on tensor cores as sums of products of bfloat16 numbers, each factor split into two:
exact to about 2^-16 of the factors. Where a ReLU is active is exact in bfloat16, so that a slope, a sum of weights
over active hidden units, takes two products in place of three.

Another kernel that needs densities on its way calls :func:`density_at`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ._grid_lookup import GridLevel, corner_row, level_parameters, load_levels, locate, padded
from ._triton import constant, interpreted, jit, tl

LEAST_LEVELS = 8
"""With two features each they fill the least depth of a matrix product."""

# What products take. The interpreter has none of bfloat16; there the same numbers come as float32.
FACTOR = constant(tl and (tl.float32 if interpreted() else tl.bfloat16))


@lru_cache(maxsize=64)
def field_levels(levels: tuple[GridLevel, ...], device: torch.device) -> Tensor:
    """What :func:`load_field_levels` reads: the parameters, int32 [7, LEVELS], of at least LEAST_LEVELS levels."""
    nothing = GridLevel(scale=0.0, resolution=1, offset=0, entries=0, hashed=False)
    return level_parameters(levels + (nothing,) * (LEAST_LEVELS - len(levels)), device)


def count_levels(levels: tuple[GridLevel, ...]) -> int:
    """The number of levels, LEVELS, as kernels count them."""
    return max(LEAST_LEVELS, padded(levels))


@jit
def load_field_levels(p_levels, LEVELS: tl.constexpr):
    """All levels, each number [1, 1, LEVELS]."""
    return load_levels(p_levels, tl.arange(0, LEVELS)[None, None, :], LEVELS)


@jit
def unit_cube(x):
    """A coordinate of the box [-1, 1]^3 in the unit cube."""
    return (x + 1.0) * 0.5


@jit
def load_vectors(p, o, m):
    """Vectors [N, 3]: three of the shape of ``o``, zero where not ``m``."""
    x = tl.load(p + o * 3, mask=m, other=0.0)
    y = tl.load(p + o * 3 + 1, mask=m, other=0.0)
    z = tl.load(p + o * 3 + 2, mask=m, other=0.0)
    return x, y, z


@jit
def locate_ends(x, y, z, level):
    """Where the points' edges begin and end.

    x, y, z [BLOCK] in the box -> the ends' cells, for ``corner_row`` with X = 0: three that broadcast to
    [2, BLOCK, LEVELS]; the points' places in their own cells, three of [1, BLOCK, LEVELS].
    """
    x, y, z = unit_cube(x)[None, :, None], unit_cube(y)[None, :, None], unit_cube(z)[None, :, None]
    cell, place = locate(x, y, z, level)
    return (cell[0] + tl.arange(0, 2)[:, None, None].to(tl.uint32), cell[1], cell[2]), place


@jit
def end_weights(place):
    """What the ends count for at a place along x, [2, BLOCK, LEVELS], and their weights' derivative, [2, 1, 1]."""
    upper = tl.arange(0, 2)[:, None, None] == 1
    return tl.where(upper, place, 1.0 - place), tl.where(upper, 1.0, -1.0)


@jit
def rows_of(row):
    """Where the features of the table's rows lie, with a last axis of them."""
    return tl.expand_dims(row * 2, -1) + tl.arange(0, 2)


@jit
def _load_ends(p_table, cell, level, Y: tl.constexpr, Z: tl.constexpr):
    return tl.load(p_table + rows_of(corner_row(cell, level, 0, Y, Z))).to(tl.float32)


@jit
def _look_up(p_table, cell, place, level):
    """Features at the ends, interpolated in y and z, and their slopes in y and z in units of the cell."""
    fy, fz = tl.expand_dims(place[1], -1), tl.expand_dims(place[2], -1)
    low = _load_ends(p_table, cell, level, 0, 0)
    dy_low = _load_ends(p_table, cell, level, 1, 0) - low
    high = _load_ends(p_table, cell, level, 0, 1)
    dy_high = _load_ends(p_table, cell, level, 1, 1) - high
    low += fy * dy_low
    dz = high + fy * dy_high - low
    return low + fz * dz, dy_low + fz * (dy_high - dy_low), dz


@jit
def features_at(p_table, x, y, z, level, BLOCK: tl.constexpr, LEVELS: tl.constexpr):
    """Features [BLOCK, 2 LEVELS] of points x, y, z [BLOCK] of the box."""
    cell, place = locate_ends(x, y, z, level)
    value, _, _ = _look_up(p_table, cell, place, level)
    weight = tl.expand_dims(end_weights(place[0])[0], -1)
    return tl.reshape(tl.sum(weight * value, axis=0), (BLOCK, 2 * LEVELS))


@jit
def features_and_slopes_at(p_table, x, y, z, level, BLOCK: tl.constexpr, LEVELS: tl.constexpr):
    """As :func:`features_at`, and the ends' shares of the features' derivatives by the coordinates in the unit cube:
    three of [2, BLOCK, LEVELS, 2]."""
    cell, place = locate_ends(x, y, z, level)
    value, dy, dz = _look_up(p_table, cell, place, level)
    weight, sign = end_weights(place[0])
    weight, scale = tl.expand_dims(weight, -1), tl.expand_dims(level[0], -1)
    features = tl.reshape(tl.sum(weight * value, axis=0), (BLOCK, 2 * LEVELS))
    weight *= scale
    return features, tl.expand_dims(sign, -1) * scale * value, weight * dy, weight * dz


@jit
def load_inner(p_inner, H: tl.constexpr, WIDTH_IN: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr):
    """Inner matrix [H, WIDTH_IN] of a perceptron, padded with zeros to [HIDDEN, WIDTH]."""
    o_hidden, o_feature = tl.arange(0, HIDDEN)[:, None], tl.arange(0, WIDTH)[None, :]
    return tl.load(
        p_inner + o_hidden * WIDTH_IN + o_feature, mask=(o_hidden < H) & (o_feature < WIDTH_IN), other=0.0
    )


@jit
def load_outer(p_outer, row: tl.constexpr, H: tl.constexpr, HIDDEN: tl.constexpr):
    """A row of an outer matrix [O, H], padded with zeros to [HIDDEN]."""
    o_hidden = tl.arange(0, HIDDEN)
    return tl.load(p_outer + row * H + o_hidden, mask=o_hidden < H, other=0.0)


@jit
def split(x):
    """x as a sum of two bfloat16 numbers, up to 2^-17 of it."""
    high = x.to(tl.bfloat16)
    low = (x - high.to(tl.float32)).to(tl.bfloat16)
    return high.to(FACTOR), low.to(FACTOR)


@jit
def transposed(x):
    """Of a split matrix."""
    return tl.trans(x[0]), tl.trans(x[1])


@jit
def product(a, b, acc=None):
    """a b + acc of split matrices."""
    acc = tl.dot(a[1], b[0], acc)
    acc = tl.dot(a[0], b[1], acc)
    return tl.dot(a[0], b[0], acc)


@jit
def exact_product(a, b, acc=None):
    """a b + acc of a matrix that bfloat16 holds exactly and a split one."""
    return tl.dot(a, b[0], tl.dot(a, b[1], acc))


@jit
def softplus(x):
    """log(1 + exp(x)), also where the exponential is far below one."""
    e = tl.exp(-tl.abs(x))
    return tl.maximum(x, 0.0) + tl.where(e < 0.01, e * (1.0 - e * (0.5 - e / 3.0)), tl.log(1.0 + e))


@jit
def blob(x, y, z, strength, radius):
    """The density's bias."""
    return strength * (1.0 - tl.sqrt(x * x + y * y + z * z) / radius)


@jit
def density_at(
    p_table, level, inner, outer, x, y, z, strength, radius, BLOCK: tl.constexpr, LEVELS: tl.constexpr
):
    """Density [BLOCK] at points of the box, x, y, z [BLOCK] float32, BLOCK >= 16 a power of two.

    Once, before any loop::

        level = load_field_levels(p_levels, LEVELS)  # p_levels from field_levels, LEVELS from count_levels
        inner = transposed(split(load_inner(p_inner, H, WIDTH_IN, HIDDEN, 2 * LEVELS)))  # of [H, WIDTH_IN]
        outer = load_outer(p_outer, 0, H, HIDDEN)  # HIDDEN >= 16 a power of two

    The table holds two features to a row, float32 or half precision. Every lane looks a point up: lanes that have none
    get any finite one, as zero. Four warps suit BLOCK = 64. Loops need num_stages=1: pipelined look-ups would go
    through shared memory.
    """
    features = features_at(p_table, x, y, z, level, BLOCK, LEVELS)
    hidden = product(split(features), inner)
    return softplus(
        tl.sum(tl.maximum(hidden, 0.0) * outer[None, :], axis=1) + blob(x, y, z, strength, radius)
    )
