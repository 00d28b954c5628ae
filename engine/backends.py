"""Who computes what: a name for each component, turned into the networks of a model once, when a pipeline is built.

A backend of the UNet makes of a :class:`~.unet.MultiViewUNet` something that is called like it, one of the VAE does
the same with a :class:`~.vae.LatentCodec`. Results of all backends agree up to rounding, those of ``fp8`` apart.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args, get_type_hints

import torch

from ..kernels._triton import obstacle
from ..kernels._tuning import cache_folder, compiled_folder
from ..kernels.attention import DTYPES, AttentionBackend
from ..kernels.fp8 import fp8_obstacle
from ._optional import installed
from .config import HashGridConfig
from .errors import InputError
from .graphed_networks import GraphedCodec, GraphedText, GraphedUNet, GraphedVision, plain
from .model import MultiViewModel
from .nerf.encoding import EncodingName, hash_grid
from .nerf.volume import VolumeName, volume_backend
from .unet import MultiViewUNet
from .vae import LatentCodec

UNetName = Literal["auto", "eager", "graph", "compiled", "tensorrt"]
VaeName = Literal["auto", "eager", "graph", "compiled", "tensorrt"]
ClipName = Literal["auto", "eager", "graph"]
LoopName = Literal["auto", "eager", "graph"]
Precision = Literal["native", "fp8"]

Plans = Callable[[MultiViewModel], MultiViewModel]
"""Puts TensorRT plans in the place of networks: see :func:`~..export.plan_model.plans_in`."""


@dataclass(frozen=True)
class Backends:
    """A name for each component. Raises :class:`InputError` for one that is not there."""

    attention: AttentionBackend = "auto"
    """The UNet's self-attentions: this package's kernel (``triton``), PyTorch's or xFormers'."""
    encoding: EncodingName = "torch"
    """The field's hash grid: this package's (``torch``), or tiny-cuda-nn's."""
    volume: VolumeName = "torch"
    """Marching and compositing: this package's (``torch``), or nerfacc's."""
    unet: UNetName = "auto"
    """``eager`` calls layer after layer, ``graph`` replays a CUDA graph for each shape, ``compiled`` replays what
    torch.compile made, ``tensorrt`` runs a plan; ``auto`` takes a plan if there is one, else ``graph`` on CUDA."""
    vae: VaeName = "auto"
    """As ``unet``; ``tensorrt`` is a plan of the decoder."""
    clip: ClipName = "auto"
    """The encoders of the prompt's text and picture, as ``unet``; ``auto`` is ``graph`` on CUDA."""
    loop: LoopName = "auto"
    """How a distillation step is run: ``graph`` replays a captured CUDA graph, ``eager`` calls one operation
    after the other, ``auto`` captures wherever that can be done."""
    precision: Precision = "native"
    """Of the UNet's linear layers: ``native`` is the model's dtype, ``fp8`` changes results (Ada, Hopper)."""

    def __post_init__(self) -> None:
        for component, name in asdict(self).items():
            if name not in (names := choices()[component]):
                raise InputError(f"unknown backend {name!r} of {component}; there are {', '.join(names)}")

    @classmethod
    def parse(cls, words: Sequence[str]) -> Backends:
        """From ``COMPONENT=NAME`` texts. Raises :class:`InputError` for what is none, with those there are."""
        found: dict[str, Any] = {}
        known = choices()
        for word in words:
            component, _, name = (part.strip() for part in word.partition("="))
            if component not in known or not name:
                raise InputError(
                    f"backend {word!r}: give COMPONENT=NAME, such as unet=compiled; the components are "
                    f"{', '.join(known)}"
                )
            if component in found:
                raise InputError(f"backend {word!r}: {component} was given as {found[component]!r} before")
            found[component] = name
        return cls(**found)


def choices() -> dict[str, tuple[str, ...]]:
    """The names of each component."""
    hints = get_type_hints(Backends)
    return {field.name: get_args(hints[field.name]) for field in fields(Backends)}


OWN = Backends()
"""This package's."""


def survey(device: torch.device) -> dict[str, dict[str, str | None]]:
    """For each component its backends, with why they cannot be used on ``device``; None where they can."""
    on_gpu = device.type == "cuda"
    kernels, gpu = obstacle(device), None if on_gpu else "no CUDA device"
    # TorchInductor writes Triton kernels for GPUs, C++ for CPUs.
    compiler = kernels if on_gpu else None

    def missing(package: str) -> str | None:
        return None if installed(package) else "not installed"

    return {
        "attention": {"triton": kernels, "torch": None, "xformers": missing("xformers")},
        "encoding": {"torch": None, "tinycudann": missing("tinycudann")},
        "volume": {"torch": None, "nerfacc": missing("nerfacc")},
        "unet": {"eager": None, "graph": gpu, "compiled": compiler, "tensorrt": gpu},
        "vae": {"eager": None, "graph": gpu, "compiled": compiler, "tensorrt": gpu},
        "clip": {"eager": None, "graph": gpu},
        "loop": {"eager": None, "graph": kernels},
        "precision": {"native": None, "fp8": fp8_obstacle(device)},
    }


