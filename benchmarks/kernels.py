"""The benchmarks of all kernels: each ``benchmarks/<kernel>.py`` is found by its name and brings its ``cases()``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from ..engine.errors import InputError
from ..engine.files import staged, write_json
from .harness import Case, OnCase, Report, measure, need_cuda

FILE = "kernels"
"""Name of the written files, without suffix."""


def benchmarked() -> list[str]:
    """Kernels that have a benchmark of their name."""
    kernels, benchmarks = (
        {module.name for module in iter_modules(import_module(folder, __package__).__path__)}
        for folder in ("..kernels", ".")
    )
    return sorted(kernels & benchmarks)


def cases(names: Sequence[str] = ()) -> Iterator[Case]:
    """The cases of these kernels, or of all of them. Raises :class:`InputError` for an unknown name."""
    known = benchmarked()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"no benchmark of {', '.join(unknown)}; there are {', '.join(known)}")
    for name in names or known:
        yield from import_module(f".{name}", __package__).cases()


def run(names: Sequence[str] = (), on_case: OnCase | None = None) -> Report:
    """Measure on the current CUDA device. Raises :class:`InputError` without one, and for an unknown name."""
    need_cuda()
    return measure(cases(names), on_case)


def write(report: Report, folder: Path) -> list[Path]:
    """``kernels.json`` and, where matplotlib is installed, ``kernels.png`` in ``folder``; the files written.

    Raises :class:`InputError` if ``folder`` cannot be written.
    """
    written = [folder / f"{FILE}.json"]
    write_json(written[0], report.to_dict())
    try:
        from .plot import figure

        drawn = figure(report)
    except ImportError:
        return written
    with staged(folder) as stage:
        drawn.savefig(stage / f"{FILE}.png", dpi=110)
    return [*written, folder / f"{FILE}.png"]
