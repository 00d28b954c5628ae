"""Prompt and background colour to the tensors that the UNet is conditioned on."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from .blocks import KeyValues
from .errors import InputError
from .model import VIEWS, MultiViewModel
from .picture import PreparedPicture, composite
from .vae import LatentCodec

Level = tuple[int, int, int]
"""RGB in whole levels, 0 to 255."""

CACHED_COLOURS = 256
"""How many background colours a conditioner remembers: every grey level."""


@dataclass(frozen=True)
class Conditioning:
    """What a denoising step is told of one prompt over one background; rows (conditional, unconditional)."""

    context: torch.Tensor
    """[R, 77, D] text tokens; R = 2, or 1 of the conditional row alone."""
    image_tokens: torch.Tensor | None
    """[R, n, D]; the unconditional row is the image adaptor's answer to zeros, not zeros."""
    image_mean: torch.Tensor | None
    """[1, 4, h, w], with ``image_std`` the unscaled VAE posterior of the prompt; ``pixel`` only."""
    image_std: torch.Tensor | None
    key_values: Sequence[KeyValues] | None = None
    """What every cross-attention of the UNet makes of context and image tokens, where that is known already."""

    def image_latent(self, noise: torch.Tensor, codec: LatentCodec) -> torch.Tensor | None:
        """The clean frames [R, 4, h, w], scaled: a posterior sample, then zeros for the unconditional row.

        ``noise`` [1, 4, h, w] standard normal. None for controllers without a fifth frame.
        """
        if self.image_mean is None or self.image_std is None:
            return None
        latent = codec.sample(self.image_mean, self.image_std, noise)
        return torch.cat([latent, torch.zeros_like(latent)])[: self.context.shape[0]]

    def conditional(self) -> Conditioning:
        """The first row alone, for denoising without guidance."""
        tokens = None if self.image_tokens is None else self.image_tokens[:1]
        key_values = None if self.key_values is None else [layer.rows(1) for layer in self.key_values]
        return Conditioning(self.context[:1], tokens, self.image_mean, self.image_std, key_values)


class PictureFeatures(NamedTuple):
    """What the networks make of the prompt picture, one row for each colour behind it."""

    tokens: torch.Tensor
    """[N, n, D]"""
    nothing: torch.Tensor
    """[1, n, D]: the image adaptor's answer to zeros in the picture's place."""
    mean: torch.Tensor | None
    """[N, 4, h, w], with ``std`` the unscaled VAE posterior; ``pixel`` only."""
    std: torch.Tensor | None


class Conditioner:
    """One prompt (picture and text) for one model: conditions on demand, per background colour.

    The text is encoded at once. The picture is encoded once per background colour, which is truncated to
    integer levels as the released compositing truncates its result: exact for pictures whose alpha is 0 or
    255, and within one level of 255 at soft edges. Gradients are never recorded.
    """

    def __init__(
        self,
        model: MultiViewModel,
        picture: PreparedPicture | None,
        prompt: str = "",
        negative_prompt: str = "",
    ) -> None:
        """Raises :class:`InputError` when the model needs a picture and there is none, or the reverse."""
        controller = model.card.controller
        if controller == "none" and picture is not None:
            raise InputError(f"{model.card.name} is conditioned on text alone; leave the picture out")
        if controller != "none" and (picture is None or model.vision is None):
            raise InputError(f"{model.card.name} needs a prompt picture (its controller is {controller})")
        self.model = model
        self.picture = picture
        self.prompt, self.negative_prompt = prompt, negative_prompt
        self._cache: OrderedDict[tuple[int, int, int], Conditioning] = OrderedDict()
        self._tokens_of_nothing: torch.Tensor | None = None
        with torch.inference_mode(False), torch.no_grad():
            self.context = model.text([prompt, negative_prompt])
            self._rgba = None if picture is None else torch.tensor(picture.rgba).to(model.device)

    @cached_property
    def identity(self) -> dict[str, str]:
        """What the conditions depend on besides the model, for checkpoints."""
        rgba = None if self.picture is None else self.picture.rgba.tobytes()
        return {
            "picture": "none" if rgba is None else hashlib.sha256(rgba).hexdigest(),
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
        }

    def at_grey(self, grey: float) -> Conditioning:
        """:meth:`at` for a grey in [0, 1]."""
        return self.at((grey, grey, grey))

    def at(self, colour: tuple[float, float, float]) -> Conditioning:
        """The conditions with that RGB colour, in [0, 1], behind the picture; cached.

        Values beyond [0, 1] count as the nearest end. Raises :class:`InputError` for a colour that is not
        finite.
        """
        if not all(math.isfinite(value) for value in colour):
            raise InputError(f"the background colour is {colour}; it must be finite")
        red, green, blue = (int(255.0 * min(max(value, 0.0), 1.0)) for value in colour)
        level: Level = (red, green, blue)
        if level in self._cache:
            self._cache.move_to_end(level)
            return self._cache[level]
        conditioning = self._cache[level] = self.encode(level)
        if len(self._cache) > CACHED_COLOURS:
            self._cache.popitem(last=False)
        return conditioning

    def forget(self) -> None:
        """Drop the cached conditions, as the released code does with every step's."""
        self._cache.clear()
        self._tokens_of_nothing = None

    # Whoever asks first may be sampling in inference mode, and later askers not: all that is made is ordinary tensors.

    @torch.inference_mode(False)
    @torch.no_grad()
    def encode(self, level: Level) -> Conditioning:
        """The conditions over a colour, given as integer levels 0..255; not cached."""
        found = self.features([level])
        if found is None:
            return Conditioning(self.context, None, None, None)
        return Conditioning(self.context, torch.cat([found.tokens, found.nothing]), found.mean, found.std)

    @torch.inference_mode(False)
    @torch.no_grad()
    def features(self, levels: Sequence[Level]) -> PictureFeatures | None:
        """Those of the picture over some colours, given as integer levels 0..255; None without a picture."""
        model, vision = self.model, self.model.vision
        if vision is None or (rgb := self.over(levels)) is None:
            return None
        encode = vision.pooled if model.card.controller == "global" else vision.hidden
        seen = encode(vision.preprocess(rgb))
        if self._tokens_of_nothing is None:
            self._tokens_of_nothing = model.unet.embed_image(torch.zeros_like(seen[:1]))
        tokens = PictureFeatures(model.unet.embed_image(seen), self._tokens_of_nothing, None, None)
        if model.card.controller != "pixel":
            return tokens
        # As many at a time as a fusion encodes: another number would have kernels of its own to choose.
        batches = model.vae.preprocess(rgb, model.card.picture_px).split(VIEWS)
        mean, std = (torch.cat(x) for x in zip(*map(model.vae.moments, batches), strict=True))
        return tokens._replace(mean=mean, std=std)

    @torch.inference_mode(False)
    @torch.no_grad()
    def over(self, colours: Sequence[tuple[float, float, float]]) -> torch.Tensor | None:
        """The picture over some colours, 0 to 255, on the model's device: uint8 [N, 3, H, W]; None without one."""
        if self._rgba is None:
            return None
        return composite(self._rgba, torch.tensor(colours, dtype=torch.float32, device=self._rgba.device))
