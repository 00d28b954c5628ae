"""Choosing launch configurations: the fastest of a few candidates, measured once for each device and shape.

What was measured is kept in a file for each device, so that the next process starts with it. Without a
measurement (in the interpreter, or while a CUDA graph is being captured) the first candidate is used, so a
kernel's candidates begin with the best general choice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ._triton import interpreted, triton

Key = tuple[Hashable, ...]

Report = Callable[[str, int, int], None]
"""``report(what, done, total)``, before each measurement and, with ``done`` equal to ``total``, at the end."""


@dataclass(frozen=True)
class Launch:
    """One way to launch a kernel: compile-time constants, warps and pipeline stages."""

    constants: tuple[tuple[str, int], ...]
    warps: int = 4
    stages: int = 2

    @classmethod
    def of(cls, warps: int = 4, stages: int = 2, **constants: int) -> Launch:
        return cls(tuple(constants.items()), warps, stages)

    def __getitem__(self, name: str) -> int:
        return dict(self.constants)[name]

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of the kernel call."""
        return {**dict(self.constants), "num_warps": self.warps, "num_stages": self.stages}

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={value}" for name, value in self.constants)
        return f"{sizes} warps={self.warps} stages={self.stages}"


class Tuned:
    """The choice among a kernel's candidates, remembered for each device and key.

    ``kernel`` is the jitted function: a change of its source makes old measurements void.
    """

    def __init__(self, name: str, kernel: Any, candidates: Callable[..., Sequence[Launch]]) -> None:
        self.name = name
        self.kernel = kernel
        self.candidates = candidates
        self._chosen: dict[tuple[int, Key], Launch] = {}

    def choose(self, device: torch.device, key: Key, run: Callable[[Launch], None]) -> Launch:
        """The launch for ``key``, the arguments of ``candidates``.

        ``run`` launches the kernel once and may be called often, at first from several threads: what it writes
        must not depend on what was there before.
        """
        index = device.index or 0
        if launch := self._chosen.get((index, key)):
            return launch
        candidates = self.candidates(*key)
        if interpreted() or device.type != "cuda":
            return candidates[0]
        if len(candidates) > 1:
            path, entry = cache_file(device), self._entry(key)
            names = {str(candidate): candidate for candidate in candidates}
            launch = names.get(_read(path).get(entry, ""))
            if launch is None:
                if torch.cuda.is_current_stream_capturing():
                    return candidates[0]
                launch = self._measure(device, key, candidates, run)
                _write(path, entry, str(launch))
        else:
            launch = candidates[0]
        self._chosen[(index, key)] = launch
        return launch

    def _measure(
        self, device: torch.device, key: Key, candidates: Sequence[Launch], run: Callable[[Launch], None]
    ) -> Launch:
        times: dict[Launch, float] = {}
        what = f"tuning {self.name} for {', '.join(map(str, key))}"
        _report(what, 0, len(candidates))
        _build(device, candidates, run)
        for number, candidate in enumerate(candidates):
            _report(what, number, len(candidates))
            with _unless_too_large():
                run(candidate)
                # The clock runs on a stream of its own. What is queued on this one may still read memory that was
                # free, in its order, to be given to the kernel's results.
                torch.cuda.synchronize(device)
                times[candidate] = triton.testing.do_bench_cudagraph(
                    lambda candidate=candidate: run(candidate), rep=5, return_mode="median"
                )
        _report(what, len(candidates), len(candidates))
        if not times:
            raise RuntimeError(f"no configuration of {self.name} runs on this device for {key}")
        return min(times, key=times.__getitem__)

    def _entry(self, key: Key) -> str:
        return f"{self.name}({', '.join(map(str, key))}) {_source_hash(self.kernel)}"


def _build(device: torch.device, candidates: Sequence[Launch], run: Callable[[Launch], None]) -> None:
    """Launch every candidate once, from a thread each: compiling takes far longer than measuring does."""
    stream = torch.cuda.current_stream(device)

    def build(candidate: Launch) -> None:
        with torch.cuda.stream(stream), _unless_too_large():
            run(candidate)

    # A thread has no CUDA context before its first call of the runtime, and tensor descriptors are made with one.
    with ThreadPoolExecutor(
        os.cpu_count() or 1, initializer=torch.cuda.synchronize, initargs=(device,)
    ) as threads:
        list(threads.map(build, candidates))


def _unless_too_large() -> contextlib.AbstractContextManager[None]:
    """A candidate may ask for more shared memory or registers than a device has."""
    return contextlib.suppress(triton.runtime.errors.OutOfResources, triton.CompilationError)


def cache_folder() -> Path:
    """Where this package keeps what the next process starts with; IMAGEDREAM_RT_CACHE moves it."""
    folder = os.environ.get("IMAGEDREAM_RT_CACHE")
    return Path(folder) if folder else Path.home() / ".cache" / "imagedream_rt"


def cache_file(device: torch.device) -> Path:
    """Where the choices for a device are kept."""
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name(device)).strip("-")
    return cache_folder() / f"tuned-{name}-triton-{triton.__version__}.json"


def tuned_count(device: torch.device) -> int:
    """How many choices the cache file of a CUDA device holds."""
    return len(_read(cache_file(device)))


def compiled_folder() -> Path:
    """Where Triton keeps compiled kernels."""
    folder = os.environ.get("TRITON_CACHE_DIR")
    home = os.environ.get("TRITON_HOME")
    return Path(folder) if folder else (Path(home) if home else Path.home()) / ".triton" / "cache"


def _source_hash(kernel: Any) -> str:
    return hashlib.sha256(str(kernel.cache_key).encode()).hexdigest()[:12]


def _read(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {entry: launch for entry, launch in found.items() if isinstance(launch, str)}


def _write(path: Path, entry: str, launch: str) -> None:
    """Add one choice. A folder that cannot be written only costs the next process its start."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({**_read(path), entry: launch}, indent=1, sort_keys=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            file.write(content)
        os.replace(file.name, path)


def _say(what: str, done: int, total: int) -> None:
    """One line that overwrites itself, where somebody looks."""
    if sys.stderr.isatty():
        line = "" if done == total else f"{what}: {done + 1} of {total}"
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()


_report: Report = _say
# Backward kernels are tuned in autograd's threads, which see no context variable of the caller's.


@contextlib.contextmanager
def report_to(report: Report) -> Iterator[None]:
    """Say what is being tuned to ``report``, in the whole process, in place of a line on stderr."""
    global _report
    before, _report = _report, report
    try:
        yield
    finally:
        _report = before
