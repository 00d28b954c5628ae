"""The benchmarks of all kernels: each ``benchmarks/<kernel>.py`` is found by its name and brings its ``cases()``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from ..engine.errors import InputError
from ..engine.files import write_json
from .harness import Case, OnCase, Report, Row, measure, need_cuda
from .plot import kernels_figure, write_figure

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
    for name in _chosen(names):
        yield from import_module(f".{name}", __package__).cases()


def _chosen(names: Sequence[str]) -> Sequence[str]:
    known = benchmarked()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"no benchmark of {', '.join(unknown)}; there are {', '.join(known)}")
    return names or known


def run(folder: Path, names: Sequence[str] = (), on_case: OnCase | None = None) -> Report:
    """Measure on the current CUDA device, one kernel after the other.

    After each kernel ``kernels.json`` in ``folder`` is written. Rows of kernels that are not measured stay in it
    if they are of the same device and versions; a peer may have been installed since. Raises :class:`InputError`
    without a CUDA device, for an unknown name, and if ``folder`` cannot be written.
    """
    need_cuda()
    chosen = _chosen(names)
    path = folder / f"{FILE}.json"
    for name in chosen:
        report = _with_others(measure(cases([name]), on_case), path)
        write_json(path, report.to_dict())
    return report


def _with_others(report: Report, path: Path) -> Report:
    """The report, and what the file says of other kernels under the same conditions."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        earlier = Report(**{**given, "rows": [Row(**row) for row in given["rows"]]})
        both = earlier.versions.keys() & report.versions.keys()
        changed = {name for name in both if earlier.versions[name] != report.versions[name]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return report
    if changed or replace(earlier, rows=[], versions={}) != replace(report, rows=[], versions={}):
        return report
    measured = {row.kernel for row in report.rows}
    others = [row for row in earlier.rows if row.kernel not in measured]
    rows = sorted(report.rows + others, key=lambda row: row.kernel)
    return replace(report, rows=rows, versions={**earlier.versions, **report.versions})


def draw(report: Report, folder: Path) -> list[Path]:
    """``kernels.png`` beside ``kernels.json`` in ``folder``, where matplotlib is installed; the files there are.

    Raises :class:`InputError` if ``folder`` cannot be written.
    """
    picture = write_figure(folder / f"{FILE}.png", lambda: kernels_figure(report))
    return [folder / f"{FILE}.json", *picture]
