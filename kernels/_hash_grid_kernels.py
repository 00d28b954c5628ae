"""The hash encoding's Triton kernels: one level in a program, one point to a thread.

Programs are numbered along the points first, so levels follow one another and the cache holds the table of
the level at work, a twelfth of the official field's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._grid_lookup import (
    GridLevel,
    level_parameters,
    load_levels,
    locate,
    lookup,
    lookup_with_slopes,
    padded,
    scatter,
)
from ._triton import jit, tl

POINTS, WARPS = 128, 4
"""Points of a program, one to a thread: more in a thread would move between threads on their way to memory."""


@jit
def _valid(p_count, N):
    """The number of points to look up: N, or fewer where a tensor holds a count."""
    return N if p_count is None else tl.minimum(tl.load(p_count), N)


@jit
def _load_points(p_x, n, stride_point, stride_axis, POINTS: tl.constexpr):
    """This program's points: numbers, mask and coordinates, each [POINTS]."""
    o = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    m = o < n
    p_x += o * stride_point
    x = tl.load(p_x, mask=m, other=0.0)
    y = tl.load(p_x + stride_axis, mask=m, other=0.0)
    z = tl.load(p_x + 2 * stride_axis, mask=m, other=0.0)
    return o, m, x, y, z


@jit
def _column(features, number: tl.constexpr, F: tl.constexpr):
    """A column of [POINTS, F]. All F lie in one thread, so the sum costs nothing."""
    return tl.sum(tl.where(tl.arange(0, F)[None, :] == number, features, 0.0), axis=1)


@jit
def _load_columns(p, stride, m, F: tl.constexpr):
    """F blocks of numbers, ``stride`` apart, as [POINTS, F]."""
    columns = tl.expand_dims(tl.zeros_like(m).to(tl.float32), -1)
    for number in tl.static_range(F):
        loaded = tl.load(p + number * stride, mask=m, other=0.0).to(tl.float32)
        columns = tl.where(tl.arange(0, F)[None, :] == number, loaded[:, None], columns)
    return columns


@jit
def encode_kernel(
    p_x,
    p_table,
    p_levels,
    p_count,
    p_value,
    p_slope,
    N,
    stride_point,
    stride_axis,
    LEVELS: tl.constexpr,
    F: tl.constexpr,
    POINTS: tl.constexpr,
):
    """Program (block of points, level). p_value [L, F, N], p_slope [L, F, 3, N] or None."""
    n = _valid(p_count, N)
    if tl.program_id(0) * POINTS >= n:
        return
    o, m, x, y, z = _load_points(p_x, n, stride_point, stride_axis, POINTS)
    number = tl.program_id(1)
    level = load_levels(p_levels, number, LEVELS)
    cell, fraction = locate(x, y, z, level)
    first = (number * F).to(tl.int64)
    if p_slope is None:
        value = lookup(p_table, cell, fraction, level, m, F)
    else:
        value, dx, dy, dz = lookup_with_slopes(p_table, cell, fraction, level, m, F)
        for f in tl.static_range(F):
            p_row = p_slope + (first + f) * 3 * N + o
            tl.store(p_row, _column(dx, f, F), mask=m)
            tl.store(p_row + N, _column(dy, f, F), mask=m)
            tl.store(p_row + 2 * N, _column(dz, f, F), mask=m)
    for f in tl.static_range(F):
        tl.store(p_value + (first + f) * N + o, _column(value, f, F), mask=m)


@jit
def scatter_kernel(
    p_x,
    p_grad,
    p_levels,
    p_count,
    p_value,
    p_slope,
    N,
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
):
    """Program (block of points, level). p_value, p_slope: gradients as in :func:`encode_kernel`, one may be
    None."""
    n = _valid(p_count, N)
    if tl.program_id(0) * POINTS >= n:
        return
    o, m, x, y, z = _load_points(p_x, n, stride_point, stride_axis, POINTS)
    number = tl.program_id(1)
    level = load_levels(p_levels, number, LEVELS)
    cell, fraction = locate(x, y, z, level)
    first = (number * F).to(tl.int64)
    if p_value is None:
        g = tl.zeros((POINTS, F), tl.float32)
    else:
        g = _load_columns(p_value + first * value_row + o * value_point, value_row, m, F)
    if p_slope is None:
        scatter(p_grad, cell, fraction, level, m, g, None, F)
    else:
        p_slope += first * slope_row + o * slope_point
        gx = _load_columns(p_slope, slope_row, m, F)
        gy = _load_columns(p_slope + slope_axis, slope_row, m, F)
        gz = _load_columns(p_slope + 2 * slope_axis, slope_row, m, F)
        scatter(p_grad, cell, fraction, level, m, g, (gx, gy, gz), F)


def encode(
    x: Tensor, entries: Tensor, levels: tuple[GridLevel, ...], jacobian: bool, count: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """x [N, 3] in any layout, entries [P, F] -> value [L F, N] and with ``jacobian`` slopes [L F, 3, N]."""
    n, features = len(x), entries.shape[1]
    value = x.new_empty(len(levels) * features, n)
    slope = x.new_empty(len(levels) * features, 3, n) if jacobian else None
    if n:
        parameters = level_parameters(levels, x.device)
        encode_kernel[_programs(n, levels)](
            *(x, entries.contiguous(), parameters, count, value, slope, n, *x.stride()),
            **_constants(levels, features),
        )
    return value, slope


def scatter_gradients(
    x: Tensor,
    shape: torch.Size,
    levels: tuple[GridLevel, ...],
    grad_value: Tensor | None,
    grad_slope: Tensor | None,
    count: Tensor | None,
) -> Tensor:
    """The gradient, float32 [P, F] = ``shape``, by the entries of :func:`encode`."""
    grad = x.new_zeros(shape)
    if len(x) and not (grad_value is None and grad_slope is None):
        strides = (0, 0) if grad_value is None else grad_value.stride()
        strides += (0, 0, 0) if grad_slope is None else grad_slope.stride()
        parameters = level_parameters(levels, x.device)
        scatter_kernel[_programs(len(x), levels)](
            *(x, grad, parameters, count, grad_value, grad_slope, len(x), *x.stride(), *strides),
            **_constants(levels, shape[1]),
        )
    return grad


def _programs(n: int, levels: Sequence[GridLevel]) -> tuple[int, int]:
    return -(-n // POINTS), len(levels)


def _constants(levels: Sequence[GridLevel], features: int) -> dict[str, int]:
    return {"LEVELS": padded(levels), "F": features, "POINTS": POINTS, "num_warps": WARPS}
