"""The warm start: which views are asked for, and what their pictures tell about the object's outline."""

from __future__ import annotations

import math

import pytest
import torch
from analytic_scene import render_scene
from tiny_fusion import TINY_WARM, StubGuidance, grey_views

from imagedream_rt.engine.config import DRAFT, CameraRange
from imagedream_rt.engine.errors import Cancelled
from imagedream_rt.engine.fuse import Fusion
from imagedream_rt.engine.warm_start import plan_views, silhouettes, view_cameras


def test_view_sets_cover_the_circle_and_the_elevations():
    plan = plan_views(DRAFT)
    azimuths = sorted(value for views in plan for value in views.azimuth_deg)
    assert azimuths == [22.5 * k for k in range(16)]
    assert all(views.azimuth_deg[1] - views.azimuth_deg[0] == 90.0 for views in plan)
    assert [views.elevation_deg for views in plan] == pytest.approx([0.0, 10.0, 20.0, 0.0])


def test_cameras_stand_in_the_middle_of_the_ranges():
    config = DRAFT.changed(camera=CameraRange((0.0, 0.0), "uniform", (40.0, 50.0), (0.6, 0.7)))
    cameras = view_cameras(config, plan_views(config))
    assert len(cameras) == 16
    distance = 0.65 / math.tan(math.radians(45.0) / 2)
    torch.testing.assert_close(cameras.c2w[:, :3, 3].norm(dim=1), torch.full((16,), distance))
    torch.testing.assert_close(cameras.c2w[1, :3, 3], torch.tensor([distance, 0.0, 0.0]), atol=1e-6, rtol=0)


def test_silhouettes_of_the_scene_over_grey():
    cameras = view_cameras(DRAFT, plan_views(DRAFT))
    pictures, coverage = render_scene(cameras, 96, torch.full((3,), 0.5))
    seen = silhouettes(pictures)
    torch.testing.assert_close(seen.background, torch.full((16, 3), 0.5))
    assert ((seen.coverage > 0.5) == (coverage[..., 0] > 0.5)).float().mean() > 0.99
    assert seen.certainty.min() == 1.0


def test_a_patch_of_background_colour_inside_the_object_is_uncertain():
    picture = torch.full((1, 20, 20, 3), 0.5)
    picture[:, 4:16, 4:16] = torch.tensor([0.9, 0.2, 0.2])
    picture[:, 8:12, 8:12] = 0.5
    picture[:, 4:16, 14:16] = 0.505  # within the noise of the background, and open to the outside
    seen = silhouettes(picture)
    assert seen.certainty[0, 8:12, 8:12].max() == 0.0
    assert seen.certainty.sum() == 400 - 16
    assert seen.coverage[0, 5, 5] == 1.0
    assert seen.coverage[0, 4:16, 14:16].max() == 0.0


def test_fitting_approaches_the_pictures():
    metrics: list[dict[str, float]] = []
    config = TINY_WARM.changed(steps=1)
    Fusion(config, StubGuidance(), views=grey_views(config)).run(
        on_metrics=lambda phase, done, values: metrics.append(values) if phase == "warm-start" else None
    )
    assert len(metrics) == 6
    assert metrics[-1]["loss"] < metrics[0]["loss"]


def test_views_report_and_ask_while_they_are_made():
    events: list[tuple[str, int, int]] = []
    still = grey_views(TINY_WARM)

    def source(views, on_progress, cancel):
        on_progress("views", 1, 3)
        if cancel():
            raise Cancelled("during the views")
        return still(views, on_progress, cancel)

    fusion = Fusion(TINY_WARM, StubGuidance(), views=source)
    with pytest.raises(Cancelled, match="during the views"):
        fusion.run(on_progress=lambda *event: events.append(event), cancel=lambda: len(events) == 2)
    assert events == [("warm-start", 0, 8), ("warm-start", 1, 8)]