def loop_obstacle(backends: Backends, device: torch.device) -> str | None:
    """Why distillation steps cannot be captured with these backends on ``device``; None where they can."""
    others = (backends.encoding, backends.volume)
    if others != (OWN.encoding, OWN.volume):
        return f"encoding and volume must be this package's own, and are {' and '.join(others)}"
    return None if obstacle(device) is None else "it needs a CUDA device and Triton"


def decided(
    backends: Backends, device: torch.device, dtype: torch.dtype, *, plans: Sequence[str] = ()
) -> Backends:
    """What every ``auto`` comes to; ``plans`` names the components (unet, vae) that there are plans for."""
    kernels = obstacle(device) is None and dtype in DTYPES
    network = "graph" if device.type == "cuda" else "eager"
    automatic: dict[str, Any] = {
        "attention": "triton" if kernels else "torch",
        "unet": "tensorrt" if "unet" in plans else network,
        "vae": "tensorrt" if "vae" in plans else network,
        "clip": network,
        "loop": "eager" if loop_obstacle(backends, device) else "graph",
    }
    return replace(
        backends, **{name: value for name, value in automatic.items() if getattr(backends, name) == "auto"}
    )


def apply(
    backends: Backends, model: MultiViewModel, plans: Plans | None = None
) -> tuple[MultiViewModel, Backends]:
    """``model`` with its networks run by these backends, and what every ``auto`` came to.

    The weights are the given model's own; its attention and precision are changed in place.

    Raises :class:`InputError` for a backend that cannot be used here, :class:`MissingDependency` for one that is
    not installed.
    """
    # Built and dropped: what cannot be used is found now, not after the views.
    hash_grid(backends.encoding, HashGridConfig(levels=1, log2_table=4, base_resolution=2))
    volume_backend(backends.volume)
    if plans is None and "tensorrt" in (backends.unet, backends.vae):
        component = "unet" if backends.unet == "tensorrt" else "vae"
        raise InputError(f"backend {component}=tensorrt needs a folder of plans (--plans DIR, or plans=)")
    planned = model if plans is None else plans(model)
    found = {"unet": type(planned.unet) not in _UNETS, "vae": type(planned.vae) not in _CODECS}
    used = decided(
        backends, model.device, model.dtype, plans=[component for component in found if found[component]]
    )
    _check(backends, used, planned, plans is not None, found)
    unet = planned.unet if used.unet == "tensorrt" else plain(model.unet)
    codec = planned.vae if used.vae == "tensorrt" else plain(model.vae)
    text, vision = plain(model.text), None if model.vision is None else plain(model.vision)
    unet.use_attention_backend(backends.attention)
    if used.precision == "fp8":
        from .fp8 import use_fp8

        use_fp8(unet)
    if used.unet in ("graph", "compiled"):
        unet = GraphedUNet(unet, compiled(unet.forward) if used.unet == "compiled" else None)
    if used.vae == "graph":
        codec = GraphedCodec(codec)
    elif used.vae == "compiled":
        codec = GraphedCodec(codec, compiled(codec.moments), compiled(codec.decode))
    if used.clip == "graph":
        text, vision = GraphedText(text), None if vision is None else GraphedVision(vision)
    if (unet, codec, text, vision) == (model.unet, model.vae, model.text, model.vision):
        return model, used
    return replace(model, unet=unet, vae=codec, text=text, vision=vision), used


_UNETS = (MultiViewUNet, GraphedUNet)
_CODECS = (LatentCodec, GraphedCodec)
"""What is computed here; of another type is a plan."""


def _check(
    asked: Backends, used: Backends, model: MultiViewModel, with_plans: bool, found: dict[str, bool]
) -> None:
    offered = survey(model.device)
    for component in ("unet", "vae", "clip", "precision"):
        name = getattr(used, component)
        if reason := offered[component][name]:
            raise InputError(f"backend {component}={name} cannot be used here: {reason}")
    if asked.loop == "graph" and (reason := loop_obstacle(asked, model.device)):
        raise InputError(f"loop 'graph' cannot be used here, {reason}: take 'eager' or 'auto'")
    for component, there in found.items():
        if getattr(used, component) == "tensorrt" and not there:
            raise InputError(f"backend {component}=tensorrt: the folder of plans has none of it")
    if with_plans and "tensorrt" not in (used.unet, used.vae):
        raise InputError(
            f"there are plans, and unet={used.unet}, vae={used.vae} use none; leave one of them out"
        )
    if used.precision == "fp8" and used.unet == "tensorrt":
        raise InputError("backend precision=fp8 cannot be used with a plan of the UNet, which has its own")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` for fixed shapes; what it builds is kept for the next process (:func:`use_cache_folder`)."""
    use_cache_folder()
    return torch.compile(function, dynamic=False, options={"fx_graph_cache": True})


def use_cache_folder() -> None:
    """TorchInductor's files into this package's cache folder, not the temporary one; the user's own choice stays.

    Its Triton kernels go where Triton keeps all others. Both are environment variables of the whole process.
    """
    # What cannot be written only costs the next process its start.
    with contextlib.suppress(OSError):
        folder = cache_folder() / "inductor"
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
        os.environ.setdefault("TRITON_CACHE_DIR", str(compiled_folder()))
