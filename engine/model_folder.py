"""Model folders in diffusers' format: which files they hold, and writing one.

``unet/``, ``vae/``, ``text_encoder/`` and, for models with an image prompt, ``image_encoder/`` each hold a
``config.json`` and a weights file; ``tokenizer/`` holds the vocabulary; ``model_index.json`` says what the
rest is. Tensor names are those of the port by ashawkey (mvdream_diffusers): the official ones in the UNet,
diffusers' and transformers' in the others.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .checkpoint_files import WEIGHT_SUFFIXES
from .errors import InputError
from .files import write_json
from .model import Controller, MultiViewModel
from .tokenizer import ClipTokenizer, FolderTokenizer

COMPONENTS = ("unet", "vae", "text_encoder", "image_encoder")
INDEX = "model_index.json"
OURS = "imagedream_rt"
"""Key of the index under which what no other file records is kept."""

_WEIGHTS = tuple(
    stem + variant + suffix
    for suffix in (".safetensors", ".bin")
    for variant in ("", ".fp16")
    for stem in ("diffusion_pytorch_model", "model", "pytorch_model")
)
"""Names of a component's weights file, the preferred ones first."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
)

CLIP_SETTINGS = (
    "vocab_size",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "image_size",
    "patch_size",
    "num_channels",
    "projection_dim",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
)
"""What decides a CLIP tower; other entries of its ``config.json`` differ between versions of transformers."""


def names_in(folder: Path) -> list[str]:
    """Files of a folder and of the folders in it, relative, with forward slashes, sorted."""
    found = [*folder.glob("*"), *folder.glob("*/*")]
    return sorted(path.relative_to(folder).as_posix() for path in found if path.is_file())


def is_model_folder(names: Iterable[str]) -> bool:
    return any(name == INDEX or name.startswith("unet/") for name in names)


def component_weights(names: Iterable[str], component: str) -> str | None:
    """The weights file of a component among the names in a model folder, if there is one."""
    present = set(names)
    return next((f"{component}/{name}" for name in _WEIGHTS if f"{component}/{name}" in present), None)


def needed_files(names: Iterable[str]) -> list[str]:
    """Of the files of a model repository those that loading reads."""
    names = list(names)
    weights = [component_weights(names, component) for component in COMPONENTS]
    configs = [INDEX, *(f"{component}/config.json" for component in COMPONENTS)]
    tokenizer = [name for name in names if name.startswith("tokenizer/")]
    return [name for name in (*configs, *weights, *tokenizer) if name in set(names) and name is not None]


def single_weights_file(names: Iterable[str], controller: Controller | None, where: str) -> str:
    """The one weights file beside each other file of a folder or repository.

    Of two, one with and one without ``local`` in its name (as released), ``controller`` decides; the pixel
    controller's is the default. Raises :class:`InputError` when there is none, or more than that settles.
    """
    files = [name for name in names if "/" not in name and name.endswith(WEIGHT_SUFFIXES)]
    if not files:
        raise InputError(
            f"{where}: no model in it: neither a diffusers-format folder (with unet/, vae/, ...) nor a "
            f"checkpoint file ({', '.join(WEIGHT_SUFFIXES)})"
        )
    wanted = [name for name in files if names_local(name) == (controller == "local")]
    choice = files if len(files) == 1 else wanted
    if len(choice) != 1:
        raise InputError(
            f"{where}: holds several checkpoints ({', '.join(files)}); name one: {where}/{files[0]}"
        )
    return choice[0]


def names_local(name: str) -> bool:
    """Whether the last part of a path or id says ``local``, as the released local checkpoint's name does."""
    return re.search(r"(?<![a-z])local(?![a-z])", name.rstrip("/").rsplit("/", 1)[-1].lower()) is not None


