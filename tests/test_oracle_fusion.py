"""The fusion without any diffusion weights: an oracle returns the true noise, so the field must become the
scene."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from analytic_scene import render_scene
from oracle_guidance import OracleGuidance, true_views

from imagedream_rt.engine.cameras import orbit_cameras
from imagedream_rt.engine.config import DRAFT, CameraRange, Ramp, RenderConfig, Stage, WarmStart
from imagedream_rt.engine.fuse import Fusion
from imagedream_rt.engine.fused_field import FusedField

STEPS = 350
RESOLUTION = 32
ORACLE = replace(
    DRAFT,
    name="oracle",
    steps=STEPS,
    stages=(Stage(0, RESOLUTION, 4),),
    camera=CameraRange((-10.0, 40.0), "uniform", relative_distance=(0.66, 0.69)),
    render=RenderConfig(samples_per_ray=96, occupancy_warmup_steps=64),
    guidance_scale=5.0,
    min_step=Ramp(0.98, 0.02, STEPS // 2),
    max_step=Ramp(0.98, 0.50, STEPS // 2),
    lambda_orient=Ramp(1.0, 10.0, STEPS),
    lambda_sparsity=1.0,
    lr_grid=0.02,
    warm_start=None,
)


def score(fused: FusedField) -> tuple[float, float]:
    """Mean PSNR in dB over white and mean silhouette IoU over 8 views that no step has seen."""
    distance = 0.675 / math.tan(math.radians(47.5) / 2)
    unseen = orbit_cameras([45.0 * k + 7.0 for k in range(8)], [0.0, 10.0, 20.0, 30.0] * 2, 47.5, distance)
    true, coverage = render_scene(unseen, 64, torch.ones(3))
    picture = fused.render(unseen, 64)
    psnr = -10 * (picture.rgb - true).square().mean(dim=(1, 2, 3)).log10()
    inside, seen = coverage > 0.5, picture.opacity > 0.5
    iou = (inside & seen).sum(dim=(1, 2, 3)) / (inside | seen).sum(dim=(1, 2, 3))
    return psnr.mean().item(), iou.mean().item()


@pytest.fixture(autouse=True)
def one_thread():
    """Fields this small gain little from threads, and on a busy machine threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_distillation_from_an_oracle_converges_to_the_scene():
    psnr, iou = score(Fusion(ORACLE, OracleGuidance(ORACLE, RESOLUTION), seed=0).run())
    print(f"oracle distillation: PSNR {psnr:.2f} dB, IoU {iou:.3f}")
    assert psnr >= 22.0
    assert iou >= 0.9


@pytest.mark.slow
def test_warm_start_on_true_views_then_distillation():
    config = replace(
        DRAFT,
        name="warm oracle",
        steps=10,
        stages=(Stage(0, RESOLUTION, 4),),
        warm_start=WarmStart(view_sets=4, ddim_steps=1, fit_steps=150, rays=2048),
    )
    fusion = Fusion(config, OracleGuidance(config, RESOLUTION), seed=0, views=true_views(config, 64))
    psnr, iou = score(fusion.run())
    print(f"warm start: PSNR {psnr:.2f} dB, IoU {iou:.3f}")
    assert psnr >= 22.0
    assert iou >= 0.9
