"""The environment behind the object: a small perceptron of the viewing direction, in one pass.

colour = sigmoid(W3 relu(W2 relu(W1 y))), where y are the nine real spherical harmonics of degree below three of the
unit direction, and matrices have no bias. Source: ImageDream's released fusion configuration (threestudio's neural
environment map).

The kernels put nothing between input and output into memory: backward computes the hidden layers again. Each of its
programs sums the matrices' gradients over its rays, and the programs' sums are added in a fixed order. Rays lie along
the columns of every product; these run on tensor cores in three parts, nearly as exact as in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._field_network import load_inner, load_vectors
from ._triton import KernelBackend, constant, jit, tl, use_triton
from ._tuning import Launch

HIDDEN = 16
"""Units of both hidden layers; also the least that a side of a matrix product may have."""

SHAPES = ((HIDDEN, 9), (HIDDEN, HIDDEN), (3, HIDDEN))
"""Of the matrices."""

PROGRAMS = 1024
"""Backward: at most as many sums of gradients."""

FORWARD = Launch.of(BLOCK=128, warps=4, stages=1)
# With more rays at a time registers spill.
BACKWARD = Launch.of(BLOCK=32, warps=1, stages=1)

ZERO, ONE = math.sqrt(1 / (4 * math.pi)), math.sqrt(3 / (4 * math.pi))
MIXED, AXIAL = math.sqrt(15 / (4 * math.pi)), math.sqrt(5 / (16 * math.pi))
_ZERO, _ONE, _MIXED, _AXIAL = (constant(value) for value in (ZERO, ONE, MIXED, AXIAL))


def spherical_harmonics(directions: Tensor) -> Tensor:
    """The nine real spherical harmonics of degree below three of unit directions [..., 3] -> [..., 9].

    Order and signs are those of tiny-cuda-nn's ``SphericalHarmonics`` of degree 3, with the normalising
    constants sqrt(1 / 4 pi), sqrt(3 / 4 pi), sqrt(15 / 4 pi), sqrt(5 / 16 pi) (Green 2003, appendix).

    >>> spherical_harmonics(torch.tensor([0.0, 0.0, 1.0]))[[0, 2]]
    tensor([0.2821, 0.4886])
    """
    x, y, z = directions.unbind(-1)
    return torch.stack(
        (
            torch.full_like(x, ZERO),
            -ONE * y,
            ONE * z,
            -ONE * x,
            MIXED * x * y,
            -MIXED * y * z,
            AXIAL * (3 * z * z - 1),
            -MIXED * x * z,
            MIXED / 2 * (x * x - y * y),
        ),
        dim=-1,
    )


def background_reference(directions: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """:func:`background` in plain PyTorch, for matrices of any width; differentiable in all."""
    x = spherical_harmonics(directions)
    for weight in weights[:-1]:
        x = torch.relu(x @ weight.t())
    return torch.sigmoid(x @ weights[-1].t())


def background(directions: Tensor, weights: Sequence[Tensor], *, backend: KernelBackend = "auto") -> Tensor:
    """Colour [..., 3] in [0, 1] of unit directions [..., 3]; differentiable in the three ``weights``.

    They are [16, 9], [16, 16] and [3, 16]. Plain PyTorch takes over for other widths and dtypes than float32, and for
    directions that need a gradient. Raises ``ValueError`` for shapes that do not fit, and if backend "triton" is asked
    for what it does not know.

    >>> weights = [torch.zeros(shape) for shape in SHAPES]
    >>> background(torch.tensor([[0.0, 0.0, 1.0]]), weights)
    tensor([[0.5000, 0.5000, 0.5000]])
    """
    if directions.shape[-1:] != (3,):
        raise ValueError(f"directions have shape {tuple(directions.shape)}; they must be [..., 3]")
    shapes = tuple(tuple(weight.shape) for weight in weights)
    known = shapes == SHAPES and not (directions.requires_grad and torch.is_grad_enabled())
    if backend == "triton" and not known:
        raise ValueError(
            f"backend 'triton' takes weights {SHAPES} and directions without gradient; the weights are {shapes}"
        )
    if use_triton(backend, directions, *weights, dtypes=(torch.float32,)) and known:
        return _Background.apply(directions, *weights)
    return background_reference(directions, weights)


class _Background(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, directions: Tensor, *weights: Tensor) -> Tensor:
        directions, weights = directions.contiguous(), tuple(weight.contiguous() for weight in weights)
        colour = torch.empty_like(directions)
        n = directions.numel() // 3
        _forward_kernel[(_blocks(n, FORWARD),)](directions, *weights, colour, n, **FORWARD.options)
        ctx.save_for_backward(directions, *weights, colour)
        return colour

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        directions, *weights, colour = ctx.saved_tensors
        n = directions.numel() // 3
        programs = min(_blocks(n, BACKWARD), PROGRAMS)
        sizes = [weight.numel() for weight in weights]
        sums = colour.new_empty(programs, sum(sizes))
        _backward_kernel[(programs,)](
            directions, *weights, colour, grad.contiguous(), sums, n, **BACKWARD.options
        )
        parts = sums.sum(0).split(sizes)
        return None, *(part.view(weight.shape) for part, weight in zip(parts, weights, strict=True))


def _blocks(n: int, launch: Launch) -> int:
    return -(-n // launch["BLOCK"])


@jit
def _harmonics(p_directions, o, m):
    """[16, BLOCK]: nine rows of harmonics, then zeros."""
    x, y, z = load_vectors(p_directions, o[None, :], m[None, :])
    k = tl.arange(0, 16)[:, None]
    value = tl.where(k == 0, _ZERO, 0.0) + tl.zeros_like(x)
    value = tl.where(k == 1, -_ONE * y, value)
    value = tl.where(k == 2, _ONE * z, value)
    value = tl.where(k == 3, -_ONE * x, value)
    value = tl.where(k == 4, _MIXED * x * y, value)
    value = tl.where(k == 5, -_MIXED * y * z, value)
    value = tl.where(k == 6, _AXIAL * (3.0 * z * z - 1.0), value)
    value = tl.where(k == 7, -_MIXED * x * z, value)
    return tl.where(k == 8, 0.5 * _MIXED * (x * x - y * y), value)


@jit
def _product(a, b, acc=None):
    return tl.dot(a, b, acc, input_precision="tf32x3")


@jit
def _forward_kernel(p_directions, p_first, p_second, p_last, p_colour, n, BLOCK: tl.constexpr):
    first, second = load_inner(p_first, 16, 9, 16, 16), load_inner(p_second, 16, 16, 16, 16)
    last = load_inner(p_last, 3, 16, 16, 16)
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    hidden = tl.maximum(_product(first, _harmonics(p_directions, o, o < n)), 0.0)
    hidden = tl.maximum(_product(second, hidden), 0.0)
    channel = tl.arange(0, 16)[:, None]
    m = (channel < 3) & (o < n)[None, :]
    tl.store(p_colour + o[None, :] * 3 + channel, tl.sigmoid(_product(last, hidden)), mask=m)


@jit
def _backward_kernel(
    p_directions, p_first, p_second, p_last, p_colour, p_grad, p_sums, n, BLOCK: tl.constexpr
):
    """p_sums [programs, 448]: each program's three gradients, one behind the other."""
    first, second = load_inner(p_first, 16, 9, 16, 16), load_inner(p_second, 16, 16, 16, 16)
    last = load_inner(p_last, 3, 16, 16, 16)
    by_first = tl.zeros((16, 16), tl.float32)
    by_second = tl.zeros((16, 16), tl.float32)
    by_last = tl.zeros((16, 16), tl.float32)
    row, column = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    # Addresses in shared memory, taken out of the loop, would not leave enough registers.
    for block in tl.range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0), disable_licm=True):
        o = block * BLOCK + tl.arange(0, BLOCK)
        harmonics = _harmonics(p_directions, o, o < n)
        early = tl.maximum(_product(first, harmonics), 0.0)
        late = tl.maximum(_product(second, early), 0.0)
        place, m = o[None, :] * 3 + row, (row < 3) & (o < n)[None, :]
        colour = tl.load(p_colour + place, mask=m, other=0.0)
        grad = tl.load(p_grad + place, mask=m, other=0.0) * colour * (1.0 - colour)
        by_last = _product(grad, tl.trans(late), by_last)
        grad = tl.where(late > 0.0, _product(tl.trans(last), grad), 0.0)
        by_second = _product(grad, tl.trans(early), by_second)
        grad = tl.where(early > 0.0, _product(tl.trans(second), grad), 0.0)
        by_first = _product(grad, tl.trans(harmonics), by_first)
    p_sums += tl.program_id(0) * 448
    tl.store(p_sums + row * 9 + column, by_first, mask=column < 9)
    tl.store(p_sums + 144 + row * 16 + column, by_second)
    tl.store(p_sums + 400 + row * 16 + column, by_last, mask=row < 3)
