"""A plan is refused before it is deserialized, with one sentence, if anything about it does not fit."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from imagedream_rt.engine.errors import InputError
from imagedream_rt.export.manifest import PlanManifest, Source, check_plan, manifest_path, read_manifest

HERE = {"flavour": "tensorrt", "version": "10.13.0", "architecture": "sm80", "platform": "Linux x86_64"}


def make_manifest(content: bytes) -> PlanManifest:
    return PlanManifest(
        component="unet",
        source=Source("builtin:nano", "abc", "pixel", 5),
        dtype="float16",
        inputs=[{"name": "sample", "shape": ["batch", 5, 4, 16, 16], "dtype": "float16"}],
        outputs=[{"name": "latent", "shape": ["batch", 5, 4, 16, 16], "dtype": "float16"}],
        profile=(2, 2, 2),
        flavour="tensorrt",
        version="10.13.0",
        architecture="sm80",
        platform="Linux x86_64",
        driver="580.1",
        onnx_sha256="def",
        onnx_error=1e-3,
        layers={"total": 1, "types": {}, "fused_attention": 0},
        build_s=1.0,
        build_peak_bytes=None,
        size_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        refit=False,
        stripped=False,
        weights={},
        rebuild="imagedream-rt export unet.onnx --tensorrt tensorrt",
    )


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "unet.sm80.plan"
    path.write_bytes(b"a plan of TensorRT")
    make_manifest(path.read_bytes()).save(path)
    return path


def test_round_trip(plan: Path) -> None:
    found = read_manifest(plan)
    assert found == make_manifest(plan.read_bytes())
    check_plan(plan, found, **HERE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "sm90"}, "was built for sm80, and this GPU is sm90"),
        ({"architecture": None}, "was built for sm80, and there is no CUDA device here"),
        ({"version": "10.14.1"}, r"was built by tensorrt 10.13.0, and here is tensorrt 10.14.1"),
        ({"flavour": "tensorrt_rtx"}, "was built by tensorrt 10.13.0, and here is tensorrt_rtx 10.13.0"),
        ({"platform": "Windows AMD64"}, "was built on Linux x86_64, and this is Windows AMD64"),
    ],
)
def test_refuses_what_does_not_belong_here(plan: Path, change: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message + r"; rebuild it here: imagedream-rt export unet.onnx"):
        check_plan(plan, read_manifest(plan), **{**HERE, **change})


def test_plans_of_tensorrt_rtx_move_between_systems(plan: Path) -> None:
    moved = replace(read_manifest(plan), platform="any")
    check_plan(plan, moved, **{**HERE, "platform": "Windows AMD64"})


def test_refuses_a_changed_byte(plan: Path) -> None:
    content = bytearray(plan.read_bytes())
    content[3] ^= 1
    plan.write_bytes(content)
    with pytest.raises(InputError, match=r"is not what its manifest was written for \(its SHA-256 differs\)"):
        check_plan(plan, read_manifest(plan), **HERE)


def test_refuses_a_truncated_plan(plan: Path) -> None:
    plan.write_bytes(plan.read_bytes()[:-1])
    with pytest.raises(InputError, match="has 17 bytes, and its manifest says 18"):
        check_plan(plan, read_manifest(plan), **HERE)


def test_refuses_a_missing_plan(plan: Path) -> None:
    plan.unlink()
    with pytest.raises(InputError, match="is not there; rebuild it here"):
        check_plan(plan, read_manifest(plan), **HERE)


def test_a_plan_without_manifest(plan: Path) -> None:
    manifest_path(plan).unlink()
    with pytest.raises(InputError, match=r"has no manifest \(unet.sm80.plan.json\)"):
        read_manifest(plan)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 1, "component": "unet"}'])
def test_a_damaged_manifest(plan: Path, text: str) -> None:
    manifest_path(plan).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="is damaged"):
        read_manifest(plan)


def test_a_manifest_of_the_future(plan: Path) -> None:
    path = manifest_path(plan)
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}), encoding="utf-8")
    with pytest.raises(InputError, match="has format 2, and this version reads 1"):
        read_manifest(plan)