def save_model_folder(model: MultiViewModel, folder: Path | str) -> None:
    """Write the model as a diffusers-format folder that :func:`~.weights.load_model` reads back.

    Weights become float16 safetensors. ``folder`` is replaced if it exists and is a model folder or empty;
    it appears whole or not at all. A model with CLIP's own vocabulary gets no ``tokenizer/``: that is the
    default on loading. Raises :class:`InputError` if ``folder`` is something else or cannot be written.
    """
    folder = Path(folder).absolute()
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InputError(f"{folder}: exists and is not a folder; choose another place for the model")
    if folder.is_dir() and any(folder.iterdir()) and not is_model_folder(names_in(folder)):
        raise InputError(f"{folder}: holds other files and would be replaced; choose an empty or new folder")
    stage = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        stage.mkdir(parents=True)
        _write(model, stage)
        if folder.exists():
            folder.rename(old)
        try:
            stage.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder}: the model cannot be written there ({error})") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _write(model: MultiViewModel, folder: Path) -> None:
    card, unet = model.card, model.unet.config
    index: dict[str, Any] = {
        "_class_name": "MVDreamPipeline",
        OURS: {"family": card.family, "controller": card.controller, "picture_px": card.picture_px},
    }

    def put(component: str, library: str, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        index[component] = [library, config.get("_class_name", (config.get("architectures") or [None])[0])]
        (folder / component).mkdir()
        stem = "model" if library == "transformers" else "diffusion_pytorch_model"
        half = {
            name: tensor.detach().to("cpu", torch.float16).contiguous() for name, tensor in tensors.items()
        }
        for name, tensor in half.items():
            if not tensor.isfinite().all():
                raise InputError(
                    f"{component}: tensor {name} is NaN, infinite or beyond float16; nothing was saved"
                )
        weights = folder / component / f"{stem}.safetensors"
        save_file(half, weights, metadata={"format": "pt"})
        write_json(folder / component / "config.json", config)
        # Some versions of safetensors write files that only their owner may read.
        shutil.copymode(folder / component / "config.json", weights)

    put("unet", "mv_unet", _unet_settings(model), model.unet.state_dict())
    vae = {key: value for key, value in dict(model.vae.vae.config).items() if not key.startswith("_")}
    vae["scaling_factor"] = model.vae.scaling_factor
    put("vae", "diffusers", {"_class_name": "AutoencoderKL", **vae}, model.vae.vae.state_dict())
    text = _clip_settings(model.text.model.config, "CLIPTextModel", "clip_text_model")
    put("text_encoder", "transformers", text, _prefixed("text_model.", model.text.model.state_dict()))
    if model.vision is not None:
        kind = "CLIPVisionModelWithProjection" if unet.image_adaptor == "global" else "CLIPVisionModel"
        vision = _clip_settings(model.vision.model.config, kind, "clip_vision_model")
        put(
            "image_encoder",
            "transformers",
            vision,
            _prefixed("vision_model.", model.vision.model.state_dict()),
        )
    tokenizer = model.text.tokenizer
    if isinstance(tokenizer, FolderTokenizer):
        (folder / "tokenizer").mkdir()
        for path in sorted(tokenizer.folder.iterdir()):
            if path.name in _TOKENIZER_FILES:
                shutil.copyfile(path, folder / "tokenizer" / path.name)
        index["tokenizer"] = ["transformers", "CLIPTokenizer"]
    elif not isinstance(tokenizer, ClipTokenizer):
        raise InputError(
            f"the tokenizer {type(tokenizer).__name__} has no files, so the model cannot be saved"
        )
    write_json(folder / INDEX, index)


def _unet_settings(model: MultiViewModel) -> dict[str, Any]:
    """Our configuration, and beside it the same in the words of the port."""
    config = model.unet.config
    return {
        "_class_name": "MultiViewUNetModel",
        **asdict(config),
        "image_size": model.latent_px,
        "attention_resolutions": [2**level for level in config.transformer_levels],
        "num_head_channels": config.head_dim,
        "transformer_depth": 1,
        "ip_dim": config.image_tokens if config.with_image else 0,
    }


def _clip_settings(config: Any, architecture: str, kind: str) -> dict[str, Any]:
    settings = {name: getattr(config, name) for name in CLIP_SETTINGS if hasattr(config, name)}
    return {"architectures": [architecture], "model_type": kind, **settings}


def _prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the prefix that transformers 4 has everywhere, and 5 in some classes only."""
    bare = (prefix, "visual_projection.")
    return {name if name.startswith(bare) else prefix + name: tensor for name, tensor in state.items()}
