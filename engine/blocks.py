"""Building blocks of the multi-view UNet: residual blocks, resampling, and the transformer over all views.

Feature maps are [N, C, H, W] with N = B * F frames, group-major. Parameter names are those of the released
checkpoints; where their indices skip a dropout of rate 0, an ``nn.Identity`` keeps the place.
Source: the released code of MVDream and ImageDream (Stable Diffusion 2.1's UNet, "ldm" layout).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kernels._triton import HALF, use_triton
from ..kernels.attention import AttentionBackend, multi_view_attention
from ..kernels.bias_residual import bias_residual
from ..kernels.convolution import doubled_convolution, doubled_weight, fits
from ..kernels.cross_attention import decoupled_cross_attention
from ..kernels.geglu import geglu
from .layers import (
    Convolution,
    Derived,
    GroupNorm,
    KernelLayer,
    LayerNorm,
    StackedParameters,
    bias_of,
    normalised_convolution,
)

GROUPS = 32


class KeyValues(NamedTuple):
    """What one cross-attention sees of the prompt; a row serves N / rows consecutive frames."""

    k_text: Tensor
    """[rows, L, H, D], as ``v_text``."""
    v_text: Tensor
    k_image: Tensor | None
    """[rows, n, H, D], as ``v_image``; both None for text only."""
    v_image: Tensor | None

    def shared_by(self, groups: int) -> bool:
        """Whether the frames of a group see the same, for this number of groups."""
        return all(x is None or groups % x.shape[0] == 0 for x in self)

    def rows(self, count: int) -> KeyValues:
        """The first rows alone."""
        return KeyValues(*(None if x is None else x[:count] for x in self))  # type: ignore[arg-type]


class Prompt(NamedTuple):
    """What the transformers see of the prompt."""

    key_values: Sequence[KeyValues]
    """By the number of the cross-attention."""
    image_scale: float
    """Weight of the image branch."""


class ResBlock(nn.Module):
    """Two convolutions; the time and camera embedding is added between them.

    Its projection of the embedding, ``emb_layers.1`` in checkpoints, is a part of the network's ``to_shifts``.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.number = 0
        """Its place among the network's residual blocks."""
        self.in_layers = nn.Sequential(
            GroupNorm(GROUPS, in_channels, eps=1e-5, silu=True),
            nn.Identity(),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
        )
        self.out_layers = nn.Sequential(
            GroupNorm(GROUPS, out_channels, eps=1e-5, silu=True),
            nn.Identity(),
            nn.Identity(),
            Convolution(out_channels, out_channels, 3, padding=1),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else Convolution(in_channels, out_channels, 1)

    @property
    def first_convolution(self) -> nn.Conv2d:
        convolution = self.in_layers[-1]
        assert isinstance(convolution, nn.Conv2d)
        return convolution

    def forward(self, x: Tensor, shifts: Sequence[Tensor]) -> Tensor:
        """``x`` [N, C, H, W] -> [N, C', H, W].

        ``shifts``, by the block's number: [N, C'], the projected embedding with the first convolution's bias.
        """
        norm_in, norm_out, conv_out = self.in_layers[0], self.out_layers[0], self.out_layers[-1]
        assert isinstance(norm_out, GroupNorm)
        h = normalised_convolution(self.first_convolution, norm_out, norm_in(x), shifts[self.number])
        return conv_out(h, self.skip_connection(x))


class Downsample(nn.Module):
    """Halves height and width with a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = Convolution(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(KernelLayer):
    """Doubles height and width (nearest), then a convolution.

    The 3x3 taps on the doubled map see 2x2 pixels of the small one, other taps together for each parity of row and
    column: four ninths of the products. Frozen networks in half precision on CUDA take them, with weights folded once,
    by this package's kernel, or by the library as a transposed 4x4 convolution where that is the faster.
    """

    LEAST_PIXELS = 512
    """Of the small maps together: with fewer, reading the larger weights takes longer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Convolution(channels, channels, 3, padding=1)
        self.parities = Derived(doubled_weight)
        self.folded = Derived(folded_doubling)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, 2H, 2W]."""
        if fits(self.backend, x, self.conv.weight, self.conv.bias):
            weight = self.parities.at(self.conv.weight)
            if weight is not None:
                return doubled_convolution(x, weight, self.conv.bias)
        weight = self.folded.at(self.conv.weight) if self._folds(x) else None
        if weight is None:
            return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        y = functional.conv_transpose2d(x, weight, None, stride=2, padding=1)
        return bias_residual(y, bias_of(self.conv), None, self.backend)

    def folded_from(self) -> tuple[Tensor, ...]:
        """Parameters that a tensor is computed from ahead of calls."""
        return (self.conv.weight,)

    def _folds(self, x: Tensor) -> bool:
        # The size comes last: an export must not depend on it.
        return (
            x.dtype == self.conv.weight.dtype in HALF
            and use_triton(self.backend, x)
            and not torch.is_autocast_enabled(x.device.type)
            and x.numel() >= self.LEAST_PIXELS * x.shape[1]
        )


def folded_doubling(weight: Tensor) -> Tensor:
    """Weights [C', C, 3, 3] behind a nearest doubling -> those [C, C', 4, 4] of the same by transposed convolution.

    Of the four taps along each side, two reach an output pixel of each parity: those of :func:`doubled_weight`, from
    the last of the second parity to the first of the first.
    """
    by_tap_and_parity = doubled_weight(weight).permute(3, 2, 4, 0, 5, 1)
    folded = by_tap_and_parity.flatten(4, 5).flatten(2, 3).flip(2, 3)
    return folded.contiguous(memory_format=torch.channels_last)


class MultiViewSelfAttention(KernelLayer, StackedParameters):
    """Self-attention whose tokens are the pixels of all F frames of a group.

    The weights of queries, keys and values are one parameter, ``to_qkv`` [3C, C], for one projection; in state
    dicts it is ``to_q.weight``, ``to_k.weight`` and ``to_v.weight``, as released.
    """

    backend: AttentionBackend = "auto"  # type: ignore[assignment]  # xformers, too

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_qkv = nn.Parameter(torch.empty(3 * channels, channels))
        nn.init.kaiming_uniform_(self.to_qkv, a=math.sqrt(5))  # as nn.Linear
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor, frames: int, keep: int | None = None) -> Tensor:
        """``x`` [N, T, C] -> [N, T, C], or of the first ``keep`` frames of each group."""
        qkv = self.project(x).unflatten(-1, (3, -1, self.head_dim))
        attended = multi_view_attention(qkv.unflatten(0, (-1, frames)), self.backend, keep)
        return self.to_out(attended.flatten(0, 1))

    def project(self, x: Tensor) -> Tensor:
        """``x`` [N, T, C] -> queries, keys and values side by side, [N, T, 3C]."""
        return functional.linear(x, self.to_qkv)

    def stacks(self) -> dict[str, dict[str, int]]:
        channels = self.to_qkv.shape[1]
        return {"to_qkv": {f"to_{part}.weight": channels for part in "qkv"}}


class PromptCrossAttention(KernelLayer):
    """Each frame attends to the text tokens and, with its own keys and values, to the image tokens."""

    def __init__(self, channels: int, context_dim: int, head_dim: int, with_image: bool) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.number = 0
        """Its place among the network's cross-attentions."""
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

    def key_values(self, context: Tensor, image_tokens: Tensor | None) -> KeyValues:
        """Of text tokens [rows, L, D] and image tokens [rows, n, D]; constant for a prompt."""
        k_image, v_image = (None, None) if image_tokens is None else self.image_key_value(image_tokens)
        return KeyValues(*self.text_key_value(context), k_image, v_image)

    def forward(self, x: Tensor, prompt: Prompt) -> Tensor:
        """``x`` [N, T, C] -> [N, T, C]."""
        q = self._split(self.to_q(x))
        k_text, v_text, k_image, v_image = prompt.key_values[self.number]
        attended = decoupled_cross_attention(
            q, k_text, v_text, k_image, v_image, prompt.image_scale, self.backend
        )
        return self.to_out(attended)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


