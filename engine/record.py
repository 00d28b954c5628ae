"""The record of one job, as ``metadata.json`` keeps it: what went in, what ran it, how long it took."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from .doctor import environment
from .model import MultiViewModel
from .picture import PreparedPicture


class Record:
    """Collects :attr:`metadata` while a job runs; ``timings_s`` has one entry per stage, in their order."""

    def __init__(self, device: torch.device, before: dict[str, Any] | None = None) -> None:
        """``before``: the metadata of a job that this one continues."""
        self._device = device
        before = before or {}
        self.metadata: dict[str, Any] = {
            **before,
            "environment": environment(str(device)),
            "timings_s": dict(before.get("timings_s", {})),
        }

    def note_model(self, model: MultiViewModel) -> None:
        """Which checkpoint, with its controller and why that one."""
        self.metadata["model"] = {
            **asdict(model.card),
            "frames": model.frames,
            "dtype": str(model.dtype).removeprefix("torch."),
        }

    def note_picture(self, picture: PreparedPicture | None) -> None:
        """What the networks were shown; its hash tells whether two jobs saw the same."""
        if picture is None:
            self.metadata["picture"] = None
            return
        self.metadata["picture"] = {
            "sha256_prepared": hashlib.sha256(picture.rgba.tobytes()).hexdigest(),
            "side_px": picture.rgba.shape[0],
            "notes": list(picture.notes),
        }

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Note the wall time of the body; waits for the GPU, so that its work counts here."""
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.metadata["timings_s"][stage] = round(time.perf_counter() - start, 3)
