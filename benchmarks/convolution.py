"""3x3 convolutions of small maps with bias and residual sum, at the shapes of the UNet's lower levels, and doubled."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels import convolution
from ..kernels.bias_residual import bias_residual
from .harness import OURS, Case, random_maps

# (frames, channels, channels of the result, side): ten frames and, for the shape of which there are most, twenty.
SHAPES = [
    (10, 640, 640, 16),
    (10, 1920, 640, 16),
    (10, 1280, 1280, 8),
    (10, 2560, 1280, 8),
    (10, 1280, 1280, 4),
    (20, 640, 640, 16),
    (20, 1280, 1280, 4),
]
DOUBLED = [(10, 640, 640, 16), (10, 1280, 1280, 8), (10, 1280, 1280, 4)]


def cases() -> Iterator[Case]:
    for doubled, shapes in ((False, SHAPES), (True, DOUBLED)):
        for shape in shapes:
            yield _case(*shape, doubled)


def _case(frames: int, channels: int, out_channels: int, side: int, doubled: bool) -> Case:
    x = random_maps(frames, channels, side, side)
    weight = random_maps(out_channels, channels, 3, 3) / (9 * channels) ** 0.5
    bias = torch.randn(out_channels, device="cuda", dtype=torch.float16)
    scale = 2 if doubled else 1
    residual = None if doubled else random_maps(frames, out_channels, side, side)
    folded = convolution.doubled_weight(weight)

    def ours() -> Tensor:
        if not convolution.fits("auto", x, weight, bias, residual):
            raise RuntimeError("the kernel is for Hopper and Triton's Gluon")
        if doubled:
            return convolution.doubled_convolution(x, folded, bias)
        return convolution.convolution(x, weight, bias, residual)

    def library() -> Tensor:
        return bias_residual(functional.conv2d(_doubled(x, doubled), weight, None, padding=1), bias, residual)

    def reference() -> Tensor:
        y = functional.conv2d(_doubled(x.double(), doubled), weight.double(), bias.double(), padding=1)
        return y if residual is None else y + residual

    return Case(
        "convolution",
        f"{frames} x {channels} to {out_channels} at {side}²{', doubled' if doubled else ''}",
        {OURS: ours, "cuDNN": library},
        reference,
        1e-3,
        2 * 9 * channels * out_channels * frames * (scale * side) ** 2,
        "TFLOP/s",
    )


def _doubled(x: Tensor, doubled: bool) -> Tensor:
    return functional.interpolate(x, scale_factor=2.0) if doubled else x
