"""Group normalisation where a residual path begins: its backward kernel adds the gradients of both ways.

    y = act(group_norm(x)),   x once more;     dx = gradient through y + gradient of the path

Autograd by itself would add the two in a pass of its own, which reads and writes a feature map more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._group_tiles import on_kernel
from ._triton import KernelBackend
from .group_norm import check, group_norm, group_norm_and_moments
from .group_norm_backward import gradients


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
    ) -> tuple[Tensor, Tensor]:
        y, mean, rstd = group_norm_and_moments(x, weight, bias, None, groups, eps, silu)
        ctx.save_for_backward(x, weight, bias, None, mean, rstd)
        ctx.silu = silu
        ctx.set_materialize_grads(False)
        return y, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, beside: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return beside, None, None, None, None, None
        needed = (*ctx.needs_input_grad[:3], False)
        found = gradients(grad, ctx.saved_tensors, ctx.silu, needed, beside)
        return *found[:3], None, None, None


def forked_group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int = 32,
    eps: float,
    silu: bool = False,
    backend: KernelBackend = "auto",
) -> tuple[Tensor, Tensor]:
    """:func:`group_norm` of ``x``, and ``x`` as the residual path must take it.

    Arguments, errors and the first result as there; the second has the numbers and the memory of ``x``.

    >>> x = torch.tensor([1.0, 3.0, 5.0, 7.0]).view(1, 2, 1, 2)
    >>> y, path = forked_group_norm(x, torch.ones(2), torch.zeros(2), groups=2, eps=0.0)
    >>> (y + path).flatten().tolist()
    [0.0, 4.0, 4.0, 8.0]
    """
    check(x, weight, bias, groups, None)
    if torch.is_grad_enabled() and x.numel() and on_kernel(backend, x, weight, bias):
        return _Fork.apply(x, weight, bias, groups, eps, silu)
    return group_norm(x, weight, bias, groups=groups, eps=eps, silu=silu, backend=backend), x
