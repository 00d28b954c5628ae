"""Models with random weights: ``random:full`` at the released size for benchmarks, ``random:tiny`` for tests.

The weights are the same on every machine, device and dtype, and cost little more than writing them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .blueprint import Layout, Part
from .errors import InputError
from .model import Controller
from .network_parts import (
    RELEASED_TEXT,
    RELEASED_VAE,
    RELEASED_VISION,
    text_part,
    unet_part,
    vae_part,
    vision_part,
)
from .unet_config import ImageAdaptor, UNetConfig

_ADAPTORS: dict[Controller, ImageAdaptor] = {
    "pixel": "resampler",
    "local": "resampler",
    "local-linear": "linear",
    "global": "global",
    "none": "none",
}
_TINY_UNET = UNetConfig(
    model_channels=32,
    channel_mult=(2, 2),
    num_res_blocks=1,
    transformer_levels=(0, 1),
    context_dim=64,
)
_TINY_RESAMPLER = {"image_tokens": 4, "resampler_width": 64, "resampler_depth": 1, "resampler_heads": 1}
_TINY_VAE = {**RELEASED_VAE, "block_out_channels": [32, 32, 32, 64], "layers_per_block": 1}
_TINY_TEXT = {
    **RELEASED_TEXT,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
}
_TINY_VISION = {
    **RELEASED_VISION,
    "image_size": 56,
    "projection_dim": 48,
    "hidden_size": 80,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 1,
}
PICTURE_PX = {"full": 256, "tiny": 64}


class ByteTokenizer:
    """A text's UTF-8 bytes as ids, with the control ids of CLIP: random weights need no vocabulary."""

    bos_id, eos_id, pad_id, size = 49406, 49407, 0, 49408

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


class RandomTensors(Mapping[str, Tensor]):
    """A float32 tensor for each of a network's parameters, made when asked for.

    Normal numbers of the variance that keeps activations near one, repeated from one pool: two billion fresh
    ones would take most of a minute. The pool's length is prime, so that rows do not repeat within a matrix.
    """

    _POOL = 1_048_583

    def __init__(self, network: nn.Module) -> None:
        self._shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
        self._pool = torch.randn(self._POOL, generator=torch.Generator().manual_seed(0))

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        start = zlib.crc32(name.encode()) % self._POOL
        repeats = -(-(start + shape.numel()) // self._POOL)
        values = self._pool.repeat(repeats)[start : start + shape.numel()].reshape(shape)
        if len(shape) > 1:
            return values.mul_((shape.numel() // shape[0]) ** -0.5)
        return values.mul_(0.1).add_(1.0 if name.endswith("weight") else 0.0)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def random_layout(size: str, controller: Controller) -> Layout:
    """The networks of ``random:<size>``. Raises :class:`InputError` for an unknown size."""
    if size not in PICTURE_PX:
        raise InputError(f"random:{size}: unknown size; the random models are random:full and random:tiny")
    adaptor = _ADAPTORS[controller]
    full = size == "full"
    vision: dict[str, Any] = RELEASED_VISION if full else _TINY_VISION
    pooled = adaptor == "global"
    image_dim = vision["projection_dim"] if pooled else vision["hidden_size"]
    sizes: dict[str, Any] = {"image_adaptor": adaptor}
    if adaptor != "none":
        sizes["image_dim"] = image_dim
    if adaptor == "resampler" and not full:
        sizes |= _TINY_RESAMPLER
    elif pooled:
        sizes["image_tokens"] = 4
    unet = replace(UNetConfig() if full else _TINY_UNET, **sizes)

    nothing: dict[str, Tensor] = {}
    parts = [
        unet_part(unet, nothing),
        vae_part(RELEASED_VAE if full else _TINY_VAE, nothing),
        text_part(RELEASED_TEXT if full else _TINY_TEXT, nothing, ByteTokenizer()),
    ]
    if adaptor != "none":
        parts.append(vision_part(vision, nothing, pooled=pooled))
    return Layout(
        {
            part.name: Part(part.name, part.wrapper, part.network, RandomTensors(part.network))
            for part in parts
        }
    )
