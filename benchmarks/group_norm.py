"""Group normalisation with SiLU at the shapes of a UNet step and of the image encoder; there with its gradient.

Bytes: x read and y written once; for the gradient x and y's gradient read and x's gradient written once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.group_norm import group_norm, group_norm_reference
from .harness import OURS, Case

EPS = 1e-5
TOLERANCE = 1.5e-3
# (frames or views, channels, side): UNet at 10 frames; encoder at 4 views.
UNET = [
    *((10, 320, 32), (10, 640, 16), (10, 1280, 8)),
    *((10, 960, 32), (10, 1920, 16), (10, 2560, 16), (10, 2560, 8)),
]
ENCODER = [(4, 128, 256), (4, 256, 128), (4, 512, 64)]


def cases() -> Iterator[Case]:
    for shape in [*UNET, *ENCODER]:
        yield _forward(*shape)
    for shape in ENCODER:
        yield _backward(*shape)


def _inputs(samples: int, channels: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cuda", dtype=torch.float16)

    x = randn(samples, channels, side, side).contiguous(memory_format=torch.channels_last)
    return x, 1 + randn(channels) / 4, randn(channels) / 4


def _eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.silu(functional.group_norm(x, 32, weight, bias, EPS))


def _reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return group_norm_reference(x, weight, bias, eps=EPS, silu=True)


def _forward(samples: int, channels: int, side: int) -> Case:
    x, weight, bias = _inputs(samples, channels, side)
    compiled = torch.compile(_reference, dynamic=False)
    return Case(
        "group_norm",
        f"{samples}x{channels}x{side}x{side} + SiLU",
        {
            OURS: lambda: group_norm(x, weight, bias, eps=EPS, silu=True),
            "torch.compile": lambda: compiled(x, weight, bias),
            "eager": lambda: _eager(x, weight, bias),
        },
        lambda: _reference(x.float(), weight, bias),
        TOLERANCE,
        2 * x.nbytes,
        "TB/s",
    )


def _backward(samples: int, channels: int, side: int) -> Case:
    """Forward pass and gradient of x, as through frozen weights."""
    x, weight, bias = _inputs(samples, channels, side)
    x.requires_grad_()
    wide = x.detach().float().requires_grad_()
    grad = torch.randn_like(x)
    compiled = torch.compile(_reference, dynamic=False)

    def gradient(function: Callable[..., Tensor], of: Tensor, **options: Any) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.enable_grad():
                y = function(of, weight, bias, **options)
            return torch.autograd.grad(y, of, grad.to(of.dtype))[0]

        return run

    return Case(
        "group_norm",
        f"{samples}x{channels}x{side}x{side} + SiLU, with input gradient",
        {
            OURS: gradient(group_norm, x, eps=EPS, silu=True),
            "torch.compile": gradient(compiled, x),
            "eager": gradient(_eager, x),
        },
        gradient(_reference, wide),
        TOLERANCE,
        5 * x.nbytes,
        "TB/s",
    )
