"""GEGLU: the gated linear unit of the UNet's feed-forward layers, with the exact (erf) GELU.

    out = value * gelu(gate),    gelu(x) = x * (1 + erf(x / sqrt(2))) / 2,

where ``value`` and ``gate`` are the first and the second half of the channels. Tensors [..., 2C] -> [..., C] in
float16, bfloat16 or float32, computed in float32.

Source: Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202, equation 6).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ._triton import KernelBackend, constant, jit, tl, triton, use_triton
from ._tuning import Launch, Tuned


def geglu_reference(projected: Tensor) -> Tensor:
    """The formula above in float32 or wider; shapes as :func:`geglu`."""
    value, gate = projected.to(torch.promote_types(projected.dtype, torch.float32)).chunk(2, dim=-1)
    return (value * functional.gelu(gate)).to(projected.dtype)


LOG2_E = constant(1.4426950408889634)


@jit
def _normal_cdf(x):
    """(1 + erf(x / sqrt(2))) / 2 with a relative error of about 1e-7, for large negative x too.

    With z = |x| / sqrt(2) and t = 1 / (1 + z / 2), erfc(z) = t exp(P(t) - z^2) where P has degree nine (Press et
    al., Numerical Recipes, section 6.2). It takes two thirds of the instructions of CUDA's erf, with which
    the kernel would wait for arithmetic instead of memory.
    """
    root = tl.rsqrt(1.0 + 0.3535533905932738 * tl.abs(x))
    t = root * root  # a division would take more instructions
    p = 0.17087277 * t - 0.82215223
    p = p * t + 1.48851587
    p = p * t - 1.13520398
    p = p * t + 0.27886807
    p = p * t - 0.18628806
    p = p * t + 0.09678418
    p = p * t + 0.37409196
    p = p * t + 1.00002368
    p = p * t - (1.26551223 + 0.69314718)  # with ln 2, for half of erfc
    tail = t * tl.exp2(LOG2_E * p - (0.5 * LOG2_E) * (x * x))
    return tl.where(x < 0, tail, 1.0 - tail)


@jit
def _tile(rows, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row and column numbers of this program's tile, and which of them there are; columns vary fastest."""
    across: tl.constexpr = (CHANNELS + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    row = (program // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = program % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < rows) & (column < CHANNELS)


@jit
def _forward_kernel(
    projected,
    out,
    rows,
    stride,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STREAM: tl.constexpr,
):
    row, column, there = _tile(rows, CHANNELS, ROWS, COLUMNS)
    p_value = projected + row * stride + column
    eviction: tl.constexpr = "evict_first" if STREAM else ""
    value = tl.load(p_value, there, eviction_policy=eviction).to(tl.float32)
    gate = tl.load(p_value + CHANNELS, there, eviction_policy=eviction).to(tl.float32)
    result = value * (gate * _normal_cdf(gate))
    tl.store(out + row * CHANNELS + column, result.to(out.dtype.element_ty), there)


@jit
def _backward_kernel(
    grad,
    projected,
    out,
    rows,
    grad_stride,
    stride,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STREAM: tl.constexpr,
):
    row, column, there = _tile(rows, CHANNELS, ROWS, COLUMNS)
    p_value = projected + row * stride + column
    eviction: tl.constexpr = "evict_first" if STREAM else ""
    g = tl.load(grad + row * grad_stride + column, there, eviction_policy=eviction).to(tl.float32)
    value = tl.load(p_value, there, eviction_policy=eviction).to(tl.float32)
    gate = tl.load(p_value + CHANNELS, there, eviction_policy=eviction).to(tl.float32)
    cdf = _normal_cdf(gate)
    density = 0.3989422804014327 * tl.exp2((-0.5 * LOG2_E) * (gate * gate))
    p_out = out + row * (2 * CHANNELS) + column
    tl.store(p_out, (g * gate * cdf).to(out.dtype.element_ty), there)
    tl.store(p_out + CHANNELS, (g * value * (cdf + gate * density)).to(out.dtype.element_ty), there)


def _candidates(rows: int, channels: int, dtype: torch.dtype) -> Sequence[Launch]:
    # STREAM spares the cache for others, which pays where the tensor is larger than the cache.
    tiles = [(4, 256, 4, 0), (4, 256, 4, 1), (2, 512, 4, 0), (1, 1024, 4, 0)]
    return [Launch.of(ROWS=r, COLUMNS=c, STREAM=stream, warps=warps) for r, c, warps, stream in tiles]


_FORWARD = Tuned("geglu", _forward_kernel, _candidates)
_BACKWARD = Tuned("geglu_backward", _backward_kernel, _candidates)


def _launch(tuned: Tuned, tensors: Sequence[Tensor], strides: Sequence[int], channels: int) -> None:
    """Run a kernel of this file; the last of the ``tensors`` is the contiguous result."""
    rows = tensors[0].shape[0]

    def run(launch: Launch) -> None:
        programs = triton.cdiv(rows, launch["ROWS"]) * triton.cdiv(channels, launch["COLUMNS"])
        tuned.kernel[(programs,)](*tensors, rows, *strides, CHANNELS=channels, **launch.options)

    device = tensors[0].device
    run(tuned.choose(device, (rows, channels, tensors[0].dtype), run))


def _rows(x: Tensor) -> Tensor:
    """[..., C] -> [rows, C] whose channels lie side by side."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def gate(projected: Tensor, dtype: torch.dtype) -> Tensor:
    """The kernel's result in ``dtype``; shapes as :func:`geglu`."""
    channels = projected.shape[-1] // 2
    out = projected.new_empty(*projected.shape[:-1], channels, dtype=dtype)
    if out.numel():
        rows = _rows(projected)
        _launch(_FORWARD, (rows, out), (rows.stride(0),), channels)
    return out


@torch.library.custom_op("imagedream_rt::geglu", mutates_args=())
def _geglu(projected: Tensor) -> Tensor:
    return gate(projected, projected.dtype)


@torch.library.custom_op("imagedream_rt::geglu_backward", mutates_args=())
def _geglu_backward(grad: Tensor, projected: Tensor) -> Tensor:
    out = torch.empty_like(projected, memory_format=torch.contiguous_format)
    if out.numel():
        g, rows = _rows(grad), _rows(projected)
        _launch(_BACKWARD, (g, rows, out), (g.stride(0), rows.stride(0)), grad.shape[-1])
    return out


@_geglu.register_fake
def _(projected: Tensor) -> Tensor:
    return projected.new_empty(*projected.shape[:-1], projected.shape[-1] // 2)


@_geglu_backward.register_fake
def _(grad: Tensor, projected: Tensor) -> Tensor:
    return torch.empty_like(projected, memory_format=torch.contiguous_format)


def _remember(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> Tensor:
    return _geglu_backward(grad, *ctx.saved_tensors)


_geglu.register_autograd(_differentiate, setup_context=_remember)


def geglu(projected: Tensor, backend: KernelBackend = "auto") -> Tensor:
    """The first half of the channels times the exact GELU of the second half; differentiable.

    Args:
        projected: [..., 2C], floating point, e.g. a linear layer's output; any strides.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        [..., C] in the dtype of ``projected``, contiguous.

    Raises:
        ValueError: the number of channels is odd, or the backend is unknown or cannot take the tensor.
        ImportError: ``"triton"`` is asked for and not installed.

    Example:
        >>> geglu(torch.tensor([2.0, 3.0, 0.0, 100.0])).tolist()  # gelu(0) = 0, gelu(100) = 100
        [0.0, 300.0]
    """
    check(projected)
    if use_triton(backend, projected):
        return _geglu(projected)
    return geglu_reference(projected)


def check(projected: Tensor) -> None:
    """Raises ``ValueError`` where the shape does not fit."""
    if projected.ndim == 0 or projected.shape[-1] % 2:
        raise ValueError(f"projected must be [..., 2C], got {list(projected.shape)}")
