"""Multiresolution hash encoding: value and Jacobian in one pass, and the gradients of both in one scatter.

At level l the unit cube carries a grid of scale s_l = b g^l - 1; a point is looked up at p = s_l x + 1/2,
and its feature is the trilinear mix of the eight corners of floor(p). A level whose r_l^3 vertices (r_l =
ceil(s_l) + 1) fit into the table is stored densely; otherwise vertices are hashed (Mueller et al. 2022,
"Instant Neural Graphics Primitives", section 3). Scales, offsets, indices and the layout of the parameters
are those of tiny-cuda-nn's ``HashGrid``, so that tables can be exchanged.

With corners c of weights w_c(x), products of p - floor(p) or 1 minus it, and table entries t_c,

    value = sum_c w_c t_c,   Jacobian = sum_c t_c (grad w_c)^T,

so that gradients dv of the value and dJ of the Jacobian reach an entry in one addition,

    dt_c += w_c dv + dJ grad w_c.

Results are kept with the samples last ([features, N]), so that every access to them is contiguous; what is
handed out are transposed views.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._grid_lookup import MOST_NUMBERS, PRIMES, GridLevel
from ._hash_grid_kernels import encode, scatter, summed, zero_sums
from ._triton import HALF, KernelBackend, use_triton
from .perceptron import blocks

BLOCK = 2**20
"""Points looked up together in plain PyTorch: bounds the work space, to about 200 MB with two features."""

FEATURES = (1, 2, 4, 8)
"""Features per level that the kernels know."""


def grid_levels(levels: int, log2_table: int, base_resolution: int, growth: float) -> tuple[GridLevel, ...]:
    """The levels of a grid, coarse to fine.

    A table for them has ``levels[-1].offset + levels[-1].entries`` rows. Scales are rounded as
    tiny-cuda-nn's float32 arithmetic rounds them. Raises ``ValueError`` unless levels >= 1, base_resolution
    >= 2, growth >= 1 and log2_table lies in 3..30.

    >>> [(level.resolution, level.hashed) for level in grid_levels(3, 12, 8, 1.5)]
    [(8, False), (12, False), (18, True)]
    """
    if levels < 1 or base_resolution < 2 or growth < 1.0 or not 3 <= log2_table <= 30:
        raise ValueError(
            f"hash grid of levels={levels}, log2_table={log2_table}, base_resolution={base_resolution},"
            f" growth={growth}: levels must be >= 1, log2_table in 3..30, base_resolution >= 2, growth >= 1"
        )
    log2_growth = torch.log2(torch.tensor(growth, dtype=torch.float32))
    found = []
    offset = 0
    for index in range(levels):
        scale = float(torch.exp2(index * log2_growth) * base_resolution - 1.0)
        resolution = -int(-scale // 1) + 1
        vertices = resolution**3
        entries = min((vertices + 7) // 8 * 8, 2**log2_table)
        found.append(GridLevel(scale, resolution, offset, entries, vertices > entries))
        offset += entries
    return tuple(found)


def _corners(x: Tensor, level: GridLevel) -> tuple[Tensor, Tensor]:
    """Entries of the eight corners of points x [3, N], and the points' place between them.

    -> index [8 N], z slowest, then y, x, sample; fraction [3, N]. Indices of a dense level run beyond its
    entries, by less than :func:`_overhang`: a vertex behind the last one is the next row's first, as in
    tiny-cuda-nn.
    """
    position = x * level.scale + 0.5
    cell = position.floor()
    fraction = position - cell
    low = cell.clamp_(0, level.resolution - 1).long()
    vertex = torch.stack((low, low + 1), dim=1)
    if level.hashed:
        px, py, pz = (vertex[axis] * PRIMES[axis] & (level.entries - 1) for axis in range(3))
        index = pz[:, None, None] ^ (py[:, None] ^ px)
    else:
        px, py, pz = (vertex[axis] * level.resolution**axis for axis in range(3))
        index = pz[:, None, None] + (py[:, None] + px)
    return index.view(-1), fraction


def _overhang(level: GridLevel) -> int:
    """How many entries of a dense level are repeated behind it, so that overhanging indices need no
    division."""
    return 0 if level.hashed else 1 + level.resolution + level.resolution**2


class _Reference(torch.autograd.Function):
    """x [3, N], table [P, F] -> value [L F, N], and with ``jacobian`` also d value / d x [L F, 3, N]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        table: Tensor,
        levels: tuple[GridLevel, ...],
        jacobian: bool,
        lookup: torch.dtype,
    ) -> Any:
        features, n = table.shape[1], x.shape[1]
        columns = table.to(lookup).t().to(x.dtype).contiguous()
        value = x.new_empty(len(levels), features, n)
        slope = x.new_empty(len(levels), features, 3, n) if jacobian else None
        for number, level in enumerate(levels):
            entries = columns[:, level.offset : level.offset + level.entries]
            entries = torch.cat((entries, entries[:, : _overhang(level)]), dim=1)
            for block in blocks(n, BLOCK):
                index, (fx, fy, fz) = _corners(x[:, block], level)
                corner = entries.index_select(1, index).view(features, 2, 2, 2, -1)
                a0, a1 = corner[..., 0, :], corner[..., 1, :]
                a = torch.lerp(a0, a1, fx)
                b = torch.lerp(a[..., 0, :], a[..., 1, :], fy)
                value[number, :, block] = torch.lerp(b[:, 0], b[:, 1], fz)
                if slope is not None:
                    dx = torch.lerp(a1[..., 0, :] - a0[..., 0, :], a1[..., 1, :] - a0[..., 1, :], fy)
                    dy = a[..., 1, :] - a[..., 0, :]
                    here = slope[number, :, :, block]
                    here[:, 0] = torch.lerp(dx[:, 0], dx[:, 1], fz)
                    here[:, 1] = torch.lerp(dy[:, 0], dy[:, 1], fz)
                    here[:, 2] = b[:, 1] - b[:, 0]
                    here *= level.scale
        ctx.save_for_backward(x)
        ctx.levels, ctx.table_shape, ctx.table_dtype = levels, table.shape, table.dtype
        ctx.set_materialize_grads(False)
        if slope is None:
            return value.flatten(0, 1)
        return value.flatten(0, 1), slope.flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor | None, grad_slope: Tensor | None = None) -> Any:
        (x,) = ctx.saved_tensors
        rows, features = ctx.table_shape
        grad = x.new_zeros(features, rows)
        for number, level in enumerate(ctx.levels):
            own = slice(number * features, (number + 1) * features)
            overhang = _overhang(level)
            entries = x.new_zeros(features, level.entries + overhang)
            for block in blocks(x.shape[1], BLOCK):
                index, (fx, fy, fz) = _corners(x[:, block], level)
                g = fz.new_zeros(features, len(fz)) if grad_value is None else grad_value[own, block]
                if grad_slope is None:
                    corner = _spread(_spread(_spread(g, fz), fy), fx)
                else:
                    slope = grad_slope[own, :, block] * level.scale
                    gy, gx = _spread(slope[:, 1], fz), _spread(_spread(slope[:, 0], fz), fy)
                    corner = _spread(_spread(_spread(g, fz, slope[:, 2]), fy, gy), fx, gx)
                entries.index_add_(1, index, corner.view(features, -1))
            entries[:, :overhang] += entries[:, level.entries :]
            grad[:, level.offset : level.offset + level.entries] = entries[:, : level.entries]
        return None, grad.t().to(ctx.table_dtype), None, None, None


