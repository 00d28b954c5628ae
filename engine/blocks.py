"""Building blocks of the multi-view UNet: residual blocks, resampling, and the transformer over all views.

Feature maps are [N, C, H, W] with N = B * F frames, group-major. Parameter names are those of the released
checkpoints; where their indices skip a dropout of rate 0, an ``nn.Identity`` keeps the place.
Source: the released code of MVDream and ImageDream (Stable Diffusion 2.1's UNet, "ldm" layout).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kernels.attention import AttentionBackend, multi_view_attention
from ..kernels.cross_attention import decoupled_cross_attention

GROUPS = 32


class Prompt(NamedTuple):
    """What the transformers see of the prompt; a row serves N / rows consecutive frames."""

    context: Tensor
    """[rows, L, D] text tokens."""
    image_tokens: Tensor | None
    """[rows, n, D], or None for text only."""
    image_scale: float
    """Weight of the image branch."""


class GroupNorm32(nn.GroupNorm):
    """32 groups; statistics and affine map in float32, the result in the input's dtype."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__(GROUPS, channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return functional.group_norm(x.float(), GROUPS, weight, bias, self.eps).to(x.dtype)


class ResBlock(nn.Module):
    """Two convolutions; the time and camera embedding is added between them."""

    def __init__(self, in_channels: int, out_channels: int, embed_dim: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNorm32(in_channels, eps=1e-5), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embed_dim, out_channels))
        self.out_layers = nn.Sequential(
            GroupNorm32(out_channels, eps=1e-5),
            nn.SiLU(),
            nn.Identity(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``x`` [N, C, H, W], ``embedding`` [N, E] -> [N, C', H, W]."""
        h = self.in_layers(x) + self.emb_layers(embedding)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Downsample(nn.Module):
    """Halves height and width with a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Doubles height and width (nearest), then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class MultiViewSelfAttention(nn.Module):
    """Self-attention whose tokens are the pixels of all F frames of a group."""

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.backend: AttentionBackend = "torch"
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def packed_qkv(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., 3, H, D]: what one projection with the three weights stacked would give."""
        qkv = torch.cat((self.to_q(x), self.to_k(x), self.to_v(x)), dim=-1)
        return qkv.unflatten(-1, (3, -1, self.head_dim))

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """``x`` [N, T, C] -> [N, T, C]."""
        qkv = self.packed_qkv(x.unflatten(0, (-1, frames)))
        return self.to_out(multi_view_attention(qkv, self.backend).flatten(0, 1))


class PromptCrossAttention(nn.Module):
    """Each frame attends to the text tokens and, with its own keys and values, to the image tokens."""

    def __init__(self, channels: int, context_dim: int, head_dim: int, with_image: bool) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        if with_image:
            self.to_k_ip = nn.Linear(context_dim, channels, bias=False)
            self.to_v_ip = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def text_key_value(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """[rows, L, D] -> keys and values [rows, L, H, head_dim]; constant for a prompt."""
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def image_key_value(self, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[rows, n, D] -> keys and values [rows, n, H, head_dim]; constant for a prompt picture."""
        return self._split(self.to_k_ip(image_tokens)), self._split(self.to_v_ip(image_tokens))

    def forward(self, x: Tensor, prompt: Prompt) -> Tensor:
        """``x`` [N, T, C] -> [N, T, C]."""
        q = self._split(self.to_q(x))
        k_text, v_text = self.text_key_value(prompt.context)
        k_image = v_image = None
        if prompt.image_tokens is not None:
            k_image, v_image = self.image_key_value(prompt.image_tokens)
        return self.to_out(decoupled_cross_attention(q, k_text, v_text, k_image, v_image, prompt.image_scale))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


class GatedLinear(nn.Module):
    """GEGLU: value * gelu(gate), with the exact (erf) GELU."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, 2 * out_dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * functional.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width, and back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            GatedLinear(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention over all views, cross-attention to the prompt, feed-forward; pre-norm, residual."""

    def __init__(self, channels: int, context_dim: int, head_dim: int, with_image: bool) -> None:
        super().__init__()
        self.attn1 = MultiViewSelfAttention(channels, head_dim)
        self.ff = FeedForward(channels)
        self.attn2 = PromptCrossAttention(channels, context_dim, head_dim, with_image)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, prompt: Prompt, frames: int) -> Tensor:
        x = x + self.attn1(self.norm1(x), frames)
        x = x + self.attn2(self.norm2(x), prompt)
        return x + self.ff(self.norm3(x))


class MultiViewTransformer(nn.Module):
    """One transformer block on a feature map, residual around the whole."""

    def __init__(self, channels: int, context_dim: int, head_dim: int, with_image: bool) -> None:
        super().__init__()
        self.norm = GroupNorm32(channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        block = TransformerBlock(channels, context_dim, head_dim, with_image)
        self.transformer_blocks = nn.ModuleList((block,))
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, prompt: Prompt, frames: int) -> Tensor:
        """``x`` [N, C, H, W], N a multiple of ``frames`` -> [N, C, H, W]."""
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        for block in self.transformer_blocks:
            tokens = block(tokens, prompt, frames)
        return x + self.proj_out(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class Stage(nn.Sequential):
    """A few layers in order, each given what it needs of embedding, prompt and frame count."""

    def forward(self, x: Tensor, embedding: Tensor, prompt: Prompt, frames: int) -> Tensor:  # type: ignore[override]
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, embedding)
            elif isinstance(layer, MultiViewTransformer):
                x = layer(x, prompt, frames)
            else:
                x = layer(x)
        return x
