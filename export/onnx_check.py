"""Is an exported file whole, valid, and numerically the model? Run by onnxruntime against PyTorch.

The reference is the component with the same (rounded) weights in float32. onnxruntime computes float16 graphs on the
CPU in float32 here and there, where an overflow would go unseen; so the peak of every float16 tensor in the graph is
measured as well, and one that float16 cannot hold fails the export.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine._optional import require, version
from ..engine.errors import InputError
from .components import Component, TensorSpec, draw
from .onnx_graph import require_onnx
from .onnx_probe import PEAK, peaks_model, widened_model

BOUNDS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 1e-2}
"""Relative L2 error of an output that passes. A bfloat16 graph runs widened to float32, and its error is that of the
constants in the graph, which have 8 bits."""
HALF_MAX = 65504.0
LARGE = 4.0
"""How many times their usual size the inputs of the hard case are."""


@dataclass(frozen=True)
class CaseReport:
    """How one batch of random inputs came out."""

    name: str
    batch: int
    error: dict[str, float]
    """Relative L2 error by output."""


@dataclass(frozen=True)
class CheckReport:
    """What a file was found to be; stored beside it."""

    bound: float
    cases: tuple[CaseReport, ...]
    peak: float | None
    """Greatest magnitude of a float16 tensor inside the graph; None for other dtypes."""
    peak_tensor: str | None
    onnxruntime: str | None
    widened: bool
    """bfloat16 was computed in float32, because onnxruntime has few bfloat16 operators on the CPU."""

    @property
    def worst(self) -> float:
        return max(error for case in self.cases for error in case.error.values())

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "worst": self.worst}


def check_file(path: Path) -> None:
    """That an ONNX file is whole and valid: onnx's full check, and all weights present.

    Raises :class:`InputError` for a file that is missing, truncated or invalid.
    """
    onnx = require_onnx()
    again = "export it again"
    if not path.is_file():
        raise InputError(f"{path} is not there; {again}")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own exceptions, which differ between its implementations
        raise InputError(f"{path} is no whole ONNX file ({_first_line(error)}); {again}") from error
    sizes = _external_sizes(model)
    for name, needed in sizes.items():
        data = path.parent / name
        found = data.stat().st_size if data.is_file() else 0
        if found < needed:
            raise InputError(f"{data} is truncated: {found} of {needed} bytes; {again}")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InputError(f"{path} is not valid ONNX ({_first_line(error)}); {again}") from error


def _external_sizes(model: Any) -> dict[str, int]:
    """Least size of each file of weights."""
    sizes: dict[str, int] = {}
    for tensor in model.graph.initializer:
        entry = {item.key: item.value for item in tensor.external_data}
        if entry:
            end = int(entry.get("offset", 0)) + int(entry.get("length", 0))
            sizes[entry["location"]] = max(sizes.get(entry["location"], 0), end)
    return sizes


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_numerics(
    component: Component, path: Path, on_step: Callable[[int, int], None] | None = None
) -> CheckReport:
    """Compare ``path`` with ``component`` on random inputs: usual ones, large ones at the ends of the schedule, and
    the zeros of the unconditional branch; in batches of one and two.

    Raises :class:`InputError` when an output is not finite or beyond the bound, or a float16 tensor overflows.
    """
    dtype = component.dtype
    cases = list(_cases(component))
    total = 2 * len(cases) + 1
    done = _Counter(total, on_step)
    wanted = reference(component, [inputs for _, inputs in cases], done)
    reports = _compare(component, path, cases, wanted, done)
    bound = BOUNDS[dtype]
    for report in reports:
        for output, error in report.error.items():
            if not error <= bound:
                raise InputError(
                    f"{path.name} differs from PyTorch: relative L2 error {error:.1e} of {output} on "
                    f"{report.name} inputs, allowed {bound:.0e}{_mend(dtype)}"
                )
    peak, tensor = _peak(path, [inputs for _, inputs in cases]) if dtype == torch.float16 else (None, None)
    done()
    runtime = version("onnxruntime", "onnxruntime-gpu")
    return CheckReport(bound, tuple(reports), peak, tensor, runtime, dtype == torch.bfloat16)


def _compare(
    component: Component,
    path: Path,
    cases: Sequence[tuple[str, tuple[Tensor, ...]]],
    wanted: Sequence[tuple[Tensor, ...]],
    done: Callable[[], None],
) -> list[CaseReport]:
    widened = component.dtype == torch.bfloat16
    reports = []
    with _runnable(path, widened) as run:
        for (name, inputs), expected in zip(cases, wanted, strict=True):
            found = run([x.float() if widened and x.is_floating_point() else x for x in inputs])
            errors = {
                spec.name: relative_l2(a, b)
                for spec, a, b in zip(component.outputs, found, expected, strict=True)
            }
            reports.append(CaseReport(name, len(inputs[0]), errors))
            done()
    return reports


def _mend(dtype: torch.dtype) -> str:
    return (
        ""
        if dtype == torch.float32
        else "; try --dtype " + ("bfloat16 or float32" if dtype == torch.float16 else "float32")
    )


def _cases(component: Component) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    generator = torch.Generator().manual_seed(1)
    dtype = component.dtype
    yield "usual", component.example(1, generator)
    yield "large", tuple(_extreme(spec, dtype, generator) for spec in component.inputs)
    single = zip(component.inputs, component.example(1, generator), strict=True)
    yield "unconditional", tuple(torch.zeros_like(x) if spec.zero else x for spec, x in single)


def _extreme(spec: TensorSpec, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Two rows: integers first and last; floating inputs large."""
    x = draw(spec, 2, dtype, generator)
    if spec.below is None:
        return x * LARGE
    x[0], x[1] = 0, spec.below - 1
    return x


