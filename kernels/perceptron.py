"""A bias-free perceptron with one hidden ReLU layer, its derivative by the input, and the gradients of both.

y = W2 relu(W1 x), and for one output dy/dx = W1^T (w2 * [W1 x > 0]). The hidden layer is far wider than the
input, so it is never stored: the samples pass in blocks that stay in the cache, and the backward pass
computes it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CPU_BLOCK = 2**13
"""Samples of one block on a CPU: its hidden layer of 64 floats per sample stays in the cache."""
GPU_BLOCK = 2**21
"""On a GPU blocks only bound the memory."""


def blocks(count: int, size: int) -> Iterator[slice]:
    """Slices of ``size`` samples that cover ``count``; the last may be shorter."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _size(x: Tensor) -> int:
    return CPU_BLOCK if x.device.type == "cpu" else GPU_BLOCK


class _Perceptron(torch.autograd.Function):
    """x [I, N], inner [H, I], outer [O, H] -> y [O, N], and with ``slope`` (then O = 1) also dy/dx [I, N]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inner: Tensor, outer: Tensor, slope: bool) -> Any:
        y = x.new_empty(outer.shape[0], x.shape[1])
        dy = torch.empty_like(x) if slope else None
        through = inner.t() * outer if slope else inner
        for block in blocks(x.shape[1], _size(x)):
            hidden = (inner @ x[:, block]).relu_()
            y[:, block] = outer @ hidden
            if dy is not None:
                dy[:, block] = through @ hidden.sign_()
        ctx.save_for_backward(x, inner, outer)
        ctx.set_materialize_grads(False)
        return y if dy is None else (y, dy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_dy: Tensor | None = None) -> Any:
        x, inner, outer = ctx.saved_tensors
        grad_x = torch.zeros_like(x) if grad_y is None else torch.empty_like(x)
        grad_inner, grad_outer = torch.zeros_like(inner), torch.zeros_like(outer)
        grad_through = torch.zeros_like(inner.t())
        for block in blocks(x.shape[1], _size(x)):
            hidden = (inner @ x[:, block]).relu_()
            if grad_y is not None:
                grad_outer += grad_y[:, block] @ hidden.t()
            active = hidden.sign_()
            if grad_y is not None:
                grad_hidden = (outer.t() @ grad_y[:, block]).mul_(active)
                grad_inner += grad_hidden @ x[:, block].t()
                grad_x[:, block] = inner.t() @ grad_hidden
            if grad_dy is not None:
                grad_through += grad_dy[:, block] @ active.t()
        if grad_dy is not None:
            grad_inner += (grad_through * outer).t()
            grad_outer += (grad_through * inner.t()).sum(0)
        return grad_x, grad_inner, grad_outer, None


def _check(x: Tensor, inner: Tensor, outer: Tensor) -> None:
    fits = x.dim() == inner.dim() == outer.dim() == 2
    if not (fits and x.shape[1] == inner.shape[1] and inner.shape[0] == outer.shape[1]):
        shapes = f"x {tuple(x.shape)}, inner {tuple(inner.shape)}, outer {tuple(outer.shape)}"
        raise ValueError(f"{shapes}; they must be [N, I], [H, I], [O, H]")


def perceptron(x: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    """y [N, O] = outer relu(inner x) of x [N, I], inner [H, I], outer [O, H]; differentiable once in all
    three.

    The result is a transposed view of contiguous [O, N], and an x of that layout is read without a copy.
    Raises ``ValueError`` for shapes that do not fit.

    >>> perceptron(torch.tensor([[2.0], [-2.0]]), torch.tensor([[3.0]]), torch.tensor([[0.5]])).tolist()
    [[3.0], [0.0]]
    """
    _check(x, inner, outer)
    return _Perceptron.apply(x.t().contiguous(), inner, outer, False).t()


def perceptron_slope(x: Tensor, inner: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    """y [N, 1] as :func:`perceptron` with outer [1, H], and dy/dx [N, I]; both differentiable once.

    The slope's own derivative by x is zero, as a ReLU has no curvature; it is differentiable in both
    matrices.
    """
    _check(x, inner, outer)
    if outer.shape[0] != 1:
        raise ValueError(f"outer is {tuple(outer.shape)}; a slope needs one output")
    y, slope = _Perceptron.apply(x.t().contiguous(), inner, outer, True)
    return y.t(), slope.t()
