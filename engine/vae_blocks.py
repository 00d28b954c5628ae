"""The blocks of diffusers' ``AutoencoderKL`` on this package's kernels.

Each takes over the layers of diffusers' own block under the names they have there, so that state dicts stay as they
are. Feature maps are [N, C, H, W]. What surrounds a convolution or a product costs no pass of its own where Triton
runs: its bias is added with the residual sum or by the next norm, and the two gradients of a residual fork by the
backward kernel of the norm.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kernels._triton import use_triton
from ..kernels.bias_residual import bias_residual
from ..kernels.forked_group_norm import forked_group_norm
from ..kernels.wide_attention import wide_attention, wide_attention_reference
from .layers import Convolution, GroupNorm, KernelLayer, normalised_convolution

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.resnet import ResnetBlock2D


class Downsample(KernelLayer):
    """``Downsample2D``: 3x3, stride 2, with a row and a column of zeros behind the last ones alone."""

    def __init__(self, block: Downsample2D) -> None:
        super().__init__()
        self.conv = block.conv

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H/2, W/2]."""
        if not use_triton(self.backend, x):
            return self.conv(functional.pad(x, (0, 1, 0, 1)))
        # Zeros in front of the kernel's rows and columns, and the same on all sides of the map, which libraries do
        # themselves: the padded map need not be written, and its gradient not be cut. See also :func:`mirrored`.
        weight = functional.pad(self.conv.weight, (1, 0, 1, 0))
        return bias_residual(
            functional.conv2d(x, weight, None, stride=2, padding=1), self.conv.bias, None, self.backend
        )


class ResidualBlock(nn.Module):
    """``ResnetBlock2D`` as the VAE has it: SiLU, no time embedding."""

    def __init__(self, block: ResnetBlock2D) -> None:
        super().__init__()
        self.norm1 = GroupNorm.taking_over(block.norm1, silu=True)
        self.conv1 = Convolution.taking_over(block.conv1)
        self.norm2 = GroupNorm.taking_over(block.norm2, silu=True)
        self.conv2 = Convolution.taking_over(block.conv2)
        shortcut = block.conv_shortcut
        self.conv_shortcut = None if shortcut is None else Convolution.taking_over(shortcut)

    def forward(self, x: Tensor, temb: None = None) -> Tensor:
        """[N, C, H, W] -> [N, C', H, W]; ``temb`` is what diffusers passes to every block."""
        h, x = _forked(self.norm1, x)
        h = normalised_convolution(self.conv1, self.norm2, h)
        return self.conv2(h, x if self.conv_shortcut is None else self.conv_shortcut(x))


class AttentionBlock(KernelLayer):
    """``Attention`` as the VAE's middle has it: one head over all pixels, residual around the whole."""

    def __init__(self, block: Attention) -> None:
        super().__init__()
        assert block.heads == 1
        self.group_norm = GroupNorm.taking_over(block.group_norm)
        self.to_q, self.to_k, self.to_v = block.to_q, block.to_k, block.to_v
        self.to_out = block.to_out

    def forward(self, x: Tensor, temb: None = None) -> Tensor:
        """[N, C, H, W] -> the same shape."""
        h, x = _forked(self.group_norm, x)
        # Of a channels-last map the tokens are a view, and the other way round.
        tokens = h.permute(0, 2, 3, 1).flatten(1, 2)
        layers = (self.to_q, self.to_k, self.to_v)
        if torch.compiler.is_exporting():  # into a graph that has the weights under their names
            attended = wide_attention_reference(*(layer(tokens) for layer in layers))
        else:
            weight, bias = torch.cat([f.weight for f in layers]), torch.cat([f.bias for f in layers])
            attended = wide_attention(functional.linear(tokens, weight, bias), self.backend)
        return x + self.to_out[0](attended).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


def _forked(norm: GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of ``x``, and ``x`` for the residual path."""
    return forked_group_norm(
        x,
        norm.weight,
        norm.bias,
        groups=norm.num_groups,
        eps=norm.eps,
        silu=norm.silu,
        backend=norm.backend,
    )


def mirrored(encoder: nn.Module, *shared: Tensor) -> nn.Module:
    """A frozen copy of an adopted encoder that makes mirrored maps of mirrored pictures (rows and columns reversed).

    There the zeros that a strided convolution finds behind the last row and column come before the first. Since the
    sides of its map are even, zeros on all sides are as good, and its weights, 3x3 again, need none of their own.
    Parameters that are the same for both and among ``shared`` are not copied.
    """
    own = copy.deepcopy(encoder, {id(parameter): parameter for parameter in shared})
    for parent in list(own.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Downsample):
                strided = Convolution.taking_over(child.conv)
                strided.padding = (1, 1)
                setattr(parent, name, strided)
    for layer in own.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
            last = layer.weight.is_contiguous(memory_format=torch.channels_last)
            layout = torch.channels_last if last else torch.contiguous_format
            weight = layer.weight.detach().flip(2, 3).contiguous(memory_format=layout)
            layer.weight = nn.Parameter(weight, requires_grad=False)
    return own


def adopt(vae: nn.Module) -> None:
    """Replace blocks, convolutions and norms of diffusers' VAE by ours, which share their parameters."""
    from diffusers.models.attention_processor import Attention
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.resnet import ResnetBlock2D

    for parent in list(vae.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ResnetBlock2D) and isinstance(child.nonlinearity, nn.SiLU):
                setattr(parent, name, ResidualBlock(child))
            elif isinstance(child, Attention):
                setattr(parent, name, AttentionBlock(child))
            elif isinstance(child, Downsample2D):
                setattr(parent, name, Downsample(child))
            elif type(child) is nn.Conv2d:
                setattr(parent, name, Convolution.taking_over(child))
            elif isinstance(child, nn.GroupNorm) and name == "conv_norm_out":
                # Encoder and decoder end with the norm, SiLU whatever the blocks have, and a convolution.
                parent.conv_norm_out = GroupNorm.taking_over(child, silu=True)
                parent.conv_act = nn.Identity()
