"""The hash encoding's Triton kernels: one level in a program, one point to a thread.

Programs are numbered along the points first, so levels follow one another and the cache holds the table of
the level at work, a twelfth of the official field's.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ._grid_lookup import (
    UNITS,
    GridLevel,
    add_to_corners,
    adds_vectors,
    corner_shares,
    level_parameters,
    load_levels,
    locate,
    lookup,
    lookup_with_slopes,
    padded,
)
from ._triton import jit, tl
from ._tuning import Launch, Tuned

POINTS, WARPS = 128, 4
"""Points of a program, one to a thread: more in a thread would move between threads on their way to memory."""

REGIONS = 64
"""Parts of the points that :func:`scatter_kernel` works on at the same time."""


_SIZES = (
    *("N", "row", "regions", "stride_point", "stride_axis"),
    *("value_row", "value_point", "slope_row", "slope_axis", "slope_point"),
)
"""Arguments whose values must not make other kernels: the number of points is another one at every step."""


@jit
def _valid(p_count, N):
    """The number of points to look up: N, or fewer where a tensor holds a count."""
    return N if p_count is None else tl.minimum(tl.load(p_count), N)


@jit
def _load_points(p_x, o, m, stride_point, stride_axis):
    """Coordinates of points ``o``, each [POINTS]."""
    p_x += o * stride_point
    x = tl.load(p_x, mask=m, other=0.0)
    y = tl.load(p_x + stride_axis, mask=m, other=0.0)
    z = tl.load(p_x + 2 * stride_axis, mask=m, other=0.0)
    return x, y, z


@jit
def _column(features, number: tl.constexpr, F: tl.constexpr):
    """A column of [POINTS, F]. All F lie in one thread, so the sum costs nothing."""
    return tl.sum(tl.where(tl.arange(0, F)[None, :] == number, features, 0.0), axis=1)


@jit
def _store_columns(p, stride, features, m, F: tl.constexpr):
    """Features [POINTS, F], to F rows that lie ``stride`` apart."""
    for number in tl.static_range(F):
        tl.store(p + number * stride, _column(features, number, F), mask=m)


@jit
def _load_columns(p, stride, m, F: tl.constexpr):
    """F blocks of numbers, ``stride`` apart, as [POINTS, F]."""
    columns = tl.expand_dims(tl.zeros_like(m).to(tl.float32), -1)
    for number in tl.static_range(F):
        loaded = tl.load(p + number * stride, mask=m, other=0.0).to(tl.float32)
        columns = tl.where(tl.arange(0, F)[None, :] == number, loaded[:, None], columns)
    return columns


@jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=("p_count",))
def encode_kernel(
    p_x,
    p_table,
    p_levels,
    p_count,
    p_along,
    p_value,
    p_slope,
    N,
    row,
    stride_point,
    stride_axis,
    LEVELS: tl.constexpr,
    F: tl.constexpr,
    POINTS: tl.constexpr,
):
    """Program (block of points, level).

    p_value [L, F, row]; p_slope [L, F, 3, row], or [L, F, row] of slopes along the vectors p_along, arranged as
    the points are, or None.
    """
    n = _valid(p_count, N)
    if tl.program_id(0) * POINTS >= n:
        return
    number = tl.program_id(1)
    level = load_levels(p_levels, number, LEVELS)
    first = (number * F).to(tl.int64)
    o = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    m = o < n
    x, y, z = _load_points(p_x, o, m, stride_point, stride_axis)
    cell, fraction = locate(x, y, z, level)
    if p_slope is None:
        value = lookup(p_table, cell, fraction, level, m, F)
    else:
        value, dx, dy, dz = lookup_with_slopes(p_table, cell, fraction, level, m, F)
        if p_along is None:
            _store_columns(p_slope + first * 3 * row + o, 3 * row, dx, m, F)
            _store_columns(p_slope + (first * 3 + 1) * row + o, 3 * row, dy, m, F)
            _store_columns(p_slope + (first * 3 + 2) * row + o, 3 * row, dz, m, F)
        else:
            ax, ay, az = _load_points(p_along, o, m, stride_point, stride_axis)
            slope = ax[:, None] * dx + ay[:, None] * dy + az[:, None] * dz
            _store_columns(p_slope + first * row + o, row, slope, m, F)
    _store_columns(p_value + first * row + o, row, value, m, F)


@jit
def _same(a, b):
    return (a[0] == b[0]) & (a[1] == b[1]) & (a[2] == b[2])


@jit
def _sum_where(m, a, b):
    """b, plus a where ``m`` [POINTS]: tuples of [POINTS, F]."""
    sums = ()
    for number in tl.static_range(len(b)):
        more = tl.where(tl.expand_dims(m, -1), a[number], 0.0)
        sums += (b[number] + more,)  # type: ignore[assignment]
    return sums


@jit
def _shares_of_points(
    p_x,
    p_along,
    p_value,
    p_slope,
    o,
    m,
    level,
    stride_point,
    stride_axis,
    value_row,
    value_point,
    slope_row,
    slope_axis,
    slope_point,
    POINTS: tl.constexpr,
    F: tl.constexpr,
):
    """Cells of points ``o`` and what they add to the corners."""
    x, y, z = _load_points(p_x, o, m, stride_point, stride_axis)
    cell, fraction = locate(x, y, z, level)
    if p_value is None:
        g = tl.zeros((POINTS, F), tl.float32)
    else:
        g = _load_columns(p_value + o * value_point, value_row, m, F)
    if p_slope is None:
        slopes = None
    elif p_along is not None:
        slope = _load_columns(p_slope + o * slope_point, slope_row, m, F)
        ax, ay, az = _load_points(p_along, o, m, stride_point, stride_axis)
        slopes = (ax[:, None] * slope, ay[:, None] * slope, az[:, None] * slope)
    else:
        p_axis = p_slope + o * slope_point
        gx = _load_columns(p_axis, slope_row, m, F)
        gy = _load_columns(p_axis + slope_axis, slope_row, m, F)
        gz = _load_columns(p_axis + 2 * slope_axis, slope_row, m, F)
        slopes = (gx, gy, gz)
    return cell, corner_shares(fraction, level, g, slopes)


@jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=("p_count",))
def scatter_kernel(
    p_x,
    p_grad,
    p_levels,
    p_count,
    p_along,
    p_value,
    p_slope,
    N,
    regions,
    stride_point,
    stride_axis,
    value_row,
    value_point,
    slope_row,
    slope_axis,
    slope_point,
    LEVELS: tl.constexpr,
    F: tl.constexpr,
    POINTS: tl.constexpr,
    RUN: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Program (block of RUN POINTS points, level). p_value, p_slope: gradients of what :func:`encode_kernel`
    writes with or without p_along; one may be None.

    Neighbouring points are samples of a ray: many share a cell of the coarse levels, and additions to the
    same entry wait for each other. So a thread takes RUN neighbours, one after another, and adds for those in
    the same cell together; and programs that run at the same time take blocks of different ``regions``.
    """
    n = _valid(p_count, N)
    blocks = tl.cdiv(n, RUN * POINTS)
    region_blocks = tl.cdiv(blocks, regions)
    region, block = tl.program_id(0) % regions, tl.program_id(0) // regions
    if (block >= region_blocks) | (region * region_blocks + block >= blocks):
        return
    number = tl.program_id(1)
    level = load_levels(p_levels, number, LEVELS)
    first = (number * F).to(tl.int64)
    if p_value is not None:
        p_value += first * value_row
    if p_slope is not None:
        p_slope += first * slope_row
    o = ((region * region_blocks + block).to(tl.int64) * POINTS + tl.arange(0, POINTS)) * RUN
    # What is to be added to the corners of a cell. The last step brings no point, so that there is one place to add:
    # a second one behind the loop would have the sums in two layouts. A loop that runs and is not unrolled compiles
    # in a second, not in twenty.
    m = tl.zeros((POINTS,), tl.int1)
    nowhere = tl.zeros((POINTS,), tl.uint32)
    cell, shares = (nowhere, nowhere, nowhere), ()
    for _ in tl.static_range(8):
        shares += (tl.zeros((POINTS, F), tl.float32),)  # type: ignore[assignment]
    for step in range(RUN + 1):
        m_next = (step < RUN) & (o + step < n)
        cell_next, shares_next = _shares_of_points(
            p_x,
            p_along,
            p_value,
            p_slope,
            o + step,
            m_next,
            level,
            stride_point,
            stride_axis,
            value_row,
            value_point,
            slope_row,
            slope_axis,
            slope_point,
            POINTS,
            F,
        )
        same = m_next & _same(cell, cell_next)
        add_to_corners(p_grad, cell, level, m & ~same, shares, F, PAIRS)
        cell, m, shares = cell_next, m_next, _sum_where(m & same, shares, shares_next)


