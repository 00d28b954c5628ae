"""Networks whose calls replay CUDA graphs where they can (:class:`~.graphed.Replays`).

Each has the very layers of another network and is called like it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..kernels.attention import AttentionBackend
from .blocks import KeyValues
from .graphed import Replays, forget_graphs
from .model import VIEWS
from .text import TextEncoder
from .unet import MultiViewUNet
from .vae import LatentCodec
from .vision import VisionEncoder

FEW = VIEWS
"""Prompts or pictures, at most, in a call that is replayed: more keep a GPU busy without a graph, and its memory."""

Network = TypeVar("Network", bound=nn.Module)


class GraphedUNet(MultiViewUNet):
    """``compute``, if given, takes the place of the other's ``forward``."""

    def __init__(self, unet: MultiViewUNet, compute: Callable[..., Tensor] | None = None) -> None:
        share(self, unet)
        self._replays = Replays(unet.forward if compute is None else compute)
        self._key_value_replays = Replays(unet.prompt_key_values)
        self._image_replays = Replays(unet.embed_image)

    @property
    def image_scale(self) -> float:
        """That of the other, which computes with it."""
        return plain(self).image_scale

    @image_scale.setter
    def image_scale(self, scale: float) -> None:
        plain(self).image_scale = scale

    def use_attention_backend(self, backend: AttentionBackend) -> None:
        """As :meth:`MultiViewUNet.use_attention_backend`; drops the graphs."""
        super().use_attention_backend(backend)
        forget_graphs(self)

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """As :meth:`MultiViewUNet.forward`."""
        if _is_trained(self):
            return self._replays.function(*arguments, **named)
        # A graph holds the scale's value, and weights that were folded from the network's.
        return self._replays(*arguments, also=(self.weights_seen, self.image_scale), **named)

    def prompt_key_values(self, context: Tensor, image_tokens: Tensor | None = None) -> list[KeyValues]:
        """As :meth:`MultiViewUNet.prompt_key_values`."""
        return list(_of_few(self, self._key_value_replays, context, image_tokens))

    def embed_image(self, image_hidden: Tensor) -> Tensor:
        """As :meth:`MultiViewUNet.embed_image`."""
        return _of_few(self, self._image_replays, image_hidden)


class GraphedCodec(LatentCodec):
    """``moments`` and ``decode``, if given, take the place of the other's methods."""

    def __init__(
        self,
        codec: LatentCodec,
        moments: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        share(self, codec)
        self._moments_replays = Replays(codec.moments if moments is None else moments)
        self._decode_replays = Replays(codec.decode if decode is None else decode)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`LatentCodec.moments`."""
        return _of_few(self, self._moments_replays, images)

    def decode(self, latents: Tensor) -> Tensor:
        """As :meth:`LatentCodec.decode`."""
        return _of_few(self, self._decode_replays, latents)


class GraphedText(TextEncoder):
    """The encoder of prompts."""

    def __init__(self, encoder: TextEncoder) -> None:
        share(self, encoder)
        self._replays = Replays(encoder.context)

    def context(self, ids: Tensor) -> Tensor:
        """As :meth:`TextEncoder.context`."""
        return _of_few(self, self._replays, ids.to(next(self.parameters()).device))


class GraphedVision(VisionEncoder):
    """The encoder of prompt pictures."""

    def __init__(self, encoder: VisionEncoder) -> None:
        share(self, encoder)
        self._hidden_replays, self._pooled_replays = Replays(encoder.hidden), Replays(encoder.pooled)

    def hidden(self, pixels: Tensor) -> Tensor:
        """As :meth:`VisionEncoder.hidden`."""
        return _of_few(self, self._hidden_replays, pixels)

    def pooled(self, pixels: Tensor) -> Tensor:
        """As :meth:`VisionEncoder.pooled`."""
        return _of_few(self, self._pooled_replays, pixels)


def share(network: nn.Module, other: nn.Module) -> None:
    """Make ``network``, not yet initialised, hold all that ``other`` holds: parameters, layers, hooks, settings."""
    nn.Module.__init__(network)
    network.__dict__.update(other.__dict__)
    # In a tuple: a module assigned as it is would become a layer, here one of itself.
    network.__dict__["_shared"] = (other,)


def plain(network: Network) -> Network:
    """The network whose layers it shares, if it does."""
    shared: tuple[Network, ...] = network.__dict__.get("_shared", (network,))
    return shared[0]


def _of_few(network: nn.Module, replays: Replays, first: Tensor, *others: Tensor | None) -> Any:
    """A replay, if that is for few rows of a network that is not trained; else the function itself."""
    if len(first) > FEW or _is_trained(network):
        return replays.function(first, *others)
    return replays(first, *others, also=_address(network))


def _is_trained(network: nn.Module) -> bool:
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in network.parameters())


def _address(network: nn.Module) -> int:
    """Of the weights: a graph holds it."""
    return next(network.parameters()).data_ptr()