class GatedLinear(KernelLayer):
    """GEGLU: value * gelu(gate), with the exact (erf) GELU."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, 2 * out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return geglu(self.proj(x), self.backend)


class FeedForward(nn.Module):
    """GEGLU to four times the width, and back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            GatedLinear(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def add_to(self, total: Tensor, x: Tensor) -> Tensor:
        """``total``, with the result for ``x`` added in place by the last product as it writes, but for its bias."""
        gated, last = self.net[0](x), self.net[-1]
        assert isinstance(last, nn.Linear)
        total.view(-1, total.shape[-1]).addmm_(gated.flatten(0, -2), last.weight.t())
        return total


class TransformerBlock(nn.Module):
    """Self-attention over all views, cross-attention to the prompt, feed-forward; pre-norm, residual."""

    def __init__(self, channels: int, context_dim: int, head_dim: int, with_image: bool) -> None:
        super().__init__()
        self.attn1 = MultiViewSelfAttention(channels, head_dim)
        self.ff = FeedForward(channels)
        self.attn2 = PromptCrossAttention(channels, context_dim, head_dim, with_image)
        self.norm1 = LayerNorm(channels)
        self.norm2 = LayerNorm(channels)
        self.norm3 = LayerNorm(channels)

    def forward(
        self, x: Tensor, prompt: Prompt, frames: int, keep: int | None = None, *, last_bias: bool = True
    ) -> Tensor:
        """``x`` [N, T, C] -> the same, or of the first ``keep`` frames of each group.

        Without ``last_bias`` the feed-forward's is left out, and nothing is differentiable.
        """
        delta = self.attn1(self.norm1(x), frames, keep)
        if keep is not None:
            x = x.unflatten(0, (-1, frames))[:, :keep].flatten(0, 1)
        x, normed = self.norm2.after_sum(x, delta)
        x, normed = self.norm3.after_sum(x, self.attn2(normed, prompt))
        return x + self.ff(normed) if last_bias else self.ff.add_to(x, normed)


class MultiViewTransformer(nn.Module):
    """One transformer block on a feature map, residual around the whole."""

    def __init__(self, channels: int, context_dim: int, head_dim: int, with_image: bool) -> None:
        super().__init__()
        self.norm = GroupNorm(GROUPS, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        block = TransformerBlock(channels, context_dim, head_dim, with_image)
        self.transformer_blocks = nn.ModuleList((block,))
        self.proj_out = nn.Linear(channels, channels)
        self.bias_out = Derived(bias_behind)

    def forward(self, x: Tensor, prompt: Prompt, frames: int, keep: int | None = None) -> Tensor:
        """``x`` [N, C, H, W], N a multiple of ``frames`` -> [N, C, H, W].

        With ``keep`` only the first so many frames of each group go on after the self-attention, and come out.
        """
        # Of a channels-last map the tokens are a view, and the other way round.
        tokens = self.proj_in(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2))
        (block,) = self.transformer_blocks
        bias = self._bias_out(tokens)
        tokens = block(tokens, prompt, frames, keep, last_bias=bias is None)
        bias = self.proj_out.bias if bias is None else bias
        delta = functional.linear(tokens, self.proj_out.weight, bias)
        delta = delta.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        if keep is None:
            return x + delta
        return (x.unflatten(0, (-1, frames))[:, :keep] + delta.unflatten(0, (-1, keep))).flatten(0, 1)

    def _bias_out(self, tokens: Tensor) -> Tensor | None:
        """In half precision and without gradients: the last bias, with that of the feed-forward before it in it."""
        if torch.is_grad_enabled() and tokens.requires_grad:
            return None
        folded_from = self.folded_from()
        if not folded_from or not self.proj_out.weight.dtype == tokens.dtype in HALF:
            return None
        return self.bias_out.at(*folded_from)

    def folded_from(self) -> tuple[Tensor, ...]:
        """Parameters that a tensor is computed from ahead of calls."""
        (block,) = self.transformer_blocks
        assert isinstance(block, TransformerBlock)
        last = block.ff.net[-1]
        if not isinstance(last, nn.Linear):  # in fp8
            return ()
        return self.proj_out.weight, self.proj_out.bias, last.bias


def bias_behind(weight: Tensor, bias: Tensor, before: Tensor) -> Tensor:
    """The bias [C'] of a linear layer with ``weight`` [C', C] that a bias [C] of its input is moved into."""
    return torch.addmv(bias.float(), weight.float(), before.float()).to(bias.dtype)


class Stage(nn.Sequential):
    """A few layers in order, each given what it needs of embedding, prompt and frame count."""

    def forward(  # type: ignore[override]
        self, x: Tensor, shifts: Sequence[Tensor], prompt: Prompt, frames: int, keep: int | None = None
    ) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, shifts)
            elif isinstance(layer, MultiViewTransformer):
                x = layer(x, prompt, frames, keep)
            else:
                x = layer(x)
        return x
