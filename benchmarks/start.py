"""How long a fresh process takes to full speed: the first one, and the next, which finds what the first has kept.

The first has empty caches (compiled kernels, tuned launches, torch.compile's files). A process is at full speed when
all that a job runs has run once: :func:`~..engine.warmup.warm_up`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..engine.backends import Backends
from ..engine.config import preset as preset_named
from ..engine.errors import InputError
from ..engine.open_model import open_model
from ..engine.pipeline import ImageTo3D
from ..engine.warmup import made_up_prompt, warm_up
from ..engine.weights import pick_device
from .harness import versions

CACHES = ("IMAGEDREAM_RT_CACHE", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


@dataclass(frozen=True)
class Start:
    """One process; seconds since it was started."""

    caches: str
    """``empty``, or ``kept`` from the process before."""
    imported_s: float
    loaded_s: float
    """The model is on its device."""
    ready_s: float
    """All that a job of the preset runs has run once."""
    views_ms: float
    """Of four views from then on: one call."""


@dataclass(frozen=True)
class StartReport:
    """Two processes, one after the other."""

    model: str
    preset: str
    backends: dict[str, str]
    device: str
    versions: dict[str, str]
    rows: list[Start]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(
    model: str = "random:full",
    preset: str = "official",
    device: str = "auto",
    backend: Sequence[str] = (),
    *,
    on_row: Callable[[Start], None] | None = None,
) -> StartReport:
    """Start two processes, with backends as ``COMPONENT=NAME``.

    Raises :class:`InputError` for a model, preset, device or backend that is not there, and if a process fails, with
    its last words.
    """
    Backends.parse(backend)
    preset_named(preset)
    pick_device(device)
    open_model(model, None)
    rows: list[Start] = []
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, **{name: str(Path(folder, name.lower())) for name in CACHES}}
        for caches in ("empty", "kept"):
            command = [sys.executable, "-m", __name__, str(time.time()), model, preset, device, *backend]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
                raise InputError(f"a process with {model} on {device} failed: {words[-1]}")
            found = json.loads(done.stdout.splitlines()[-1])
            rows.append(Start(caches, **found["times"]))
            if on_row is not None:
                on_row(rows[-1])
    return StartReport(model, preset, found["backends"], found["device"], versions(), rows)


def _process(began: float, model: str, preset: str, device: str, backend: Sequence[str]) -> dict[str, Any]:
    """What a process that was started at ``began`` finds of itself."""
    times = {"imported_s": time.time() - began}
    pipe = ImageTo3D.from_pretrained(model, device, backends=Backends.parse(backend))
    times["loaded_s"] = time.time() - began
    warm_up(pipe, preset)
    times["ready_s"] = time.time() - began
    record = pipe.views(made_up_prompt(pipe.model), "a ball").metadata
    times["views_ms"] = record["timings_s"]["views"] * 1e3
    return {"times": times, "backends": asdict(pipe.used), "device": record["environment"]["device_name"]}


if __name__ == "__main__":
    moment, a_model, a_preset, a_device, *names = sys.argv[1:]
    print(json.dumps(_process(float(moment), a_model, a_preset, a_device, names)))
