"""The image encoder's first convolution and its input gradient.

Bytes: x read and y written; in the backward pass y's gradient read and x's written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..kernels.bias_residual import bias_residual
from ..kernels.picture_convolution import picture_convolution, picture_convolution_reference
from .harness import OURS, Case, random_maps

# (views, channels of y, side)
SHAPES = [(4, 128, 256), (8, 128, 256)]


def cases() -> Iterator[Case]:
    for views, channels, side in SHAPES:
        yield _case(views, channels, side)


def _case(views: int, channels: int, side: int) -> Case:
    x = torch.randn(views, 3, side, side, device="cuda", dtype=torch.float16)
    weight = random_maps(channels, 3, 3, 3) / 27**0.5
    bias = torch.randn(channels, device="cuda", dtype=torch.float16)
    grad = random_maps(views, channels, side, side)

    def library(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return bias_residual(torch.nn.functional.conv2d(x, weight, None, padding=1), bias)

    def both(of: Tensor, compute: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        of = of.detach().requires_grad_()
        with torch.enable_grad():
            y = compute(of, *(tensor.to(of.dtype) for tensor in (weight, bias)))
        return y.detach(), torch.autograd.grad(y, of, grad.to(of.dtype))[0]

    return Case(
        "picture_convolution",
        f"{views} x 3 to {channels} at {side}², with input gradient",
        {
            OURS: lambda: both(x, picture_convolution),
            "cuDNN": lambda: both(x.contiguous(memory_format=torch.channels_last), library),
        },
        lambda: both(x.float(), picture_convolution_reference),
        1e-3,
        2 * (x.nbytes + grad.nbytes),
        "TB/s",
    )
