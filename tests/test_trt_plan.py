"""Real plans for A100 and RTX GPUs, built without any GPU, and what happens when a build cannot end well."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from exports import copied, exported

from imagedream_rt.engine.errors import ImageDreamError, InputError
from imagedream_rt.export import preflight
from imagedream_rt.export.flavours import check_architectures, load_tensorrt
from imagedream_rt.export.job import export_plans
from imagedream_rt.export.manifest import read_manifest
from imagedream_rt.export.onnx_graph import read_metadata
from imagedream_rt.export.trt_build import summary_of
from imagedream_rt.export.trt_plan import PlanOptions, build_plan, explained

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("tensorrt_rtx")

RTX = load_tensorrt("tensorrt_rtx")


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """The ONNX file of a small component, to be built or broken."""
    return copied(exported("text_encoder", dtype=torch.float16), tmp_path)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_unet_for_sm80_and_sm89(tmp_path: Path) -> None:
    """Both plans, with manifests; the self-attentions are fused, as the layer list of the build says."""
    path = copied(exported("unet", dtype=torch.float16), tmp_path)
    told: list[tuple[str, int, int]] = []
    plans = export_plans([path], RTX, ["sm80", "sm89"], PlanOptions(), lambda *step: told.append(step))
    assert [plan.name for plan in plans] == ["unet.sm80.plan", "unet.sm89.plan"]
    for plan, architecture in zip(plans, ("sm80", "sm89"), strict=True):
        manifest = read_manifest(plan)
        assert (manifest.architecture, manifest.flavour, manifest.version) == (
            architecture,
            "tensorrt_rtx",
            RTX.version,
        )
        assert manifest.profile == (2, 2, 2)
        assert manifest.size_bytes == plan.stat().st_size > 10**5
        assert manifest.onnx_error <= 5e-3
        assert manifest.layers["fused_attention"] >= 4
        assert manifest.layers["total"] == sum(manifest.layers["types"].values())
        assert manifest.build_peak_bytes is None or manifest.build_peak_bytes > 10**8
        log = plan.with_name(f"{plan.name}.log").read_text(encoding="utf-8")
        assert "_gemm_mha_v" in log  # v1 or v2, by size
    stages = [stage for stage, _, _ in told]
    assert stages[0] == "unet to sm80"
    assert stages[-1] == "unet to sm89"
    shares = [done for stage, done, _ in told if stage == "unet to sm80"]
    assert shares[0] == 0
    assert shares[-1] == 100
    assert len(set(shares)) > 4


def test_profile(graph: Path) -> None:
    plan = build_plan(graph, "sm80", RTX, PlanOptions(profile=(1, 2, 8)))
    assert read_manifest(plan).profile == (1, 2, 8)
    assert "--profile 1,2,8" in read_manifest(plan).rebuild


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (PlanOptions(profile=(4, 2, 8)), "must be at least 1 and ascend"),
        (PlanOptions(profile=(0, 2, 8)), "must be at least 1 and ascend"),
        (PlanOptions(profile=(1, 2, 64)), "batches of up to 32"),
        (PlanOptions(strip_weights=True), "needs --refit"),
        (PlanOptions(optimization_level=9), "the levels are 0 to 5"),
    ],
)
def test_options_that_contradict(graph: Path, options: PlanOptions, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_plan(graph, "sm80", RTX, options)


def test_unknown_architecture() -> None:
    with pytest.raises(
        InputError, match=r"unknown architecture '90'; tensorrt_rtx .* builds for .*80, 86, 89, 120"
    ):
        check_architectures(RTX, ["80", "90"])
    assert check_architectures(RTX, ["8.0", "SM89", "sm_120", "80"]) == ["sm80", "sm89", "sm120"]


def test_truncated_onnx(graph: Path) -> None:
    data = graph.with_name(f"{graph.name}.data")
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(InputError, match="is truncated"):
        build_plan(graph, "sm80", RTX, PlanOptions())
    assert not list(graph.parent.glob("*.plan*"))


def test_changed_onnx(graph: Path) -> None:
    data = graph.with_name(f"{graph.name}.data")
    content = bytearray(data.read_bytes())
    content[0] ^= 1
    data.write_bytes(content)
    with pytest.raises(InputError, match="is not what its report was written for"):
        build_plan(graph, "sm80", RTX, PlanOptions())


def test_foreign_onnx(tmp_path: Path) -> None:
    helper = onnx.helper
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    body = helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "abs", [value], [out])
    onnx.save(helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "abs.onnx")
    with pytest.raises(InputError, match="was not written by this program"):
        build_plan(tmp_path / "abs.onnx", "sm80", RTX, PlanOptions())


def test_a_failed_build_leaves_nothing(graph: Path) -> None:
    """TensorRT-RTX cannot build refittable plans without a CUDA driver; with one this build succeeds."""
    before = files(graph.parent)
    if torch.cuda.is_available():
        plan = build_plan(graph, "sm80", RTX, PlanOptions(refit=True))
        assert read_manifest(plan).refit
        return
    with pytest.raises(
        ImageDreamError, match=r"could not build text_encoder.onnx for sm80: it needs a CUDA driver"
    ):
        build_plan(graph, "sm80", RTX, PlanOptions(refit=True))
    assert files(graph.parent) == before


def test_a_killed_child_leaves_nothing(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(graph.parent)
    popen = subprocess.Popen

    def doomed(command: list[str], **given: object) -> subprocess.Popen[str]:
        code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
        return popen([sys.executable, "-c", code], **given)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr("imagedream_rt.export.trt_plan.subprocess.Popen", doomed)
    with pytest.raises(ImageDreamError, match="was killed by signal 9 while building"):
        build_plan(graph, "sm80", RTX, PlanOptions())
    assert files(graph.parent) == before


def test_an_interrupt_ends_the_child_and_leaves_nothing(graph: Path) -> None:
    before = files(graph.parent)
    children: list[int] = []

    def interrupt(share: float) -> None:
        children.extend(
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and b"trt_build" in _command_line(entry)
        )
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plan(graph, "sm80", RTX, PlanOptions(), interrupt)
    assert files(graph.parent) == before
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGTERM")
def test_a_terminated_command_leaves_no_plan(graph: Path) -> None:
    """The whole command is killed while it builds: what stays has no plan's name."""
    code = f"""
import sys
from pathlib import Path
from imagedream_rt.export.flavours import load_tensorrt
from imagedream_rt.export.trt_plan import PlanOptions, build_plan
build_plan(Path({str(graph)!r}), "sm80", load_tensorrt("tensorrt_rtx"), PlanOptions(),
           lambda share: print(share, flush=True))
"""
    command = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert command.stdout is not None
    command.stdout.readline()
    command.send_signal(signal.SIGTERM)
    command.wait()
    time.sleep(0.1)
    assert not [path for path in graph.parent.iterdir() if path.suffix == ".plan"]


