"""Several GPUs: kernels refuse tensors of another device than the current one, and jobs make theirs the current one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import tiny
from command_line import object_picture
from tiny_fusion import TINY, StubGuidance

from imagedream_rt import ImageTo3D
from imagedream_rt.engine import fuse, fused_field, graphed, pipeline
from imagedream_rt.engine.cameras import orbit_cameras
from imagedream_rt.engine.run_context import current
from imagedream_rt.kernels import _triton

CPU = torch.device("cpu")


class Inside:
    """Stands in for :func:`current` in some modules; knows whether a call happens within it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
        self.devices: list[torch.device] = []
        self.checked: list[str] = []
        self._patch = monkeypatch
        for module in modules:
            monkeypatch.setattr(module, "current", self._current)

    @contextmanager
    def _current(self, device: torch.device) -> Iterator[None]:
        self.devices.append(device)
        yield
        self.devices.pop()

    def expect(self, owner: Any, name: str, device: torch.device = CPU) -> None:
        """Calls of that function must happen within, on that device."""
        function = getattr(owner, name)

        def checked(*arguments: Any, **named: Any) -> Any:
            assert self.devices == [device]
            self.checked.append(name)
            return function(*arguments, **named)

        self._patch.setattr(owner, name, checked)


def cuda(index: int) -> Any:
    return SimpleNamespace(device=torch.device("cuda", index), is_cuda=True, dtype=torch.float32)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_kernels_run_on_the_current_device_only(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(_triton, "obstacle", lambda device: None)
    monkeypatch.setattr(_triton, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert _triton.use_triton(backend, cuda(1))
    with pytest.raises(
        ValueError, match=r"on cuda:0 and the current device is cuda:1.*torch\.cuda\.device\(0\)"
    ):
        _triton.use_triton(backend, cuda(0))
    assert not _triton.use_triton("torch", cuda(0))


def test_a_device_without_kernels_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "obstacle", lambda device: "too old")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert not _triton.use_triton("auto", cuda(0))


def test_only_cuda_devices_become_current() -> None:
    with current(torch.device("cpu")):
        pass
    assert isinstance(current(torch.device("cuda", 1)), torch.cuda.device)


def test_views_are_made_on_the_models_device(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = Inside(monkeypatch, pipeline)
    for name in ("Conditioner", "sample_views", "decode_views"):
        inside.expect(pipeline, name)
    ImageTo3D(tiny("pixel")).views(object_picture(), steps=1)
    assert inside.checked == ["Conditioner", "sample_views", "decode_views"]


def test_fusions_run_on_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = Inside(monkeypatch, fuse, fused_field)
    fusion = fuse.Fusion(TINY, StubGuidance())
    inside.expect(fusion, "distill")
    fused = fusion.run()
    assert inside.checked == ["distill"] * TINY.steps
    inside.expect(fused_field, "render_rays")
    inside.expect(fused.field, "density")
    fused.render(orbit_cameras([0.0], 0.0, 40.0, 2.0), 8)
    fused.density(torch.zeros(1, 3))
    assert inside.checked[-2:] == ["render_rays", "density"]


def test_graphs_are_captured_on_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed.GraphedStep, "_aside", lambda self: None)
    inside = Inside(monkeypatch, graphed)
    inside.expect(graphed.GraphedStep, "_aside", torch.device("cuda", 1))
    graphed.GraphedStep(lambda: None, torch.device("cuda", 1))()
    assert inside.checked == ["_aside"]
