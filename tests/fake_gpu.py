"""A GPU that computes as the CPU does, for benchmarks that need one."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from checkpoints import tiny

from imagedream_rt.engine.model import MultiViewModel


def fake_gpu(monkeypatch: pytest.MonkeyPatch, benchmark: ModuleType) -> MultiViewModel:
    """``benchmark`` finds a CUDA device with 3 GiB in use, and this tiny model on the CPU whatever it loads."""
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: torch.enable_grad())
    model = tiny("pixel")
    monkeypatch.setattr(benchmark, "need_cuda", lambda: None)
    monkeypatch.setattr(benchmark, "load_model", lambda *_, **__: model)
    return model
