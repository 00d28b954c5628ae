"""The multi-view UNet's large matrix products in fp8: those that follow a layer norm or a GEGLU.

These are the projections to queries, keys and values, to the cross-attention's queries and both of the
feed-forward: four fifths of the FLOPs of all linear layers. Their inputs are bounded before any picture is seen, so
each channel has a constant scale, and there is nothing to calibrate, to measure on the way or to overflow:

- a layer norm's output is |y_i| <= sqrt(C) |weight_i| + |bias_i|, for the normalised row has length sqrt(C);
- a projection of it is |W_j y + b_j| <= sqrt(C) ||W_j * weight|| + |W_j bias + b_j| (Cauchy-Schwarz);
- of a GEGLU's value and gate, |value gelu(gate)| <= |value| |gate|.

What a channel is multiplied by goes into the layer before it, and its inverse into the weights behind it. The other
linear layers are small, see other inputs, or run once per prompt: they stay in half precision.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.fp8 import (
    LARGEST,
    add_layer_norm_e4m3,
    fp8_obstacle,
    geglu_e4m3,
    layer_norm_e4m3,
    linear_e4m3,
    to_e4m3,
)
from .blocks import GatedLinear, MultiViewSelfAttention, TransformerBlock
from .errors import InputError
from .layers import KernelLayer, use_kernels
from .unet import MultiViewUNet

TINY = 1e-12
"""Stands for the bound of a channel that is always zero."""
NARROWEST = 1 / 64
"""Least share of the largest gate's bound that a gate counts with. A value's weights grow as its gate shrinks, and
all weights of a layer share one range, of 2^15: a gate that is always zero must not take it all."""


class Fp8Linear(KernelLayer):
    """A linear layer on inputs in e4m3 whose channels carry the factors ``scales`` [K]."""

    weight: Tensor
    scale: Tensor
    one: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, scales: Tensor, dtype: torch.dtype) -> None:
        """``weight`` [N, K] and ``bias`` [N] in float32; the output has ``dtype``."""
        super().__init__()
        self.dtype = dtype
        weight = weight / scales
        scale = weight.abs().amax().clamp_min(TINY) / LARGEST
        self.register_buffer("weight", to_e4m3(weight / scale))
        self.register_buffer("scale", scale)
        self.register_buffer("one", torch.ones_like(scale))
        self.register_buffer("bias", None if bias is None else bias.to(dtype))

    @classmethod
    def taking_over(cls, linear: nn.Linear, scales: Tensor) -> Fp8Linear:
        """The same layer for such inputs."""
        weight, bias = linear.weight, linear.bias
        return cls(weight.float(), None if bias is None else bias.float(), scales, weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] in e4m3 -> [..., N]."""
        return linear_e4m3(x, self.weight, self.one, self.scale, self.bias, self.dtype, self.backend)


