"""The radiance field's two Triton kernels, each one pass over the points; see ``radiance_field`` for the formulas.

A point's features and hidden units are never stored: the backward kernel computes them again.
"""

from __future__ import annotations

from ._field_network import (
    FACTOR,
    blob,
    end_weights,
    exact_product,
    features_and_slopes_at,
    features_at,
    load_field_levels,
    load_inner,
    load_outer,
    load_vectors,
    locate_ends,
    product,
    rows_of,
    softplus,
    split,
    transposed,
)
from ._grid_lookup import corner_row, exists
from ._triton import constant, jit, tl

UNITS = 2.0**44
"""Of a gradient that is summed in whole numbers: they span +-2^19 in steps of 2^-44."""
_UNITS = constant(UNITS)


@jit
def _blocks(p_count, n, BLOCK: tl.constexpr):
    """The number of points, and this program's blocks of them: its first and the one behind its last.

    Programs take neighbouring blocks, for the cache's sake, and are far from each other, so that they seldom
    add to the same entry of the table at once.
    """
    if p_count is not None:
        n = tl.minimum(n, tl.load(p_count))
    blocks = tl.cdiv(n, BLOCK)
    each = tl.cdiv(blocks, tl.num_programs(0))
    first = tl.program_id(0) * each
    return n, first, tl.minimum(first + each, blocks)


@jit
def _blob_slope(x, y, z, strength, radius):
    """d blob / d point."""
    square = x * x + y * y + z * z
    factor = tl.where(square > 1e-24, -strength / radius * tl.rsqrt(tl.maximum(square, 1e-24)), 0.0)
    return x * factor, y * factor, z * factor


@jit
def _sum_for_points(x):
    """[2, BLOCK, LEVELS, 2] -> [BLOCK]."""
    return tl.sum(tl.sum(tl.sum(x, axis=3), axis=2), axis=0)


