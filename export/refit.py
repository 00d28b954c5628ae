"""New weights into a plan, without building it again."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from ..engine.errors import InputError
from ..engine.files import staged
from ..engine.model import Controller, MultiViewModel
from ..engine.weights import load_model
from .components import component
from .job import source_of
from .manifest import read_manifest
from .onnx_graph import parameters_of
from .preflight import check_disk
from .trt_runtime import open_engine, refit_engine


def refit_plan(plan: Path, model: MultiViewModel, output: Path) -> Path:
    """Write ``output``: ``plan`` with the weights of ``model``, which is on the CPU in the plan's dtype.

    Raises :class:`InputError` if the plan was not built with ``--refit`` or does not belong here, if the checkpoint
    is of another kind, or if there is too little disk.
    """
    manifest = read_manifest(plan)
    if not manifest.refit:
        raise InputError(f"{plan} was not built to be refitted; build it so: {manifest.rebuild} --refit")
    part = component(model, manifest.component)
    if part is None or model.card.controller != manifest.source.controller:
        raise InputError(
            f"{model.card.name} has controller {model.card.controller}, and {plan} was built for "
            f"{manifest.source.controller}; a refit needs a checkpoint of the same kind"
        )
    if str(part.dtype).removeprefix("torch.") != manifest.dtype:
        raise InputError(f"{plan} computes in {manifest.dtype}, and the model was loaded as {part.dtype}")
    parameters = sum(x.numel() * x.element_size() for x in part.module.parameters())
    check_disk(output.parent, int(1.2 * parameters) + plan.stat().st_size, f"{output.name}")
    found, tensorrt, engine = open_engine(plan)
    written = refit_engine(engine, tensorrt, found, parameters_of(part.module))
    with staged(output.parent) as stage:
        (stage / output.name).write_bytes(written)
        replace(
            found,
            source=source_of(model),
            stripped=False,
            size_bytes=len(written),
            sha256=hashlib.sha256(written).hexdigest(),
        ).save(stage / output.name)
    return output


def refit_from_checkpoint(plan: Path, checkpoint: str, output: Path, controller: str | None = None) -> Path:
    """:func:`refit_plan` with the weights of a checkpoint, loaded in the plan's dtype."""
    manifest = read_manifest(plan)
    model = load_model(
        checkpoint,
        device="cpu",
        dtype=getattr(torch, manifest.dtype),
        controller=cast(Controller, controller or manifest.source.controller),
    )
    return refit_plan(plan, model, output)
