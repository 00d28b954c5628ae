"""A convolution's bias and a residual sum in one pass over its feature map.

    y = x + bias_c + residual

for x and residual [N, C, H, W]; the residual may be missing. PyTorch adds a convolution's bias on CUDA in a pass of its
own, and the residual in another. The sum is in float32 and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._group_tiles import is_channels_last
from ._triton import KernelBackend, jit, overlap, tl, triton, use_triton
from ._tuning import Launch, Tuned


def bias_residual_reference(x: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    """The formula above in float32 or wider; arguments as :func:`bias_residual`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) + bias.to(wide)[:, None, None]
    return (y if residual is None else y + residual).to(x.dtype)


@jit
def _kernel(
    x,
    bias,
    residual,
    y,
    rows,
    columns,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows are pixels and columns channels; if not ``CHANNELS_LAST``, rows are maps and columns their pixels."""
    across = tl.cdiv(columns, COLUMNS)
    o_row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    m_row, m_column = o_row < rows, o_column < columns
    offset, mask = o_row * columns + o_column, m_row & m_column
    if PDL:
        tl.extra.cuda.gdc_wait()
    if CHANNELS_LAST:
        b_bias = tl.load(bias + o_column, m_column, other=0.0)
    else:
        b_bias = tl.load(bias + o_row % CHANNELS, m_row, other=0.0)
    b_y = tl.load(x + offset, mask).to(tl.float32) + b_bias.to(tl.float32)
    if residual is not None:
        b_y += tl.load(residual + offset, mask).to(tl.float32)
    tl.store(y + offset, b_y.to(y.dtype.element_ty), mask)


def _candidates(rows: int, columns: int, inputs: int, dtype: torch.dtype) -> list[Launch]:
    """Tiles whose columns fill a power of two: of 320 channels 64."""
    width = columns & -columns
    if width < 16:
        width = triton.next_power_of_2(columns)
    width = min(width, 128)
    return [
        Launch.of(ROWS=elements // width, COLUMNS=width, warps=warps)
        for elements, warps in ((4096, 8), (2048, 4), (8192, 8))
    ]


_TUNED = Tuned("bias_residual", _kernel, _candidates)


@torch.library.custom_op("imagedream_rt::bias_residual", mutates_args=())
def _bias_residual(x: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    y, (samples, channels, height, width) = torch.empty_like(x), x.shape
    last = is_channels_last(x)
    rows, columns = samples * height * width, channels
    if not last:
        rows, columns = samples * channels, height * width
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    bias = bias.contiguous()
    overlapping = overlap(x)

    def run(launch: Launch) -> None:
        _kernel[(triton.cdiv(rows, launch["ROWS"]) * triton.cdiv(columns, launch["COLUMNS"]),)](
            *(x, bias, residual, y, rows, columns),
            CHANNELS=channels,
            CHANNELS_LAST=last,
            **overlapping,
            **launch.options,
        )

    inputs = 1 if residual is None else 2
    run(_TUNED.choose(x.device, (rows, columns, inputs, x.dtype), run))
    return y


@_bias_residual.register_fake
def _(x: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    return torch.empty_like(x)


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    of_x, of_bias, of_residual = ctx.needs_input_grad
    _, bias, residual = ctx.dtypes
    return (
        grad if of_x else None,
        grad.sum((0, 2, 3), dtype=torch.float32).to(bias) if of_bias else None,
        grad.to(residual) if of_residual else None,
    )


_bias_residual.register_autograd(_differentiate, setup_context=_remember)


def bias_residual(
    x: Tensor, bias: Tensor, residual: Tensor | None = None, backend: KernelBackend = "auto"
) -> Tensor:
    """``x + bias + residual``, rounded once; differentiable with respect to all three.

    ``x`` and ``residual`` [N, C, H, W], ``bias`` [C], each of any floating dtype. Returns [N, C, H, W] in the dtype of
    ``x`` and, where Triton runs, its memory format. Under ``auto``, an ``x`` that is neither channels-last nor
    contiguous goes to plain PyTorch.

    Raises ``ValueError`` for shapes that do not fit together, or if ``triton`` is asked for such a strided ``x``.

    >>> bias_residual(torch.tensor([1.0, 2.0]).view(1, 2, 1, 1), torch.tensor([10.0, 20.0])).flatten().tolist()
    [11.0, 22.0]
    """
    if x.dim() != 4 or bias.shape != x.shape[1:2]:
        raise ValueError(f"x must be [N, C, H, W] and bias [C], got {[*x.shape]} and {[*bias.shape]}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must be {[*x.shape]} as x, got {[*residual.shape]}")
    if not x.numel():
        return x.clone()
    fits = is_channels_last(x) or x.is_contiguous()
    if use_triton(backend, x, bias, residual) and (fits or backend == "triton"):
        if not fits:
            raise ValueError(
                f"backend 'triton' takes channels-last or contiguous x, got strides {x.stride()} of {[*x.shape]}"
            )
        return _bias_residual(x, bias, residual)
    return bias_residual_reference(x, bias, residual)
