"""Latency of one exported component: PyTorch, onnxruntime and TensorRT in one run, whichever are there.

Every contender gets the same inputs; its output is compared with the float32 reference before it is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..engine._optional import version
from ..engine.doctor import environment
from ..engine.errors import InputError, MissingDependency
from ..engine.files import write_json
from ..engine.model import Controller
from ..engine.weights import load_model
from ..export.components import Component, component
from ..export.flavours import local_architecture
from ..export.manifest import read_manifest
from ..export.onnx_check import reference, relative_l2, session
from ..export.onnx_report import OnnxReport
from ..export.trt_runtime import Plan
from .harness import time_us

NAME = "bench.json"
ALLOWED = 5e-2
"""Relative L2 error above which a contender computes something else, and has no time."""
CPU_REPEATS = 5

Run = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Latency:
    """One contender; ``problem`` says why it has no time."""

    contender: str
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    error: float | None = None
    problem: str | None = None

    def line(self) -> str:
        if self.median_ms is None:
            return f"{self.contender:<28} {self.problem}"
        return (
            f"{self.contender:<28} {self.median_ms:10.2f} ms  ({self.p10_ms:.2f}-{self.p90_ms:.2f}), "
            f"error {self.error:.1e}"
        )


def run(
    folder: Path,
    name: str = "unet",
    checkpoint: str | None = None,
    on_row: Callable[[Latency], None] | None = None,
) -> dict[str, Any]:
    """Time the contenders for ``folder/name.onnx`` and its plans; the report is also ``folder/bench.json``.

    Raises :class:`InputError` if the file, its report or its checkpoint is not there.
    """
    onnx = folder / f"{name}.onnx"
    if not onnx.is_file():
        raise InputError(f"{onnx} is not there; make it: imagedream-rt export CHECKPOINT -o {folder}")
    about = OnnxReport.read(onnx)
    model = load_model(
        checkpoint or about.source.model,
        device="cpu",
        dtype=getattr(torch, about.dtype),
        controller=cast(Controller, about.source.controller),
    )
    if model.card.sha256 != about.source.sha256:
        raise InputError(f"{onnx} was made of other weights than {model.card.name} has now; export it again")
    part = component(model, name)
    assert part is not None
    inputs = part.example(part.batch, torch.Generator().manual_seed(3))
    wanted = reference(part, [inputs])[0]
    rows = []
    for contender, prepare, graph in _contenders(part, onnx, inputs):
        rows.append(_measure(contender, prepare, graph, wanted))
        if on_row is not None:
            on_row(rows[-1])
    packages = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt_rtx")
    machine = environment("cuda" if torch.cuda.is_available() else None)
    report = {
        "component": name,
        "dtype": about.dtype,
        "batch": part.batch,
        "machine": {**machine, **{package: version(package) for package in packages}},
        "rows": [asdict(row) for row in rows],
    }
    write_json(folder / NAME, report)
    return report


def _contenders(
    part: Component, onnx: Path, inputs: Sequence[Tensor]
) -> Iterator[tuple[str, Callable[[], Run], bool]]:
    """Name, what prepares it outside the clock, and whether it is timed as a CUDA graph."""
    gpu = torch.cuda.is_available()

    def eager() -> Run:
        module = part.module.cuda() if gpu else part.module
        given = _on_device(inputs)
        return lambda: _tuple(module(*given))

    def compiled() -> Run:
        module = torch.compile(part.module.cuda() if gpu else part.module)
        given = _on_device(inputs)
        return lambda: _tuple(module(*given))

    def onnxruntime() -> Run:
        run = session(onnx)
        return lambda: run(inputs)

    yield "PyTorch eager", eager, False
    if gpu:
        yield "PyTorch compiled + graph", compiled, True
    yield "onnxruntime (CPU)", onnxruntime, False
    for path in sorted(onnx.parent.glob(f"{onnx.stem}.*.plan")):
        if read_manifest(path).architecture == local_architecture():

            def planned(path: Path = path) -> Run:
                plan, given = Plan(path), _on_device(inputs)
                return lambda: plan(*given)

            flavour = read_manifest(path).flavour
            yield flavour, planned, False
            yield f"{flavour} + graph", planned, True


def _measure(contender: str, prepare: Callable[[], Run], graph: bool, wanted: Sequence[Tensor]) -> Latency:
    try:
        with torch.no_grad():
            call = prepare()
            found = [x.float().cpu() for x in call()]
            error = max(relative_l2(a, b) for a, b in zip(found, wanted, strict=True))
            if not error <= ALLOWED:
                return Latency(contender, problem=f"wrong: relative L2 error {error:.1e}")
            low, middle, high = _times_ms(call, graph, on_gpu="CPU" not in contender)
    except (ImportError, MissingDependency, RuntimeError) as failure:
        # The others can still be measured.
        return Latency(contender, problem=" ".join(str(failure).split())[:200])
    return Latency(contender, middle, low, high, error)


def _times_ms(call: Run, graph: bool, *, on_gpu: bool) -> tuple[float, float, float]:
    """10th percentile, median and 90th percentile."""
    if on_gpu and torch.cuda.is_available():
        low, middle, high = time_us(call, graph=graph)
        return low / 1e3, middle / 1e3, high / 1e3
    times = []
    for _ in range(CPU_REPEATS):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return min(times), statistics.median(times), max(times)


def _on_device(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.cuda() if torch.cuda.is_available() else x for x in inputs]


def _tuple(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)
