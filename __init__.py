"""imagedream-rt: one picture of an object in; four consistent views, a fused NeRF and a 3D asset out.

Names are loaded on first use, so ``import imagedream_rt`` itself imports neither torch nor triton.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Asset": "engine.asset",
    "FusionConfig": "engine.config",
    "ImageDreamError": "engine.errors",
    "ImageTo3D": "engine.pipeline",
    "InputError": "engine.errors",
    "PRESETS": "engine.config",
    "load_model": "engine.weights",
    "load_unet": "engine.weights",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
