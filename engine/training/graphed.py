"""A training step as one CUDA graph: launching a small model's hundreds of kernels takes longer than running them."""

from __future__ import annotations

from collections.abc import Callable

import torch

WARMUP = 4


class GraphedStep:
    """Calls ``step``: directly at first and off CUDA, from a captured graph afterwards.

    ``step`` takes nothing, returns nothing and writes its results into tensors that outlive it; it must draw its
    random numbers from the default generator, make no tensor from host values and never wait for the device.
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self.step, self.device, self.calls = step, device, 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        self.calls += 1
        if self.device.type != "cuda":
            self.step()
        elif self.calls <= WARMUP:
            self._aside()
        else:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self.step()
            self.graph.replay()

    def _aside(self) -> None:
        # capture wants what it records to have run on a side stream before (libraries set themselves up there)
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self.step()
        current.wait_stream(side)
