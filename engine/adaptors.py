"""Image adaptors: CLIP features of the prompt picture -> tokens for the image branch of the cross-attentions.

Parameter names are those of the released checkpoints (``image_embed.*``).
Source: paper (arXiv 2312.02201) section 3.2; the resampler is Flamingo's (arXiv 2204.14198) in the form of
IP-Adapter (arXiv 2308.06721).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

RESAMPLER_HEAD_DIM = 64


class ResamplerAttention(nn.Module):
    """Learned tokens attend to the picture's hidden states and to themselves."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        inner = heads * RESAMPLER_HEAD_DIM
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Tensor, latents: Tensor) -> Tensor:
        """``hidden`` [B, T, W], ``latents`` [B, n, W] -> [B, n, W]."""
        hidden, latents = self.norm1(hidden), self.norm2(latents)
        q = self._split(self.to_q(latents))
        k, v = self.to_kv(torch.cat((hidden, latents), dim=1)).chunk(2, dim=-1)
        # Scaling both sides by d^(-1/4) instead of the product by d^(-1/2) keeps float16 scores in range.
        scale = RESAMPLER_HEAD_DIM**-0.25
        scores = (q * scale) @ (self._split(k) * scale).transpose(-1, -2)
        out = torch.softmax(scores.float(), dim=-1).to(v.dtype) @ self._split(v)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, RESAMPLER_HEAD_DIM)).transpose(1, 2)


class ResamplerLayer(nn.Sequential):
    """Attention, then a feed-forward of four times the width; each residual."""

    def __init__(self, width: int, heads: int) -> None:
        feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )
        super().__init__(ResamplerAttention(width, heads), feed_forward)

    def forward(self, hidden: Tensor, latents: Tensor) -> Tensor:  # type: ignore[override]
        """``hidden`` [B, T, W], ``latents`` [B, n, W] -> [B, n, W]."""
        latents = latents + self[0](hidden, latents)
        return latents + self[1](latents)


class Resampler(nn.Module):
    """``local`` and ``pixel``: all hidden states [B, T, Dv] -> n tokens [B, n, D].

    A map of zeros gives tokens that are constant but not zero: the unconditional branch is made of them.
    """

    def __init__(self, image_dim: int, width: int, out_dim: int, tokens: int, depth: int, heads: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, tokens, width) * width**-0.5)
        self.proj_in = nn.Linear(image_dim, width)
        self.proj_out = nn.Linear(width, out_dim)
        self.norm_out = nn.LayerNorm(out_dim)
        self.layers = nn.ModuleList(ResamplerLayer(width, heads) for _ in range(depth))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.proj_in(hidden)
        latents = self.latents.expand(hidden.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(hidden, latents)
        return self.norm_out(self.proj_out(latents))


class LinearProjector(nn.Module):
    """``local-linear``: every hidden state becomes a token, [B, T, Dv] -> [B, T, D]."""

    def __init__(self, image_dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(image_dim, out_dim)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(self.proj(hidden))


class GlobalProjector(nn.Module):
    """``global``: the pooled feature becomes n tokens, [B, Dp] or [B, 1, Dp] -> [B, n, D]."""

    def __init__(self, image_dim: int, out_dim: int, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.proj = nn.Linear(image_dim, tokens * out_dim)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.norm(self.proj(pooled).reshape(pooled.shape[0], self.tokens, -1))
