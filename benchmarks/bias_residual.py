"""A convolution's bias with the residual sum behind it, at the shapes of the image encoder and of the UNet."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..kernels.bias_residual import bias_residual, bias_residual_reference
from .harness import OURS, Case, random_maps

# (views or frames, channels, side): the encoder at 4 views, the UNet at 10 frames.
SHAPES = [(4, 128, 256), (4, 256, 128), (4, 512, 64), (10, 320, 32), (10, 1280, 8)]


def cases() -> Iterator[Case]:
    for samples, channels, side in SHAPES:
        x, residual = (random_maps(samples, channels, side, side) for _ in range(2))
        yield _case(x, torch.randn(channels, device="cuda", dtype=torch.float16), residual)


def _case(x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> Case:
    compiled = torch.compile(bias_residual_reference, dynamic=False)
    return Case(
        "bias_residual",
        "x".join(map(str, x.shape)),
        {
            OURS: lambda: bias_residual(x, bias, residual),
            "torch.compile": lambda: compiled(x, bias, residual),
            "PyTorch": lambda: x + bias[:, None, None] + residual,
        },
        lambda: bias_residual_reference(x.float(), bias, residual.float()),
        1e-3,
        3 * x.nbytes,
        "TB/s",
    )
