"""The 3x3 convolution that a network begins with: of three channels to many, with its bias.

    y[n, :, i, j] = sum over a, b of W[:, :, a, b] x[n, :, i + a - 1, j + b - 1] + bias

for x [N, C, H, W], zero outside of the picture. It is a product of pixels' 9 C neighbours with the weights, few enough
for one step of the tensor cores, so that writing y is all that takes time; libraries' tiles are for many channels. The
gradient by x is the transposed product, whose columns a second kernel adds at the pixels they came from:

    P[a, b, c, n, i, j] = sum over o of W[o, c, a, b] dy[n, o, i, j],
    dx[n, c, i, j] = sum over a, b of P[a, b, c, n, i - a + 1, j - b + 1].

Sums are in float32 and rounded once. For frozen weights in half precision; :func:`fits` says of what else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ._triton import HALF, KernelBackend, jit, overlap, tl, triton, use_triton
from ._tuning import Launch, Tuned

NEIGHBOURS = 32
"""Columns of the product, some of them empty: the least that fills a step of the tensor cores, and holds 3 x 9."""
MOST_DEPTH = 128
"""Output channels of a step."""


def picture_convolution_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The formula above in float32 or wider; arguments as :func:`picture_convolution`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = functional.conv2d(x.to(wide), weight.to(wide), bias.to(wide), padding=1)
    return y.to(x.dtype, memory_format=torch.channels_last)


@jit
def _weights(weight, o_neighbour, o_out, IN: tl.constexpr, OUT: tl.constexpr):
    """W as [neighbours, channels of y], of dense memory [OUT, 3, 3, IN]; columns that there are not are zero."""
    mask = (o_neighbour < 9 * IN)[:, None] & (o_out < OUT)[None, :]
    return tl.load(weight + o_out[None, :] * (9 * IN) + o_neighbour[:, None], mask, other=0.0)


@jit
def _forward_kernel(
    x,
    weight,
    bias,
    y,
    rows,
    height,
    width,
    n_stride,
    c_stride,
    h_stride,
    w_stride,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """ROWS pixels by COLUMNS channels of y."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_out = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    o_neighbour = tl.arange(0, NEIGHBOURS)
    o_tap = o_neighbour // IN
    o_i = (o_row // width % height)[:, None] + (o_tap // 3 - 1)[None, :]
    o_j = (o_row % width)[:, None] + (o_tap % 3 - 1)[None, :]
    mask = (o_row < rows)[:, None] & (o_neighbour < 9 * IN)[None, :]
    mask &= (o_i >= 0) & (o_i < height) & (o_j >= 0) & (o_j < width)
    place = (o_row // (width * height)).to(tl.int64)[:, None] * n_stride + o_i * h_stride + o_j * w_stride
    b_weight = _weights(weight, o_neighbour, o_out, IN, OUT)
    b_bias = tl.load(bias + o_out, o_out < OUT, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    b_x = tl.load(x + place + (o_neighbour % IN)[None, :] * c_stride, mask, other=0.0)
    b_y = tl.dot(b_x, b_weight) + b_bias[None, :]
    m_y = (o_row < rows)[:, None] & (o_out < OUT)[None, :]
    tl.store(y + o_row.to(tl.int64)[:, None] * OUT + o_out[None, :], b_y.to(y.dtype.element_ty), m_y)


@jit
def _products_kernel(
    grad,
    weight,
    products,
    rows,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """P of ROWS pixels, [9 IN, rows] in float32."""
    o_row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    o_neighbour = tl.arange(0, NEIGHBOURS)
    if PDL:
        tl.extra.cuda.gdc_wait()
    b_products = tl.zeros([ROWS, NEIGHBOURS], tl.float32)
    for start in tl.static_range(0, OUT, DEPTH):
        o_out = start + tl.arange(0, DEPTH)
        mask = (o_row < rows)[:, None] & (o_out < OUT)[None, :]
        b_grad = tl.load(grad + o_row[:, None] * OUT + o_out[None, :], mask, other=0.0)
        b_products = tl.dot(b_grad, tl.trans(_weights(weight, o_neighbour, o_out, IN, OUT)), b_products)
    m_products = (o_row < rows)[:, None] & (o_neighbour < 9 * IN)[None, :]
    tl.store(products + o_neighbour.to(tl.int64)[None, :] * rows + o_row[:, None], b_products, m_products)


@jit
def _fold_kernel(
    products,
    grad_x,
    rows,
    height,
    width,
    n_stride,
    c_stride,
    h_stride,
    w_stride,
    IN: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """dx of ROWS pixels, one channel."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1)
    o_n, o_i, o_j = o_row // (width * height), o_row // width % height, o_row % width
    if PDL:
        tl.extra.cuda.gdc_wait()
    b_grad = tl.zeros([ROWS], tl.float32)
    for tap in tl.static_range(9):
        down, right = 1 - tap // 3, 1 - tap % 3
        mask = (o_row < rows) & (o_i + down >= 0) & (o_i + down < height)
        mask &= (o_j + right >= 0) & (o_j + right < width)
        plane = (tap * IN + channel).to(tl.int64) * rows
        b_grad += tl.load(products + plane + o_row + down * width + right, mask, other=0.0)
    place = o_n.to(tl.int64) * n_stride + channel * c_stride + o_i * h_stride + o_j * w_stride
    tl.store(grad_x + place, b_grad.to(grad_x.dtype.element_ty), o_row < rows)


def _candidates(rows: int, out: int, dtype: torch.dtype) -> list[Launch]:
    return [Launch.of(ROWS=rows, warps=warps) for rows, warps in ((128, 4), (128, 8), (64, 4), (256, 8))]


_FORWARD = Tuned("picture_convolution", _forward_kernel, _candidates)
_GRADIENT = Tuned("picture_convolution_gradient", _products_kernel, _candidates)
FOLDED_ROWS = 1024
"""Pixels of a program that adds products."""


def _depth(channels: int) -> int:
    """Channels of y that a tile holds."""
    return min(MOST_DEPTH, max(16, triton.next_power_of_2(channels)))


@torch.library.custom_op("imagedream_rt::picture_convolution", mutates_args=())
def _picture_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    samples, channels, height, width = x.shape
    out, rows, overlapping = len(weight), samples * height * width, overlap(x)
    columns = _depth(out)
    y, bias = _empty(x, weight, bias), bias.contiguous()

    def run(launch: Launch) -> None:
        _forward_kernel[(triton.cdiv(rows, launch["ROWS"]), triton.cdiv(out, columns))](
            *(x, weight, bias, y, rows, height, width, *x.stride()),
            IN=channels,
            OUT=out,
            NEIGHBOURS=NEIGHBOURS,
            COLUMNS=columns,
            **overlapping,
            **launch.options,
        )

    run(_FORWARD.choose(x.device, (rows, out, x.dtype), run))
    return y


@_picture_convolution.register_fake
def _empty(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.custom_op("imagedream_rt::picture_convolution_gradient", mutates_args=())
def picture_convolution_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """That by x, like it; ``grad`` [N, C', H, W] is that of y."""
    samples, channels, height, width = x.shape
    out, rows, overlapping = len(weight), samples * height * width, overlap(x)
    grad, grad_x = grad.contiguous(memory_format=torch.channels_last), torch.empty_like(x)
    products = x.new_empty(9 * channels, rows, dtype=torch.float32)

    def run(launch: Launch) -> None:
        _products_kernel[(triton.cdiv(rows, launch["ROWS"]),)](
            *(grad, weight, products, rows),
            IN=channels,
            OUT=out,
            NEIGHBOURS=NEIGHBOURS,
            DEPTH=_depth(out),
            **overlapping,
            **launch.options,
        )

    run(_GRADIENT.choose(x.device, (rows, out, x.dtype), run))
    _fold_kernel[(triton.cdiv(rows, FOLDED_ROWS), channels)](
        *(products, grad_x, rows, height, width, *grad_x.stride()),
        IN=channels,
        ROWS=FOLDED_ROWS,
        num_warps=4,
        **overlapping,
    )
    return grad_x


@picture_convolution_gradient.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return picture_convolution_gradient(grad, *ctx.saved_tensors), None, None


_picture_convolution.register_autograd(_differentiate, setup_context=_remember)


def fits(backend: KernelBackend, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel takes these: few channels and many, half precision, frozen and channels-last weights."""
    if bias is None or bias.dtype not in HALF or not x.dtype == weight.dtype in HALF:
        return False
    trained = torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad)
    return (
        9 * x.shape[1] <= NEIGHBOURS
        and not trained
        and 0 < x.numel() < 2**31
        and weight.is_contiguous(memory_format=torch.channels_last)
        and use_triton(backend, x, weight, bias)
    )


def picture_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The formula above, of what :func:`fits`; differentiable by ``x``, once.

    ``x`` [N, C, H, W], ``weight`` [C', C, 3, 3], ``bias`` [C'] -> [N, C', H, W], channels-last.
    """
    return _picture_convolution(x, weight, bias)
