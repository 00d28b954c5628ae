"""Checkpoint -> model: ``load_model``, ``load_unet``, and ``inspect`` for what can be told without loading.

What a file is, is read off its content: the official ImageDream and MVDream checkpoints as ``.pt`` or
safetensors, and model folders in diffusers' format. Names and shapes must fit exactly; tensors that nobody
reads are left out by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from .blueprint import Layout, Part, check, fill
from .checkpoint_files import flat_tensors, read_tensors, sha256_of
from .errors import InputError
from .folder_layout import folder_unet
from .layers import fast_memory_format
from .model import VIEWS, Controller, ModelCard, MultiViewModel
from .model_folder import names_in, save_model_folder, single_weights_file
from .network_parts import unet_by_tensors
from .official_layout import UNET_PREFIX, is_official, unet_tensors
from .open_model import open_model
from .schedule import alphas_cumprod
from .text import TextEncoder
from .unet import MultiViewUNet
from .vae import LatentCodec
from .vision import VisionEncoder

__all__ = ["ModelInfo", "PartInfo", "inspect", "load_model", "load_unet", "save_model_folder"]


@dataclass(frozen=True)
class PartInfo:
    """One network of a checkpoint."""

    name: str
    """``unet``, ``vae``, ``text`` or ``vision``."""
    parameters: int
    """How many are loaded; layers that nobody reads are left out."""
    dtypes: tuple[str, ...]
    """As stored."""


@dataclass(frozen=True)
class ModelInfo:
    """What ``info`` shows of a checkpoint."""

    card: ModelCard
    frames: int
    """Frames that the UNet denoises together."""
    latent_px: int
    parts: tuple[PartInfo, ...]


def load_model(
    model: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    controller: Controller | None = None,
) -> MultiViewModel:
    """Load a checkpoint for inference: evaluation mode, no gradients, one device, one dtype.

    Args:
        model: ``builtin:nano``; an official ``.pt`` or ``.safetensors`` checkpoint; a diffusers-format
            folder; a Hub id ``owner/name`` or ``owner/name/file``; ``random:full`` or ``random:tiny``.
        device: ``auto`` is CUDA where there is a GPU, else the CPU.
        dtype: float32, float16 or bfloat16; by default float16 on CUDA, else float32.
        controller: needed only where the default is wrong. The pixel and the local checkpoint have the same
            tensors, and which one it is, is guessed from the name.

    Raises:
        InputError: the model does not exist, cannot be read or trusted, lacks tensors or has others, holds
            NaN, or contradicts ``controller``; or the device or dtype cannot be used.
    """
    target = pick_device(device)
    kind = pick_dtype(dtype, target)
    opened = open_model(str(model), controller)
    # Hashing reads the file as copying does, and lets other threads run.
    with ThreadPoolExecutor(1) as pool:
        digest = pool.submit(_sha256, opened.weights)
        for part in opened.layout.parts.values():
            fill(part, target, kind, opened.card.name)
            fast_memory_format(part.wrapper)
    card = replace(opened.card, sha256=digest.result())
    wrappers = {name: part.wrapper for name, part in opened.layout.parts.items()}
    return MultiViewModel(
        card=card,
        unet=cast(MultiViewUNet, wrappers["unet"]),
        vae=cast(LatentCodec, wrappers["vae"]),
        text=cast(TextEncoder, wrappers["text"]),
        vision=cast("VisionEncoder | None", wrappers.get("vision")),
        alphas_cumprod=alphas_cumprod().to(target),
    )


def load_unet(state_dict_or_path: Mapping[str, Tensor] | str | Path, head_dim: int = 64) -> MultiViewUNet:
    """The multi-view UNet alone, in float32 on the CPU, in evaluation mode, without gradients.

    Args:
        state_dict_or_path: tensors by their official names, with ``model.diffusion_model.`` (other networks
            of the checkpoint are passed over) or without; or a checkpoint file; or a diffusers-format
            folder or its ``unet``.
        head_dim: width of an attention head, which no shape tells; a folder's own record comes first.

    Raises:
        InputError: unreadable; or tensors missing, extra, wrongly shaped or not finite, all of them listed.
    """
    where, build = _unet_source(state_dict_or_path, head_dim)
    layout = Layout()
    layout.attempt(build)
    check(where, layout)
    fill(layout.parts["unet"], torch.device("cpu"), torch.float32, where)
    return cast(MultiViewUNet, layout.parts["unet"].wrapper)


def _unet_source(source: Mapping[str, Tensor] | str | Path, head_dim: int) -> tuple[str, Callable[[], Part]]:
    """What to call the source in errors, and what lays out the UNet in it."""
    if isinstance(source, Mapping):
        where = "the given state dict"
        tensors = flat_tensors(source, where)
    else:
        path = Path(source).expanduser()
        where = str(path)
        if path.is_dir():
            path = path.resolve()
            if (path / "unet").is_dir():
                return where, lambda: folder_unet(path, "unet")
            if (path / "config.json").is_file():
                return where, lambda: folder_unet(path.parent, path.name)
            path = path / single_weights_file(names_in(path), None, where)
        tensors = read_tensors(path)
    prefix = UNET_PREFIX if is_official(tensors) else ""
    return where, lambda: unet_by_tensors(unet_tensors(tensors), head_dim, prefix.__add__)


def inspect(model: str | Path, controller: Controller | None = None) -> ModelInfo:
    """What a checkpoint is. Nothing is loaded; all but NaN is checked as in :func:`load_model`."""
    opened = open_model(str(model), controller)
    card, layout = replace(opened.card, sha256=_sha256(opened.weights)), opened.layout
    vae = cast(LatentCodec, layout.parts["vae"].wrapper)
    parts = []
    for part in layout.parts.values():
        # Random weights, all float32, are made when looked at.
        looked_at = [*part.network.state_dict()] if opened.weights else [*part.tensors][:1]
        stored = sorted({str(part.tensors[name].dtype).removeprefix("torch.") for name in looked_at})
        count = sum(parameter.numel() for parameter in part.network.parameters())
        parts.append(PartInfo(part.name, count, tuple(stored)))
    frames = VIEWS + (card.controller == "pixel")
    return ModelInfo(card, frames, card.picture_px // vae.downscale, tuple(parts))


def _sha256(path: Path | None) -> str:
    return "" if path is None else sha256_of(path)


def pick_device(device: str | torch.device) -> torch.device:
    """``auto`` is CUDA where there is a GPU, else the CPU. Raises :class:`InputError` for one not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(f"unknown device {device!r}; give auto, cpu, cuda or cuda:<number>") from None
    if target.type not in ("cpu", "cuda"):
        raise InputError(f"device {device!r} is not supported; give auto, cpu, cuda or cuda:<number>")
    if target.type == "cuda" and not 0 <= (target.index or 0) < torch.cuda.device_count():
        raise InputError(
            f"device {device!r} is not there ({torch.cuda.device_count()} CUDA devices are visible to "
            f"PyTorch {torch.__version__}); give auto or cpu, or see `imagedream-rt doctor`"
        )
    return target


def pick_dtype(dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    """None is float16 on CUDA, else float32. Raises :class:`InputError` for a dtype that networks are not run in."""
    if dtype is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise InputError(f"dtype is {dtype}; give float32, float16 or bfloat16")
    return dtype
