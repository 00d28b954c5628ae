"""Sizes of the multi-view UNet, and how to read them off a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .adaptors import RESAMPLER_HEAD_DIM
from .blocks import GROUPS
from .errors import InputError

ImageAdaptor = Literal["none", "resampler", "linear", "global"]


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a :class:`MultiViewUNet`; the defaults are the released ImageDream model."""

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    """Channels of each level, in units of ``model_channels``; every level halves height and width."""
    num_res_blocks: int = 2
    """Residual blocks of a level on the way down; one more on the way up."""
    transformer_levels: tuple[int, ...] = (0, 1, 2)
    """Levels whose residual blocks are followed by a transformer. The middle always has one."""
    context_dim: int = 1024
    head_dim: int = 64
    camera_dim: int = 16
    image_adaptor: ImageAdaptor = "resampler"
    """``none`` leaves out the image branch of the cross-attentions (MVDream)."""
    image_dim: int = 1280
    """Width of the picture's hidden states, or of the pooled feature for ``global``."""
    image_tokens: int = 16
    """Tokens that ``resampler`` or ``global`` make; ``linear`` keeps one for each hidden state."""
    resampler_width: int = 1024
    resampler_depth: int = 4
    resampler_heads: int = 12
    """Heads of 64 channels."""

    def __post_init__(self) -> None:
        sizes = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        for name, value in sizes.items():
            if value < 1:
                raise InputError(f"UNet setting {name} is {value}; it must be at least 1")
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise InputError(
                f"UNet setting channel_mult is {self.channel_mult}; it needs a positive number a level"
            )
        if not set(self.transformer_levels) <= set(range(len(self.channel_mult))):
            raise InputError(
                f"UNet setting transformer_levels is {self.transformer_levels}; the levels are "
                f"0 to {len(self.channel_mult) - 1}"
            )
        if self.model_channels % GROUPS:
            raise InputError(
                f"UNet setting model_channels is {self.model_channels}; it must be a multiple of {GROUPS}"
            )
        for level in {*self.transformer_levels, len(self.channel_mult) - 1}:
            channels = self.channel_mult[level] * self.model_channels
            if channels % self.head_dim:
                raise InputError(
                    f"UNet setting head_dim is {self.head_dim}, but must divide the {channels} channels "
                    f"of level {level}; give the head width that the model was trained with"
                )

    @property
    def with_image(self) -> bool:
        return self.image_adaptor != "none"

    @property
    def downscale(self) -> int:
        """Latents' height and width must be multiples of this."""
        return 2 ** (len(self.channel_mult) - 1)


def infer_unet_config(state_dict: Mapping[str, Tensor], head_dim: int = 64) -> UNetConfig:
    """The configuration whose tensors have the names and shapes of ``state_dict``.

    ``head_dim`` cannot be seen from shapes; every released model has 64. Only what tells the sizes is read: a
    strict ``load_state_dict`` afterwards finds missing, extra and wrongly shaped tensors.

    Raises:
        InputError: the tensors are not those of a multi-view UNet (names one that is missing or misshapen),
            or ``head_dim`` does not divide its channels.
    """
    model_channels, in_channels, *_ = _shape(state_dict, "input_blocks.0.0.weight", 4)
    levels = _levels(state_dict)
    channels = [level.channels for level in levels]
    blocks = {level.blocks for level in levels}
    if len(blocks) != 1 or any(width % model_channels for width in channels):
        raise InputError(
            f"{_NOT_A_UNET}: its levels have {channels} channels, which must be multiples of "
            f"{model_channels}, and must have equally many residual blocks"
        )
    return UNetConfig(
        in_channels=in_channels,
        out_channels=_shape(state_dict, "out.2.weight", 4)[0],
        model_channels=model_channels,
        channel_mult=tuple(width // model_channels for width in channels),
        num_res_blocks=blocks.pop(),
        transformer_levels=tuple(number for number, level in enumerate(levels) if level.transformer),
        context_dim=_shape(state_dict, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2)[1],
        head_dim=head_dim,
        camera_dim=_shape(state_dict, "camera_embed.0.weight", 2)[1],
        **_adaptor(state_dict),
    )


_NOT_A_UNET = "not the weights of a multi-view UNet"


def _shape(state_dict: Mapping[str, Tensor], name: str, rank: int) -> torch.Size:
    if name not in state_dict:
        raise InputError(f"{_NOT_A_UNET}: tensor {name} is missing")
    shape = state_dict[name].shape
    if len(shape) != rank or 0 in shape:
        raise InputError(f"{_NOT_A_UNET}: tensor {name} has shape {list(shape)}, not {rank} dimensions")
    return shape


@dataclass
class _Level:
    channels: int
    blocks: int
    transformer: bool


def _levels(state_dict: Mapping[str, Tensor]) -> list[_Level]:
    """What the way down holds between its downsamplings (``input_blocks.*.0.op``)."""
    levels: list[_Level] = []
    number, starts_level = 1, True
    while True:
        block = f"input_blocks.{number}"
        number += 1
        if f"{block}.0.op.weight" in state_dict:
            starts_level = True
        elif f"{block}.0.out_layers.3.weight" in state_dict:
            channels = _shape(state_dict, f"{block}.0.out_layers.3.weight", 4)[0]
            if starts_level:
                levels.append(_Level(channels, 0, f"{block}.1.proj_in.weight" in state_dict))
                starts_level = False
            levels[-1].blocks += 1
        else:
            return levels


def _adaptor(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """The image settings of :class:`UNetConfig`; projectors are told apart by how many tokens they fill."""
    branch = any(name.endswith(".attn2.to_k_ip.weight") for name in state_dict)
    adaptor = any(name.startswith("image_embed.") for name in state_dict)
    if branch != adaptor:
        present, absent = ("to_k_ip", "image_embed") if branch else ("image_embed", "to_k_ip")
        raise InputError(f"{_NOT_A_UNET}: it has {present} tensors but no {absent} tensors")
    if not adaptor:
        return {"image_adaptor": "none"}
    if "image_embed.latents" in state_dict:
        _, tokens, width = _shape(state_dict, "image_embed.latents", 3)
        layers = {name.split(".")[2] for name in state_dict if name.startswith("image_embed.layers.")}
        inner = _shape(state_dict, "image_embed.layers.0.0.to_q.weight", 2)[0]
        return {
            "image_adaptor": "resampler",
            "image_dim": _shape(state_dict, "image_embed.proj_in.weight", 2)[1],
            "image_tokens": tokens,
            "resampler_width": width,
            "resampler_depth": len(layers),
            "resampler_heads": inner // RESAMPLER_HEAD_DIM,
        }
    rows, image_dim = _shape(state_dict, "image_embed.proj.weight", 2)
    width = _shape(state_dict, "image_embed.norm.weight", 1)[0]
    if rows == width:
        return {"image_adaptor": "linear", "image_dim": image_dim}
    return {"image_adaptor": "global", "image_dim": image_dim, "image_tokens": rows // width}
