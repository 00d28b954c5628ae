"""The prompt picture: read from anything, freed of its background, centred in a square, straight alpha."""

from __future__ import annotations

import io
import math
import os
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from ._optional import installed, require
from .errors import InputError, MissingDependency

Source = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | torch.Tensor
"""A file's path or content, a Pillow picture, or an array: [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4
channels, uint8 or float in [0, 1]."""

OBJECT_FRACTION = 0.8
"""The longer side of the object's box, as a part of the square's side."""
ALPHA_THRESHOLD = 8
"""Pixels with more alpha than this, of 255, make up the object's box: cut-out tools leave a haze below it."""
MIN_SIDE_PX = 8
MAX_PIXELS = 64_000_000
MAX_ASPECT = 64
"""Of the object: a longer one would be thinner than a pixel or two in the square."""

_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "ICO", "JPEG2000", "AVIF")
"""Named, because Pillow's whole list has readers that start other programs (EPS)."""
_REMBG_NETWORK = "u2net"


@dataclass(frozen=True)
class PreparedPicture:
    """What the networks are shown, before a background colour is put behind it."""

    rgba: np.ndarray
    """uint8 [S, S, 4], straight alpha; RGB is 0 where alpha is 0."""
    notes: tuple[str, ...] = ()
    """What was done to the picture that its owner may want to know, one sentence each."""


def load_picture(source: Source) -> Image.Image:
    """The picture as 8-bit RGB, or RGBA where it has transparency; turned as its EXIF orientation says.

    Palette, grey, 16-bit, CMYK and floating-point pictures are converted; of an animation the first frame
    is taken. The size is judged before anything is decoded. Raises :class:`InputError` for what is not a
    picture, is damaged, has a side under 8 pixels or more than 64 million pixels.
    """
    if isinstance(source, np.ndarray | torch.Tensor):
        return _from_array(source)
    if isinstance(source, Image.Image):
        name = getattr(source, "filename", "") or "the picture"
        return _decoded(source, name)
    if isinstance(source, bytes):
        name, stream = f"the picture ({len(source)} bytes)", io.BytesIO(source)
        return _from_stream(stream, name, empty=not source)
    if not isinstance(source, str | os.PathLike):
        raise InputError(
            f"a picture cannot be a {type(source).__name__}; give a path, bytes, a Pillow picture, an array "
            "or a tensor"
        )
    name = os.fspath(source)
    try:
        with open(name, "rb") as file:
            return _from_stream(file, name, empty=os.fstat(file.fileno()).st_size == 0)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        hint = "; download it first and give the file" if "://" in name else ""
        raise InputError(f"{name}: cannot be read ({getattr(error, 'strerror', error)}){hint}") from None


def prepare(
    source: Source, *, keep_background: bool = False, recentre: bool = True, size: int = 512
) -> PreparedPicture:
    """Free the object of its background, centre it and scale it into a ``size`` x ``size`` square.

    The box of pixels with alpha above :data:`ALPHA_THRESHOLD` is centred and its longer side scaled to
    :data:`OBJECT_FRACTION` of the square; with ``recentre=False`` the whole picture fills the square, padded
    transparently where it is not square. Resizing runs on colour times alpha, so colours under transparent
    pixels never bleed into the edge.

    A picture without transparency (no alpha, or alpha 255 everywhere) has its background removed by rembg
    where that is installed. With ``keep_background`` it is used whole instead: padded to a square with the
    mean colour of its border, opaque.

    Raises :class:`InputError` as :func:`load_picture` does, for a picture that shows nothing, or an object of
    less than 8 pixels or too thin, and for one without transparency when its background can neither stay nor
    be removed.
    """
    if size < MIN_SIDE_PX:
        raise InputError(f"the prepared picture's side is {size} px; it must be at least {MIN_SIDE_PX}")
    picture, name = load_picture(source), _name(source)
    notes: list[str] = []
    has_alpha = picture.mode == "RGBA" and int(np.asarray(picture)[..., 3].min()) < 255
    if has_alpha and keep_background:
        notes.append("The picture is transparent around its object, so there was no background to keep.")
    if not has_alpha and keep_background:
        rgba = np.asarray(picture.convert("RGBA"))
        _check_aspect(picture.width, picture.height, name)
        border = _border_mean(rgba)
        if picture.width != picture.height:
            colour = ", ".join(f"{value:.0f}" for value in border[:3])
            notes.append(f"The background was kept, padded to a square with its border's colour ({colour}).")
        return PreparedPicture(_fit(rgba, 1.0, size, border), tuple(notes))
    if not has_alpha:
        picture = _without_background(picture, name)
        notes.append(f"The background was removed by rembg ({_REMBG_NETWORK}).")
    rgba = np.asarray(picture)
    left, top, right, bottom = _object_box(rgba[..., 3], name)
    longer = max(right - left, bottom - top)
    clear = np.zeros(4, np.float32)
    if not recentre:
        _check_aspect(picture.width, picture.height, name)
        return PreparedPicture(_fit(rgba, 1.0, size, clear), tuple(notes))
    if longer * 2 < OBJECT_FRACTION * size:
        notes.append(f"The object is only {right - left} x {bottom - top} pixels and was enlarged.")
    return PreparedPicture(_fit(rgba[top:bottom, left:right], OBJECT_FRACTION, size, clear), tuple(notes))


