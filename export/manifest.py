"""What stands beside each plan: where it comes from, where it runs, and what its bytes must be.

A plan is code for one GPU architecture and one TensorRT version; loading any other is undefined at worst and a riddle
at best. So nothing is deserialized before its manifest was read and found to fit.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..engine.checkpoint_files import sha256_of
from ..engine.errors import InputError
from ..engine.files import write_json

FORMAT = 1
SUFFIX = ".json"


@dataclass(frozen=True)
class Source:
    """The checkpoint that a file was made of."""

    model: str
    """As it was given: a path, a Hub id or ``builtin:nano``."""
    sha256: str
    """Of its weights; empty for random ones."""
    controller: str
    frames: int


@dataclass(frozen=True)
class PlanManifest:
    """Manifest of one plan."""

    component: str
    source: Source
    dtype: str
    inputs: list[dict[str, Any]]
    """``name``, ``dtype`` and ``shape``, whose first size is ``batch``."""
    outputs: list[dict[str, Any]]
    profile: tuple[int, int, int]
    """Least, usual and greatest batch."""
    flavour: str
    """``tensorrt`` or ``tensorrt_rtx``."""
    version: str
    architecture: str
    """``sm80`` and the like."""
    platform: str
    """Operating system and machine that ``tensorrt`` built it on; ``any`` for ``tensorrt_rtx``, whose plans move."""
    driver: str | None
    """The CUDA driver it was built with, of ``tensorrt``."""
    onnx_sha256: str
    onnx_error: float
    """Worst relative L2 error of the ONNX file against PyTorch."""
    layers: dict[str, Any]
    build_s: float
    build_peak_bytes: int | None
    size_bytes: int
    sha256: str
    refit: bool
    stripped: bool
    weights: dict[str, dict[str, Any]]
    """For a refit: by TensorRT's name the ``parameter`` of the checkpoint, and whether it is ``transposed``."""
    rebuild: str
    """The command that makes such a plan."""
    format: int = FORMAT

    def save(self, plan: Path) -> Path:
        path = manifest_path(plan)
        write_json(path, asdict(self))
        return path


def manifest_path(plan: Path) -> Path:
    return plan.with_name(plan.name + SUFFIX)


def read_manifest(plan: Path) -> PlanManifest:
    """The manifest of ``plan``. Raises :class:`InputError` if it is missing, damaged or of another format."""
    path = manifest_path(plan)
    again = "build the plan again with `imagedream-rt export`"
    if not path.is_file():
        raise InputError(f"{plan} has no manifest ({path.name}); {again}")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        if given["format"] != FORMAT:
            raise InputError(f"{path} has format {given['format']}, and this version reads {FORMAT}; {again}")
        return PlanManifest(
            **{**given, "source": Source(**given["source"]), "profile": tuple(given["profile"])}
        )
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}); {again}") from error


def check_plan(
    plan: Path, manifest: PlanManifest, *, flavour: str, version: str, architecture: str | None, platform: str
) -> None:
    """That the plan's bytes are the manifest's, and that they run on what is at hand.

    Raises :class:`InputError` with the one reason and the command that rebuilds the plan.
    """
    rebuild = f"rebuild it here: {manifest.rebuild}"
    if not plan.is_file():
        raise InputError(f"{plan} is not there; {rebuild}")
    if manifest.flavour != flavour or manifest.version != version:
        raise InputError(
            f"{plan} was built by {manifest.flavour} {manifest.version}, and here is {flavour} {version}; {rebuild}"
        )
    if manifest.architecture != architecture:
        here = "there is no CUDA device here" if architecture is None else f"this GPU is {architecture}"
        raise InputError(f"{plan} was built for {manifest.architecture}, and {here}; {rebuild}")
    if manifest.platform not in ("any", platform):
        raise InputError(f"{plan} was built on {manifest.platform}, and this is {platform}; {rebuild}")
    size = plan.stat().st_size
    if size != manifest.size_bytes:
        raise InputError(f"{plan} has {size} bytes, and its manifest says {manifest.size_bytes}; {rebuild}")
    if sha256_of(plan) != manifest.sha256:
        raise InputError(f"{plan} is not what its manifest was written for (its SHA-256 differs); {rebuild}")
