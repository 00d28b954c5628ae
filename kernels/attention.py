"""Multi-view self-attention: one softmax over the tokens of all frames of a group.

For each group b and head h, with L = F * T tokens (frame-major, then row-major pixels),

    out = softmax(Q K^T / sqrt(D)) V,        Q, K, V in R^{L x D}.

Source: the inflated "3D" self-attention of MVDream (arXiv 2308.16512, section 3.1), which ImageDream keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

AttentionBackend = Literal["torch", "xformers"]


def multi_view_attention_reference(qkv: Tensor) -> Tensor:
    """The formula above, written out with an explicit softmax in float32 or wider; slow, the tests' oracle.

    ``qkv`` [B, F, T, 3, H, D] -> [B, F, T, H*D] in the dtype of ``qkv``.
    """
    b, f, t, _, h, d = qkv.shape
    wide = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    q, k, v = wide.reshape(b, f * t, 3, h, d).permute(2, 0, 3, 1, 4)
    weights = torch.softmax(q @ k.transpose(-1, -2) * d**-0.5, dim=-1)
    return (weights @ v).transpose(1, 2).reshape(b, f, t, h * d).to(qkv.dtype)


def check_attention_backend(backend: str) -> None:
    """Raise ValueError for an unknown backend and ImportError for one that is not installed."""
    if backend not in get_args(AttentionBackend):
        raise ValueError(
            f"unknown attention backend {backend!r}; there are {', '.join(get_args(AttentionBackend))}"
        )
    if backend == "xformers":
        _xformers_attention()


def multi_view_attention(qkv: Tensor, backend: AttentionBackend = "torch") -> Tensor:
    """Self-attention over all F*T tokens of each group; softmax scale 1/sqrt(D); differentiable.

    Args:
        qkv: [B, F, T, 3, H, D], floating point; queries, keys and values packed on axis 3, so that one
            projection with stacked weights can write it.
        backend: ``"torch"`` (scaled_dot_product_attention) or ``"xformers"`` (its memory-efficient attention;
            needs the ``xformers`` extra and a device that it supports).

    Returns:
        [B, F, T, H*D] in the dtype of ``qkv``, contiguous.

    Raises:
        ValueError: ``qkv`` has another shape, or the backend is unknown.
        ImportError: the backend is not installed.

    Example:
        >>> qkv = torch.zeros(1, 2, 1, 3, 1, 1)  # equal scores: the mean over the two frames
        >>> qkv[0, :, 0, 2, 0, 0] = torch.tensor([1.0, 3.0])
        >>> multi_view_attention(qkv).flatten().tolist()
        [2.0, 2.0]
    """
    if qkv.ndim != 6 or qkv.shape[3] != 3:
        raise ValueError(f"qkv must be [B, F, T, 3, H, D], got {list(qkv.shape)}")
    b, f, t, _, h, d = qkv.shape
    q, k, v = qkv.reshape(b, f * t, 3, h, d).unbind(2)
    if backend == "torch":
        out = functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        out = out.transpose(1, 2)
    else:
        check_attention_backend(backend)
        out = _xformers_attention()(q, k, v)
    return out.reshape(b, f, t, h * d)


def _xformers_attention() -> Callable[..., Tensor]:
    """xformers' ``memory_efficient_attention``: [B, L, H, D] tensors, scale 1/sqrt(D)."""
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise ImportError(
            "attention backend 'xformers' needs the package xformers: pip install 'imagedream-rt[xformers]' "
            f"({error})"
        ) from error
    return memory_efficient_attention