def composite(rgba: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """Put colours [N, 3] (RGB, 0 to 255) behind a straight-alpha picture: uint8 [H, W, 4] -> uint8 [N, 3, H, W].

    trunc(rgb a + colour (1 - a)) in float32, not rounded: the arithmetic of the released code, to the bit on every
    device.
    """
    planes = rgba.permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
    # By a tensor on the device, because CUDA multiplies with the reciprocal of a number.
    alpha = planes[3] / torch.full((), 255.0, device=rgba.device)
    coloured = colours.float()[:, :, None, None] * (1 - alpha)
    return coloured.add_(planes[:3] * alpha).to(torch.uint8)


def _name(source: Source) -> str:
    return os.fspath(source) if isinstance(source, str | os.PathLike) else "the picture"


def _from_stream(stream: Any, name: str, *, empty: bool) -> Image.Image:
    if empty:
        raise InputError(f"{name}: the file is empty")
    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # _check_size is stricter
            image = Image.open(stream, formats=[known for known in _FORMATS if known in Image.OPEN])
    except Image.DecompressionBombError:
        raise InputError(_too_large(name)) from None
    except Exception as error:  # Pillow's readers raise whatever a damaged header leads them to
        raise InputError(
            f"{name}: not a picture that can be read; give a PNG, JPEG, WebP, GIF, BMP or TIFF file"
        ) from error
    return _decoded(image, name)


def _decoded(image: Image.Image, name: str) -> Image.Image:
    _check_size(*image.size, name)
    try:
        image.load()
        return _as_8bit(ImageOps.exif_transpose(image), name)
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise InputError(_too_large(name)) from None
    except Exception as error:
        raise InputError(f"{name}: the picture is damaged ({_cause(error)})") from error


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise InputError(_too_large(name, f"{width} x {height} pixels; "))
    if min(width, height) < MIN_SIDE_PX:
        raise InputError(
            f"{name}: {width} x {height} pixels are too few; each side needs at least {MIN_SIDE_PX}"
        )


def _check_aspect(width: int, height: int, name: str) -> None:
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InputError(
            f"{name}: what it shows is {width} x {height} pixels, too long and thin to be seen in a square; "
            f"the longer side can be {MAX_ASPECT} times the shorter one"
        )


def _too_large(name: str, size: str = "") -> str:
    return (
        f"{name}: the picture is too large ({size}at most {MAX_PIXELS // 10**6} million are read); "
        "shrink it first"
    )


def _as_8bit(image: Image.Image, name: str) -> Image.Image:
    """RGB or RGBA."""
    if image.mode in ("RGB", "RGBA") and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return _grey(np.asarray(image), 65535, name)
    if image.mode == "F":
        return _grey(np.asarray(image), 1, name)
    transparent = image.mode in ("RGBA", "LA", "La", "PA", "RGBa") or "transparency" in image.info
    return image.convert("RGBA" if transparent else "RGB")


def _grey(values: np.ndarray, top: int, name: str) -> Image.Image:
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= top):
        raise InputError(f"{name}: its grey values leave the range 0 to {top}; save it as an 8-bit picture")
    return Image.fromarray(np.rint(values * (255.0 / top)).astype(np.uint8)).convert("RGB")


def _from_array(source: np.ndarray | torch.Tensor) -> Image.Image:
    """A tensor is read as [C, H, W] where both orders fit its shape, an array as [H, W, C]."""
    name = f"the picture ({type(source).__name__} of shape {list(source.shape)})"
    if isinstance(source, torch.Tensor):
        tensor = source.detach().cpu()
        array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    else:
        array = source
    channels = (1, 3, 4)
    if array.ndim == 2:
        array = array[..., None]
    fits_last = array.ndim == 3 and array.shape[2] in channels
    fits_first = array.ndim == 3 and array.shape[0] in channels
    if not (fits_last or fits_first):
        raise InputError(f"{name}: the shape must be [H, W], [H, W, C] or [C, H, W] with C = 1, 3 or 4")
    if fits_first and (isinstance(source, torch.Tensor) or not fits_last):
        array = array.transpose(1, 2, 0)
    _check_size(array.shape[1], array.shape[0], name)
    if np.issubdtype(array.dtype, np.floating):
        # Resampling overshoots a little; values of another range (0..255, -1..1) are a mistake.
        if not (np.isfinite(array).all() and array.min() >= -0.01 and array.max() <= 1.01):
            raise InputError(f"{name}: floating-point values must be finite and lie in [0, 1]")
        array = np.rint(array.clip(0.0, 1.0) * 255.0).astype(np.uint8)
    if array.dtype != np.uint8:
        raise InputError(f"{name}: its dtype is {array.dtype}; give uint8, or floats in [0, 1]")
    if array.shape[2] == 1:
        array = array.repeat(3, axis=2)
    return Image.fromarray(np.ascontiguousarray(array))


