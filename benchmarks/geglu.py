"""GEGLU behind the UNet's feed-forward projections, at ten frames."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from ..kernels.geglu import geglu, geglu_reference
from .harness import OURS, Case

SHAPES = [(10240, 1280), (2560, 2560), (640, 5120), (160, 5120)]
"""Tokens and channels of the result."""


def cases() -> Iterator[Case]:
    for tokens, channels in SHAPES:
        yield _case(tokens, channels)


def _case(tokens: int, channels: int) -> Case:
    x = torch.randn(tokens, 2 * channels, device="cuda", dtype=torch.float16)

    def eager() -> torch.Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * functional.gelu(gate)

    compiled = torch.compile(geglu_reference, dynamic=False)
    return Case(
        kernel="geglu",
        name=f"{tokens} x {2 * channels}",
        contenders={OURS: lambda: geglu(x), "PyTorch": eager, "torch.compile": lambda: compiled(x)},
        reference=lambda: geglu_reference(x.float()),
        tolerance=2e-3,
        work=1.5 * x.nbytes,
        unit="TB/s",
    )