def reference(
    component: Component, batches: Sequence[Sequence[Tensor]], done: Callable[[], None] = lambda: None
) -> list[tuple[Tensor, ...]]:
    """The component's outputs in float32. Its parameters are widened in place and narrowed again, both exact."""
    dtype, results = component.dtype, []
    component.module.float()
    try:
        with torch.no_grad():
            for inputs in batches:
                given = [x.float() if x.is_floating_point() else x for x in inputs]
                results.append(component(*given))
                done()
    finally:
        component.module.to(dtype)
    return results


@contextmanager
def _runnable(path: Path, widened: bool) -> Iterator[Callable[[Sequence[Tensor]], list[Tensor]]]:
    if widened:
        with widened_model(path) as wide:
            yield session(wide)
    else:
        yield session(path)


def session(path: Path) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """A function that runs the file on the CPU with inputs in its order. Raises :class:`InputError`."""
    ort = require("onnxruntime", "export", "to check exported files")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    # Memory goes back at once: attention alone takes gigabytes here, where nothing fuses it.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.execution_order = (
        ort.ExecutionOrder.PRIORITY_BASED
    )  # the default keeps all that is probed to the end
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        opened = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class of its own for each failure
        raise InputError(f"{path}: onnxruntime cannot load it ({_first_line(error)})") from error
    names = [value.name for value in opened.get_inputs()]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        found = opened.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
        return [torch.from_numpy(array).float() for array in found]

    return run


def _peak(path: Path, batches: Sequence[Sequence[Tensor]]) -> tuple[float, str]:
    """Greatest magnitude of a float16 tensor in the graph, and its name. Raises :class:`InputError` beyond
    float16."""
    with peaks_model(path) as (probe, names):
        run = session(probe)
        highest = [0.0] * len(names)
        for row in (
            tuple(x[at : at + 1] for x in inputs) for inputs in batches for at in range(len(inputs[0]))
        ):
            values = run(row)[-len(names) :]
            # An infinite tensor breeds NaN: for a maximum both count as infinite.
            highest = [
                max(peak, math.inf if math.isnan(value) else value)
                for peak, value in zip(highest, (float(x) for x in values), strict=True)
            ]
    beyond = next((at for at, peak in enumerate(highest) if peak > HALF_MAX), None)
    if beyond is not None:
        raise InputError(
            f"{path.name}: {names[beyond].removeprefix(PEAK)} reaches {highest[beyond]:.3g}, beyond float16's "
            f"{HALF_MAX:.0f}; try --dtype bfloat16 or float32"
        )
    at = max(range(len(names)), key=highest.__getitem__)
    return highest[at], names[at].removeprefix(PEAK)


def relative_l2(found: Tensor, wanted: Tensor) -> float:
    """Relative L2 error in float64; infinite where either is not finite."""
    difference = (found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)
    return float(difference.nan_to_num(nan=math.inf, posinf=math.inf))


class _Counter:
    def __init__(self, total: int, on_step: Callable[[int, int], None] | None) -> None:
        self._done, self._total, self._on_step = 0, total, on_step

    def __call__(self) -> None:
        self._done += 1
        if self._on_step is not None:
            self._on_step(self._done, self._total)
