"""One call of ``imagedream-rt export``: what was asked, checked before anything slow, then done in order."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from ..engine.errors import InputError
from ..engine.model import Controller
from ..engine.weights import load_model
from .components import COMPONENTS, chosen
from .flavours import check_architectures, load_tensorrt, pick_flavour
from .job import OnStage, export_onnx, export_plans
from .manifest import read_manifest
from .onnx_check import check_file
from .onnx_report import OnnxReport
from .server_repo import write_server_repo
from .trt_plan import PlanOptions

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FOLDER = Path("out/export")


@dataclass(frozen=True)
class ExportRequest:
    """What was asked for."""

    checkpoint: str
    """A checkpoint, or an ONNX file that an export wrote, to build plans of."""
    folder: Path | None = None
    controller: str | None = None
    dtype: str = "float16"
    components: tuple[str, ...] = ()
    """Empty for all."""
    flavour: str | None = None
    architectures: tuple[str, ...] = ()
    """Plans are built if a flavour or an architecture is named."""
    options: PlanOptions = field(default_factory=PlanOptions)
    server_repo: Path | None = None


@dataclass(frozen=True)
class Exported:
    """The files of an export."""

    onnx: list[Path]
    plans: list[Path]
    served: list[str]
    """Models in the server repository."""

    @property
    def folder(self) -> Path:
        return self.onnx[0].parent

    def figures(self) -> dict[str, Any]:
        """JSON-ready: what each file was found to be."""
        return {
            "onnx": {str(path): _figures(OnnxReport.read(path)) for path in self.onnx},
            "plans": {str(path): _plan_figures(path) for path in self.plans},
            "server_repo": self.served,
        }

    def lines(self) -> dict[Path, str]:
        """A line for each file."""
        lines = {}
        for path in self.onnx:
            report = OnnxReport.read(path)
            peak = report.check["peak"]
            reach = "" if peak is None else f", float16 peak {peak:.0f}"
            lines[path] = (
                f"{report.dtype}, {report.size_bytes / 2**20:.1f} MiB, error {report.check['worst']:.1e}{reach}"
            )
        for path in self.plans:
            found = read_manifest(path)
            lines[path] = (
                f"{found.flavour} {found.version}, batch {'/'.join(map(str, found.profile))}, "
                f"{found.size_bytes / 2**20:.1f} MiB, built in {found.build_s:.0f} s, "
                f"{found.layers['fused_attention']} fused attentions"
            )
        return lines


def run(request: ExportRequest, on_progress: OnStage | None = None) -> Exported:
    """Raises as :func:`~.job.export_onnx` and :func:`~.trt_plan.build_plan`."""
    request.options.check()
    _check_names(request)
    tensorrt, architectures = None, []
    if request.flavour is not None or request.architectures:
        # What is missing shows before a model is loaded.
        tensorrt = load_tensorrt(pick_flavour(request.flavour, request.architectures))
        architectures = check_architectures(tensorrt, request.architectures)
    if Path(request.checkpoint).suffix == ".onnx":
        files = [_given(request, tensorrt is not None)]
    else:
        model = load_model(
            request.checkpoint,
            device="cpu",
            dtype=DTYPES[request.dtype],
            controller=cast("Controller | None", request.controller),
        )
        parts = chosen(request.components, model)
        files = export_onnx(model, parts, request.folder or FOLDER, on_progress)
    plans = (
        [] if tensorrt is None else export_plans(files, tensorrt, architectures, request.options, on_progress)
    )
    served = [] if request.server_repo is None else write_server_repo(request.server_repo, files, plans)
    return Exported(files, plans, served)


def _check_names(request: ExportRequest) -> None:
    if request.dtype not in DTYPES:
        raise InputError(f"unknown dtype {request.dtype!r}; the dtypes are {', '.join(DTYPES)}")
    for name in request.components:
        if name not in COMPONENTS:
            raise InputError(f"unknown component {name!r}; the components are {', '.join(COMPONENTS)}")


def _given(request: ExportRequest, plans: bool) -> Path:
    path = Path(request.checkpoint)
    if not plans and request.server_repo is None:
        raise InputError(
            f"{path} is ONNX already; name what to make of it with --sm, --tensorrt or --server-repo"
        )
    if request.folder is not None and request.folder.absolute() != path.parent.absolute():
        raise InputError(f"plans go beside their ONNX file, into {path.parent}; leave -o out")
    check_file(path)
    return path


def _figures(report: OnnxReport) -> dict[str, Any]:
    return {
        "dtype": report.dtype,
        "size_bytes": report.size_bytes,
        "check": report.check,
        "seconds": report.seconds,
    }


def _plan_figures(path: Path) -> dict[str, Any]:
    found = read_manifest(path)
    names = (
        "flavour",
        "version",
        "architecture",
        "profile",
        "layers",
        "build_s",
        "build_peak_bytes",
        "size_bytes",
    )
    return {name: getattr(found, name) for name in names}
