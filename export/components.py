"""The parts of a model that are exported: a module each, with its inputs and outputs as data.

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
from .wrappers import (
    CachedUNet,
    FullUNet,
    ImageAdaptor,
    ImageEncoder,
    PromptKeyValues,
    TextTower,
    VAEDecoder,
    VAEEncoder,
    cross_attention_widths,
)

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
    together: tuple[tuple[str, ...], ...] = ()
    """Groups of inputs, the last ones, that the module takes as one tensor joined on the last axis. In the graph they
    are apart. (Each input of a traced module brings a symbol for its batch, and time grows with their square.)"""
    scores: int = 0
    """Numbers in the largest attention matrix of a row, where that takes gigabytes: nothing fuses it on the CPU."""

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def arguments(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """What the module is called with."""
        grouped = {name for group in self.together for name in group}
        given = {spec.name: x for spec, x in zip(self.inputs, inputs, strict=True)}
        plain = [x for name, x in given.items() if name not in grouped]
        return [*plain, *(torch.cat([given[name] for name in group], dim=-1) for group in self.together)]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs, computed by PyTorch."""
        found = self.module(*self.arguments(inputs))
        return found if isinstance(found, tuple) else (found,)

    def example(self, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Random inputs of the distribution in use, in the component's dtype."""
        return tuple(draw(spec, batch, self.dtype, generator) for spec in self.inputs)


def draw(spec: TensorSpec, batch: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A random input: uniform integers, or normal numbers of the scale in use."""
    shape = (batch, *spec.shape)
    if spec.below is not None:
        return torch.randint(spec.below, shape, generator=generator)
    return (torch.randn(shape, generator=generator) * spec.scale).to(dtype)


COMPONENTS = (
    "unet",
    "unet_cached",
    "key_values",
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
        "unet_cached": _unet_cached,
        "key_values": _key_values,
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
    inputs = [*_noise_inputs(model), _context(model), _camera(model)]
    if model.unet.config.with_image:
        inputs.append(_image_tokens(model))
    if model.card.controller == "pixel":
        inputs.append(_latent("image_latent", model, zero=True))
    module = FullUNet(model.unet, [spec.name for spec in inputs])
    return Component(
        "unet", module, tuple(inputs), (_latent("latent", model, frames=True),), 2, scores=_scores(model)
    )


def _unet_cached(model: MultiViewModel) -> Component:
    plain = [*_noise_inputs(model), _camera(model)]
    if model.card.controller == "pixel":
        plain.append(_latent("image_latent", model, zero=True))
    groups = _key_value_specs(model)
    module = CachedUNet(model.unet, [spec.name for spec in plain])
    return Component(
        "unet_cached",
        module,
        (*plain, *(spec for group in groups for spec in group)),
        (_latent("latent", model, frames=True),),
        2,
        together=tuple(tuple(spec.name for spec in group) for group in groups),
        scores=_scores(model),
    )


def _key_values(model: MultiViewModel) -> Component:
    inputs = (_context(model), *((_image_tokens(model),) if model.unet.config.with_image else ()))
    outputs = tuple(spec for group in _key_value_specs(model) for spec in group)
    return Component("key_values", PromptKeyValues(model.unet), inputs, outputs, batch=2)


def _noise_inputs(model: MultiViewModel) -> list[TensorSpec]:
    return [_latent("sample", model, frames=True), TensorSpec("timestep", (), below=TRAIN_STEPS)]


def _context(model: MultiViewModel) -> TensorSpec:
    return TensorSpec("encoder_hidden_states", (model.text.length, model.unet.config.context_dim))


def _camera(model: MultiViewModel) -> TensorSpec:
    return TensorSpec("camera", (model.frames, model.unet.config.camera_dim), scale=0.5)


def _image_tokens(model: MultiViewModel) -> TensorSpec:
    return TensorSpec("image_tokens", (_tokens(model), model.unet.config.context_dim))


def _key_value_specs(model: MultiViewModel) -> list[tuple[TensorSpec, ...]]:
    """``key_text_00``, ``value_text_00``, ``key_text_01`` and so on, [L, C] each; the same for the image, if any."""
    tokens = {"text": model.text.length}
    if model.unet.config.with_image:
        tokens["image"] = _tokens(model)
    return [
        tuple(
            TensorSpec(f"{part}_{source}_{number:02d}", (length, width))
            for number, width in enumerate(cross_attention_widths(model.unet))
            for part in ("key", "value")
        )
        for source, length in tokens.items()
    ]


def _scores(model: MultiViewModel) -> int:
    config = model.unet.config
    tokens = model.frames * model.latent_px**2
    return config.model_channels * config.channel_mult[0] // config.head_dim * tokens**2


def _image_adaptor(model: MultiViewModel) -> Component | None:
    if not model.unet.config.with_image:
        return None
    tokens = (_image_tokens(model),)
    return Component("image_adaptor", ImageAdaptor(model.unet), (_features(model),), tokens, batch=1)


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
