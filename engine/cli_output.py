"""What the command line says: progress and errors on stderr; results on stdout, as lines or as JSON."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from .weights import ModelInfo

MESH_SUFFIXES = (".glb", ".obj", ".ply")

STAGES = {
    "prepare": "prepare the picture",
    "views": "diffuse four views",
    "warm-start": "fit the field to views",
    "condition": "condition on every grey",
    "fuse": "fuse (MV-SDS)",
    "mesh": "extract the mesh",
    "files": "write the files",
    "warm-up": "run and tune the kernels",
}


class Stages:
    """Progress bars on stderr, one for each stage; silent when it is no terminal. Is an ``on_progress``."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            redirect_stdout=False,
        )
        self._tasks: dict[str, TaskID] = {}
        self._tuning = self._bars.add_task("", visible=False)

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(STAGES.get(stage, stage), total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)

    def tuning(self, what: str, done: int, total: int) -> None:
        """A bar that is there only while a kernel's launch configuration is being chosen."""
        self._bars.update(
            self._tuning, description=what, completed=done, total=total, visible=done < total, refresh=True
        )

    def __enter__(self) -> Stages:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()


@contextmanager
def only_our_words(debug: bool) -> Iterator[None]:
    """Keep stdout for results: what libraries print goes to stderr; their warnings show only with ``debug``.

    Warnings of this package become one line each on stderr.
    """

    def show(message: Warning | str, category: type, filename: str, lineno: int, *_: object) -> None:
        if debug or f"imagedream_rt{os.sep}" in filename:
            print(f"warning: {message}", file=sys.stderr)

    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def set_up_libraries() -> None:
    """Environment of libraries, before they are imported: no chatter on stderr, and threads that sleep while they wait.

    OpenMP's threads otherwise spin between operations, and on a machine that has anything else to do a fusion then
    takes several times as long. The user's own settings stay.
    """
    for name, value in {
        "OMP_WAIT_POLICY": "passive",
        "TRANSFORMERS_VERBOSITY": "error",
        "DIFFUSERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, indent=2, default=str), flush=True)


def print_outcome(paths: Sequence[Path], values: dict[str, Any]) -> None:
    """The written files, and other values, as one JSON object on stdout."""
    print_json({"files": [str(path) for path in paths], **values})


def print_files(files: dict[Path, str]) -> None:
    """A line per written file on stdout: its path and what it holds."""
    width = max(len(str(path)) for path in files)
    for path, what in files.items():
        print(f"{path!s:<{width}}  {what}")


def print_table(title: str, rows: Sequence[tuple[str, ...]]) -> None:
    """An aligned table on stdout."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    for _ in rows[0]:
        table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    # Without a terminal there is no width to fit into.
    width = None if sys.stdout.isatty() else 160
    Console(highlight=False, markup=False, width=width).print(table)


def print_error(message: str, exit_code: int, as_json: bool) -> None:
    """The one sentence of a failure: on stderr, and with ``as_json`` also as the JSON object on stdout."""
    if as_json:
        print_json({"error": message, "exit_code": exit_code})
    print(f"error: {message}", file=sys.stderr, flush=True)


_CONTENT = {
    "views.png": "the prompt and the views at 0 (front), 90, 180 and 270 degrees",
    "turntable.mp4": "one turn around the fused NeRF",
    "asset.glb": "textured mesh",
    "nerf.safetensors": "the fused NeRF, for the command mesh",
    "preview.png": "the fused NeRF from its four sides",
    "metadata.json": "seed, versions, settings, timings",
}


def print_written(paths: list[Path], metadata: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_outcome(paths, metadata)
        return
    contents = {path: _CONTENT.get(path.name, "textured mesh") for path in paths}
    if report := metadata.get("mesh"):
        closed = "watertight" if report["watertight"] else "not watertight"
        for path in paths:
            if path.suffix in MESH_SUFFIXES:
                contents[path] += f", {report['faces']} triangles, {closed}"
    print_files(contents)


def print_info(info: ModelInfo, as_json: bool) -> None:
    """What a checkpoint is."""
    if as_json:
        print_json(asdict(info))
        return
    card, side, latent = info.card, info.card.picture_px, info.latent_px
    rows = [
        ("family", card.family),
        ("layout", card.layout),
        ("controller", f"{card.controller} ({card.controller_reason})"),
        ("frames", str(info.frames)),
        ("picture", f"{side} x {side} px, latents {latent} x {latent}"),
    ]
    for part in info.parts:
        rows.append((part.name, f"{part.parameters / 1e6:.2f} M parameters, {', '.join(part.dtypes)}"))
    print_table(card.name, [*rows, ("sha256", card.sha256)])


def print_doctor(report: dict[str, Any], as_json: bool) -> None:
    """What this machine offers, in tables."""
    if as_json:
        print_json(report)
        return
    devices = []
    for found in report["devices"]:
        memory = f"{found['memory_gib']} GiB" if found["memory_gib"] else ""
        devices.append((found["device"], found["name"], memory, found["says"]))
    print_table(f"devices (auto is {report['default_device']})", devices)
    print_table("\nversions", [(name, str(value)) for name, value in report["versions"].items() if value])
    packages = [
        (package["package"], package["state"], package["version"] or "", package["says"])
        for package in report["packages"]
    ]
    print_table("\npackages", packages)
    print_table("\nkernels", list(report["kernels"].items()))
    print_table("\nbackends (--backend COMPONENT=NAME)", _backends(report["backends"]))
    if tuned := report["tuned"]:
        print(f"{tuned['configurations']} tuned launch configurations in {tuned['file']}")


def _backends(found: dict[str, dict[str, Any]]) -> list[tuple[str, str, str]]:
    """By component: what is taken unless another is asked for, and the others."""
    rows = []
    for component, offered in found.items():
        others = [f"{name} ({reason})" if reason else name for name, reason in offered["others"].items()]
        rows.append((component, offered["auto"], f"or {', '.join(others)}"))
    return rows
