"""CUDA graphs of what a test calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Found = TypeVar("Found")


def captured(step: Callable[[], Found]) -> tuple[Callable[[], None], Found]:
    """What replays ``step``, and the result that every replay writes anew.

    The step is called once before it is captured, on a side stream as a capture wants it: kernels are compiled and
    tuned then. Its result holds nothing before the first replay.
    """
    side, usual = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(usual)
    with torch.cuda.stream(side):
        step()
    usual.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    return graph.replay, found
