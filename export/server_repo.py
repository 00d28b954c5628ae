"""A model repository for Triton Inference Server, of exported files.

One model for each file: ``<component>/config.pbtxt`` and ``<component>/1/model.onnx``, or ``1/model.plan`` for a
plan, whose model is called ``<component>_<architecture>``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..engine.files import check_writable_folder, staged
from .manifest import read_manifest
from .onnx_graph import read_metadata
from .onnx_report import data_path
from .preflight import check_disk

_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16", "int64": "TYPE_INT64"}


def write_server_repo(folder: Path, onnx: Sequence[Path], plans: Sequence[Path]) -> list[str]:
    """Add each file to the repository ``folder``; returns the models' names. Plans are hard links where the
    file system has them; ONNX files are copies, because onnx takes linked weights for an attack.

    Of a component both as ONNX and as plan, the two are models of their own.

    Raises :class:`InputError` where nothing can be written, or there is too little disk for copies.
    """
    check_writable_folder(folder)
    needed = sum(path.stat().st_size for path in (*onnx, *plans, *map(data_path, onnx)))
    check_disk(folder, needed, "the server repository")
    names = []
    for path in onnx:
        about = read_metadata(path)
        _write_model(
            folder, path.stem, config(path.stem, "onnxruntime", about["inputs"], about["outputs"], None)
        )
        version = folder / path.stem / "1"
        shutil.copyfile(path, version / "model.onnx")
        # The graph knows its weights by this name.
        shutil.copyfile(data_path(path), version / data_path(path).name)
        names.append(path.stem)
    for path in plans:
        manifest = read_manifest(path)
        name = f"{manifest.component}_{manifest.architecture}"
        _write_model(
            folder, name, config(name, "tensorrt", manifest.inputs, manifest.outputs, manifest.profile)
        )
        _link(path, folder / name / "1" / "model.plan")
        names.append(name)
    return names


def config(
    name: str,
    backend: str,
    inputs: Sequence[dict[str, Any]],
    outputs: Sequence[dict[str, Any]],
    profile: tuple[int, int, int] | None,
) -> str:
    """``config.pbtxt``. Where the batch can vary (``profile`` None: without limit) the server sees it as a size of
    its own among the dims; batching requests together is left to who knows the traffic."""
    static = profile is not None and profile[0] == profile[2]
    batch = profile[0] if static and profile is not None else -1

    def described(kind: str, specs: Sequence[dict[str, Any]]) -> str:
        entries = [
            f'  {{\n    name: "{spec["name"]}"\n    data_type: {_TYPES[spec["dtype"]]}\n'
            f"    dims: [ {', '.join(map(str, [batch, *spec['shape'][1:]]))} ]\n  }}"
            for spec in specs
        ]
        return f"{kind} [\n" + ",\n".join(entries) + "\n]\n"

    return (
        f'name: "{name}"\nbackend: "{backend}"\nmax_batch_size: 0\n'
        + described("input", inputs)
        + described("output", outputs)
        + "instance_group [\n  {\n    count: 1\n    kind: KIND_GPU\n  }\n]\n"
    )


def _write_model(folder: Path, name: str, text: str) -> None:
    with staged(folder / name) as stage:
        (stage / "config.pbtxt").write_text(text, encoding="utf-8")
    (folder / name / "1").mkdir(exist_ok=True)


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
