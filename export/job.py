"""The whole export: a checkpoint's components to ONNX, each checked, then to plans, then to a server's repository."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..engine._optional import require, version
from ..engine.checkpoint_files import sha256_of
from ..engine.files import check_writable_folder, staged
from ..engine.model import MultiViewModel
from .components import Component
from .flavours import TensorRT
from .manifest import Source
from .onnx_check import check_file, check_numerics
from .onnx_graph import require_onnx, write_onnx
from .onnx_report import OnnxReport, data_path
from .preflight import GIB, check_disk, check_memory
from .trt_plan import PlanOptions, build_plan

OnStage = Callable[[str, int, int], None]
"""``on_progress(stage, done, total)``; a stage for each component and each plan."""


def export_onnx(
    model: MultiViewModel, components: Sequence[Component], folder: Path, on_progress: OnStage | None = None
) -> list[Path]:
    """Write ``<component>.onnx`` with weights and report for each component; each is checked before it is kept.

    ``model`` is on the CPU: graphs do not depend on the device, and the reference is computed there.

    Raises:
        InputError: too little disk or memory, or a file that does not compute what PyTorch does; of that one
            nothing stays.
        MissingDependency: onnx, onnxscript or onnxruntime is missing.
    """
    require_onnx()
    require("onnxruntime", "export", "to check exported files")
    check_writable_folder(folder)
    check_disk(folder, int(1.1 * sum(map(weights_bytes, components))) + 64 * 2**20, "the export")
    needed, name = max((memory_bytes(component), component.name) for component in components)
    check_memory(needed, f"the export of {name}")
    return [_export_one(model, component, folder, on_progress) for component in components]


def _export_one(
    model: MultiViewModel, component: Component, folder: Path, on_progress: OnStage | None
) -> Path:
    stage_name, seconds = f"{component.name} to ONNX", {}

    def tell(done: int, total: int = 10) -> None:
        if on_progress is not None:
            on_progress(stage_name, done, total)

    tell(0)
    source = source_of(model)
    with staged(folder) as stage:
        path = stage / f"{component.name}.onnx"
        start = time.perf_counter()
        write_onnx(component, path, described(model, source))
        seconds["write"] = round(time.perf_counter() - start, 2)
        tell(3)
        check_file(path)
        start = time.perf_counter()
        report = check_numerics(component, path, lambda done, total: tell(3 + done, 3 + total))
        seconds["check"] = round(time.perf_counter() - start, 2)
        OnnxReport(
            component=component.name,
            source=source,
            dtype=dtype_name(component.dtype),
            nodes=node_counts(path),
            check=report.to_dict(),
            seconds=seconds,
            size_bytes=path.stat().st_size + data_path(path).stat().st_size,
            sha256=sha256_of(path),
            data_sha256=sha256_of(data_path(path)),
            versions={name: version(name) for name in ("imagedream-rt", "torch", "onnx", "onnxscript")},
        ).save(path)
    return folder / f"{component.name}.onnx"


def export_plans(
    files: Sequence[Path],
    tensorrt: TensorRT,
    architectures: Sequence[str],
    options: PlanOptions,
    on_progress: OnStage | None = None,
) -> list[Path]:
    """A plan of each ONNX file for each architecture. Raises as :func:`~.trt_plan.build_plan`."""
    plans = []
    for onnx in files:
        for architecture in architectures:
            stage = f"{onnx.stem} to {architecture}"

            def on_share(share: float, stage: str = stage) -> None:
                if on_progress is not None:
                    on_progress(stage, round(100 * share), 100)

            on_share(0.0)
            plans.append(build_plan(onnx, architecture, tensorrt, options, on_share))
            on_share(1.0)
    return plans


def source_of(model: MultiViewModel) -> Source:
    card = model.card
    return Source(card.name, card.sha256, card.controller, model.frames)


def described(model: MultiViewModel, source: Source) -> dict[str, str]:
    """Of the model, for the file's metadata."""
    return {
        "model": source.model,
        "model_sha256": source.sha256,
        "family": model.card.family,
        "controller": source.controller,
        "frames": str(source.frames),
    }


def weights_bytes(component: Component) -> int:
    """Of what the graph holds; a module may have parameters that it does not."""
    return sum(x.numel() * x.element_size() for x in component.module.parameters())


def memory_bytes(component: Component) -> int:
    """What an export takes: the module, the file and onnxruntime's float32 copy, and four times the scores of two
    rows."""
    parameters = sum(x.numel() for x in component.module.parameters())
    return 2 * weights_bytes(component) + 4 * parameters + 2 * 4 * 4 * component.scores + GIB


def node_counts(path: Path) -> dict[str, int]:
    onnx = require_onnx()
    nodes = onnx.load(path, load_external_data=False).graph.node
    return dict(Counter(node.op_type for node in nodes).most_common())


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
