"""The modules of flat tensors that are exported: the engine's networks without anything but tensors around them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..engine.blocks import KeyValues, PromptCrossAttention
from ..engine.text import TextEncoder
from ..engine.unet import MultiViewUNet
from ..engine.vae import LatentCodec
from ..engine.vision import VisionEncoder


class FullUNet(nn.Module):
    """The UNet from context and image tokens; takes the tensors of ``names`` in that order."""

    def __init__(self, unet: MultiViewUNet, names: Sequence[str]) -> None:
        super().__init__()
        self.unet = unet
        self.names = tuple(names)

    def forward(self, *inputs: Tensor) -> Tensor:
        given = dict(zip(self.names, inputs, strict=True))
        return self.unet(
            given["sample"],
            given["timestep"],
            given["encoder_hidden_states"],
            camera=given["camera"],
            image_latent=given.get("image_latent"),
            image_tokens=given.get("image_tokens"),
        )


class CachedUNet(nn.Module):
    """The UNet from keys and values of every cross-attention, which are constant for a prompt: for the loop.

    Takes the tensors of ``names``, then keys and values of text, and of the image if there is one, each joined on the
    last axis, [rows, L, C].
    """

    def __init__(self, unet: MultiViewUNet, names: Sequence[str]) -> None:
        super().__init__()
        self.unet = unet
        self.names = tuple(names)
        self.widths = [width for width in cross_attention_widths(unet) for _ in "kv"]

    def forward(self, *inputs: Tensor) -> Tensor:
        given = dict(zip(self.names, inputs, strict=False))
        pairs = [self._pairs(joined) for joined in inputs[len(self.names) :]]
        key_values = [
            KeyValues(*text, *(pairs[1][at] if len(pairs) > 1 else (None, None)))
            for at, text in enumerate(pairs[0])
        ]
        return self.unet(
            given["sample"],
            given["timestep"],
            None,
            camera=given["camera"],
            image_latent=given.get("image_latent"),
            key_values=key_values,
        )

    def _pairs(self, joined: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(keys, values) of each layer, [rows, L, H, D]."""
        heads = (-1, self.unet.config.head_dim)
        parts = [part.unflatten(-1, heads) for part in joined.split(self.widths, dim=-1)]
        return list(zip(parts[::2], parts[1::2], strict=True))


class PromptKeyValues(nn.Module):
    """What :class:`CachedUNet` takes, of context and image tokens."""

    def __init__(self, unet: MultiViewUNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, encoder_hidden_states: Tensor, image_tokens: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        found = self.unet.prompt_key_values(encoder_hidden_states, image_tokens)
        text = [tensor.flatten(2) for layer in found for tensor in layer[:2]]
        image = [tensor.flatten(2) for layer in found for tensor in layer[2:] if tensor is not None]
        return (*text, *image)


class ImageAdaptor(nn.Module):
    """Image tokens of the picture's features."""

    def __init__(self, unet: MultiViewUNet) -> None:
        super().__init__()
        self.image_embed = unet.image_embed

    def forward(self, image_hidden: Tensor) -> Tensor:
        return self.image_embed(image_hidden)


class VAEEncoder(nn.Module):
    """Pictures in [-1, 1] to the posterior's mean and standard deviation, unscaled."""

    def __init__(self, codec: LatentCodec) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.codec.moments(images)


class VAEDecoder(nn.Module):
    """Scaled latents to pictures, about [-1, 1]."""

    def __init__(self, codec: LatentCodec) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, latent: Tensor) -> Tensor:
        return self.codec.decode(latent)


class ImageEncoder(nn.Module):
    """CLIP's features of a picture: the hidden states, or the pooled feature for the global controller."""

    def __init__(self, vision: VisionEncoder, pooled: bool) -> None:
        super().__init__()
        self.vision = vision
        self.pooled = pooled

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.vision.pooled(pixel_values) if self.pooled else self.vision.hidden(pixel_values)


class TextTower(nn.Module):
    """CLIP's context of token ids."""

    def __init__(self, text: TextEncoder) -> None:
        super().__init__()
        self.text = text

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.text.context(input_ids)


def cross_attention_widths(unet: MultiViewUNet) -> list[int]:
    """Channels of each cross-attention, in the order in which they run."""
    layers = (module for module in unet.modules() if isinstance(module, PromptCrossAttention))
    return [layer.to_q.out_features for layer in layers]
