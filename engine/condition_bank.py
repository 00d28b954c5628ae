"""The conditions of a whole fusion as tensors on the device, so that a captured step can choose among them.

The released fusion puts the grey of the rendered background's mean behind the prompt, truncated to one of 256
levels: all of them are encoded once, and a step picks its own by an index that never leaves the device. Where
the colour is matched, levels are too many: the host encodes what a step needs before the step begins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .blocks import KeyValues
from .conditioning import Conditioner, Conditioning, PictureFeatures
from .distill import matched_colour
from .model import Progress

LEVELS = 256
BATCH = 32
"""Pictures that the image encoder sees at a time: enough to keep a GPU busy, within 1 GB at the released size."""


class Conditions(Protocol):
    """Where a step takes its conditions from."""

    def prepare(self, background_rgb: Callable[[], Tensor]) -> None:
        """Called by the host before the step, with what computes the step's background [..., 3]."""
        ...

    def at(self, background_rgb: Tensor) -> Conditioning:
        """For the rendered background [..., 3]; tensors only, without waiting for the device."""
        ...


class GreyBank:
    """The conditions over every grey level, [256, ...] each, as :meth:`Conditioner.at_grey` gives them.

    They hold the keys and values that the UNet's cross-attentions make of them: those of the text and of no
    picture are the same over all levels; the others are picked by one copy a step. So no image tokens are given.
    """

    def __init__(self, conditioner: Conditioner, on_progress: Progress | None = None) -> None:
        unet, context = conditioner.model.unet, conditioner.context
        found: list[PictureFeatures] = []
        rows: list[Tensor] = []
        for start in range(0, LEVELS, BATCH):
            some = conditioner.features([(level,) * 3 for level in range(start, start + BATCH)])
            if some is not None:
                found.append(some)
                with torch.no_grad():
                    # One token of text, which is the same over all levels, will do here.
                    layers = unet.prompt_key_values(context[:1, :1].expand(BATCH, -1, -1), some.tokens)
                rows.append(torch.cat([x.flatten(1) for x in _image_parts(layers)], dim=1))
            if on_progress is not None:
                on_progress("condition", start + BATCH, LEVELS)
        self.context = context
        self.image_mean, self.image_std = _joined([x.mean for x in found]), _joined([x.std for x in found])
        self._image_rows = torch.cat(rows) if rows else None
        tokens = torch.cat([found[0].tokens[:1], found[0].nothing]) if found else None
        with torch.no_grad():
            self._key_values = self._views(unet.prompt_key_values(context, tokens))

    def _views(self, layers: list[KeyValues]) -> list[KeyValues]:
        """The layers with their image parts as views into one buffer [2, ...], whose first row a step writes."""
        if self._image_rows is None:
            return layers
        parts = _image_parts(layers)
        self._current = torch.cat([x.flatten(1) for x in parts], dim=1)
        pieces = self._current.split([x[0].numel() for x in parts], dim=1)
        views = iter([piece.unflatten(1, x.shape[1:]) for piece, x in zip(pieces, parts, strict=True)])
        return [KeyValues(layer.k_text, layer.v_text, next(views), next(views)) for layer in layers]

    def prepare(self, background_rgb: Callable[[], Tensor]) -> None:
        """Nothing: every level is there."""

    def at(self, background_rgb: Tensor) -> Conditioning:
        mean = background_rgb.detach().float().mean()
        return self.at_level((mean.clamp(0.0, 1.0) * 255.0).long().reshape(1))

    def at_level(self, level: Tensor) -> Conditioning:
        """For one level, int64 [1] in 0..255 on the device; its keys and values hold until the next call."""
        if self._image_rows is not None:
            torch.index_select(self._image_rows, 0, level, out=self._current[:1])
        return Conditioning(
            self.context,
            None,
            _row(self.image_mean, level),
            _row(self.image_std, level),
            self._key_values,
        )


class MatchedColour:
    """The conditions over the mean colour of each step's background; the host waits for the device for it."""

    def __init__(self, conditioner: Conditioner) -> None:
        self.conditioner = conditioner
        first = conditioner.at_grey(0.5)
        self._current = Conditioning(
            first.context, _clone(first.image_tokens), _clone(first.image_mean), _clone(first.image_std)
        )

    def prepare(self, background_rgb: Callable[[], Tensor]) -> None:
        found = self.conditioner.at(matched_colour(background_rgb(), "colour"))
        for name in ("image_tokens", "image_mean", "image_std"):
            if (held := getattr(self._current, name)) is not None:
                held.copy_(getattr(found, name))

    def at(self, background_rgb: Tensor) -> Conditioning:
        return self._current


def _image_parts(layers: list[KeyValues]) -> list[Tensor]:
    return [x for layer in layers for x in layer[2:] if x is not None]


def _clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def _joined(tensors: list[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None


def _row(table: Tensor | None, index: Tensor) -> Tensor | None:
    return None if table is None else table.index_select(0, index)
