"""Layer normalisation over the channels, alone or together with the residual sum before it.

    out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias,    var(x) = mean((x - mean(x))^2),

over the last dimension of x [..., C] in float16, bfloat16 or float32; statistics and arithmetic in float32.
With a residual, x = x + delta first, rounded to its dtype as a sum of its own would be, so that the sum is
written once, read never and normalised in one pass.

Source: Ba et al., "Layer Normalization" (arXiv 1607.06450).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ._triton import KernelBackend, jit, tl, triton, use_triton
from ._tuning import Launch, Tuned

WIDEST = 16384
"""Most channels that the kernels take: a row is held in registers."""


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """The formula above in float32 or wider; shapes as :func:`layer_norm`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return functional.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(x.dtype)


def add_layer_norm_reference(
    x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The sum, and its norm; shapes as :func:`add_layer_norm`."""
    total = x + delta
    return total, layer_norm_reference(total, weight, bias, eps)


@jit
def _append(items, item):
    return items + (item,)  # noqa: RUF005


@jit
def _forward_kernel(
    x,
    delta,
    weight,
    bias,
    total,
    out,
    rows,
    x_stride,
    delta_stride,
    eps,
    ADD: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS rows, held in registers as blocks of channels: 320 is five blocks of 64, and no lane idles."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    o_out = row * CHANNELS + column
    parts, weights, biases = (), (), ()
    for first in tl.static_range(0, CHANNELS, BLOCK):
        there = (row < rows) & (first + column < CHANNELS)
        part = tl.load(x + row * x_stride + first + column, there, other=0.0).to(tl.float32)
        if ADD:
            part += tl.load(delta + row * delta_stride + first + column, there, other=0.0).to(tl.float32)
            rounded = part.to(total.dtype.element_ty)
            tl.store(total + o_out + first, rounded, there)
            part = rounded.to(tl.float32)
        parts = _append(parts, part)
    # Under way while the statistics are computed. An address for each row gives them the layout of x.
    for first in tl.static_range(0, CHANNELS, BLOCK):
        channel = tl.broadcast_to(first + column, (ROWS, BLOCK))
        weights = _append(weights, tl.load(weight + channel, channel < CHANNELS))
        biases = _append(biases, tl.load(bias + channel, channel < CHANNELS))

    moment = tl.zeros((ROWS, BLOCK), tl.float32)
    for number in tl.static_range(len(parts)):
        moment += parts[number]
    mean = tl.sum(moment, axis=1)[:, None] / CHANNELS
    moment = tl.zeros((ROWS, BLOCK), tl.float32)
    for number in tl.static_range(len(parts)):
        centred = tl.where(number * BLOCK + column < CHANNELS, parts[number] - mean, 0.0)
        moment += centred * centred
    inverse = tl.rsqrt(tl.sum(moment, axis=1)[:, None] / CHANNELS + eps)
    for number in tl.static_range(len(parts)):
        normed = (parts[number] - mean) * inverse
        normed = normed * weights[number].to(tl.float32) + biases[number].to(tl.float32)
        there = (row < rows) & (number * BLOCK + column < CHANNELS)
        tl.store(out + o_out + number * BLOCK, normed.to(out.dtype.element_ty), there)


@jit
def _backward_kernel(
    grad,
    x,
    weight,
    grad_x,
    grad_weight,
    grad_bias,
    rows,
    grad_stride,
    x_stride,
    eps,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Every program takes each so-many-th tile of rows and keeps its own sums for weight and bias."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < CHANNELS
    b_weight = tl.load(weight + column, inside, other=0.0).to(tl.float32)
    sum_weight = tl.zeros((1, BLOCK), tl.float32)
    sum_bias = tl.zeros((1, BLOCK), tl.float32)
    for first in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = tl.cast(first, tl.int64) + tl.arange(0, ROWS)[:, None]
        there = (row < rows) & inside
        b_x = tl.load(x + row * x_stride + column, there, other=0.0).to(tl.float32)
        b_grad = tl.load(grad + row * grad_stride + column, there, other=0.0).to(tl.float32)
        centred = tl.where(there, b_x - tl.sum(b_x, axis=1)[:, None] / CHANNELS, 0.0)
        inverse = tl.rsqrt(tl.sum(centred * centred, axis=1)[:, None] / CHANNELS + eps)
        normed = centred * inverse
        scaled = b_grad * b_weight
        mean = tl.sum(scaled, axis=1)[:, None] / CHANNELS
        slope = tl.sum(scaled * normed, axis=1)[:, None] / CHANNELS
        result = (scaled - mean - normed * slope) * inverse
        tl.store(grad_x + row * CHANNELS + column, result.to(grad_x.dtype.element_ty), there)
        sum_weight += tl.sum(b_grad * normed, axis=0, keep_dims=True)
        sum_bias += tl.sum(b_grad, axis=0, keep_dims=True)
    tl.store(grad_weight + program * CHANNELS + column, sum_weight, inside)
    tl.store(grad_bias + program * CHANNELS + column, sum_bias, inside)


def _block(channels: int) -> int:
    """Channels of a block: the largest power of two that divides them all, or one block where that is small."""
    divisor = channels & -channels
    return divisor if channels <= 8 * divisor else triton.next_power_of_2(channels)


def _candidates(rows: int, channels: int, dtype: torch.dtype, add: bool) -> Sequence[Launch]:
    block = _block(channels)
    if channels > 2048:
        return [Launch.of(BLOCK=block, ROWS=1, warps=warps) for warps in (8, 4, 16)]
    shapes = [(4, 4), (2, 4), (1, 4), (8, 8), (4, 2)]
    return [Launch.of(BLOCK=block, ROWS=rows, warps=warps) for rows, warps in shapes]


def _backward_launch(channels: int) -> Launch:
    block = triton.next_power_of_2(channels)
    return Launch.of(BLOCK=block, ROWS=max(1, 1024 // block), warps=max(4, min(16, block // 512)))


_FORWARD = Tuned("layer_norm", _forward_kernel, _candidates)


def _rows(x: Tensor) -> Tensor:
    """[..., C] -> [rows, C] whose channels lie side by side."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def normalise(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernel's sum (``x`` itself without a ``delta``) and norm, in ``dtype`` or else that of ``x``."""
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    total = x if delta is None else torch.empty_like(out, dtype=x.dtype)
    if not x.numel():
        return total, out
    channels = x.shape[-1]
    x, added = _rows(x), _rows(x if delta is None else delta)
    weight, bias = weight.contiguous(), bias.contiguous()

    def run(launch: Launch) -> None:
        programs = triton.cdiv(len(x), launch["ROWS"])
        tensors = (x, added, weight, bias, total, out)
        numbers = (len(x), x.stride(0), added.stride(0), eps)
        constants = {"ADD": delta is not None, "CHANNELS": channels, **launch.options}
        _forward_kernel[(programs,)](*tensors, *numbers, **constants)

    run(_FORWARD.choose(x.device, (len(x), channels, x.dtype, delta is not None), run))
    return total, out


@torch.library.custom_op("imagedream_rt::layer_norm", mutates_args=())
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return normalise(x, None, weight, bias, eps)[1]


@torch.library.custom_op("imagedream_rt::add_layer_norm", mutates_args=())
def _add_layer_norm(
    x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return normalise(x, delta, weight, bias, eps)


@torch.library.custom_op("imagedream_rt::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, in its dtype, and of weight and bias, in float32."""
    channels = x.shape[-1]
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not x.numel():
        nothing = x.new_zeros(channels, dtype=torch.float32)
        return grad_x, nothing, nothing.clone()
    grad, x, weight = _rows(grad), _rows(x), weight.contiguous()
    launch = _backward_launch(channels)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    programs = min(4 * processors, triton.cdiv(len(x), launch["ROWS"]))
    sums = x.new_empty(2, programs, channels, dtype=torch.float32)
    numbers = (len(x), grad.stride(0), x.stride(0), eps)
    _backward_kernel[(programs,)](
        grad, x, weight, grad_x, *sums, *numbers, CHANNELS=channels, **launch.options
    )
    return grad_x, sums[0].sum(0), sums[1].sum(0)


@_layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_add_layer_norm.register_fake
def _(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, torch.empty_like(out)


@_layer_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_weight = x.new_empty(x.shape[-1], dtype=torch.float32)
    return grad_x, grad_weight, torch.empty_like(grad_weight)


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
    x, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    x, weight, bias = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _layer_norm_backward(grad, x, weight, ctx.eps)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None


def _remember_sum(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor]
) -> None:
    _, _, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(output[0], weight, bias)


def _differentiate_sum(
    ctx: Any, grad_total: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
    grad_x, grad_weight, grad_bias, _ = _differentiate(ctx, grad)
    grad_x = grad_x + grad_total
    return grad_x, grad_x, grad_weight, grad_bias, None


_layer_norm.register_autograd(_differentiate, setup_context=_remember)
_add_layer_norm.register_autograd(_differentiate_sum, setup_context=_remember_sum)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, backend: KernelBackend = "auto"
) -> Tensor:
    """Each row of C channels shifted and scaled to mean 0 and variance 1, then scaled and shifted as learned.

    Args:
        x: [..., C], floating point, any strides.
        weight, bias: [C], each in the dtype of ``x`` or wider.
        eps: added to the variance.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        [..., C] in the dtype of ``x``, contiguous; differentiable in ``x``, ``weight`` and ``bias``.

    Raises:
        ValueError: a shape does not fit, or the backend is unknown or cannot take the tensors.
        ImportError: ``"triton"`` is asked for and not installed.

    Example:
        >>> layer_norm(torch.tensor([1.0, 3.0]), torch.ones(2), torch.tensor([0.0, 1.0]), eps=0.0).tolist()
        [-1.0, 2.0]
    """
    check(x, weight, bias)
    if use_triton(backend, x, weight, bias) and fits(x, backend):
        return _layer_norm(x, weight, bias, eps)
    return layer_norm_reference(x, weight, bias, eps)


def add_layer_norm(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    backend: KernelBackend = "auto",
) -> tuple[Tensor, Tensor]:
    """The residual sum ``x + delta`` and its :func:`layer_norm`, in one pass.

    ``delta`` has the shape and dtype of ``x``; all else, the errors too, as for :func:`layer_norm`.

    Returns:
        The sum and its norm, each [..., C] in the dtype of ``x``.

    Example:
        >>> x, ones = torch.tensor([1.0, 3.0]), torch.ones(2)
        >>> [part.tolist() for part in add_layer_norm(x, ones, ones, ones, eps=0.0)]
        [[2.0, 4.0], [0.0, 2.0]]
    """
    check(x, weight, bias, delta)
    if use_triton(backend, x, delta, weight, bias) and fits(x, backend):
        return _add_layer_norm(x, delta, weight, bias, eps)
    return add_layer_norm_reference(x, delta, weight, bias, eps)


def check(x: Tensor, weight: Tensor, bias: Tensor, delta: Tensor | None = None) -> None:
    """Raises ``ValueError`` where shapes or dtypes do not fit."""
    if x.ndim == 0 or weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(
            "x must be [..., C] and weight and bias [C], "
            f"got {list(x.shape)}, {list(weight.shape)} and {list(bias.shape)}"
        )
    if delta is not None and (delta.shape != x.shape or delta.dtype != x.dtype):
        raise ValueError(
            f"delta must have the shape and dtype of x, {list(x.shape)} in {x.dtype}, "
            f"got {list(delta.shape)} in {delta.dtype}"
        )


def fits(x: Tensor, backend: str) -> bool:
    """Whether a row fits into registers; raises if the kernel was asked for in spite of it."""
    if x.shape[-1] > WIDEST and backend == "triton":
        raise ValueError(f"backend 'triton' takes up to {WIDEST} channels, got {x.shape[-1]}")
    return x.shape[-1] <= WIDEST