def _spread(grad: Tensor, fraction: Tensor, grad_difference: Tensor | None = None) -> Tensor:
    """Adjoint of one interpolation, [..., n] -> [..., 2, n].

    ``grad`` is the gradient of lerp(a, b, fraction), ``grad_difference`` that of b - a; returned are those
    of a, b.
    """
    both = grad.new_empty(*grad.shape[:-1], 2, grad.shape[-1])
    lower, upper = both[..., 0, :], both[..., 1, :]
    torch.mul(grad, fraction, out=upper)
    torch.sub(grad, upper, out=lower)
    if grad_difference is not None:
        upper += grad_difference
        lower -= grad_difference
    return both


class _Kernels(torch.autograd.Function):
    """As :class:`_Reference`, but of x [N, 3] in any layout; ``count`` as in :func:`hash_encode`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        table: Tensor,
        levels: tuple[GridLevel, ...],
        jacobian: bool,
        lookup: torch.dtype,
        count: Tensor | None,
    ) -> Any:
        value, slope = encode(x, table.to(lookup), levels, jacobian, count)
        ctx.save_for_backward(x, count)
        ctx.levels, ctx.table_shape, ctx.table_dtype = levels, table.shape, table.dtype
        ctx.set_materialize_grads(False)
        return value if slope is None else (value, slope)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor | None, grad_slope: Tensor | None = None) -> Any:
        x, count = ctx.saved_tensors
        sums = zero_sums(ctx.table_shape, x.device)
        scatter(sums, x, ctx.levels, count, None, grad_value, grad_slope)
        return None, summed(sums).to(ctx.table_dtype), None, None, None, None


def _check(
    x: Tensor,
    table: Tensor,
    levels: Sequence[GridLevel],
    lookup: torch.dtype,
    count: Tensor | None,
) -> None:
    if x.dim() != 2 or x.shape[1] != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be [N, 3]")
    rows = levels[-1].offset + levels[-1].entries
    if table.dim() != 2 or table.shape[0] != rows:
        raise ValueError(f"table has shape {tuple(table.shape)}; these levels need [{rows}, features]")
    fits = x.dtype in (torch.float32, torch.float64) and table.dtype in (x.dtype, *HALF)
    if not fits or x.device != table.device:
        raise ValueError(
            f"x is {x.dtype} on {x.device}, table {table.dtype} on {table.device}; they must agree, x in"
            " float32 or float64, or the table be in half precision"
        )
    if lookup not in (table.dtype, *HALF):
        raise ValueError(f"lookup in {lookup}; it may be {', '.join(map(str, HALF))} or None")
    if count is not None and (count.shape != (1,) or count.dtype != torch.int32 or count.device != x.device):
        raise ValueError(
            f"count is {count.dtype} {tuple(count.shape)} on {count.device}; it must be int32 [1] on {x.device}"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "x requires a gradient, which is not provided: use hash_encode_jacobian and chain it"
        )


def _encode(
    x: Tensor,
    table: Tensor,
    levels: Sequence[GridLevel],
    jacobian: bool,
    lookup: torch.dtype | None,
    count: Tensor | None,
    backend: KernelBackend,
) -> tuple[Tensor, ...]:
    """-> value [L F, N] and with ``jacobian`` slopes [L F, 3, N]."""
    lookup = lookup or table.dtype
    _check(x, table, levels, lookup, count)
    levels = tuple(levels)
    known = table.shape[1] in FEATURES and table.numel() < MOST_NUMBERS
    if backend == "triton" and not known:
        raise ValueError(
            f"table has shape {tuple(table.shape)}; backend 'triton' takes fewer than 2^31 numbers and"
            f" {', '.join(map(str, FEATURES))} features"
        )
    if use_triton(backend, x, table) and known:
        found = _Kernels.apply(x, table, levels, jacobian, lookup, count)
        return found if jacobian else (found,)
    if count is not None:
        valid = torch.arange(len(x), device=x.device) < count
        x = x.where(valid[:, None], 0.0)
    found = _Reference.apply(x.t().contiguous(), table, levels, jacobian, lookup)
    found = found if jacobian else (found,)
    return found if count is None else tuple(result.where(valid, 0.0) for result in found)


def hash_encode(
    x: Tensor,
    table: Tensor,
    levels: Sequence[GridLevel],
    *,
    lookup: torch.dtype | None = None,
    count: Tensor | None = None,
    backend: KernelBackend = "auto",
) -> Tensor:
    """Features of points.

    x [N, 3] in the unit cube, table [P, F], ``levels`` from :func:`grid_levels` -> [N, L F], level-major, a
    transposed view of contiguous [L F, N]. Points outside the cube get some entry of the table and never
    fail. Differentiable with respect to ``table``, once.

    x and the result are float32 or float64, the table likewise or in half precision; ``lookup`` (float16 or
    bfloat16) rounds a wider table for the look-ups of this call, which halves their memory traffic. Sums and
    gradients are in x's precision either way; the table's gradient is then cast to the table's.

    With ``count``, int32 [1] on the same device, only the first ``count`` points are looked up: rows behind
    them are undefined, and their gradients are ignored. The host never waits for it.

    On a GPU gradients are added by atomic operations, in any order: their last bits differ from run to run, but
    under :func:`torch.use_deterministic_algorithms`. Then the kernel sums them in steps of 2^-44, and they must
    stay within +-2^19.

    Raises ``ValueError`` for shapes, dtypes or devices that do not fit, and if ``x`` requires a gradient.

    >>> levels = grid_levels(1, 9, 2, 1.0)
    >>> table = torch.arange(8.0)[:, None]
    >>> hash_encode(torch.zeros(1, 3), table, levels)
    tensor([[3.5000]])
    """
    return _encode(x, table, levels, False, lookup, count, backend)[0].t()


def hash_encode_jacobian(
    x: Tensor,
    table: Tensor,
    levels: Sequence[GridLevel],
    *,
    lookup: torch.dtype | None = None,
    count: Tensor | None = None,
    backend: KernelBackend = "auto",
) -> tuple[Tensor, Tensor]:
    """Features of points and their derivatives by the coordinates, in one pass.

    Same arguments as :func:`hash_encode` -> features [N, L F] and Jacobian [N, L F, 3] in units of 1 /
    (unit cube), views of contiguous [L F, N] and [L F, 3, N]. Both are differentiable with respect to
    ``table``, so a function of the Jacobian such as a normal trains the table with first-order autograd
    alone. The Jacobian is that of the cell that the point lies in; it jumps at cell borders.
    """
    value, slope = _encode(x, table, levels, True, lookup, count, backend)
    return value.t(), slope.permute(2, 0, 1)