def _without_background(picture: Image.Image, name: str) -> Image.Image:
    """RGBA of the same size, cut out by rembg."""
    if not installed("rembg"):
        raise MissingDependency(
            f"{name}: the picture has no transparency, so the object cannot be told from its background. "
            "Give an RGBA picture, or install the extra that cuts objects out "
            '(pip install "imagedream-rt[rembg]"), or keep the background (--keep-background, '
            "keep_background=True)"
        )
    rembg = require("rembg", "rembg", "to remove the picture's background")
    try:
        cut = rembg.remove(picture.convert("RGB"), session=_rembg_session())
    except Exception as error:  # a failed download, a broken onnxruntime: the mend is the same
        raise InputError(
            f"{name}: rembg could not remove the background ({_cause(error)}); its network is downloaded on "
            "first use. Give an RGBA picture or keep the background (--keep-background)"
        ) from error
    return cut.convert("RGBA")


@cache
def _rembg_session() -> Any:
    # Named, because rembg's default has changed and one of its networks has a non-commercial licence.
    return require("rembg", "rembg", "to remove the picture's background").new_session(_REMBG_NETWORK)


def _object_box(alpha: np.ndarray, name: str) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of alpha [H, W] above the threshold, right and bottom exclusive."""
    seen = alpha > ALPHA_THRESHOLD
    columns, rows = np.flatnonzero(seen.any(axis=0)), np.flatnonzero(seen.any(axis=1))
    if not columns.size:
        raise InputError(f"{name}: the picture is fully transparent; there is no object to see in it")
    left, right = int(columns[0]), int(columns[-1]) + 1
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    if max(right - left, bottom - top) < MIN_SIDE_PX:
        raise InputError(
            f"{name}: its object is only {right - left} x {bottom - top} pixels; the longer side needs at "
            f"least {MIN_SIDE_PX}"
        )
    _check_aspect(right - left, bottom - top, name)
    return left, top, right, bottom


def _border_mean(rgba: np.ndarray) -> np.ndarray:
    """float32 [4]: mean of the outermost pixels."""
    sides = (rgba[0], rgba[-1], rgba[1:-1, 0], rgba[1:-1, -1])
    return np.concatenate(sides).mean(axis=0, dtype=np.float64).astype(np.float32)


def _fit(rgba: np.ndarray, fraction: float, size: int, fill: np.ndarray) -> np.ndarray:
    """Centre ``rgba`` [H, W, 4] in a square, its longer side ``fraction`` of that; resize to ``size``.

    ``fill`` [4] surrounds it. The filter is a triangle (antialiased): it has no negative lobes, so neither
    alpha nor colour can ring at an edge.
    """
    pixels = _premultiplied(rgba, max(1, max(rgba.shape[:2]) // (2 * size)))
    side = max(pixels.shape[:2]) / fraction
    margins = [(side - extent) / 2 for extent in pixels.shape[:2]]
    pads = [math.ceil(margin) for margin in margins]
    top, left = (pad - margin for pad, margin in zip(pads, margins, strict=True))
    box = (left, top, left + side, top + side)
    planes = []
    for channel in range(4):
        plane = np.pad(pixels[..., channel], [(pads[0],) * 2, (pads[1],) * 2], constant_values=fill[channel])
        box_inside = (*box[:2], min(box[2], plane.shape[1]), min(box[3], plane.shape[0]))
        resized = Image.fromarray(plane).resize((size, size), Image.Resampling.BILINEAR, box=box_inside)
        planes.append(np.asarray(resized))
    result = np.stack(planes, axis=-1)
    alpha = result[..., 3:]
    visible = alpha > 0.5  # those that do not round to zero
    result[..., :3] = np.where(visible, result[..., :3] * 255.0 / np.where(visible, alpha, 1.0), 0.0)
    return np.rint(result.clip(0.0, 255.0)).astype(np.uint8)


def _premultiplied(rgba: np.ndarray, block: int) -> np.ndarray:
    """float32 [H / block, W / block, 4] in 0 to 255: colour times alpha, and alpha, averaged over blocks.

    The averaging bounds the memory that a large picture takes; it goes row by row for the same reason.
    """
    columns = np.arange(0, rgba.shape[1], block)
    widths = np.diff(columns, append=rgba.shape[1])[:, None]
    rows = []
    for start in range(0, rgba.shape[0], block):
        band = rgba[start : start + block].astype(np.float32)
        band[..., :3] *= band[..., 3:] / 255.0
        rows.append(np.add.reduceat(band.mean(axis=0), columns, axis=0) / widths)
    return np.stack(rows).astype(np.float32)


def _cause(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
