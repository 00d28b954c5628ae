"""Pictures as tensors of whole levels, on any device: what Pillow's filters make of them, to the very level.

Pillow resizes 8-bit pictures in integers: weights are rounded to multiples of 2^-22, and along the width, then along
the height, sums are rounded to levels (recent versions take the height of strips three times as high as wide first).
Sums of whole numbers below 2^53 are exact in float64 in any order, so matrix products with the same weights give the
same levels on every device.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import InputError

_FRACTION_BITS = 22
"""Of Pillow's weights (``PRECISION_BITS`` in its ``Resample.c``)."""
_BLOCK = 16
"""Pixels that are made of the same window of pixels: smaller windows are less work, more blocks more overlap."""


def check_pictures(rgb: Tensor) -> None:
    """Raises :class:`~.errors.InputError` unless ``rgb`` is uint8 [N, 3, H, W]."""
    if rgb.dtype != torch.uint8 or rgb.ndim != 4 or rgb.shape[1] != 3 or 0 in rgb.shape:
        raise InputError(
            f"the pictures are {rgb.dtype} {list(rgb.shape)}; the encoders take torch.uint8 [N, 3, H, W]"
        )


def resize(rgb: Tensor, height: int, width: int, resample: Image.Resampling) -> Tensor:
    """Pictures uint8 [N, 3, H, W] -> uint8 [N, 3, height, width], level by level as Pillow's ``resize``."""
    if rgb.shape[3] != width:
        rgb = _resize_rows(rgb, width, resample)
    if rgb.shape[2] != height:
        rgb = _resize_rows(rgb.mT, height, resample).mT
    return rgb


def unit(rgb: Tensor) -> Tensor:
    """float32 in [0, 1] of levels."""
    return rgb.float().div(255)


def _resize_rows(levels: Tensor, to: int, resample: Image.Resampling) -> Tensor:
    """Levels uint8 [..., W] -> uint8 [..., to]."""
    columns, weights = _windows(levels.shape[-1], to, resample, levels.device)
    blocks, size, _ = weights.shape
    seen = levels.flatten(0, -2).index_select(1, columns).double().unflatten(1, (blocks, size))
    sums = torch.bmm(seen.transpose(0, 1), weights).transpose(0, 1).flatten(1)[:, :to]
    half = 2.0 ** (_FRACTION_BITS - 1)
    rounded = sums.add_(half).div_(2 * half).floor_().clamp_(0, 255)
    return rounded.to(torch.uint8).unflatten(0, levels.shape[:-1])


@lru_cache(maxsize=8)
def _windows(size: int, to: int, resample: Image.Resampling, device: torch.device) -> tuple[Tensor, Tensor]:
    """What each block of a resized row is made of: the columns of its window, all blocks' in one int64 row, and their
    weights, whole numbers in float64 [blocks, window, block]; weights behind the last pixel are zero.
    """
    # The weights are Pillow's own: what its filter, which rounds 32-bit pictures to whole numbers, makes of single
    # pixels of 1 in that fixed point.
    dots = Image.fromarray(np.eye(size, dtype=np.int32) << _FRACTION_BITS)
    weights = np.asarray(dots.resize((to, size), resample))
    weights = np.pad(weights, [(0, 0), (0, -to % _BLOCK)])
    blocks = np.split(weights, weights.shape[1] // _BLOCK, axis=1)
    used = [np.flatnonzero(block.any(axis=1)) for block in blocks]
    window = max(int(rows[-1] - rows[0]) + 1 for rows in used)
    starts = [min(int(rows[0]), size - window) for rows in used]
    columns = np.concatenate([np.arange(start, start + window) for start in starts])
    found = np.stack([block[start : start + window] for block, start in zip(blocks, starts, strict=True)])
    return torch.from_numpy(columns).to(device), torch.from_numpy(found.astype(np.float64)).to(device)
