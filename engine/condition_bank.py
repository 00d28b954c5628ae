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
from .conditioning import Conditioner, Conditioning
from .distill import matched_colour
from .model import Progress

LEVELS = 256
BATCH = 16


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
        found: list[Conditioning] = []
        rows: list[Tensor] = []
        unet = conditioner.model.unet
        for start in range(0, LEVELS, BATCH):
            found += conditioner.encode([(level,) * 3 for level in range(start, start + BATCH)])
            if (first := found[-1]).image_tokens is not None:
                tokens = torch.stack([_given(one.image_tokens)[0] for one in found[-BATCH:]])
                with torch.no_grad():
                    layers = unet.prompt_key_values(first.context[:1].expand(BATCH, -1, -1), tokens)
                rows.append(
                    torch.cat([x.flatten(1) for layer in layers for x in layer[2:] if x is not None], 1)
                )
            if on_progress is not None:
                on_progress("condition", start + BATCH, LEVELS)
        self.context = found[0].context
        self.image_mean = _stack([one.image_mean for one in found])
        self.image_std = _stack([one.image_std for one in found])
        self._image_rows = torch.cat(rows) if rows else None
        with torch.no_grad():
            self._key_values = self._views(unet.prompt_key_values(self.context, found[0].image_tokens))

    def _views(self, layers: list[KeyValues]) -> list[KeyValues]:
        """The layers with their image parts as views into one buffer [2, ...], whose first row a step writes."""
        if self._image_rows is None:
            return layers
        parts = [x for layer in layers for x in layer[2:] if x is not None]
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


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def _stack(tensors: list[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if present else None


def _row(table: Tensor | None, index: Tensor) -> Tensor | None:
    return None if table is None else table.index_select(0, index)[0]
