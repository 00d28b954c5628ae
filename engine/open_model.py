"""From a model's name to its networks on the meta device, checked against its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from .blueprint import Layout, check
from .checkpoint_files import file_format, read_json, read_tensors
from .errors import InputError
from .folder_layout import folder_layout
from .hub import fetch, is_hub_id
from .model import Controller, ModelCard
from .model_folder import (
    INDEX,
    OURS,
    component_weights,
    is_model_folder,
    names_in,
    names_local,
    single_weights_file,
)
from .network_parts import widths_disagree
from .official_layout import is_official, official_layout
from .random_model import PICTURE_PX, random_layout
from .unet_config import ImageAdaptor

BUILTIN = {"builtin:nano": Path(__file__).parent / "data" / "nano"}

_CONTROLLERS: dict[ImageAdaptor, tuple[Controller, ...]] = {
    "resampler": ("pixel", "local"),
    "linear": ("local-linear",),
    "global": ("global",),
    "none": ("none",),
}
"""Controllers that the tensors of an image adaptor allow; the first is the default."""


@dataclass(frozen=True)
class OpenedModel:
    """A model that can be loaded."""

    card: ModelCard
    """Without ``sha256``, which takes seconds and can be found while weights are copied."""
    layout: Layout
    weights: Path | None
    """The file to hash; None for random weights."""


def open_model(model: str, controller: Controller | None) -> OpenedModel:
    """Find, read and check a model. Raises :class:`InputError` as :func:`~.weights.load_model` does."""
    if controller is not None and controller not in get_args(Controller):
        raise InputError(
            f"unknown controller {controller!r}; the controllers are {', '.join(get_args(Controller))}"
        )
    if model.startswith("random:"):
        return _random(model, controller or "pixel")
    path, called = _locate(model, controller)
    if path.is_dir():
        return _folder(model, path, called, controller)
    return _file(model, path, called, controller)


def _locate(model: str, controller: Controller | None) -> tuple[Path, str]:
    """A checkpoint file or model folder, and the name by which its controller is guessed."""
    if model in BUILTIN:
        path, called = BUILTIN[model], model
        if not (path / INDEX).is_file():
            raise InputError(
                f"{model}: this installation holds no embedded model ({path} is missing); reinstall the "
                "package, or give a checkpoint's path or a hub id"
            )
    elif model.startswith("builtin:"):
        raise InputError(f"{model}: no such embedded model; there is {', '.join(BUILTIN)}")
    elif model and _exists(Path(model).expanduser()):
        path = Path(model).expanduser()
        called = path.resolve().name
    elif is_hub_id(model):
        path, called = fetch(model, controller), model
    else:
        raise InputError(
            f"{model or 'the model'}: no such file or folder; give a checkpoint's path, a hub id "
            "owner/name, or builtin:nano"
        )
    if path.is_dir() and not is_model_folder(names_in(path)):
        path = path / single_weights_file(names_in(path), controller, model)
    return path, path.name if path.is_file() else called


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _file(model: str, path: Path, called: str, controller: Controller | None) -> OpenedModel:
    tensors = read_tensors(path)
    if not is_official(tensors):
        if "input_blocks.0.0.weight" in tensors:
            raise InputError(
                f"{path}: holds a UNet alone (load_unet takes it); a model needs its VAE and CLIP too"
            )
        names = ", ".join(list(tensors)[:3])
        raise InputError(
            f"{path}: not a checkpoint of ImageDream or MVDream: no tensor's name begins with "
            f"model.diffusion_model. (its first are {names}); give an official checkpoint or a "
            "diffusers-format folder"
        )
    layout = official_layout(tensors)
    _check(str(path), layout)
    chosen, reason = _controller(model, called, _adaptor(layout), None, controller)
    family = "mvdream" if chosen == "none" else "imagedream"
    kind = f"official-{file_format(path)}"
    return OpenedModel(ModelCard(model, family, kind, chosen, reason, 256, ""), layout, path)


def _folder(model: str, path: Path, called: str, controller: Controller | None) -> OpenedModel:
    layout = folder_layout(path)
    _check(str(path), layout)
    record = _record(path, layout)
    chosen, reason = _controller(model, called, _adaptor(layout), record.get("controller"), controller)
    family = record.get("family", "mvdream" if chosen == "none" else "imagedream")
    weights = component_weights(names_in(path), "unet")
    assert weights is not None
    card = ModelCard(model, family, "diffusers", chosen, reason, record["picture_px"], "")
    return OpenedModel(card, layout, path / weights)


def _record(folder: Path, layout: Layout) -> dict[str, Any]:
    """``family``, ``controller`` where this package wrote the folder, and ``picture_px`` always."""
    index = folder / INDEX
    record = read_json(index).get(OURS, {}) if index.is_file() else {}
    downscale: int = layout.parts["vae"].wrapper.downscale
    if not isinstance(record, dict) or not isinstance(record.get("family", ""), str):
        raise InputError(
            f"{index}: the entry {OURS!r} is not as this package writes it; give the unchanged folder"
        )
    latent_px = read_json(folder / "unet" / "config.json").get("image_size", 256 // downscale)
    px = record.get("picture_px", latent_px * downscale if isinstance(latent_px, int) else latent_px)
    unit = downscale * layout.parts["unet"].network.config.downscale
    if not isinstance(px, int) or px < unit or px % unit:
        raise InputError(
            f"{index}: the pictures are to be {px!r} pixels wide; it must be a multiple of {unit}"
        )
    return {**record, "picture_px": px}


def _random(model: str, controller: Controller) -> OpenedModel:
    size = model.removeprefix("random:")
    layout = random_layout(size, controller)
    family = "mvdream" if controller == "none" else "imagedream"
    reason = "chosen when the random model was made"
    return OpenedModel(
        ModelCard(model, family, "random", controller, reason, PICTURE_PX[size], ""), layout, None
    )


def _check(where: str, layout: Layout) -> None:
    check(where, layout)
    layout.complaints += widths_disagree(layout.parts)
    check(where, layout)


def _adaptor(layout: Layout) -> ImageAdaptor:
    return layout.parts["unet"].network.config.image_adaptor


def _controller(
    model: str, called: str, adaptor: ImageAdaptor, recorded: Any, given: Controller | None
) -> tuple[Controller, str]:
    """The controller and why: given, else recorded, else the only possible one, else guessed by name."""
    allowed = _CONTROLLERS[adaptor]
    if given is not None:
        if given not in allowed:
            raise InputError(
                f"{model}: its tensors fit the controller {' or '.join(allowed)}, not {given!r}; leave the "
                "controller out, or give the checkpoint that was trained with it"
            )
        return given, "given by the caller"
    if recorded is not None:
        if recorded not in allowed:
            raise InputError(
                f"{model}: {INDEX} records the controller {recorded!r}, but its tensors fit "
                f"{' or '.join(allowed)}"
            )
        return recorded, f"recorded in {INDEX}"
    if len(allowed) == 1:
        return allowed[0], "the only one that the tensors allow"
    guess: Controller = "local" if names_local(called) else "pixel"
    says = "says" if guess == "local" else "does not say"
    return (
        guess,
        f"guessed: the name {called!r} {says} 'local', and the tensors of both are alike (--controller "
        "overrides)",
    )
