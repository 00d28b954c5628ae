"""The commands of the export, on the embedded model: files, plans, repository, verification, report, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import CommandLine
from exports import copied, exported, shared_folder

from imagedream_rt.engine import _optional
from imagedream_rt.export import flavours, preflight
from imagedream_rt.export.manifest import read_manifest
from imagedream_rt.export.onnx_report import OnnxReport

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def nano(run: CommandLine) -> Path:
    """``builtin:nano`` with plans for SM80 and SM89, and a server repository; made once."""
    folder = shared_folder() / "nano"
    if not folder.exists():
        ran = run(
            *("export", "builtin:nano", "-o", folder, "--components", "unet,image_adaptor,vae_decoder"),
            *("--sm", "80,89", "--server-repo", folder / "repository", "--json"),
        )
        assert ran.code == 0, ran.err
        (folder / "said.json").write_text(ran.out, encoding="utf-8")
    return folder


def test_embedded_model(nano: Path) -> None:
    said = json.loads((nano / "said.json").read_text(encoding="utf-8"))
    assert sorted(Path(path).name for path in said["onnx"]) == [
        "image_adaptor.onnx",
        "unet.onnx",
        "vae_decoder.onnx",
    ]
    for path, found in said["onnx"].items():
        assert found["check"]["worst"] <= 5e-3
        assert OnnxReport.read(Path(path)).source.model == "builtin:nano"
    assert len(said["plans"]) == 6
    unet = read_manifest(nano / "unet.sm80.plan")
    assert len(unet.source.sha256) == 64
    assert unet.source.frames == 5
    assert unet.layers["fused_attention"] >= 10  # each transformer's self-attention
    assert "unet_sm89" in said["server_repo"]
    assert (nano / "repository" / "unet_sm89" / "1" / "model.plan").is_file()


def test_verify(run: CommandLine, nano: Path) -> None:
    """Without a GPU the ONNX files are compared and the plans are named as not compared."""
    ran = run("verify", nano, "--json")
    assert ran.code == 0, ran.err
    found = ran.json()
    assert {
        finding["file"]: finding["problem"] for finding in found["findings"] if finding["kind"] == "onnx"
    } == {
        "image_adaptor.onnx": None,
        "unet.onnx": None,
        "vae_decoder.onnx": None,
    }
    if not torch.cuda.is_available():
        assert len(found["skipped"]) == 6
    assert json.loads((nano / "verify.json").read_text(encoding="utf-8")) == found


def test_verify_finds_a_changed_file(run: CommandLine, tmp_path: Path) -> None:
    path = copied(exported("image_adaptor", dtype=torch.float16), tmp_path)
    data = path.with_name(f"{path.name}.data")
    content = bytearray(data.read_bytes())
    content[1] ^= 1
    data.write_bytes(content)
    ran = run("verify", tmp_path)
    assert ran.code == 1
    assert "is not what its report was written for" in ran.out
    assert "1 of 1 files failed: image_adaptor.onnx" in ran.err


def test_bench(run: CommandLine, nano: Path) -> None:
    ran = run("bench", "export", nano, "--component", "image_adaptor")
    assert ran.code == 0, ran.err
    assert "PyTorch eager" in ran.out
    assert "onnxruntime (CPU)" in ran.out
    report = json.loads((nano / "bench.json").read_text(encoding="utf-8"))
    assert all(row["error"] < 5e-3 for row in report["rows"] if row["problem"] is None)
    assert report["rows"][0]["median_ms"] > 0


def test_report_to_send(run: CommandLine, tmp_path: Path) -> None:
    ran = run("export", "random:tiny", "-o", tmp_path, "--components", "image_adaptor", "--report")
    assert ran.code == 0, ran.err
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["verify"]["findings"][0]["problem"] is None
    assert "device_name" in report["verify"]["machine"]


def test_plans_of_an_onnx_file(run: CommandLine, tmp_path: Path) -> None:
    path = copied(exported("image_adaptor", dtype=torch.float16), tmp_path)
    ran = run("export", path, "--sm", "86", "--profile", "1,2,4")
    assert ran.code == 0, ran.err
    assert "batch 1/2/4" in ran.out
    assert read_manifest(tmp_path / "image_adaptor.sm86.plan").architecture == "sm86"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sm", "90"], "unknown architecture '90'"),
        (["--sm", "80", "--profile", "4,2,1"], "must be at least 1 and ascend"),
        (["--sm", "80", "--profile", "1,2"], "give the least, usual and greatest batch"),
        (["--sm", "80", "--profile", "one"], "give the least, usual and greatest batch"),
        (["--sm", "80", "--profile", "99"], "batches of up to 32"),
        (["--tensorrt", "trt"], "unknown TensorRT flavour 'trt'; there are tensorrt, tensorrt_rtx"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--components", "unet,vae"], "unknown component 'vae'"),
        (["--sm", "80", "--strip-weights"], "needs --refit"),
        (["--controller", "no"], "unknown controller 'no'"),
    ],
)
def test_bad_input(run: CommandLine, tmp_path: Path, arguments: list[str], message: str) -> None:
    ran = run("export", "random:tiny", "-o", tmp_path / "new", *arguments)
    assert ran.code == 2
    assert message in ran.err
    assert not (tmp_path / "new").exists()


def test_missing_tensorrt(run: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flavours, "installed", lambda module: False)
    ran = run("export", "random:tiny", "-o", tmp_path, "--sm", "80")
    assert ran.code == 2
    assert 'pip install "imagedream-rt[tensorrt]"' in ran.err
    assert '"imagedream-rt[tensorrt-rtx]"' in ran.err


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_package(
    run: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    there = _optional.installed
    monkeypatch.setattr(_optional, "installed", lambda module: module != package and there(module))
    ran = run("export", "random:tiny", "-o", tmp_path / "new", "--components", "image_adaptor")
    assert ran.code == 2
    assert f"{package} is not installed; it is needed to" in ran.err
    assert 'pip install "imagedream-rt[export]"' in ran.err


def test_old_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    module = type("Old", (), {"__version__": "10.12.0"})
    monkeypatch.setattr(flavours, "require", lambda *asked: module)
    with pytest.raises(_optional.MissingDependency, match=r"tensorrt 10.12.0 is too old; plans need 10.13"):
        flavours.load_tensorrt("tensorrt")


def test_too_little_disk_and_memory(
    run: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(preflight, "available_memory", lambda: 10**6)
        ran = run("export", "random:tiny", "-o", tmp_path / "new")
    assert ran.code == 2
    assert "not enough memory: the export of" in ran.err
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    ran = run("export", "random:tiny", "-o", tmp_path / "new")
    assert ran.code == 2
    assert "not enough disk: the export takes about" in ran.err
    assert not (tmp_path / "new").exists()


def test_truncated_onnx(run: CommandLine, tmp_path: Path) -> None:
    path = copied(exported("image_adaptor", dtype=torch.float16), tmp_path)
    path.write_bytes(path.read_bytes()[:2000])
    ran = run("export", path, "--sm", "80")
    assert ran.code == 2
    assert "is no whole ONNX file" in ran.err


def test_an_onnx_file_alone(run: CommandLine, tmp_path: Path) -> None:
    path = copied(exported("image_adaptor", dtype=torch.float16), tmp_path)
    assert "is ONNX already; name what to make of it" in run("export", path).err
    assert "plans go beside their ONNX file" in run("export", path, "--sm", "80", "-o", tmp_path / "x").err


def test_nothing_to_verify_or_time(run: CommandLine, tmp_path: Path) -> None:
    assert "holds no ONNX files or plans" in run("verify", tmp_path).err
    assert "unet.onnx is not there; make it" in run("bench", "export", tmp_path).err


def test_refit_of_a_plan_that_cannot(run: CommandLine, nano: Path) -> None:
    ran = run("refit", nano / "image_adaptor.sm80.plan", "builtin:nano")
    assert ran.code == 2
    assert "was not built to be refitted; build it so: imagedream-rt export" in ran.err


def test_views_with_plans_but_without_a_gpu(run: CommandLine, tmp_path: Path, picture: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, whose plans may be there")
    ran = run("views", picture, "--model", "random:tiny", "-o", tmp_path / "views", "--plans", tmp_path)
    assert ran.code == 2
    assert "backend tensorrt needs a CUDA device; there is none here" in ran.err
