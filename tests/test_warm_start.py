"""The warm start: which views are asked for, and what their pictures tell about the object's outline."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from analytic_scene import render_scene
from test_captured import assert_same_fields
from tiny_fusion import TINY_WARM, StubGuidance, grey_views

from imagedream_rt.engine import warm_start
from imagedream_rt.engine.backends import Backends, LoopName
from imagedream_rt.engine.config import DRAFT, CameraRange, WarmStart
from imagedream_rt.engine.errors import Cancelled
from imagedream_rt.engine.field_state import FieldState
from imagedream_rt.engine.fuse import Fusion
from imagedream_rt.engine.picture import PreparedPicture
from imagedream_rt.engine.warm_start import (
    WarmStartFit,
    clearest_grey,
    plan_views,
    silhouettes,
    view_cameras,
)

# Draws of the later occupancy updates differ when captured, so the warm-up of the grid lasts.
WARM_ONLY = replace(
    TINY_WARM,
    render=replace(TINY_WARM.render, occupancy_warmup_steps=100),
    warm_start=WarmStart(view_sets=2, ddim_steps=1, fit_steps=12, rays=48),
)


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


def disc(radius: float, colour: float, background: float, blur: float = 0.0, side: int = 64) -> torch.Tensor:
    """[1, side, side, 3]: a disc of a radius in half frames, its edge a linear ramp of width ``blur``."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, side)] * 2, indexing="ij")
    inside = ((radius - (x.square() + y.square()).sqrt()) / max(blur, 1e-6) + 0.5).clamp(0, 1)
    return (background + (colour - background) * inside)[None, ..., None].expand(-1, -1, -1, 3)


def prepared(*colours: int) -> PreparedPicture:
    """A picture of vertical stripes of grey, equally wide, before nothing."""
    levels = np.repeat(np.array(colours, dtype=np.uint8), 8)
    rgba = np.zeros((16, len(levels) + 8, 4), dtype=np.uint8)
    rgba[:, : len(levels), :3] = levels[None, :, None]
    rgba[:, : len(levels), 3] = 255
    return PreparedPicture(rgba)


@pytest.mark.parametrize(
    ("colours", "grey"),
    [
        ((255,), 0.5),
        ((0, 255), 0.5),
        ((128,), 0.25),  # the first of two equally far ones
        ((128, 64), 0.0),  # 0.75 is 0.248 from 128 / 255
        ((0, 110, 255), 0.75),
        ((0, 90, 180, 255), 0.5),  # nothing is clear; from the middle they differ by 0.147 at least
    ],
)
def test_the_grey_that_an_object_stands_out_from(colours: tuple[int, ...], grey: float):
    assert clearest_grey(prepared(*colours)) == grey


def test_without_a_picture_the_grey_is_the_middle_one():
    assert clearest_grey(None) == 0.5
    assert clearest_grey(PreparedPicture(np.zeros((8, 8, 4), dtype=np.uint8))) == 0.5


@pytest.mark.parametrize("contrast", [0.15, 0.3, 0.5])
def test_silhouettes_do_not_depend_on_the_contrast(contrast: float):
    """A blurred edge is where the difference is about half of that inside, be the object faint or strong."""
    found = silhouettes(disc(0.6, 0.5 - contrast, 0.5, blur=0.06))
    wanted = disc(0.6, 1.0, 0.0)[..., 0] > 0.5
    seen = found.coverage > 0.5
    assert (seen & wanted).sum() / (seen | wanted).sum() > 0.93
    assert found.background[0].tolist() == pytest.approx([0.5] * 3)


def test_an_even_picture_has_no_object():
    found = silhouettes(torch.full((1, 32, 32, 3), 0.5))
    assert found.coverage.max() == 0
    assert found.certainty.min() == 1


def fitted(captured: bool, device: torch.device) -> FieldState:
    state = FieldState(WARM_ONLY, 3, device)
    source = grey_views(WARM_ONLY)
    fit = WarmStartFit.begin(state, source, None, None, captured=captured)
    losses = [float(fit.advance(step)[1]["loss"]) for step in range(fit.steps)]
    assert losses[-1] < losses[0]
    return state


def test_a_captured_fit_is_the_plain_one():
    plain, captured = fitted(False, torch.device("cpu")), fitted(True, torch.device("cpu"))
    assert_same_fields(captured, plain, 1e-4)
    one, other = captured.streams.state(), plain.streams.state()
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(AssertionError):
        assert_same_fields(FieldState(WARM_ONLY, 3, torch.device("cpu")), plain, 1e-2)


def test_a_fit_whose_buffers_were_too_small_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(warm_start, "KEPT_OF_A_RAY", 2)
    with pytest.warns(UserWarning, match=r"fitting had \d+ samples worth a gradient and buffers for 96"):
        fitted(True, torch.device("cpu"))


@pytest.mark.gpu
def test_a_replayed_fit_is_the_plain_one():
    device = torch.device("cuda")
    assert_same_fields(fitted(True, device), fitted(False, device), 2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(("loop", "captured"), [("auto", True), ("eager", False)])
def test_the_loop_backend_says_whether_the_fit_is_captured(loop: LoopName, captured: bool):
    seen = []
    fusion = Fusion(
        WARM_ONLY, StubGuidance(), device="cuda", views=grey_views(WARM_ONLY), backends=Backends(loop=loop)
    )

    def cancel() -> bool:
        if fusion.warm is not None:
            seen.append(fusion.warm._capacity is not None)
        return len(seen) == 3

    with pytest.raises(Cancelled, match="of warm-start"):
        fusion.run(cancel=cancel)
    assert set(seen) == {captured}
