"""Everything of an export compared on the machine at hand: PyTorch, onnxruntime, and plans where they run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from ..engine._optional import version
from ..engine.doctor import environment
from ..engine.errors import ImageDreamError, InputError
from ..engine.files import write_json
from ..engine.model import Controller, MultiViewModel
from ..engine.weights import load_model
from .components import Component, component
from .flavours import local_architecture
from .job import OnStage
from .manifest import Source, read_manifest
from .onnx_check import check_file, check_numerics, reference, relative_l2
from .onnx_report import OnnxReport
from .trt_runtime import Plan, Workspace

NAME = "verify.json"
PLAN_BOUNDS = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Relative L2 error of a plan's outputs that passes. A GPU multiplies float32 as TF32 and sums in another order."""


@dataclass(frozen=True)
class Finding:
    """How one file came out; ``problem`` says why it could not be compared, or what is wrong."""

    file: str
    kind: str
    """``onnx`` or ``plan``."""
    error: float | None = None
    bound: float | None = None
    problem: str | None = None

    @property
    def passed(self) -> bool:
        return self.problem is None


@dataclass(frozen=True)
class VerifyReport:
    """What was compared, and on what."""

    folder: str
    machine: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Plans of other architectures."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        width = max((len(finding.file) for finding in self.findings), default=0)
        lines = [
            f"{finding.file:<{width}}  "
            + (finding.problem or f"error {finding.error:.1e}, allowed {finding.bound:.0e}")
            for finding in self.findings
        ]
        return [*lines, *(f"{name}: not compared, it is for another GPU" for name in self.skipped)]

    def raise_if_failed(self) -> None:
        """Raises :class:`ImageDreamError` naming the files that are not what they should be."""
        failed = [finding.file for finding in self.findings if not finding.passed]
        if failed:
            raise ImageDreamError(f"{len(failed)} of {len(self.findings)} files failed: {', '.join(failed)}")


def verify_folder(
    folder: Path, checkpoint: str | None = None, on_progress: OnStage | None = None
) -> VerifyReport:
    """Compare every exported file of ``folder`` with PyTorch, and write ``verify.json`` there.

    PyTorch computes in float32 on the CPU, with weights rounded to the file's dtype; each model is loaded once.

    Raises :class:`InputError` if there is nothing to compare, or the checkpoint is not there or has changed.
    """
    files = sorted(folder.glob("*.onnx"))
    plans = sorted(folder.glob("*.plan"))
    if not files and not plans:
        raise InputError(f"{folder} holds no ONNX files or plans; give the folder that export wrote")
    here = local_architecture()
    report = VerifyReport(str(folder), _machine())
    models: dict[tuple[str, str], MultiViewModel] = {}
    for done, path in enumerate([*files, *plans]):
        if on_progress is not None:
            on_progress("verify", done, len(files) + len(plans))
        try:
            if path.suffix == ".plan" and read_manifest(path).architecture != here:
                report.skipped.append(path.name)
                continue
            about = OnnxReport.read(path) if path.suffix == ".onnx" else read_manifest(path)
            part = _component(models, about.source, about.dtype, about.component, checkpoint)
            report.findings.append(_compare(path, part))
        except ImageDreamError as error:
            report.findings.append(Finding(path.name, path.suffix[1:], problem=str(error)))
    if on_progress is not None:
        on_progress("verify", len(files) + len(plans), len(files) + len(plans))
    write_json(folder / NAME, report.to_dict())
    return report


def _machine() -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else None
    packages = ("onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt_rtx")
    return {
        **environment(device),
        "architecture": local_architecture(),
        **{name: version(name) for name in packages},
    }


def _component(
    models: dict[tuple[str, str], MultiViewModel],
    source: Source,
    dtype: str,
    name: str,
    checkpoint: str | None,
) -> Component:
    where = checkpoint or source.model
    key = (where, dtype)
    if key not in models:
        models.clear()
        models[key] = load_model(
            where, device="cpu", dtype=getattr(torch, dtype), controller=cast(Controller, source.controller)
        )
    model = models[key]
    if model.card.sha256 != source.sha256:
        raise InputError(f"it was made of other weights than {where} has now; export it again")
    part = component(model, name)
    if part is None:
        raise InputError(f"{where} has no {name}")
    return part


def _compare(path: Path, part: Component) -> Finding:
    if path.suffix == ".plan":
        return _compare_plan(path, part)
    check_file(path)
    OnnxReport.read(path).check_unchanged(path)
    report = check_numerics(part, path)
    return Finding(path.name, "onnx", report.worst, report.bound)


def _compare_plan(path: Path, part: Component) -> Finding:
    plan = Plan(path, workspace=Workspace())
    inputs = part.example(plan.manifest.profile[1], torch.Generator().manual_seed(2))
    wanted = reference(part, [inputs])[0]
    found = [x.float().cpu() for x in plan(*(x.cuda() for x in inputs))]
    error = max(relative_l2(a, b) for a, b in zip(found, wanted, strict=True))
    bound = PLAN_BOUNDS[part.dtype]
    problem = None
    if not error <= bound:
        problem = f"differs from PyTorch: relative L2 error {error:.1e}, allowed {bound:.0e}"
    return Finding(path.name, "plan", error if math.isfinite(error) else None, bound, problem)
