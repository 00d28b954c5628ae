"""Files of the fusion: tensors as safetensors, the rest as JSON in the header; nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import (
    CameraRange,
    FieldConfig,
    FusionConfig,
    HashGridConfig,
    Ramp,
    RenderConfig,
    Stage,
    WarmStart,
)
from .errors import InputError
from .files import replacing

HEADER = "imagedream_rt"
FORMAT = 1


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write ``tensors`` with ``header`` (JSON) to ``path``: under a temporary name first, then renamed.

    Raises :class:`InputError` if the folder cannot be written; an older file of that name then stays as it
    was.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"format": FORMAT, **header})
    with replacing(path) as partial:
        try:
            save_file(held, partial, metadata={HEADER: text})
        except SafetensorError as error:
            raise InputError(f"cannot write {path}: {error}; choose a folder that can be written") from error


def read_tensors(path: Path, kinds: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """CPU tensors and header of a file that :func:`write_tensors` made, of one of ``kinds``.

    Raises :class:`InputError` for a missing, truncated or foreign file.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        header = json.loads(metadata[HEADER])
        kind, version = header["kind"], header["format"]
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is damaged or no safetensors file: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} was not written by the fusion of imagedream-rt") from error
    if version != FORMAT:
        raise InputError(f"{path} has format {version}; this version reads format {FORMAT}")
    if kind not in kinds:
        raise InputError(f"{path} holds a {kind}; needed is a {' or '.join(kinds)}")
    return tensors, header


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = len(prefix) + 1
    return {name[start:]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}


def optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """Moments and step counts, as ``<parameter name>/<state name>``; empty before the first step."""
    return {
        f"{name}/{key}": value
        for parameter, name in names.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], tensors: Mapping[str, Tensor]
) -> None:
    """Inverse of :func:`optimizer_state`."""
    by_name = {name: parameter for parameter, name in names.items()}
    for entry, tensor in tensors.items():
        name, key = entry.rsplit("/", 1)
        parameter = by_name[name]
        # A step count lives with its parameter only where a CUDA graph has to count.
        moments = tensor.shape == parameter.shape
        moved = tensor.to(parameter.device) if moments or optimizer.defaults["capturable"] else tensor
        optimizer.state[parameter][key] = moved.clone()


def config_to_json(config: FusionConfig) -> dict[str, Any]:
    """Plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(config.to_dict()))


def config_from_json(values: Mapping[str, Any]) -> FusionConfig:
    """Inverse of :func:`config_to_json`. Raises :class:`InputError` for settings of another version."""
    try:
        held = {name: _tupled(value) for name, value in values.items()}
        held["stages"] = tuple(Stage(**stage) for stage in values["stages"])
        held["camera"] = CameraRange(**held["camera"])
        held["field"] = FieldConfig(**{**held["field"], "grid": HashGridConfig(**held["field"]["grid"])})
        held["render"] = RenderConfig(**held["render"])
        for name in ("min_step", "max_step", "lambda_orient"):
            held[name] = Ramp(**held[name])
        if held["warm_start"] is not None:
            held["warm_start"] = WarmStart(**held["warm_start"])
        return FusionConfig(**held)
    except (KeyError, TypeError) as error:
        raise InputError(f"the file's fusion settings are not those of this version ({error})") from error


def _tupled(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_tupled(item) for item in value)
    if isinstance(value, dict):
        return {name: _tupled(item) for name, item in value.items()}
    return value


def differences(saved: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Every entry that differs, as ``name: saved -> current``, descending into nested mappings."""
    found = []
    for name in sorted(set(saved) | set(current)):
        old, new = saved.get(name), current.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name}: {old} in the checkpoint, {new} now")
    return found
