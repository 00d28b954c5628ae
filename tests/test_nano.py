"""The embedded model as shipped: that it is there, small, and good on objects that it never saw."""

import os

import numpy as np
import pytest
import torch

from imagedream_rt.engine.config import DRAFT, WarmStart
from imagedream_rt.engine.errors import InputError
from imagedream_rt.engine.pipeline import ImageTo3D
from imagedream_rt.engine.training import evaluate as measuring
from imagedream_rt.engine.training.kinds import make_objects
from imagedream_rt.engine.training.objects import TEST_SEEDS


@pytest.fixture(scope="module")
def pipe():
    return ImageTo3D.from_pretrained("builtin:nano", device="cpu")


def test_it_is_small(pipe):
    import imagedream_rt

    folder = os.path.join(os.path.dirname(imagedream_rt.__file__), "engine", "data", "nano")
    size = sum(os.path.getsize(os.path.join(root, f)) for root, _, files in os.walk(folder) for f in files)
    assert size < 30e6
    assert pipe.model.card.controller == "pixel"


def test_views_of_unseen_objects_are_close_to_the_truth(pipe):
    """Half of the released figures' steps; the floors are those that the README's figures clear by far."""
    psnr, iou = [], []
    for seed in (TEST_SEEDS + 100, TEST_SEEDS + 101, TEST_SEEDS + 102):
        objects = make_objects(torch.tensor([seed]))
        picture = measuring.prepare(measuring.example_picture(seed, 256))
        images = pipe.views(picture, steps=15, guidance_scale=2.0).images
        cameras = measuring.orbit_cameras([0.0, 90.0, 180.0, 270.0], 0.0, 47.5, measuring.unit_distance(47.5))
        truth = measuring._truth(objects, cameras)
        views = torch.from_numpy(images).float() / 255
        psnr.append(measuring._psnr(views, truth[..., :3] + 0.5 * (1 - truth[..., 3:])))
        iou.append(measuring._iou(measuring._view_masks(views), truth[..., 3] > 0.5))
    assert np.mean(psnr) > 19
    assert np.mean(iou) > 0.85


def test_evaluation_measures_what_it_says(pipe, tmp_path):
    """A fusion of a few steps scores badly but finitely, and the sheet is written."""
    config = DRAFT.changed(steps=2, warm_start=WarmStart(view_sets=1, ddim_steps=4, fit_steps=40, rays=512))
    (score,) = measuring.evaluate(pipe, 1, config, pictures=tmp_path)
    assert score.seed == TEST_SEEDS
    assert 10 < score.views_psnr_db < 60
    assert 0 < score.fused_iou <= 1
    assert 0 < score.chamfer < 1
    assert (tmp_path / f"{TEST_SEEDS}.png").is_file()
    assert measuring.summary([score])["mean"]["chamfer"] == score.chamfer
    with pytest.raises(InputError, match="objects"):
        next(measuring.evaluate(pipe, 0, config))


def test_figures_are_perfect_for_the_truth_itself():
    truth = torch.rand(2, 8, 8, 3)
    mask = truth[..., 0] > 0.5
    assert measuring._psnr(truth, truth) == pytest.approx(100)
    assert measuring._iou(mask, mask) == 1.0
    assert measuring._iou(mask, ~mask) == 0.0
    assert measuring._psnr(torch.zeros(1, 4, 4, 3), torch.full((1, 4, 4, 3), 0.1)) == pytest.approx(
        20, abs=1e-3
    )
