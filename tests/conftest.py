"""Shared by all tests: no network, the installed package first, GPU tests only where there is a GPU."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Before anything imports huggingface_hub and torch, which read them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from command_line import SECONDS, CommandLine, save_object_picture
from interpreter import take_scalars_as_loop_bounds

# Before any kernel is defined: without a GPU, Triton's interpreter runs the kernels' tests.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    take_scalars_as_loop_bounds()

# Several workers share the cores: one thread each is faster than two that wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# Before pytest visits the checkout's own __init__.py: in a checkout that is named imagedream_rt it would
# otherwise be imported under that name, in place of the installed package.
import imagedream_rt
from imagedream_rt.engine.asset import Asset
from imagedream_rt.engine.config import PRESETS
from imagedream_rt.kernels._tuning import Tuned

# A run started in the background inherits an ignored Ctrl-C, and the tests of interrupts need one that works.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> list[str]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return [
        f"imagedream_rt {imagedream_rt.__version__} from {os.path.dirname(imagedream_rt.__file__)}",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, gpu: {gpu}",
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """The command line, with a preset ``seconds`` and a turntable that are over at once."""
    monkeypatch.setitem(PRESETS, SECONDS.name, SECONDS)
    film, short = Asset.turntable, {"seconds": 0.125, "resolution": 32}
    monkeypatch.setattr(
        Asset, "turntable", lambda self, path, **given: film(self, path, **{**given, **short})
    )
    monkeypatch.delenv("IMAGEDREAM_RT_DEBUG", raising=False)
    return CommandLine(capsys)


@pytest.fixture
def kernel_device() -> torch.device:
    """Where kernels are tested: the GPU, or the CPU in Triton's interpreter."""
    pytest.importorskip("triton")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first launch of each kernel: tuning would compile all of them for every little shape."""
    monkeypatch.setattr(Tuned, "choose", lambda self, device, key, run: self.candidates(*key)[0])


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A PNG of a simple object before nothing."""
    return save_object_picture(tmp_path)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