def _candidates(features: int, slopes: bool, pairs: bool, size: int) -> list[Launch]:
    """For fewer than 2^``size`` points: long runs once there are programs enough."""
    runs = (8, 16, 4) if size > 15 else (1,)
    return [Launch.of(warps=WARPS, POINTS=POINTS, RUN=run) for run in runs]


_TUNED = Tuned("hash_grid_scatter", scatter_kernel, _candidates)


def encode(
    x: Tensor, entries: Tensor, levels: tuple[GridLevel, ...], jacobian: bool, count: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """x [N, 3] in any layout, entries [P, F] -> value [L F, N] and with ``jacobian`` slopes [L F, 3, N]."""
    n, features = len(x), entries.shape[1]
    value = x.new_empty(len(levels) * features, n)
    slope = x.new_empty(len(levels) * features, 3, n) if jacobian else None
    launch_encode(x, entries, levels, count, None, value, slope)
    return value, slope


def launch_encode(
    x: Tensor,
    entries: Tensor,
    levels: tuple[GridLevel, ...],
    count: Tensor | None,
    along: Tensor | None,
    value: Tensor,
    slope: Tensor | None,
) -> None:
    """Write the value [L F, N] and the slopes [L F, 3, N] or, along vectors [N, 3] with x's strides, [L F, N].

    The results may be the first columns of wider ones, the same for both.
    """
    if len(x):
        parameters = level_parameters(levels, x.device)
        encode_kernel[-(-len(x) // POINTS), len(levels)](
            *(x, entries.contiguous(), parameters, count, along, value, slope, len(x), value.stride(0)),
            *x.stride(),
            LEVELS=padded(levels),
            F=entries.shape[1],
            POINTS=POINTS,
            num_warps=WARPS,
        )


def zero_sums(shape: torch.Size, device: torch.device) -> Tensor:
    """Where a gradient is summed: float32, in any order, or under :func:`torch.use_deterministic_algorithms` int64
    in UNITS, where order does not matter."""
    whole = torch.are_deterministic_algorithms_enabled()
    return torch.zeros(shape, dtype=torch.int64 if whole else torch.float32, device=device)


def summed(sums: Tensor) -> Tensor:
    """The gradient, float32, of what was added to :func:`zero_sums`."""
    return (sums.double() / UNITS).float() if sums.dtype == torch.int64 else sums


def scatter(
    sums: Tensor,
    x: Tensor,
    levels: tuple[GridLevel, ...],
    count: Tensor | None,
    along: Tensor | None,
    value: Tensor | None,
    slope: Tensor | None,
) -> None:
    """Add the gradient by the entries to ``sums`` [P, F] of :func:`zero_sums`.

    ``value`` and ``slope`` are the gradients, in any layout, of what :func:`launch_encode` writes.
    """
    if not len(x) or (value is None and slope is None):
        return
    strides = (0, 0) if value is None else value.stride()
    if slope is None:
        strides += (0, 0, 0)
    else:
        strides += slope.stride() if along is None else (slope.stride(0), 0, slope.stride(1))
    parameters = level_parameters(levels, x.device)
    features = sums.shape[1]
    pairs = features <= 2 and sums.dtype == torch.float32 and adds_vectors(x.device)

    def run(target: Tensor, launch: Launch) -> None:
        blocks = -(-len(x) // (launch["RUN"] * launch["POINTS"]))
        regions = min(REGIONS, blocks)
        scatter_kernel[-(-blocks // regions) * regions, len(levels)](
            *(x, target, parameters, count, along, value, slope, len(x), regions, *x.stride(), *strides),
            LEVELS=padded(levels),
            F=features,
            PAIRS=pairs,
            **launch.options,
        )

    scratch = cache(lambda: torch.zeros_like(sums))
    key = (features, slope is not None, pairs, len(x).bit_length())
    run(sums, _TUNED.choose(x.device, key, lambda launch: run(scratch(), launch)))
