"""Prompt and background colour to the tensors that the UNet is conditioned on."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .blocks import KeyValues
from .errors import InputError
from .model import MultiViewModel
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
        self.identity = {
            "picture": "none" if picture is None else hashlib.sha256(picture.rgba.tobytes()).hexdigest(),
            "prompt": prompt,
            "negative_prompt": negative_prompt,
        }
        """What the conditions depend on besides the model, for checkpoints."""
        self._cache: OrderedDict[tuple[int, int, int], Conditioning] = OrderedDict()
        self._tokens_of_nothing: torch.Tensor | None = None
        with torch.inference_mode(False), torch.no_grad():
            self._context = model.text([prompt, negative_prompt])

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
        conditioning = self._cache[level] = self.encode([level])[0]
        if len(self._cache) > CACHED_COLOURS:
            self._cache.popitem(last=False)
        return conditioning

    def forget(self) -> None:
        """Drop the cached conditions, as the released code does with every step's."""
        self._cache.clear()
        self._tokens_of_nothing = None

    def encode(self, levels: Sequence[Level]) -> list[Conditioning]:
        """The conditions over each of some colours, given as integer levels 0..255; in one batch, not cached."""
        # Whoever asks first may be sampling in inference mode, and later askers not: keep ordinary tensors.
        with torch.inference_mode(False), torch.no_grad():
            return self._encode(levels)

    def _encode(self, levels: Sequence[Level]) -> list[Conditioning]:
        model, vision = self.model, self.model.vision
        if self.picture is None or vision is None:
            return [Conditioning(self._context, None, None, None)] * len(levels)
        pictures = [composite(self.picture.rgba, level) for level in levels]
        pixels = torch.stack([vision.preprocess(rgb) for rgb in pictures]).to(model.device)
        encode = vision.pooled if model.card.controller == "global" else vision.hidden
        features = encode(pixels)
        if self._tokens_of_nothing is None:
            self._tokens_of_nothing = model.unet.embed_image(torch.zeros_like(features[:1]))
        nothing = self._tokens_of_nothing
        tokens = [torch.cat([row, nothing]) for row in model.unet.embed_image(features).split(1)]
        if model.card.controller != "pixel":
            return [Conditioning(self._context, row, None, None) for row in tokens]
        px = model.card.picture_px
        seen = torch.stack([model.vae.preprocess(rgb, px) for rgb in pictures]).to(model.device)
        mean, std = (moment.split(1) for moment in model.vae.moments(seen))
        return [Conditioning(self._context, *rows) for rows in zip(tokens, mean, std, strict=True)]
