"""Multi-view self-attention at the UNet's levels: five frames, one and two groups with both guidance branches.

Everybody starts from the packed projection [B, F, T, 3, H, D] and ends with merged heads [B, F, T, H*D].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kernels.attention import AttentionBackend, multi_view_attention, multi_view_attention_reference
from .harness import OURS, Case

FRAMES, SIZE = 5, 64
LEVELS = [(1024, 5), (256, 10), (64, 20), (16, 20)]
"""Tokens of a frame and heads."""

Attention = Callable[[Tensor], Tensor]


def cases() -> Iterator[Case]:
    for tokens, heads in LEVELS:
        for batch in (2, 4):
            yield _case(batch, tokens, heads)
    for tokens, heads in LEVELS[:2]:
        yield _training_case(2, tokens, heads)


def _case(batch: int, tokens: int, heads: int) -> Case:
    qkv = _packed(batch, tokens, heads)
    contenders = {name: _call(attend, qkv) for name, attend in _contenders().items()}
    return Case(
        kernel="attention",
        name=_name(batch, tokens, heads),
        contenders=contenders,
        reference=lambda: multi_view_attention_reference(qkv.float()),
        tolerance=2e-3,
        work=_products(2, qkv),
        unit="TFLOP/s",
    )


def _training_case(batch: int, tokens: int, heads: int) -> Case:
    """Forward and backward."""
    qkv = _packed(batch, tokens, heads)
    cotangent = torch.randn(batch, FRAMES, tokens, heads * SIZE, device="cuda", dtype=torch.float16)

    def gradient(attend: Attention, qkv: Tensor, cotangent: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = qkv.detach().requires_grad_()
            return torch.autograd.grad(attend(leaf), leaf, cotangent)[0]

    return Case(
        kernel="attention",
        name=f"{_name(batch, tokens, heads)}, with gradient",
        contenders={name: _call(gradient, attend, qkv, cotangent) for name, attend in _contenders().items()},
        reference=lambda: gradient(multi_view_attention_reference, qkv.float(), cotangent.float()),
        tolerance=3e-3,
        work=_products(7, qkv),
        unit="TFLOP/s",
    )


def _contenders() -> dict[str, Attention]:
    return {
        OURS: multi_view_attention,
        "SDPA cuDNN": _sdpa(SDPBackend.CUDNN_ATTENTION),
        "SDPA flash": _sdpa(SDPBackend.FLASH_ATTENTION),
        "SDPA efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
        "xformers": _with("xformers"),
        "flex_attention": _flex(),
        "torch.compile": torch.compile(multi_view_attention_reference, dynamic=False),
    }


def _call(function: Callable[..., Tensor], *inputs: object) -> Callable[[], Tensor]:
    return lambda: function(*inputs)


def _with(backend: AttentionBackend) -> Attention:
    return lambda qkv: multi_view_attention(qkv, backend)


def _sdpa(backend: SDPBackend) -> Attention:
    def run(qkv: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return multi_view_attention(qkv, "torch")

    return run


def _flex() -> Attention:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def run(qkv: Tensor) -> Tensor:
        q, k, v = qkv.flatten(1, 2).permute(2, 0, 3, 1, 4)
        return compiled(q, k, v).transpose(1, 2).reshape(*qkv.shape[:3], -1)

    return run


def _packed(batch: int, tokens: int, heads: int) -> Tensor:
    return torch.randn(batch, FRAMES, tokens, 3, heads, SIZE, device="cuda", dtype=torch.float16)


def _name(batch: int, tokens: int, heads: int) -> str:
    return f"{FRAMES * tokens} tokens, {heads} heads, batch {batch}"


def _products(count: int, qkv: Tensor) -> float:
    """FLOP of ``count`` products of L x D with D x L matrices for every group and head."""
    batch, frames, tokens, _, heads, size = qkv.shape
    return float(count * 2 * batch * heads * (frames * tokens) ** 2 * size)
