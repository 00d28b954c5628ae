"""LayerNorm at the UNet's levels and ten frames, alone and with the residual sum before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.layer_norm import (
    add_layer_norm,
    add_layer_norm_reference,
    layer_norm,
    layer_norm_reference,
)
from .harness import OURS, Case

SHAPES = [(10240, 320), (2560, 640), (640, 1280), (160, 1280)]
"""Tokens and channels."""


def cases() -> Iterator[Case]:
    for tokens, channels in SHAPES:
        yield _alone(tokens, channels)
        yield _with_sum(tokens, channels)


def _inputs(tokens: int, channels: int) -> tuple[Tensor, ...]:
    x, delta = torch.randn(2, tokens, channels, device="cuda", dtype=torch.float16)
    weight, bias = torch.randn(2, channels, device="cuda", dtype=torch.float16)
    return x, delta, weight, bias


def _wide(function: Callable, *tensors: Tensor) -> Callable[[], Tensor]:
    return lambda: function(*(x.float() for x in tensors))


def _alone(tokens: int, channels: int) -> Case:
    x, _, weight, bias = _inputs(tokens, channels)
    compiled = torch.compile(layer_norm_reference, dynamic=False)
    return Case(
        kernel="layer_norm",
        name=f"{tokens} x {channels}",
        contenders={
            OURS: lambda: layer_norm(x, weight, bias),
            "PyTorch": lambda: functional.layer_norm(x, weight.shape, weight, bias),
            "torch.compile": lambda: compiled(x, weight, bias),
        },
        reference=_wide(layer_norm_reference, x, weight, bias),
        tolerance=2e-3,
        work=2.0 * x.nbytes,
        unit="TB/s",
    )


def _with_sum(tokens: int, channels: int) -> Case:
    x, delta, weight, bias = _inputs(tokens, channels)
    compiled = torch.compile(add_layer_norm_reference, dynamic=False)

    def eager() -> tuple[Tensor, Tensor]:
        total = x + delta
        return total, functional.layer_norm(total, weight.shape, weight, bias)

    return Case(
        kernel="layer_norm",
        name=f"{tokens} x {channels} with sum",
        contenders={
            OURS: lambda: add_layer_norm(x, delta, weight, bias),
            "PyTorch": eager,
            "torch.compile": lambda: compiled(x, delta, weight, bias),
        },
        reference=_wide(add_layer_norm_reference, x, delta, weight, bias),
        tolerance=2e-3,
        work=4.0 * x.nbytes,
        unit="TB/s",
    )
