"""What this machine offers and what it lacks: devices, versions, optional packages, kernels."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Literal

from . import _optional

if TYPE_CHECKING:
    import torch

State = Literal["active", "on request", "missing", "unused"]

_VERSIONED = (
    "numpy",
    "transformers",
    "safetensors",
    "huggingface-hub",
    "pillow",
    "trimesh",
    "xatlas",
    "typer",
)
"""Dependencies whose version explains a difference between two machines; torch is asked itself."""


@dataclass(frozen=True)
class PackageReport:
    """One optional package. ``unused``: installed, but no part of this version uses it."""

    package: str
    state: State
    version: str | None
    says: str
    """What it is used for where it is installed; else what its absence costs."""


@dataclass(frozen=True)
class DeviceReport:
    """A device that fits ``--device``."""

    device: str
    name: str
    memory_gib: float | None
    says: str


def environment(device: str | None = None) -> dict[str, Any]:
    """Versions and machine, as ``metadata.json`` keeps them; ``device`` is the one the work ran on."""
    import torch

    on_gpu = device is not None and device.startswith("cuda")
    return {
        **_versions(),
        **({"device": device} if device else {}),
        "device_name": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "threads": torch.get_num_threads(),
    }


@cache
def _versions() -> dict[str, str | None]:
    """Looking through installed packages takes longer than a denoising step, and finds the same in every job."""
    import torch

    return {
        "imagedream_rt": _optional.version(_optional.PROJECT),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: _optional.version(name) for name in ("diffusers", "warp-lang", "triton", *_VERSIONED)},
    }


@cache
def cpu_name() -> str:
    """The processor's name where the system tells it, else its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def devices() -> list[DeviceReport]:
    """The CPU and every CUDA device, the default (``--device auto``) first."""
    import torch

    cpu = DeviceReport("cpu", cpu_name(), None, f"{torch.get_num_threads()} of {os.cpu_count()} cores")
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        capability = f"compute capability {properties.major}.{properties.minor}"
        gpus.append(
            DeviceReport(
                f"cuda:{index}", properties.name, round(properties.total_memory / 2**30, 1), capability
            )
        )
    return [*gpus, cpu]


def packages() -> list[PackageReport]:
    """Every optional package with its state; none of them is imported."""
    reports = []
    for package in _optional.PACKAGES:
        version = _optional.version(*package.distributions)
        state: State
        if not _optional.installed(package.module):
            useful = package.extra is not None and package.gives is not None
            hint = f'; pip install "{_optional.PROJECT}[{package.extra}]"' if useful else ""
            state, version, says = "missing", None, package.without + hint
        elif package.gives is None:
            state, says = "unused", "installed, but no part of this version uses it"
        else:
            state, says = "on request" if package.on_request else "active", package.gives
        reports.append(PackageReport(package.module, state, version, says))
    return reports


def kernels() -> dict[str, str]:
    """What computes each kernel on the default device, and why where it is not Triton; by kernel name."""
    from ..kernels._triton import obstacle, triton

    gpu = _default_gpu()
    reason = obstacle(gpu)
    if reason is not None:
        return dict.fromkeys(_dispatching(), f"PyTorch: {reason}")
    return dict.fromkeys(_dispatching(), f"Triton {triton.__version__} on {devices()[0].name}")


def tuned() -> dict[str, Any]:
    """``file`` with the launch configurations chosen for the default device, and how many; empty without kernels."""
    from ..kernels._triton import obstacle
    from ..kernels._tuning import cache_file, tuned_count

    gpu = _default_gpu()
    if gpu is None or obstacle(gpu) is not None:
        return {}
    return {"file": str(cache_file(gpu)), "configurations": tuned_count(gpu)}


def backends() -> dict[str, dict[str, Any]]:
    """By component: ``auto``, what a job on the default device takes, and ``others`` with why not (None: usable)."""
    import torch

    from .backends import OWN, decided, survey

    gpu = _default_gpu()
    device = gpu or torch.device("cpu")
    taken = asdict(decided(OWN, device, torch.float16 if gpu else torch.float32))
    return {
        component: {
            "auto": taken[component],
            "others": {
                name: reason or ("with --plans DIR" if name == "tensorrt" else None)
                for name, reason in offered.items()
                if name != taken[component]
            },
        }
        for component, offered in survey(device).items()
    }


def _default_gpu() -> torch.device | None:
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else None


def _dispatching() -> list[str]:
    """Modules of the kernels that choose between Triton and PyTorch: the others are parts of them."""
    package = import_module("..kernels", __package__)
    names = [module.name for module in iter_modules(package.__path__) if not module.name.startswith("_")]
    return [name for name in names if hasattr(import_module(f"{package.__name__}.{name}"), "use_triton")]


def report() -> dict[str, Any]:
    """All of it, JSON-ready: ``default_device``, ``devices``, ``versions``, ``packages``, ``kernels``, ``tuned``,
    ``backends``."""
    found = devices()
    return {
        "default_device": found[0].device,
        "devices": [asdict(device) for device in found],
        "versions": environment(),
        "executable": sys.executable,
        "packages": [asdict(package) for package in packages()],
        "kernels": kernels(),
        "tuned": tuned(),
        "backends": backends(),
    }
