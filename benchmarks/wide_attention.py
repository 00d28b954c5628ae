"""Attention of one head of 512 channels over the pixels of the image encoder's middle, with and without gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..kernels.wide_attention import wide_attention
from .harness import OURS, Case

CHANNELS = 512
# (views, tokens): pictures of 256 and of 512 pixels.
SHAPES = [(4, 1024), (8, 1024), (4, 4096)]


def cases() -> Iterator[Case]:
    for views, tokens in SHAPES:
        qkv = torch.randn(views, tokens, 3 * CHANNELS, device="cuda", dtype=torch.float16)
        name, flop = f"{views} views x {tokens} tokens", 4.0 * views * tokens**2 * CHANNELS
        yield _alone(name, qkv, flop)
        yield _with_gradient(f"{name}, with gradient", qkv, 3 * flop)


def _exact(qkv: Tensor) -> Tensor:
    q, k, v = qkv.chunk(3, dim=-1)
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v


def _alone(name: str, qkv: Tensor, flop: float) -> Case:
    return Case(
        "wide_attention",
        name,
        {OURS: lambda: wide_attention(qkv), "SDPA": lambda: wide_attention(qkv, "torch")},
        lambda: _exact(qkv.float()),
        1e-3,
        flop,
        "TFLOP/s",
    )


def _with_gradient(name: str, qkv: Tensor, flop: float) -> Case:
    wide, qkv = qkv.float().requires_grad_(), qkv.detach().requires_grad_()
    grad = torch.randn(*qkv.shape[:2], CHANNELS, device="cuda", dtype=torch.float16)

    def gradient(function: Callable[[Tensor], Tensor], of: Tensor) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.enable_grad():
                attended = function(of)
            return torch.autograd.grad(attended, of, grad.to(of.dtype))[0]

        return run

    contenders = {
        OURS: gradient(wide_attention, qkv),
        "SDPA": gradient(lambda x: wide_attention(x, "torch"), qkv),
    }
    return Case("wide_attention", name, contenders, gradient(_exact, wide), 2e-3, flop, "TFLOP/s")
