"""The parts of a model that are exported: modules of flat tensors, with their inputs and outputs as data.

A component's floating inputs and outputs have the dtype of the model, so that whoever runs it binds device memory as
it is. The first axis of every input and output is the batch, the one symbolic size; all others are the model's own.
Names are those that NVIDIA's and Hugging Face's exports of Stable Diffusion use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.errors import InputError
from ..engine.model import MultiViewModel
from ..engine.schedule import TRAIN_STEPS
from ..engine.text import TextEncoder
from ..engine.unet import MultiViewUNet
from ..engine.vae import LatentCodec
from ..engine.vision import VisionEncoder

BATCH = "batch"
"""Name of the symbolic axis."""
MAX_BATCH = 32
"""Greatest batch that the graphs are traced for. The VAE takes another road, to the same numbers, from 64 on."""


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: ``shape`` is what follows the batch axis."""

    name: str
    shape: tuple[int, ...]
    below: int | None = None
    """Integers (int64) from zero to below this; None for a floating tensor."""
    scale: float = 1.0
    """Standard deviation that a floating input has in use."""
    zero: bool = False
    """The unconditional branch is told nothing by zeros here."""

    def dims(self, batch: int | str) -> list[int | str]:
        return [batch, *self.shape]

    def dtype(self, floating: torch.dtype) -> torch.dtype:
        return floating if self.below is None else torch.int64


@dataclass(frozen=True)
class Component:
    """One graph to export."""

    name: str
    module: nn.Module
    """Takes the inputs in order, and returns the outputs, one tensor or a tuple."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch: int
    """What the engine calls it with."""

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def example(self, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Random inputs of the distribution in use, in the component's dtype."""
        return tuple(draw(spec, batch, self.dtype, generator) for spec in self.inputs)


def draw(spec: TensorSpec, batch: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A random input: uniform integers, or normal numbers of the scale in use."""
    shape = (batch, *spec.shape)
    if spec.below is not None:
        return torch.randint(spec.below, shape, generator=generator)
    return (torch.randn(shape, generator=generator) * spec.scale).to(dtype)


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


COMPONENTS = (
    "unet",
    "image_adaptor",
    "vae_encoder",
    "vae_decoder",
    "image_encoder",
    "text_encoder",
)
"""In the order in which they are exported; those that a checkpoint lacks are left out."""


def component(model: MultiViewModel, name: str) -> Component | None:
    """The component ``name`` of :data:`COMPONENTS`, or None if the model has none (text-only models).

    Raises :class:`InputError` for an unknown name.
    """
    builders = {
        "unet": _unet,
        "image_adaptor": _image_adaptor,
        "vae_encoder": _vae_encoder,
        "vae_decoder": _vae_decoder,
        "image_encoder": _image_encoder,
        "text_encoder": _text_encoder,
    }
    if name not in builders:
        raise InputError(f"unknown component {name!r}; the components are {', '.join(COMPONENTS)}")
    return builders[name](model)


def chosen(names: Sequence[str] | None, model: MultiViewModel) -> list[Component]:
    """The components ``names``, or all that the model has.

    Raises :class:`InputError` for an unknown name, or one that this model has not.
    """
    found = []
    for name in names or COMPONENTS:
        part = component(model, name)
        if part is not None:
            found.append(part)
        elif names:
            raise InputError(f"{model.card.name} is conditioned on text alone and has no {name}")
    return found


def _tokens(model: MultiViewModel) -> int:
    """How many image tokens the adaptor makes."""
    config = model.unet.config
    return _hidden_tokens(model) if config.image_adaptor == "linear" else config.image_tokens


def _hidden_tokens(model: MultiViewModel) -> int:
    assert model.vision is not None
    config: Any = model.vision.model.config
    return (config.image_size // config.patch_size) ** 2 + 1


def _features(model: MultiViewModel) -> TensorSpec:
    width = model.unet.config.image_dim
    if model.unet.config.image_adaptor == "global":
        return TensorSpec("image_hidden", (width,), scale=width**-0.5, zero=True)
    return TensorSpec("image_hidden", (_hidden_tokens(model), width), zero=True)


def _latent(name: str, model: MultiViewModel, *, frames: bool = False, zero: bool = False) -> TensorSpec:
    side = model.latent_px
    leading = (model.frames,) if frames else ()
    return TensorSpec(name, (*leading, model.unet.config.in_channels, side, side), zero=zero)


def _unet(model: MultiViewModel) -> Component:
    config = model.unet.config
    inputs = [
        _latent("sample", model, frames=True),
        TensorSpec("timestep", (), below=TRAIN_STEPS),
        TensorSpec("encoder_hidden_states", (model.text.length, config.context_dim)),
        TensorSpec("camera", (model.frames, config.camera_dim), scale=0.5),
    ]
    if config.with_image:
        inputs.append(TensorSpec("image_tokens", (_tokens(model), config.context_dim)))
    if model.card.controller == "pixel":
        inputs.append(_latent("image_latent", model, zero=True))
    module = FullUNet(model.unet, [spec.name for spec in inputs])
    return Component("unet", module, tuple(inputs), (_latent("latent", model, frames=True),), batch=2)


def _image_adaptor(model: MultiViewModel) -> Component | None:
    config = model.unet.config
    if not config.with_image:
        return None
    tokens = TensorSpec("image_tokens", (_tokens(model), config.context_dim))
    return Component("image_adaptor", ImageAdaptor(model.unet), (_features(model),), (tokens,), batch=1)


def _vae_encoder(model: MultiViewModel) -> Component:
    side = model.card.picture_px
    pictures = TensorSpec("images", (3, side, side), scale=0.5)
    outputs = (_latent("mean", model), _latent("std", model))
    return Component("vae_encoder", VAEEncoder(model.vae), (pictures,), outputs, batch=1)


def _vae_decoder(model: MultiViewModel) -> Component:
    side = model.card.picture_px
    pictures = TensorSpec("images", (3, side, side))
    return Component("vae_decoder", VAEDecoder(model.vae), (_latent("latent", model),), (pictures,), batch=4)


def _image_encoder(model: MultiViewModel) -> Component | None:
    if model.vision is None:
        return None
    px = model.vision.image_px
    pooled = model.unet.config.image_adaptor == "global"
    module = ImageEncoder(model.vision, pooled)
    return Component(
        "image_encoder", module, (TensorSpec("pixel_values", (3, px, px)),), (_features(model),), batch=1
    )


def _text_encoder(model: MultiViewModel) -> Component:
    ids = TensorSpec("input_ids", (model.text.length,), below=int(model.text.model.config.vocab_size))
    context = TensorSpec("text_embeddings", (model.text.length, model.unet.config.context_dim))
    return Component("text_encoder", TextTower(model.text), (ids,), (context,), batch=2)