class Fp8LayerNorm(KernelLayer):
    """A layer norm with its output in e4m3, each channel multiplied by its one of ``scales`` [C]."""

    weight: Tensor
    bias: Tensor
    scales: Tensor

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        weight, bias = norm.weight.float(), norm.bias.float()
        self.eps = norm.eps
        bound = len(weight) ** 0.5 * weight.abs() + bias.abs()
        self.register_buffer("scales", LARGEST / bound.clamp_min(TINY))
        self.register_buffer("weight", weight * self.scales)
        self.register_buffer("bias", bias * self.scales)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C] in e4m3."""
        return layer_norm_e4m3(x, self.weight, self.bias, self.eps, self.backend)

    def after_sum(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """``x + delta`` and its norm, all [..., C], the norm in e4m3."""
        return add_layer_norm_e4m3(x, delta, self.weight, self.bias, self.eps, self.backend)


class Fp8SelfAttention(MultiViewSelfAttention):
    """Self-attention with the projection to queries, keys and values in fp8."""

    def __init__(self, attention: MultiViewSelfAttention, scales: Tensor) -> None:
        with torch.device("meta"):
            super().__init__(attention.to_qkv.shape[1], attention.head_dim)
        del self.to_qkv
        weight = attention.to_qkv
        self.fp8_qkv = Fp8Linear(weight.float(), None, scales, weight.dtype)
        self.to_out = attention.to_out
        self.backend = attention.backend

    def project(self, x: Tensor) -> Tensor:
        """``x`` [N, T, C] in e4m3 -> [N, T, 3C]."""
        return self.fp8_qkv(x)

    def stacks(self) -> dict[str, dict[str, int]]:
        return {}


class Fp8GatedLinear(KernelLayer):
    """GEGLU with its projection in fp8 and its output in e4m3, each channel multiplied by one of ``scales``."""

    scales: Tensor

    def __init__(self, linear: nn.Linear, norm: nn.LayerNorm, scales: Tensor) -> None:
        super().__init__()
        weight, bias = linear.weight.float(), linear.bias.float()
        length = weight.shape[1] ** 0.5 * (weight * norm.weight.float()).norm(dim=1)
        value, gate = (length + (weight @ norm.bias.float() + bias).abs()).chunk(2)
        gate = gate.clamp_min(gate.max() * NARROWEST)
        self.register_buffer("scales", LARGEST / (value * gate).clamp_min(TINY))
        rows = torch.cat((self.scales, torch.ones_like(gate)))
        self.proj = Fp8Linear(weight * rows[:, None], bias * rows, scales, linear.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., 4C], both in e4m3."""
        return geglu_e4m3(self.proj(x), self.backend)


def use_fp8(unet: MultiViewUNet, *, emulate: bool = False) -> None:
    """Replace the large linear layers of a frozen network by fp8 counterparts, in place and for good.

    Load and move the network first; its state dict is no longer that of a checkpoint. ``emulate`` computes with
    the same roundings in plain PyTorch, on any device and slowly: to measure what fp8 does to the results.

    Raises:
        InputError: a parameter asks for gradients; or, unless emulated, the device or this PyTorch has no fp8
            products, or the weights are not in half precision.
    """
    if any(parameter.requires_grad for parameter in unet.parameters()):
        raise InputError(
            "fp8 is for a frozen network; call unet.requires_grad_(False) first, or train without it"
        )
    if not emulate:
        _check(next(unet.parameters()).device, unet.dtype)
    blocks = [module for module in unet.modules() if isinstance(module, TransformerBlock)]
    with torch.no_grad():
        for block in blocks:
            if not isinstance(block.norm1, Fp8LayerNorm):
                _convert(block)
            if emulate:
                use_kernels(block, "torch")


def _convert(block: TransformerBlock) -> None:
    """The layers of one block; what a layer norm is replaced by has a single reader, replaced as well."""
    norms = {name: Fp8LayerNorm(getattr(block, name)) for name in ("norm1", "norm2", "norm3")}
    gated, _, out = block.ff.net
    assert isinstance(gated, GatedLinear)
    assert isinstance(out, nn.Linear)
    gate = Fp8GatedLinear(gated.proj, block.norm3, norms["norm3"].scales)
    block.attn1 = Fp8SelfAttention(block.attn1, norms["norm1"].scales)
    block.attn2.add_module("to_q", Fp8Linear.taking_over(block.attn2.to_q, norms["norm2"].scales))
    block.ff.net[0] = gate
    block.ff.net[2] = Fp8Linear.taking_over(out, gate.scales)
    for name, norm in norms.items():
        block.add_module(name, norm)


def _check(device: torch.device, dtype: torch.dtype) -> None:
    """Raises :class:`InputError` where the tensor cores' fp8 products cannot be had."""
    if reason := fp8_obstacle(device if device.type == "cuda" else None):
        raise InputError(f"fp8 cannot run here: {reason}; choose another precision")
    if dtype not in (torch.float16, torch.bfloat16):
        raise InputError(f"fp8 is for weights loaded in float16 or bfloat16, and these are in {dtype}")
    one = torch.ones((), device=device)
    square = to_e4m3(one.expand(16, 16)).contiguous()
    try:
        linear_e4m3(square, square, one, one, one.to(dtype).repeat(16), dtype)
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"PyTorch {torch.__version__} has no fp8 products here: {error}") from error
