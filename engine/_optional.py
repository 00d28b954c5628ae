"""What else is installed: the one place that asks for optional packages. Nothing is imported early."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module, metadata, util
from types import ModuleType

from .errors import MissingDependency

PROJECT = "imagedream-rt"


@dataclass(frozen=True)
class OptionalPackage:
    """A package that the engine can do without, and what doing without it costs."""

    module: str
    distributions: tuple[str, ...]
    """Names it goes by in package metadata, the usual one first."""
    extra: str | None
    """The extra of this project that installs it; None where there is none."""
    gives: str | None
    """What it does here; None while nothing in this version uses it."""
    without: str
    """What its absence costs, in one phrase."""
    on_request: bool = False
    """Used only where the caller asks for it by name."""


_UNUSED = "nothing: no part of this version uses it"

PACKAGES: tuple[OptionalPackage, ...] = (
    OptionalPackage(
        "diffusers",
        ("diffusers",),
        None,
        "the VAE's layers and the samplers other than the built-in DDIM",
        "no model can be loaded (it is a dependency: reinstall the package)",
    ),
    OptionalPackage(
        "instant_clip_tokenizer",
        ("instant-clip-tokenizer",),
        None,
        "CLIP's byte-pair tokenizer without a download",
        "a text prompt needs the tokenizer files of the checkpoint",
    ),
    OptionalPackage(
        "warp",
        ("warp-lang",),
        None,
        "iso-surface extraction on CPU and GPU",
        "scikit-image extracts the surface, on the CPU only",
    ),
    OptionalPackage(
        "rembg",
        ("rembg",),
        "rembg",
        "background removal",
        "a picture without alpha channel needs --keep-background or a cut-out made elsewhere",
    ),
    OptionalPackage(
        "onnxruntime",
        ("onnxruntime", "onnxruntime-gpu"),
        "export",
        "rembg's networks; checks of exported files",
        "neither rembg nor export can run",
    ),
    OptionalPackage(
        "xformers",
        ("xformers",),
        "xformers",
        "another self-attention: --backend attention=xformers",
        "nothing: PyTorch's own attention serves",
        on_request=True,
    ),
    OptionalPackage(
        "nerfacc",
        ("nerfacc",),
        "nerfacc",
        "another ray marching and compositing: --backend volume=nerfacc",
        "nothing: this package's own serves",
        on_request=True,
    ),
    OptionalPackage(
        "tinycudann",
        ("tinycudann",),
        None,
        "another hash grid: --backend encoding=tinycudann",
        "nothing: this package's own serves",
        on_request=True,
    ),
    OptionalPackage(
        "triton",
        ("triton", "triton-windows", "pytorch-triton"),
        "triton",
        "this package's kernels, on CUDA devices",
        "on a CUDA device plain PyTorch takes the place of every kernel, and is slower",
    ),
    OptionalPackage("cupy", ("cupy-cuda12x", "cupy-cuda13x", "cupy"), None, None, _UNUSED),
    OptionalPackage(
        "onnx",
        ("onnx",),
        "export",
        "ONNX files of the networks: export",
        "nothing can be exported",
        on_request=True,
    ),
    OptionalPackage(
        "onnxscript",
        ("onnxscript",),
        "export",
        "PyTorch's ONNX exporter",
        "nothing can be exported",
        on_request=True,
    ),
    OptionalPackage(
        "tensorrt",
        ("tensorrt",),
        "tensorrt",
        "plans for the GPU at hand: export --tensorrt tensorrt",
        "no plans for H100 and other GPUs that tensorrt_rtx does not serve",
        on_request=True,
    ),
    OptionalPackage(
        "tensorrt_rtx",
        ("tensorrt-rtx", "tensorrt_rtx"),
        "tensorrt-rtx",
        "plans for named GPUs without one: export --sm",
        "no plans for named GPUs",
        on_request=True,
    ),
)


def installed(module: str) -> bool:
    """Whether the top-level ``module`` can be found. Nothing is imported.

    A folder of that name without ``__init__.py`` (a namespace package) does not count.
    """
    try:
        spec = util.find_spec(module)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None


def version(*distributions: str) -> str | None:
    """The version of the first of these distributions that is installed, from its metadata; else None."""
    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def require(module: str, extra: str | None, purpose: str) -> ModuleType:
    """Import and return ``module``.

    Raises :class:`~.errors.MissingDependency` when it is not installed or cannot be imported: the message
    says what it is for (``purpose``, as in "to remove the background"), the cause, and what to install.
    """
    command = f'pip install "{PROJECT}[{extra}]"' if extra else f"pip install {module.replace('_', '-')}"
    if not installed(module):
        raise MissingDependency(f"{module} is not installed; it is needed {purpose}: {command}")
    try:
        return import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise MissingDependency(
            f"{module} is installed but cannot be imported ({cause}); it is needed {purpose}; try {command}"
        ) from error
