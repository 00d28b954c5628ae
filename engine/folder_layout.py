"""Model folders in diffusers' format, as networks laid out beside their tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from .blueprint import Layout, Part
from .checkpoint_files import read_json, read_tensors
from .errors import InputError
from .model_folder import CLIP_SETTINGS, component_weights, names_in
from .network_parts import text_part, unet_by_tensors, unet_part, vae_part, vision_part
from .tokenizer import ClipTokenizer, FolderTokenizer, Tokenizer
from .unet_config import UNetConfig


def folder_layout(folder: Path) -> Layout:
    """The networks of a model folder; what is missing or cannot be read is among its complaints.

    Sizes come from the ``config.json`` of each component, those of a UNet in the port's format from its
    tensors.
    """
    layout = Layout()
    layout.attempt(lambda: folder_unet(folder, "unet"))
    layout.attempt(
        lambda: vae_part(read_json(folder / "vae" / "config.json"), _tensors(folder, "vae"), _in("vae"))
    )
    layout.attempt(
        lambda: text_part(
            _clip_config(folder / "text_encoder"),
            _tensors(folder, "text_encoder"),
            _tokenizer(folder / "tokenizer"),
            _in("text_encoder"),
        )
    )
    adaptor = layout.parts["unet"].network.config.image_adaptor if "unet" in layout.parts else "none"
    if adaptor != "none":
        layout.attempt(
            lambda: vision_part(
                _clip_config(folder / "image_encoder"),
                _tensors(folder, "image_encoder"),
                _in("image_encoder"),
                pooled=adaptor == "global",
            )
        )
    return layout


def folder_unet(folder: Path, component: str) -> Part:
    """The UNet in a component folder of a model folder. Raises :class:`InputError`."""
    where = folder / component / "config.json"
    config = read_json(where)
    tensors = _tensors(folder, component)
    if "image_adaptor" in config:  # written by this package
        return unet_part(_recorded(config, where), tensors, _in(component))
    head_dim = config.get("num_head_channels", 64)
    if not isinstance(head_dim, int) or head_dim < 1:
        raise InputError(f"{where}: num_head_channels is {head_dim!r}; it must be a positive whole number")
    return unet_by_tensors(tensors, head_dim, _in(component))


def _recorded(config: dict[str, Any], where: Path) -> UNetConfig:
    settings: dict[str, Any] = {}
    for setting in fields(UNetConfig):
        default: Any = setting.default
        value = config.get(setting.name, default)
        value = tuple(value) if isinstance(value, list) else value
        numbers = value if isinstance(default, tuple) and isinstance(value, tuple) else ()
        if type(value) is not type(default) or any(type(number) is not int for number in numbers):
            raise InputError(f"{where}: {setting.name} is {value!r}; give the folder as it was written")
        settings[setting.name] = value
    return UNetConfig(**settings)


def _tensors(folder: Path, component: str) -> dict[str, Tensor]:
    names = names_in(folder)
    file = component_weights(names, component)
    if file is None:
        raise InputError(
            f"{folder / component}: has no weights file (such as diffusion_pytorch_model.safetensors or "
            "model.safetensors, in one piece)"
        )
    return read_tensors(folder / file)


def _clip_config(folder: Path) -> dict[str, Any]:
    """What this package reads of a CLIP tower's ``config.json``."""
    config = read_json(folder / "config.json")
    return {key: value for key, value in config.items() if key in CLIP_SETTINGS and value is not None}


def _tokenizer(folder: Path) -> Tokenizer:
    return FolderTokenizer(folder) if folder.is_dir() else ClipTokenizer()


def _in(component: str) -> Callable[[str], str]:
    return lambda name: f"{component}/{name}"