def test_too_little_disk_or_memory(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(preflight, "available_memory", lambda: 10**6)
        with pytest.raises(
            InputError, match=r"not enough memory: building the plan of text_encoder.onnx takes about"
        ):
            build_plan(graph, "sm80", RTX, PlanOptions())
    usage = type("Usage", (), {"free": 10**6})
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"not enough disk: the plan of text_encoder.onnx takes about"):
        build_plan(graph, "sm80", RTX, PlanOptions())


def test_network_has_every_weight_of_the_name_map(graph: Path) -> None:
    """TensorRT knows each name that a refit would set."""
    trt = RTX.module
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(graph))
    names = read_metadata(graph)["weights"]
    assert len(names) > 20
    assert all(network.mark_weights_refittable(name) for name in names)
    assert not network.mark_weights_refittable("no.such.weight")


def test_summary_of_layers() -> None:
    lines = [
        "Name: _gemm_mha_v2_myl0_29, LayerType: kgen, Inputs: [ { Name: x } ]",
        "Name: conv, LayerType: correlation, Inputs: []",
        "Name: add, LayerType: kgen, Inputs: []",
        "Bindings:",
    ]
    assert summary_of(lines) == {"total": 3, "types": {"kgen": 2, "correlation": 1}, "fused_attention": 1}


def test_explained() -> None:
    assert explained("a\n  b") == "a b"
    assert explained("CHECK(status == CUDA_SUCCESS) failed").startswith("it needs a CUDA driver")


def test_manifest_is_json(graph: Path) -> None:
    plan = build_plan(graph, "sm80", RTX, PlanOptions())
    given = json.loads(plan.with_name(f"{plan.name}.json").read_text(encoding="utf-8"))
    assert given["source"] == {"model": "random:tiny", "sha256": "", "controller": "pixel", "frames": 5}
    assert given["inputs"] == [{"name": "input_ids", "shape": ["batch", 77], "dtype": "int64"}]
    assert given["refit"] is False
    assert given["weights"] == {}
