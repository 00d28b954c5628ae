"""Same seed, same bits: of a whole fusion with its warm start, on the CPU always, on a GPU in deterministic mode."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_captured import CONFIG
from tiny_fusion import TINY_WARM, grey_views
from torch import Tensor

from imagedream_rt.engine.conditioning import Conditioner
from imagedream_rt.engine.distill import MultiViewGuidance
from imagedream_rt.engine.fuse import Fusion
from imagedream_rt.engine.picture import PreparedPicture
from imagedream_rt.engine.run_context import deterministic
from imagedream_rt.engine.weights import load_model

# Renders of two sizes, both enlarged for the VAE; occupancy updates of both kinds; every loss.
WHOLE = replace(CONFIG, warm_start=TINY_WARM.warm_start, render=TINY_WARM.render)


def fused(
    device: str, *, seed: int = 5, asked: bool = False, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    rgba = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    model = load_model("random:tiny", device=device, controller="pixel", dtype=dtype)
    guidance = MultiViewGuidance(model, Conditioner(model, PreparedPicture(rgba), "a robot"), WHOLE)
    fusion = Fusion(WHOLE, guidance, seed=seed, device=device, views=grey_views(WHOLE), deterministic=asked)
    fusion.run()
    return fusion.state.tensors()


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [name for name in one if not torch.equal(one[name].cpu(), other[name].cpu())]


def test_the_cpu_repeats_a_fusion():
    one, other = fused("cpu"), fused("cpu")
    assert differing(one, other) == []
    assert "field.grid.table" in differing(one, fused("cpu", seed=6))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_gpu_repeats_a_fusion_when_asked(dtype: torch.dtype):
    """Of captured steps: the kernels, PyTorch's operators and cuDNN all sum in a fixed order."""
    one, other = (fused("cuda", asked=True, dtype=dtype) for _ in range(2))
    assert differing(one, other) == []
    assert one["field.grid.table"].isfinite().all()


@pytest.mark.gpu
def test_deterministic_mode_changes_rounding_alone():
    usual, exact = fused("cuda")["field.grid.table"], fused("cuda", asked=True)["field.grid.table"]
    assert (usual - exact).norm() / exact.norm() < 2e-2


def test_only_the_cpu_is_deterministic_unasked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for device, asked, wanted in (("cpu", False, True), ("cuda", False, False), ("cuda", True, True)):
        with deterministic(torch.device(device), asked):
            assert torch.are_deterministic_algorithms_enabled() is wanted
        assert not torch.are_deterministic_algorithms_enabled()
