"""Layer norms and the matrix products behind them in fp8, against the same in float16, at ten frames."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ..engine.blocks import FeedForward, GatedLinear
from ..engine.fp8 import Fp8GatedLinear, Fp8LayerNorm, Fp8Linear
from ..engine.layers import LayerNorm
from .harness import OURS, Case

SHAPES = [(10240, 320), (2560, 640), (640, 1280), (160, 1280)]
"""Tokens and channels."""
TOLERANCE = 0.1
"""Four roundings to three mantissa bits, of 0.0265 each, and room."""


def cases() -> Iterator[Case]:
    for tokens, channels in SHAPES:
        yield _case(tokens, channels, "projection to queries", nn.Linear(channels, channels, bias=False))
        yield _case(tokens, channels, "to q, k and v", nn.Linear(channels, 3 * channels, bias=False))
        yield _case(tokens, channels, "feed-forward", FeedForward(channels))


def _case(tokens: int, channels: int, what: str, behind: nn.Linear | FeedForward) -> Case:
    x = torch.randn(tokens, channels, device="cuda", dtype=torch.float16)
    exact = nn.Sequential(LayerNorm(channels), behind).cuda().requires_grad_(False)
    wanted = exact(x.float())
    half = exact.half()
    quantised = _in_fp8(half)
    return Case(
        kernel="fp8",
        name=f"{tokens} x {channels}, norm and {what}",
        contenders={OURS: lambda: quantised(x), "float16": lambda: half(x)},
        reference=lambda: wanted,
        tolerance=TOLERANCE,
        work=2 * tokens * sum(weight.numel() for weight in behind.parameters() if weight.ndim == 2),
        unit="TFLOP/s",
    )


def _in_fp8(layers: nn.Sequential) -> nn.Sequential:
    norm, behind = layers
    assert isinstance(norm, LayerNorm)
    first = Fp8LayerNorm(norm)
    if isinstance(behind, nn.Linear):
        return nn.Sequential(first, Fp8Linear.taking_over(behind, first.scales))
    assert isinstance(behind, FeedForward)
    gated, _, out = behind.net
    assert isinstance(gated, GatedLinear)
    assert isinstance(out, nn.Linear)
    gate = Fp8GatedLinear(gated.proj, norm, first.scales)
    return nn.Sequential(first, gate, Fp8Linear.taking_over(out, gate.scales))
