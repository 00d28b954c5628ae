"""The model repository for Triton Inference Server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from exports import copied, exported
from test_manifest import make_manifest

from imagedream_rt.engine.errors import InputError
from imagedream_rt.export import preflight
from imagedream_rt.export.server_repo import config, write_server_repo

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def test_onnx_model_runs_from_the_repository(tmp_path: Path) -> None:
    names = write_server_repo(tmp_path, [exported("image_adaptor", dtype=torch.float16)], [])
    assert names == ["image_adaptor"]
    text = (tmp_path / "image_adaptor" / "config.pbtxt").read_text(encoding="utf-8")
    assert 'backend: "onnxruntime"' in text
    assert re.search(
        r'input \[\s+{\s+name: "image_hidden"\s+data_type: TYPE_FP16\s+dims: \[ -1, 17, 80 \]', text
    )
    assert re.search(
        r'output \[\s+{\s+name: "image_tokens"\s+data_type: TYPE_FP16\s+dims: \[ -1, 4, 64 \]', text
    )
    model = tmp_path / "image_adaptor" / "1" / "model.onnx"
    opened = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    (found,) = opened.run(None, {"image_hidden": torch.zeros(3, 17, 80).half().numpy()})
    assert found.shape == (3, 4, 64)


def test_plan_is_there_without_taking_room(tmp_path: Path) -> None:
    plan = tmp_path / "unet.sm80.plan"
    plan.write_bytes(b"a plan of TensorRT")
    make_manifest(plan.read_bytes()).save(plan)
    repository = tmp_path / "repository"
    assert write_server_repo(repository, [], [plan]) == ["unet_sm80"]
    text = (repository / "unet_sm80" / "config.pbtxt").read_text(encoding="utf-8")
    assert 'backend: "tensorrt"' in text
    assert "dims: [ 2, 5, 4, 16, 16 ]" in text
    placed = repository / "unet_sm80" / "1" / "model.plan"
    assert placed.read_bytes() == plan.read_bytes()
    assert placed.samefile(plan)


def test_again_replaces(tmp_path: Path) -> None:
    path = copied(exported("image_adaptor"), tmp_path)
    write_server_repo(tmp_path / "repository", [path], [])
    assert write_server_repo(tmp_path / "repository", [path], []) == ["image_adaptor"]


def test_a_batch_that_varies_is_a_free_size() -> None:
    spec = [{"name": "x", "dtype": "int64", "shape": ["batch", 77]}]
    assert "dims: [ -1, 77 ]" in config("a", "tensorrt", spec, spec, (1, 2, 8))
    assert "data_type: TYPE_INT64" in config("a", "tensorrt", spec, spec, (1, 2, 8))


def test_too_little_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(InputError, match="not enough disk: the server repository takes about"):
        write_server_repo(tmp_path, [exported("image_adaptor")], [])
