"""The radiance field inside Triton kernels: device functions for a block of points.

All levels of the hash grid are looked up at once, [BLOCK, LEVELS, 2], and their features are the rows of a matrix,
[BLOCK, 2 LEVELS]; see ``_grid_lookup`` for the level parameters. Products of float32 numbers run on tensor cores
as sums of products of bfloat16 numbers, each factor split into two: exact to about 2^-16 of the factors. Where a
ReLU is active is exact in bfloat16, so that a slope, a sum of weights over active hidden units, takes two
products in place of three.

Another kernel that needs densities on its way calls :func:`density_at`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ._grid_lookup import GridLevel, level_parameters, load_levels, locate, lookup, lookup_with_slopes, padded
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
    """All levels, each number [1, LEVELS]."""
    return load_levels(p_levels, tl.arange(0, LEVELS)[None, :], LEVELS)


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
def features_at(p_table, x, y, z, level, BLOCK: tl.constexpr, LEVELS: tl.constexpr):
    """Features [BLOCK, LEVELS, 2] of points of the box, x, y, z [BLOCK, 1]."""
    everywhere = tl.full((BLOCK, LEVELS), True, tl.int1)
    cell, fraction = locate(unit_cube(x), unit_cube(y), unit_cube(z), level)
    return lookup(p_table, cell, fraction, level, everywhere, 2)


@jit
def features_and_slopes_at(p_table, x, y, z, level, BLOCK: tl.constexpr, LEVELS: tl.constexpr):
    """As :func:`features_at`, and the features' derivatives by the coordinates in the unit cube."""
    everywhere = tl.full((BLOCK, LEVELS), True, tl.int1)
    cell, fraction = locate(unit_cube(x), unit_cube(y), unit_cube(z), level)
    return lookup_with_slopes(p_table, cell, fraction, level, everywhere, 2)


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

    The table holds two features to a row, float32 or half precision. Every lane looks a point up: lanes that
    have none get any finite one, as zero. A thread is well used with eight look-ups, of one level each: 4
    warps for BLOCK = 64. Loops need num_stages=1: pipelined look-ups would go through shared memory.
    """
    features = features_at(p_table, x[:, None], y[:, None], z[:, None], level, BLOCK, LEVELS)
    hidden = product(split(tl.reshape(features, (BLOCK, 2 * LEVELS))), inner)
    return softplus(
        tl.sum(tl.maximum(hidden, 0.0) * outer[None, :], axis=1) + blob(x, y, z, strength, radius)
    )
