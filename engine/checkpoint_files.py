"""Reading checkpoint files without trusting them: ``.pt`` (weights-only pickle), ``.safetensors`` and JSON.

Every failure is one :class:`~.errors.InputError` that names the file, the rule and the mend.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from .errors import InputError

FileFormat = Literal["pt", "safetensors"]

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
"""Endings by which a weights file is recognised among other files; its format is read off its content."""

_MEND = "download it again, or give another file"


def file_format(path: Path) -> FileFormat:
    """Which kind of weights file this is, by its first bytes.

    Raises :class:`InputError` for a missing, unreadable or empty file, a truncated safetensors header, a Git
    LFS pointer, and anything else that is not a weights file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file; give the path of a checkpoint") from None
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); give a readable checkpoint file"
        ) from None
    if size == 0:
        raise InputError(f"{path}: the file is empty; {_MEND}")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(
            f"{path}: this is a Git LFS pointer, not the weights; run `git lfs pull` there, or download the "
            "file itself"
        )
    if head[8:9] == b"{":
        header = int.from_bytes(head[:8], "little")
        if header > size - 8:
            raise InputError(
                f"{path}: truncated or damaged safetensors file (its header claims {header} bytes of "
                f"{size}); {_MEND}"
            )
        return "safetensors"
    if head.startswith(b"PK\x03\x04") or head[:1] == b"\x80":
        return "pt"
    raise InputError(
        f"{path}: neither a PyTorch checkpoint nor a safetensors file (it begins with {bytes(head[:12])!r}); "
        "give a .pt or .safetensors checkpoint or a diffusers-format folder"
    )


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a ``.pt`` or ``.safetensors`` file, by name, on the CPU in the dtypes of the file.

    The file is memory-mapped where its format allows: tensors cost memory only once they are read. Pickles
    go through PyTorch's weights-only unpickler, which builds tensors and plain containers and runs nothing.
    One nesting ``{"state_dict": ...}`` is accepted. Raises :class:`InputError`.
    """
    if file_format(path) == "safetensors":
        return _read_safetensors(path)
    return flat_tensors(_read_pickle(path), str(path))


def flat_tensors(value: Any, where: str) -> dict[str, torch.Tensor]:
    """The flat ``name -> tensor`` dict in ``value``, with one ``{"state_dict": ...}`` around it taken off.

    Raises :class:`InputError` if it is anything else; ``where`` names its origin in the message.
    """
    if isinstance(value, Mapping) and isinstance(value.get("state_dict"), Mapping):
        value = value["state_dict"]
    if not isinstance(value, Mapping):
        raise InputError(
            f"{where}: holds a {type(value).__name__}; a checkpoint must be a flat dict of tensors by name "
            "(or such a dict under 'state_dict')"
        )
    if not value:
        raise InputError(
            f"{where}: holds no tensors at all; a checkpoint must be a flat dict of tensors by name"
        )
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise InputError(
                f"{where}: the entry {name!r} is a {type(tensor).__name__}, not a tensor; a checkpoint must "
                "be a flat dict of tensors by name (or such a dict under 'state_dict')"
            )
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise InputError(
                f"{where}: the tensor {name!r} is sparse or quantized; save it as a plain dense tensor"
            )
    return {name: tensor.detach() for name, tensor in value.items()}


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    # The parser's own exception class has moved between versions of safetensors, and a header that lies
    # about shapes fails in torch; whatever it is, the file is to blame.
    except Exception as error:
        raise InputError(
            f"{path}: truncated or damaged safetensors file ({_first_line(error)}); {_MEND}"
        ) from None


def _read_pickle(path: Path) -> Any:
    is_zip = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        claims_zip = file.read(4) == b"PK\x03\x04"
    if claims_zip and not is_zip:
        raise InputError(
            f"{path}: truncated or damaged PyTorch checkpoint (the zip directory at its end is missing); "
            f"{_MEND}"
        )
    try:
        if is_zip and _compressed(path):
            # Mapped memory would be taken for weights while it holds compressed bytes.
            raise InputError(
                f"{path}: a compressed zip, which torch.save never writes; unpack it, or {_MEND}"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that are about to be refused
            # Only the zip format can be mapped; the format of PyTorch before 1.6 is read whole.
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=is_zip)
    except InputError:
        raise
    # A hostile or damaged pickle can fail in any way; whatever it is, the file is to blame and nothing of it
    # was run.
    except Exception as error:
        reason = str(error)
        named = re.search(r"GLOBAL ([\w.]+)|Unsupported (?:class|global) ([\w.]+)", reason)
        if named or "weights_only" in reason or "Weights only" in reason:
            what = (named.group(1) or named.group(2)) if named else "something other than tensors"
            raise InputError(
                f"{path}: refused, because its pickle asks for {what}, and only tensors and plain "
                "containers are read (a pickle can run any program); give a checkpoint that holds nothing "
                "but tensors, best as safetensors"
            ) from None
        raise InputError(
            f"{path}: truncated or damaged PyTorch checkpoint ({_first_line(error)}); {_MEND}"
        ) from None


def _compressed(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises :class:`InputError` for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file; a model folder needs it") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({_first_line(error)}); {_MEND}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a JSON {type(value).__name__}, but an object is needed; {_MEND}")
    return value


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
