"""Small models and what is exported of them, made once for all tests."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from imagedream_rt.engine.model import Controller, MultiViewModel
from imagedream_rt.engine.unet import MultiViewUNet
from imagedream_rt.engine.weights import load_model
from imagedream_rt.export.components import chosen
from imagedream_rt.export.job import export_onnx


@cache
def shared_folder() -> Path:
    """A folder that is gone when the tests are."""
    folder = Path(tempfile.mkdtemp(prefix="imagedream-rt-exports-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def small_model(controller: Controller, dtype: torch.dtype = torch.float32) -> MultiViewModel:
    """``random:tiny`` with a UNet of one level: four transformers, which is a quarter of the tracing."""
    model = load_model("random:tiny", device="cpu", dtype=dtype, controller=controller)
    config = replace(model.unet.config, channel_mult=(2,), transformer_levels=(0,))
    torch.manual_seed(0)
    return replace(model, unet=MultiViewUNet(config).eval().requires_grad_(False).to(dtype))


@cache
def exported(component: str, controller: Controller = "pixel", dtype: torch.dtype = torch.float32) -> Path:
    """The ONNX file of one component of :func:`small_model`, in a folder of its own; not to be changed."""
    model = small_model(controller, dtype)
    folder = shared_folder() / f"{component}-{controller}-{str(dtype).removeprefix('torch.')}"
    return export_onnx(model, chosen([component], model), folder)[0]


def copied(path: Path, folder: Path) -> Path:
    """A copy of an exported file with all that belongs to it, which may be changed."""
    for part in path.parent.glob(f"{path.name}*"):
        shutil.copyfile(part, folder / part.name)
    return folder / path.name
