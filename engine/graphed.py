"""A step as one CUDA graph: launching hundreds of small kernels takes longer than running them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

WARMUP = 4


class GraphedStep:
    """Calls ``step``: directly at first and off CUDA, from a captured graph afterwards.

    ``step`` takes nothing, what it returns is dropped, and it writes its results into tensors that outlive it;
    it must draw its random numbers from the default generator or from ``generators``, make no tensor from host
    values and never wait for the device. The first ``warmup`` calls (at least one) run as they are: libraries
    set themselves up and kernels are tuned then.
    """

    def __init__(
        self,
        step: Callable[[], object],
        device: torch.device,
        generators: Sequence[torch.Generator] = (),
        warmup: int = WARMUP,
    ) -> None:
        self.step, self.device, self.generators, self.warmup = step, device, generators, warmup
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        self.calls += 1
        if self.device.type != "cuda":
            self.step()
        elif self.calls <= self.warmup:
            self._aside()
        else:
            if self.graph is None:
                self.graph = self._capture()
            self.graph.replay()

    def _aside(self) -> None:
        # capture wants what it records to have run on a side stream before (libraries set themselves up there)
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self.step()
        current.wait_stream(side)

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            self.step()
        return graph
