"""How everything here is measured: one clock, one row format, one machine stamp.

A :class:`Case` is one problem size with several contenders that compute the same thing; they are timed in one
run, after each one's result was compared with the reference: a wrong result has no time.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from typing import Any, Literal

import torch
from torch import Tensor

from ..engine.errors import InputError

Result = Tensor | tuple[Tensor, ...]
Contender = Callable[[], Result]

OURS = "ours"
"""Name of this package's contender."""
WARM_UP, REPEATS = 3, 50
"""Calls before the clock starts, and measurements of which the median and the percentiles are taken."""


@dataclass(frozen=True)
class Case:
    """One problem size.

    ``contenders`` are called without arguments and return their result; "ours" is this package's.
    ``reference`` computes what they should return, in float32 or wider; ``tolerance`` bounds the relative L2
    error of each returned tensor. ``work`` is in FLOP (unit "TFLOP/s") or in bytes, each input read once and
    each output written once (unit "TB/s").
    """

    kernel: str
    name: str
    contenders: Mapping[str, Contender]
    reference: Contender
    tolerance: float
    work: float
    unit: Literal["TFLOP/s", "TB/s"]
    graph: bool = True
    """Time CUDA-graph replays, free of launch cost; False where a contender cannot be captured."""
    captured: Mapping[str, bool] = field(default_factory=dict)
    """Exceptions from ``graph`` by contender."""


@dataclass(frozen=True)
class Row:
    """One contender's figures in one case; ``problem`` says why there is no time."""

    kernel: str
    case: str
    contender: str
    median_us: float | None
    p10_us: float | None
    p90_us: float | None
    rate: float | None
    unit: str
    error: float | None
    graph: bool
    ceiling: float
    """The rate of a large matrix product or a large copy in the same run."""
    problem: str | None = None


@dataclass(frozen=True)
class Report:
    """What was measured, how and where."""

    device: str
    versions: dict[str, str]
    rows: list[Row]
    warm_up: int = WARM_UP
    repeats: int = REPEATS

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


OnCase = Callable[[list[Row]], None]
"""Given the rows of each finished case."""


def need_cuda() -> None:
    """Raises :class:`InputError` where PyTorch sees no CUDA device."""
    if not torch.cuda.is_available():
        raise InputError(
            "benchmarks need a CUDA device, and PyTorch sees none; imagedream-rt doctor shows what is there"
        )


def measure(cases: Iterable[Case], on_case: OnCase | None = None) -> Report:
    """Check and time every contender of every case, on the current CUDA device."""
    limits = ceilings()
    rows = []
    for case in cases:
        with torch.no_grad():
            wanted = _tensors(case.reference())
        ceiling = limits[case.unit]
        found = [_row(case, name, contender, wanted, ceiling) for name, contender in case.contenders.items()]
        rows += found
        if on_case:
            on_case(found)
        del case, wanted
        torch.cuda.empty_cache()
        # What was compiled for this case would count as a recompilation in the next, and few of those are allowed.
        torch.compiler.reset()
    return Report(torch.cuda.get_device_name(), versions(), rows)


def best_peer(rows: Iterable[Row]) -> Row | None:
    """The fastest row that is not ours, of the rows of one case; None where no peer has a time."""
    timed = [row for row in rows if row.contender != OURS and row.median_us is not None]
    return min(timed, key=lambda row: row.median_us or 0.0, default=None)


def _row(case: Case, name: str, contender: Contender, wanted: tuple[Tensor, ...], ceiling: float) -> Row:
    graph = case.captured.get(name, case.graph)
    row = Row(case.kernel, case.name, name, None, None, None, None, case.unit, None, graph, ceiling)
    try:
        found = _tensors(contender())
        error = max(relative_error(a, b) for a, b in zip(found, wanted, strict=True))
        del found
        if not error <= case.tolerance:
            problem = f"wrong: relative error {error:.1e}, allowed {case.tolerance:.0e}"
            return replace(row, error=error, problem=problem)
        p10, median, p90 = time_us(contender, graph=graph)
    except Exception as failure:  # whatever a library raises, the others can still be measured
        problem = " ".join(str(failure).split())[:200] or type(failure).__name__
        return replace(row, problem=problem)
    rate = case.work / median * 1e-6
    return replace(row, median_us=median, p10_us=p10, p90_us=p90, rate=rate, error=error)


def time_us(
    function: Callable[[], Any], *, graph: bool = True, repeats: int = REPEATS
) -> tuple[float, float, float]:
    """10th percentile, median and 90th percentile of one call's device time in microseconds.

    With ``graph`` a CUDA graph of several calls is replayed, enough of them for a millisecond; without it
    single calls are timed between events, their launch cost included. The caches stay warm.
    """
    for _ in range(WARM_UP):
        function()
    torch.cuda.synchronize()
    calls = 1
    run = function
    if graph:
        once = _capture(function, 1)
        calls = max(1, min(200, int(1000 / max(_elapsed_us(once), 1.0))))
        run = _capture(function, calls)
    for _ in range(WARM_UP):
        run()
    times = sorted(_elapsed_us(run) / calls for _ in range(repeats))
    return times[repeats // 10], statistics.median(times), times[-1 - repeats // 10]


def _capture(function: Callable[[], Any], calls: int) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def _elapsed_us(run: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def ceilings() -> dict[str, float]:
    """Measured rates of this device: an fp16 matrix product of 8192^3 in TFLOP/s, a 4 GB copy in TB/s."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
    product = 2 * 8192**3 / time_us(lambda: a @ b, graph=False, repeats=20)[1] * 1e-6
    source = torch.empty(2**30, device="cuda", dtype=torch.float32)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / time_us(lambda: target.copy_(source), graph=False, repeats=20)[1] * 1e-6
    return {"TFLOP/s": product, "TB/s": copy}


def random_maps(*shape: int) -> Tensor:
    """Feature maps [N, C, H, W] in float16, channels-last, on the GPU."""
    drawn = torch.randn(*shape, device="cuda", dtype=torch.float16)
    return drawn.contiguous(memory_format=torch.channels_last)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Relative L2 error, computed in float64; NaN counts as infinite. ``ValueError`` for another shape."""
    if found.shape != wanted.shape:
        raise ValueError(f"wrong: shape {list(found.shape)}, must be {list(wanted.shape)}")
    difference = (found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)
    return float(difference.nan_to_num(nan=float("inf")))


def versions() -> dict[str, str]:
    """Versions that explain a difference between two runs."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for name in ("triton", "xformers", "nerfacc", "tinycudann"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _tensors(result: Result) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
