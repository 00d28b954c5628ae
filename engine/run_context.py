"""Contexts that work runs in: its device, bit-reproducible arithmetic, interrupts between steps only."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch


def current(device: torch.device) -> AbstractContextManager[object]:
    """A CUDA device as this thread's current one: Triton, streams and graphs run there, wherever their tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def deterministic(device: torch.device, asked: bool = False) -> Iterator[None]:
    """Deterministic algorithms, so that a run can be repeated bit by bit; restored afterwards.

    Always on the CPU, where they cost little, elsewhere only if ``asked`` (``docs/determinism.md``).
    """
    if device.type != "cpu" and not asked:
        yield
        return
    if device.type == "cuda":
        # PyTorch wants it said before it multiplies matrices; it gives cuBLAS a fixed workspace either way.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic  # a module whose attributes its type does not show
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Costs a pass over every fresh tensor, and none is read before it is written.
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill


@contextmanager
def interrupt_between_steps() -> Iterator[Callable[[], bool]]:
    """Yields a question: has Ctrl-C been pressed? The first one only sets the answer, a second one
    interrupts.

    A step torn apart by an exception could not be resumed from. Where signals cannot be handled (outside the
    main thread) the answer stays no.
    """
    pressed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.default_int_handler)
