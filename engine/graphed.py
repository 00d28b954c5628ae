"""Work as CUDA graphs: launching hundreds of small kernels takes longer than running them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from .run_context import current

WARMUP = 4
MOST_REPLAYS = 4
"""Graphs that a function keeps: views with and without guidance, and room for two sizes more."""

_within_a_step: ContextVar[bool] = ContextVar("within a step", default=False)


class GraphedStep:
    """Calls ``step``: directly at first and off CUDA, from a captured graph afterwards.

    ``step`` takes nothing, what it returns is dropped, and it writes its results into tensors that outlive it;
    it must draw its random numbers from the default generator or from ``generators``, make no tensor from host
    values and never wait for the device. The first ``warmup`` calls (at least one) run as they are: libraries
    set themselves up and kernels are tuned then. Graphs that are never replayed at the same time may share the
    memory of a ``pool`` (:func:`torch.cuda.graph_pool_handle`).
    """

    def __init__(
        self,
        step: Callable[[], object],
        device: torch.device,
        generators: Sequence[torch.Generator] = (),
        warmup: int = WARMUP,
        pool: Any = None,
    ) -> None:
        self.step, self.device, self.generators, self.warmup = step, device, generators, warmup
        self.pool = pool
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        self.calls += 1
        with current(self.device):
            if self.device.type != "cuda":
                with _step():
                    self.step()
            elif self.calls <= self.warmup:
                self._aside()
            else:
                if self.graph is None:
                    self.graph = self._capture()
                self.graph.replay()

    def _aside(self) -> None:
        # capture wants what it records to have run on a side stream before (libraries set themselves up there)
        side, usual = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(usual)
        with torch.cuda.stream(side), _step():
            self.step()
        usual.wait_stream(side)

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph, pool=self.pool), _step():
            self.step()
        return graph


@contextmanager
def _step() -> Iterator[None]:
    """What :class:`Replays` are called meanwhile becomes part of the step."""
    token = _within_a_step.set(True)
    try:
        yield
    finally:
        _within_a_step.reset(token)


class Replays:
    """Calls a function of tensors that returns some: from the second call of a shape on by a CUDA graph.

    Arguments may be tensors, None, numbers, and (nested) lists and tuples of these. The result, of the same kinds with
    tuples for lists, is the function's own up to rounding, in memory of its own, without gradient. Each graph has
    buffers that its arguments are copied to, contiguous, and is kept for as long as this object is, the latest
    :data:`MOST_REPLAYS` of them. What the function depends on besides its arguments must stay what it was, or be among
    the ``also`` of a call.

    The function itself is called where graphs do not help or are not possible: off CUDA, where a gradient by an
    argument is wanted, and while a step that contains the call is captured.
    """

    def __init__(self, function: Callable[..., Any], most: int = MOST_REPLAYS) -> None:
        self.function, self.most = function, most
        self._found: OrderedDict[Hashable, _Replay] = OrderedDict()
        self._pool: Any = None
        self._lock = threading.Lock()  # the buffers of a graph serve one call at a time

    def __call__(self, *arguments: Any, also: Hashable = None, **named: Any) -> Any:
        given = (arguments, tuple(named.values()))
        tensors = list(_tensors(given))
        if not replayable(tensors):
            return self.function(*arguments, **named)
        signature = (_signature(given), tuple(named), also)
        with self._lock:
            replay = self._found.get(signature)
            if replay is None:
                replay = self._found[signature] = self._new(given, tuple(named), tensors)
            self._found.move_to_end(signature)
            try:
                return replay(tensors)
            except BaseException:
                del self._found[signature]  # half made
                raise

    def __len__(self) -> int:
        return len(self._found)

    def forget(self) -> None:
        """Drop all graphs with their memory."""
        with self._lock:
            self._found.clear()

    def _new(self, given: Sequence[Any], names: Sequence[str], tensors: list[Tensor]) -> _Replay:
        if len(self._found) >= self.most:
            self._found.popitem(last=False)
        if self._pool is None and tensors[0].is_cuda:
            self._pool = torch.cuda.graph_pool_handle()
        return _Replay(self.function, given, names, tensors, self._pool)


def forget_graphs(network: object) -> None:
    """Drop the graphs, with their memory, that the methods of an object replay."""
    for value in vars(network).values():
        if isinstance(value, Replays):
            value.forget()


def replayable(tensors: Sequence[Tensor]) -> bool:
    """Whether a call with these tensors may be replayed from a graph of its own."""
    return (
        bool(tensors)
        and all(tensor.is_cuda for tensor in tensors)
        and not _within_a_step.get()
        and not torch.cuda.is_current_stream_capturing()
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    )


class _Replay:
    """One shape of a function's arguments: buffers, and the graph over them."""

    def __init__(
        self,
        function: Callable[..., Any],
        given: Sequence[Any],
        names: Sequence[str],
        tensors: list[Tensor],
        pool: Any,
    ) -> None:
        """``given``: the positional arguments, and those of the ``names``; ``tensors``: all that are in them."""
        # Ordinary tensors, whoever calls first: those made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self._inputs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors]
        self._function = function
        self._arguments, values = _with_tensors(given, iter(self._inputs))
        self._named = dict(zip(names, values, strict=True))
        self._alike = [
            [number for number, x in enumerate(tensors) if x.dtype == dtype]
            for dtype in dict.fromkeys(x.dtype for x in tensors)
        ]
        self._step = GraphedStep(self._run, tensors[0].device, warmup=1, pool=pool)

    @torch.no_grad()
    def __call__(self, tensors: list[Tensor]) -> Any:
        for numbers in self._alike:  # of one dtype all in one launch
            torch._foreach_copy_([self._inputs[n] for n in numbers], [tensors[n] for n in numbers])
        self._step()
        return _with_tensors(self._output, (x.clone() for x in _tensors(self._output)))

    def _run(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._output = self._function(*self._arguments, **self._named)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of nested lists and tuples, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """``value`` with other tensors in the places of its own."""
    if isinstance(value, Tensor):
        return next(tensors)
    if not isinstance(value, (list, tuple)):
        return value
    items = [_with_tensors(item, tensors) for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def _signature(value: Any) -> Hashable:
    """Shapes, dtypes and devices of tensors, everything else as it is."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    return tuple(map(_signature, value)) if isinstance(value, (list, tuple)) else value