@jit(do_not_specialize=("n",))
def forward_kernel(
    p_points,
    p_table,
    p_levels,
    p_inner,
    p_outer,
    p_colour_inner,
    p_colour_outer,
    p_count,
    p_sigma,
    p_albedo,
    p_normal,
    p_inverse,
    n,
    strength,
    radius,
    LEVELS: tl.constexpr,
    WIDTH_IN: tl.constexpr,
    H: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """p_albedo, p_normal: None for what is not asked for; p_inverse: 1 / |g| for the backward kernel, or None."""
    WIDTH: tl.constexpr = 2 * LEVELS
    level = load_field_levels(p_levels, LEVELS)
    inner = load_inner(p_inner, H, WIDTH_IN, HIDDEN, WIDTH)
    outer = load_outer(p_outer, 0, H, HIDDEN)
    through = split(outer[:, None] * inner)
    inner = transposed(split(inner))
    if p_albedo is not None:
        colour_inner = transposed(split(load_inner(p_colour_inner, H, WIDTH_IN, HIDDEN, WIDTH)))
    n, block, behind = _blocks(p_count, n, BLOCK)
    while block < behind:
        o = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x, y, z = load_vectors(p_points, o, o < n)
        if p_normal is None:
            features = features_at(p_table, x, y, z, level, BLOCK, LEVELS)
        else:
            features, by_x, by_y, by_z = features_and_slopes_at(p_table, x, y, z, level, BLOCK, LEVELS)
        features = split(features)
        hidden = product(features, inner)
        raw = tl.sum(tl.maximum(hidden, 0.0) * outer[None, :], axis=1) + blob(x, y, z, strength, radius)
        tl.store(p_sigma + o, softplus(raw), mask=o < n)
        if p_normal is not None:
            active = tl.where(hidden > 0.0, 1.0, 0.0).to(FACTOR)
            slope = tl.reshape(exact_product(active, through), (1, BLOCK, LEVELS, 2))
            bx, by, bz = _blob_slope(x, y, z, strength, radius)
            gx = 0.5 * _sum_for_points(slope * by_x) + bx
            gy = 0.5 * _sum_for_points(slope * by_y) + by
            gz = 0.5 * _sum_for_points(slope * by_z) + bz
            square = gx * gx + gy * gy + gz * gz
            inverse = tl.where(square > 1e-24, tl.rsqrt(tl.maximum(square, 1e-24)), 0.0)
            tl.store(p_normal + o * 3, -gx * inverse, mask=o < n)
            tl.store(p_normal + o * 3 + 1, -gy * inverse, mask=o < n)
            tl.store(p_normal + o * 3 + 2, -gz * inverse, mask=o < n)
            if p_inverse is not None:
                tl.store(p_inverse + o, inverse, mask=o < n)
        if p_albedo is not None:
            hidden = tl.maximum(product(features, colour_inner), 0.0)
            for channel in tl.static_range(3):
                row = load_outer(p_colour_outer, channel, H, HIDDEN)
                value = tl.sigmoid(tl.sum(hidden * row[None, :], axis=1))
                tl.store(p_albedo + o * 3 + channel, value, mask=o < n)
        block += 1


@jit
def _grad_raw(p_sigma, p_grad_sigma, o, m):
    """Gradient by the density before its softplus, of the shape of ``o``."""
    sigma = tl.load(p_sigma + o, mask=m, other=0.0)
    # 1 - exp(-softplus(raw)) = sigmoid(raw)
    part = tl.where(sigma < 0.01, sigma * (1.0 - sigma * (0.5 - sigma / 6.0)), 1.0 - tl.exp(-sigma))
    return tl.load(p_grad_sigma + o, mask=m, other=0.0) * part


@jit
def _grad_slope(p_normal, p_grad_normal, p_inverse, o, m):
    """Gradient by the features' share of g, sum_f s_f J_f in the unit cube: three of the shape of ``o``."""
    nx, ny, nz = load_vectors(p_normal, o, m)
    gx, gy, gz = load_vectors(p_grad_normal, o, m)
    along = nx * gx + ny * gy + nz * gz
    factor = 0.5 * tl.load(p_inverse + o, mask=m, other=0.0)
    return (along * nx - gx) * factor, (along * ny - gy) * factor, (along * nz - gz) * factor


@jit
def _share(place, slope, g, s, Y: tl.constexpr, Z: tl.constexpr):
    weight, sign = end_weights(place[0])
    wy = place[1] if Y else 1.0 - place[1]
    wz = place[2] if Z else 1.0 - place[2]
    share = tl.expand_dims(weight * wy * wz, -1) * g
    if slope is not None:
        across = (slope[1] if Y else -slope[1]) * wz + (slope[2] if Z else -slope[2]) * wy
        share += tl.expand_dims(sign * slope[0] * (wy * wz) + weight * across, -1) * s
    return share


@jit
def _of_run(x, j, GROUPS: tl.constexpr, RUN: tl.constexpr, LEVELS: tl.constexpr):
    """Rows g RUN + j of x [GROUPS RUN, 2 LEVELS], as [1, GROUPS, LEVELS, 2]."""
    x = tl.permute(tl.reshape(x, (GROUPS, RUN, LEVELS, 2)), (0, 2, 3, 1))
    return tl.expand_dims(tl.sum(tl.where(tl.arange(0, RUN) == j, x, 0.0), axis=3), 0)


@jit
def _shares(
    upstream, o_run, n, g, s, j, level, GROUPS: tl.constexpr, RUN: tl.constexpr, LEVELS: tl.constexpr
):
    """Of the ``j``-th points of the runs: the cells of their edges' ends, and the gradients by the entries at the ends
    of the four edges, each [2, GROUPS, LEVELS, 2].

    g, the gradient by a feature, goes to its value; s, the slope of raw by it, along the gradient by the slope of raw
    to its differences.
    """
    p_points, p_normal, p_grad_normal, p_inverse = upstream
    o = o_run + j
    m = o < n
    # Volatile: what was computed for the look-up is computed again, rather than kept in registers meanwhile.
    x = tl.load(p_points + o * 3, mask=m, other=0.0, volatile=True)
    y = tl.load(p_points + o * 3 + 1, mask=m, other=0.0, volatile=True)
    z = tl.load(p_points + o * 3 + 2, mask=m, other=0.0, volatile=True)
    cell, place = locate_ends(x, y, z, level)
    if p_grad_normal is None:
        slope = None
    else:
        sx, sy, sz = _grad_slope(p_normal, p_grad_normal, p_inverse, o, m)
        slope = (level[0] * sx[None, :, None], level[0] * sy[None, :, None], level[0] * sz[None, :, None])
    g, s = _of_run(g, j, GROUPS, RUN, LEVELS), _of_run(s, j, GROUPS, RUN, LEVELS)
    shares = ()
    for edge in tl.static_range(4):
        share = _share(place, slope, g, s, edge & 1, edge >> 1)
        shares += (share,)  # type: ignore[assignment]
    return cell, shares


@jit
def _add_to(p, value, m, WHOLE: tl.constexpr):
    """Programs add in any order: to floats, which round on the way, or to whole numbers, which do not."""
    if WHOLE:
        value = (value * _UNITS).to(tl.int64)
    tl.atomic_add(p, value, mask=m, sem="relaxed")


@jit
def _add(p_grad_table, cell, level, m, shares, WHOLE: tl.constexpr):
    for edge in tl.static_range(4):
        p_rows = p_grad_table + rows_of(corner_row(cell, level, 0, edge & 1, edge >> 1))
        _add_to(p_rows, shares[edge], tl.expand_dims(m, -1), WHOLE)


@jit
def _sum_where(m, a, b):
    """b, plus a where ``m``, for four edges."""
    sums = ()
    for edge in tl.static_range(4):
        both = b[edge] + tl.where(tl.expand_dims(m, -1), a[edge], 0.0)
        sums += (both,)  # type: ignore[assignment]
    return sums


@jit
def _scatter(
    p_points,
    p_normal,
    p_grad_normal,
    p_inverse,
    p_grad_table,
    g,
    s,
    o_run,
    n,
    level,
    GROUPS: tl.constexpr,
    RUN: tl.constexpr,
    LEVELS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Add both orders to the table's gradient.

    Neighbouring points are samples of a ray: many share a cell of the coarse levels, and additions to the same entry
    wait for each other. So a thread takes RUN neighbours, one after another, and adds for those in the same cell
    together.
    """
    upstream = (p_points, p_normal, p_grad_normal, p_inverse)
    m = (o_run < n)[None, :, None] & exists(level)
    cell, shares = _shares(upstream, o_run, n, g, s, 0, level, GROUPS, RUN, LEVELS)
    for j in tl.range(1, RUN):
        m_next = (o_run + j < n)[None, :, None] & exists(level)
        cell_next, shares_next = _shares(upstream, o_run, n, g, s, j, level, GROUPS, RUN, LEVELS)
        same = m_next & (cell[0] == cell_next[0]) & (cell[1] == cell_next[1]) & (cell[2] == cell_next[2])
        _add(p_grad_table, cell, level, m & ~same, shares, WHOLE)
        shares = _sum_where(same, shares, shares_next)
        cell, m = cell_next, m_next
    _add(p_grad_table, cell, level, m, shares, WHOLE)


@jit(do_not_specialize=("n",))
def backward_kernel(
    p_points,
    p_table,
    p_levels,
    p_inner,
    p_outer,
    p_colour_inner,
    p_colour_outer,
    p_count,
    p_sigma,
    p_albedo,
    p_normal,
    p_inverse,
    p_grad_sigma,
    p_grad_albedo,
    p_grad_normal,
    p_grad_table,
    p_grad_inner,
    p_grad_outer,
    p_grad_colour_inner,
    p_grad_colour_outer,
    n,
    LEVELS: tl.constexpr,
    WIDTH_IN: tl.constexpr,
    H: tl.constexpr,
    HIDDEN: tl.constexpr,
    GROUPS: tl.constexpr,
    RUN: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """p_grad_sigma, p_grad_albedo, p_grad_normal: None for outputs that the loss does not use.

    With WHOLE the gradients by the parameters are int64, in UNITS.
    """
    BLOCK: tl.constexpr = GROUPS * RUN
    WIDTH: tl.constexpr = 2 * LEVELS
    level = load_field_levels(p_levels, LEVELS)
    inner = load_inner(p_inner, H, WIDTH_IN, HIDDEN, WIDTH)
    through = split(load_outer(p_outer, 0, H, HIDDEN)[:, None] * inner)
    inner = transposed(split(inner))
    both_orders = tl.zeros((HIDDEN, WIDTH), tl.float32)
    if p_grad_albedo is not None:
        colour_inner = split(load_inner(p_colour_inner, H, WIDTH_IN, HIDDEN, WIDTH))
        grad_colour_inner = tl.zeros((HIDDEN, WIDTH), tl.float32)
        grad_colour_outer = tl.zeros((HIDDEN, 16), tl.float32)
    n, block, behind = _blocks(p_count, n, BLOCK)
    while block < behind:
        o = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x, y, z = load_vectors(p_points, o, o < n)
        if p_grad_normal is None:
            features = features_at(p_table, x, y, z, level, BLOCK, LEVELS)
            second = tl.zeros((BLOCK, WIDTH), tl.float32)
        else:
            features, by_x, by_y, by_z = features_and_slopes_at(p_table, x, y, z, level, BLOCK, LEVELS)
            sx, sy, sz = _grad_slope(p_normal, p_grad_normal, p_inverse, o, o < n)
            moved = sx[None, :, None, None] * by_x + sy[None, :, None, None] * by_y
            moved += sz[None, :, None, None] * by_z
            second = tl.reshape(tl.sum(moved, axis=0), (BLOCK, WIDTH))
        o = o[:, None]
        m = o < n
        if p_grad_sigma is not None:
            second += _grad_raw(p_sigma, p_grad_sigma, o, m) * features
        features, second = split(features), split(second)
        active = tl.where(product(features, inner) > 0.0, 1.0, 0.0).to(FACTOR)
        both_orders = exact_product(tl.trans(active), second, both_orders)
        s = exact_product(active, through)
        if p_grad_sigma is not None:
            g = _grad_raw(p_sigma, p_grad_sigma, o, m) * s
        else:
            g = tl.zeros((BLOCK, WIDTH), tl.float32)
        if p_grad_albedo is not None:
            hidden = product(features, transposed(colour_inner))
            grad_hidden = tl.zeros((BLOCK, HIDDEN), tl.float32)
            grad_out = tl.zeros((BLOCK, 16), tl.float32)
            for channel in tl.static_range(3):
                albedo = tl.load(p_albedo + o * 3 + channel, mask=m, other=0.0)
                grad = tl.load(p_grad_albedo + o * 3 + channel, mask=m, other=0.0) * albedo * (1.0 - albedo)
                grad_hidden += grad * load_outer(p_colour_outer, channel, H, HIDDEN)[None, :]
                grad_out = tl.where(tl.arange(0, 16)[None, :] == channel, grad, grad_out)
            grad_hidden = split(tl.where(hidden > 0.0, grad_hidden, 0.0))
            hidden = transposed(split(tl.maximum(hidden, 0.0)))
            grad_colour_outer = product(hidden, split(grad_out), grad_colour_outer)
            grad_colour_inner = product(transposed(grad_hidden), features, grad_colour_inner)
            g = product(grad_hidden, colour_inner, g)
        o_run = (block.to(tl.int64) * GROUPS + tl.arange(0, GROUPS)) * RUN
        _scatter(
            p_points,
            p_normal,
            p_grad_normal,
            p_inverse,
            p_grad_table,
            g,
            s,
            o_run,
            n,
            level,
            GROUPS,
            RUN,
            LEVELS,
            WHOLE,
        )
        block += 1

    o_hidden, o_feature = tl.arange(0, HIDDEN)[:, None], tl.arange(0, WIDTH)[None, :]
    m = (o_hidden < H) & (o_feature < WIDTH_IN)
    outer = load_outer(p_outer, 0, H, HIDDEN)[:, None]
    _add_to(p_grad_inner + o_hidden * WIDTH_IN + o_feature, both_orders * outer, m, WHOLE)
    grad = tl.sum(both_orders * load_inner(p_inner, H, WIDTH_IN, HIDDEN, WIDTH), axis=1)
    _add_to(p_grad_outer + tl.arange(0, HIDDEN), grad, tl.arange(0, HIDDEN) < H, WHOLE)
    if p_grad_albedo is not None:
        _add_to(p_grad_colour_inner + o_hidden * WIDTH_IN + o_feature, grad_colour_inner, m, WHOLE)
        channel = tl.arange(0, 16)[None, :]
        p_grad = p_grad_colour_outer + channel * H + o_hidden
        _add_to(p_grad, grad_colour_outer, (channel < 3) & (o_hidden < H), WHOLE)
