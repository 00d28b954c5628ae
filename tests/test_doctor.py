"""What ``doctor`` says of kernels, and ``warmup``: with and without the devices and packages they depend on."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import SECONDS, CommandLine, object_picture

from imagedream_rt.engine import cli_bench, doctor, warmup, weights
from imagedream_rt.engine.config import Stage
from imagedream_rt.engine.pipeline import ImageTo3D
from imagedream_rt.engine.warmup import warm_up
from imagedream_rt.kernels import _triton, _tuning

triton = pytest.importorskip("triton")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with an A100, as far as questions go; the cache file of its choices, which is not there yet."""
    monkeypatch.setenv("IMAGEDREAM_RT_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    a100 = doctor.DeviceReport("cuda:0", "A100", 80.0, "compute capability 8.0")
    monkeypatch.setattr(doctor, "devices", lambda: [a100])
    return _tuning.cache_file(torch.device("cuda", 0))


def test_kernels_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = doctor.kernels()
    assert {"layer_norm", "geglu"} <= set(found)
    assert set(found.values()) == {"PyTorch: no CUDA device"}
    assert doctor.tuned() == {}


def test_kernels_on_a_gpu(gpu: Path) -> None:
    assert set(doctor.kernels().values()) == {f"Triton {triton.__version__} on A100"}
    assert doctor.tuned() == {"file": str(gpu), "configurations": 0}
    gpu.write_text('{"a(1) x": "BLOCK=1 warps=4 stages=2", "a(2) x": "BLOCK=1 warps=4 stages=2"}')
    assert doctor.tuned() == {"file": str(gpu), "configurations": 2}


def test_kernels_on_a_gpu_that_is_too_old(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert set(doctor.kernels().values()) == {"PyTorch: compute capability 7.5, the kernels need 8.0"}


def test_kernels_without_triton(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "triton", None)
    assert set(doctor.kernels().values()) == {"PyTorch: triton is not installed"}
    assert doctor.tuned() == {}


def test_backends(gpu: Path) -> None:
    found = doctor.backends()
    assert found["unet"] == {
        "auto": "graph",
        "others": {"eager": None, "compiled": None, "tensorrt": "with --plans DIR"},
    }
    assert found["precision"]["others"]["fp8"] == "compute capability 8.0, fp8 needs 8.9"


def test_doctor_prints_the_backends(run: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lines = [" ".join(line.split()) for line in run("doctor").out.splitlines()]
    assert "backends (--backend COMPONENT=NAME)" in lines
    assert "loop eager or graph (no CUDA device)" in lines


def test_doctor_prints_the_kernels(run: CommandLine, gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "environment", lambda: {"python": "3"})
    gpu.write_text('{"a(1) x": "BLOCK=1 warps=4 stages=2"}')
    lines = [" ".join(line.split()) for line in run("doctor").out.splitlines()]
    assert f"geglu Triton {triton.__version__} on A100" in lines
    assert f"1 tuned launch configurations in {gpu}" in lines


def test_warmup_without_a_gpu(run: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run("warmup").out == "nothing to do: no CUDA device\n"
    assert run("warmup", "--json").json() == {"nothing_to_do": "no CUDA device"}


def test_warming_up_is_a_job_in_short() -> None:
    """On the CPU as on a GPU: the views, and steps of every stage, with the warm start once."""
    pipe = ImageTo3D.from_pretrained("random:tiny", "cpu")
    config = replace(SECONDS, stages=(Stage(0, 16, 4), Stage(2, 24, 8)))
    denoised, encoded = Counter[int](), Counter[int]()
    pipe.model.unet.register_forward_pre_hook(lambda _, inputs: denoised.update([len(inputs[0])]))
    moments = pipe.model.vae.moments
    pipe.model.vae.moments = lambda images: (  # type: ignore[method-assign]
        encoded.update([len(images)] * images.requires_grad) or moments(images)
    )
    reports: list[tuple[str, int, int]] = []
    warm_up(pipe, config, on_progress=lambda *report: reports.append(report))
    # Conditional and unconditional rows of one group of views, and of two in the stage of eight.
    assert denoised[2] >= 3
    assert denoised[4] == 2
    assert encoded == {4: 2, 8: 2}
    assert reports == [("warm-up", done, 3) for done in (1, 2, 3)]


def test_warmup_prints_where_the_caches_are(
    run: CommandLine, gpu: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    warmed: list[str | None] = []
    monkeypatch.setattr(weights, "pick_device", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr(cli_bench, "load_pipeline", lambda *_: None)
    monkeypatch.setattr(warmup, "warm_up", lambda pipe, preset, on_progress: warmed.append(preset))
    ran = run("warmup", "--preset", "draft")
    assert ran.out.splitlines() == [
        f"{gpu}  0 tuned configurations",
        f"{tmp_path / 'compiled'}  compiled kernels",
        f"{tmp_path / 'inductor'}  what torch.compile made",
    ]
    assert warmed == ["draft"]
    assert run("warmup", "--json").json() == {
        "nothing_to_do": None,
        "tuned": str(gpu),
        "configurations": 0,
        "compiled": str(tmp_path / "compiled"),
        "inductor": str(tmp_path / "inductor"),
    }


@pytest.mark.gpu
def test_warmup_leaves_nothing_to_tune(
    run: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("IMAGEDREAM_RT_CACHE", str(tmp_path))
    options = ("--model", "random:tiny", "--device", "cuda")
    assert run("warmup", *options, "--json").json()["configurations"] > 0
    tuned: list[str] = []
    with _tuning.report_to(lambda what, *_: tuned.append(what)):
        ImageTo3D.from_pretrained("random:tiny", "cuda").views(object_picture(), "a ball", steps=1)
    assert tuned == []
