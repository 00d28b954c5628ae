"""TensorRT comes as two packages with one interface: ``tensorrt``, which builds for the GPU at hand, and
``tensorrt_rtx``, which builds for named architectures and needs no GPU for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from ..engine._optional import installed, require
from ..engine.errors import InputError, MissingDependency

Flavour = Literal["tensorrt", "tensorrt_rtx"]
OLDEST = {"tensorrt": (10, 13), "tensorrt_rtx": (1, 3)}
"""tensorrt: strongly typed networks with all that the graphs use; tensorrt_rtx: fused attention without faults."""
_EXTRA = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}


@dataclass(frozen=True)
class TensorRT:
    """One of the two packages, imported."""

    flavour: Flavour
    module: Any

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    def architectures(self) -> list[str]:
        """Names of what ``tensorrt_rtx`` can build for, as ``80``."""
        names = vars(self.module.ComputeCapability)
        return sorted((name[2:] for name in names if name.startswith("SM")), key=int)


def pick_flavour(asked: str | None, architectures: Sequence[str] = ()) -> Flavour:
    """The flavour that is asked for; else the one that is installed; of both, the one that can name architectures if
    some are named.

    Nothing is imported. Raises :class:`InputError` for an unknown name, :class:`MissingDependency` for none.
    """
    known = get_args(Flavour)
    if asked is not None:
        if asked not in known:
            raise InputError(f"unknown TensorRT flavour {asked!r}; there are {', '.join(known)}")
        return "tensorrt" if asked == "tensorrt" else "tensorrt_rtx"
    rtx, full = installed("tensorrt_rtx"), installed("tensorrt")
    if not rtx and not full:
        raise MissingDependency(
            'TensorRT is not installed; it is needed to build plans: pip install "imagedream-rt[tensorrt]" to build '
            'for the GPU of this machine, or "imagedream-rt[tensorrt-rtx]" to build for RTX GPUs and A100 without one'
        )
    return "tensorrt_rtx" if rtx and (architectures or not full) else "tensorrt"


def load_tensorrt(flavour: Flavour) -> TensorRT:
    """Import a flavour. Raises :class:`MissingDependency` if it is missing or too old."""
    module = require(flavour, _EXTRA[flavour], "to build and run plans")
    version = tuple(int(part) for part in str(module.__version__).split(".")[:2])
    if version < OLDEST[flavour]:
        oldest = ".".join(map(str, OLDEST[flavour]))
        raise MissingDependency(
            f"{flavour} {module.__version__} is too old; plans need {oldest} or newer: pip install --upgrade "
            f'"imagedream-rt[{_EXTRA[flavour]}]"'
        )
    return TensorRT(flavour, module)


def check_architectures(tensorrt: TensorRT, asked: Sequence[str]) -> list[str]:
    """The architectures to build for, as ``sm80``; none asked for means the GPU at hand.

    Raises :class:`InputError` for one that the flavour cannot build for.
    """
    here = local_architecture()
    if not asked:
        if here is None:
            raise InputError(
                "there is no CUDA device to build for; name architectures with --sm, which tensorrt_rtx builds for "
                "without one"
            )
        asked = [here]
    wanted = [name.strip().lower().removeprefix("sm").replace(".", "").replace("_", "") for name in asked]
    if tensorrt.flavour == "tensorrt":
        foreign = [name for name in wanted if f"sm{name}" != here]
        if foreign:
            at_hand = "there is none here" if here is None else f"here that is {here}"
            raise InputError(
                f"--sm {foreign[0]}: tensorrt builds for the GPU at hand alone ({at_hand}); install "
                '"imagedream-rt[tensorrt-rtx]" to build for named architectures'
            )
    else:
        known = tensorrt.architectures()
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise InputError(
                f"unknown architecture {unknown[0]!r}; tensorrt_rtx {tensorrt.version} builds for "
                f"{', '.join(known)}"
            )
    return [f"sm{name}" for name in dict.fromkeys(wanted)]


def local_architecture() -> str | None:
    """``sm80`` and the like of the current CUDA device; None without one."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"
