"""The radiance field's Triton kernels; see ``radiance_field`` for the formulas.

Forward is one pass over the points, and nothing that is inside is stored. Backward computes it again, in four passes
over a chunk of points at a time, each with little enough to do to keep a GPU busy: where the points lie and how the
loss moves with the slope there; the look-up, one level at a time, of ``_hash_grid_kernels``; the perceptrons; and the
sum of gradients by table entries, again of ``_hash_grid_kernels``.
"""

from __future__ import annotations

from ._field_network import (
    FACTOR,
    blob,
    exact_product,
    features_and_slopes_at,
    features_at,
    load_field_levels,
    load_inner,
    load_outer,
    load_vectors,
    product,
    softplus,
    split,
    transposed,
    unit_cube,
)
from ._grid_lookup import add_to
from ._triton import jit, tl


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


@jit(do_not_specialize=("n",))
def prepare_kernel(
    p_points, p_normal, p_grad_normal, p_inverse, p_unit, p_along, n, row, BLOCK: tl.constexpr
):
    """p_unit [3, row]: points in the unit cube. p_along [3, row]: gradients by the features' share of the slope of
    raw there, sum_f s_f J_f, where p_grad_normal is not None."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    x, y, z = load_vectors(p_points, o, m)
    _store_rows(p_unit + o, row, unit_cube(x), unit_cube(y), unit_cube(z), m)
    if p_grad_normal is not None:
        nx, ny, nz = load_vectors(p_normal, o, m)
        gx, gy, gz = load_vectors(p_grad_normal, o, m)
        along = nx * gx + ny * gy + nz * gz
        factor = 0.5 * tl.load(p_inverse + o, mask=m, other=0.0)
        x, y, z = (along * nx - gx) * factor, (along * ny - gy) * factor, (along * nz - gz) * factor
        _store_rows(p_along + o, row, x, y, z, m)


@jit
def _store_rows(p, row, x, y, z, m):
    tl.store(p, x, mask=m)
    tl.store(p + row, y, mask=m)
    tl.store(p + 2 * row, z, mask=m)


@jit
def _grad_raw(p_sigma, p_grad_sigma, o, m):
    """Gradient by the density before its softplus, of the shape of ``o``."""
    sigma = tl.load(p_sigma + o, mask=m, other=0.0)
    # 1 - exp(-softplus(raw)) = sigmoid(raw)
    part = tl.where(sigma < 0.01, sigma * (1.0 - sigma * (0.5 - sigma / 6.0)), 1.0 - tl.exp(-sigma))
    return tl.load(p_grad_sigma + o, mask=m, other=0.0) * part


@jit(do_not_specialize=("n",), do_not_specialize_on_alignment=("p_count",))
def backward_kernel(
    p_value,
    p_slope,
    p_inner,
    p_outer,
    p_colour_inner,
    p_colour_outer,
    p_count,
    p_sigma,
    p_albedo,
    p_grad_sigma,
    p_grad_albedo,
    p_grad_inner,
    p_grad_outer,
    p_grad_colour_inner,
    p_grad_colour_outer,
    n,
    row,
    WIDTH_IN: tl.constexpr,
    WIDTH: tl.constexpr,
    H: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Backward through both perceptrons. In place of the features in p_value [WIDTH_IN, row] it leaves the gradients
    by them, and in place of their slopes along the gradient by the slope of raw, in p_slope, the slopes of raw by the
    features: what the table's gradient is made of.

    p_slope, p_grad_sigma, p_grad_albedo: None for outputs that the loss does not use.
    """
    o_hidden, o_feature = tl.arange(0, HIDDEN)[:, None], tl.arange(0, WIDTH)[None, :]
    # As few as a matrix product takes; three are there.
    channel = tl.arange(0, 16)[None, :]
    m_outer = (o_hidden < H) & (channel < 3)
    inner = load_inner(p_inner, H, WIDTH_IN, HIDDEN, WIDTH)
    through = split(load_outer(p_outer, 0, H, HIDDEN)[:, None] * inner)
    inner = split(inner)
    both_orders = tl.zeros((HIDDEN, WIDTH), tl.float32)
    if p_grad_albedo is not None:
        colour_inner = split(load_inner(p_colour_inner, H, WIDTH_IN, HIDDEN, WIDTH))
        grad_colour_inner = tl.zeros((HIDDEN, WIDTH), tl.float32)
        colour_outer = split(tl.load(p_colour_outer + channel * H + o_hidden, mask=m_outer, other=0.0))
        grad_colour_outer = tl.zeros((HIDDEN, 16), tl.float32)
    n, first, behind = _blocks(p_count, n, BLOCK)
    # Addresses in shared memory, taken out of the loop, would push a quarter of a kilobyte out of the registers.
    for block in tl.range(first, behind, disable_licm=True):
        o = block * BLOCK + tl.arange(0, BLOCK)[:, None]
        m = o < n
        o_rows, m_rows = o_feature * row + o, m & (o_feature < WIDTH_IN)
        # Points lie along the columns, as in memory: hidden units by points go into the next product as they are.
        values = tl.load(p_value + tl.trans(o_rows), mask=tl.trans(m_rows), other=0.0)
        features = split(values)
        g = tl.zeros((BLOCK, WIDTH), tl.float32)
        if p_grad_albedo is not None:
            o_channel, m_channel = o * 3 + channel, m & (channel < 3)
            albedo = tl.load(p_albedo + o_channel, mask=m_channel, other=0.0)
            grad = tl.load(p_grad_albedo + o_channel, mask=m_channel, other=0.0)
            grad_out = split(grad * albedo * (1.0 - albedo))
            hidden = split(tl.maximum(product(colour_inner, features), 0.0))
            grad_colour_outer = product(hidden, grad_out, grad_colour_outer)
            grad_hidden = product(colour_outer, transposed(grad_out))
            grad_hidden = split(tl.where(hidden[0] > 0.0, grad_hidden, 0.0))
            grad_colour_inner = product(grad_hidden, transposed(features), grad_colour_inner)
            g = product(transposed(grad_hidden), colour_inner)
        second = tl.zeros((WIDTH, BLOCK), tl.float32)
        if p_slope is not None:
            second = tl.load(p_slope + tl.trans(o_rows), mask=tl.trans(m_rows), other=0.0)
        if p_grad_sigma is not None:
            second += _grad_raw(p_sigma, p_grad_sigma, tl.trans(o), tl.trans(m)) * values
        active = tl.where(product(inner, features) > 0.0, 1.0, 0.0).to(FACTOR)
        both_orders = exact_product(active, transposed(split(second)), both_orders)
        s = exact_product(tl.trans(active), through)
        # The products have waited for all warps to load what is overwritten now.
        if p_slope is not None:
            tl.store(p_slope + o_rows, s, mask=m_rows)
        if p_grad_sigma is not None:
            g += _grad_raw(p_sigma, p_grad_sigma, o, m) * s
        tl.store(p_value + o_rows, g, mask=m_rows)

    m = (o_hidden < H) & (o_feature < WIDTH_IN)
    outer = load_outer(p_outer, 0, H, HIDDEN)[:, None]
    add_to(p_grad_inner + o_hidden * WIDTH_IN + o_feature, both_orders * outer, m)
    grad = tl.sum(both_orders * load_inner(p_inner, H, WIDTH_IN, HIDDEN, WIDTH), axis=1)
    add_to(p_grad_outer + tl.arange(0, HIDDEN), grad, tl.arange(0, HIDDEN) < H)
    if p_grad_albedo is not None:
        add_to(p_grad_colour_inner + o_hidden * WIDTH_IN + o_feature, grad_colour_inner, m)
        add_to(p_grad_colour_outer + channel * H + o_hidden, grad_colour_outer, m_outer)
