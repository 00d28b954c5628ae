"""The distillation target against the released guidance, from given noise predictions."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from imagedream_rt.engine.config import OFFICIAL
from imagedream_rt.engine.distill import matched_colour, reconstruction_target, timestep_range
from imagedream_rt.engine.losses import reconstruction_loss
from imagedream_rt.engine.schedule import alphas_cumprod, q_sample

FIXTURE = Path(__file__).parent / "fixtures" / "sds_target.safetensors"
CASES = ("plain", "plain_t20", "plain_t980", "norescale", "pixel", "local")
OFFICIAL_VIEWS = 8


@pytest.fixture(scope="module")
def official():
    return load_file(FIXTURE)


@pytest.mark.parametrize("case", CASES)
def test_target_loss_and_gradient_equal_the_released_guidance(official, case):
    held = {name: official[f"{case}.{name}"] for name in ("latents", "eps_cond", "eps_uncond", "grad")}
    views = len(held["latents"])  # two cases keep the first group only; groups do not touch each other
    t = official[f"{case}.t"][0]
    latents = held["latents"].clone().requires_grad_()
    noisy = q_sample(held["latents"], t, official["noise"][:views], alphas_cumprod())
    target = reconstruction_target(
        noisy,
        held["eps_cond"],
        held["eps_uncond"],
        t,
        alphas_cumprod(),
        guidance_scale=5.0,
        std_rescale=0.0 if case == "norescale" else 0.2,
    )
    loss = reconstruction_loss(latents, target)
    loss.backward()
    gradient = latents.grad * (views / OFFICIAL_VIEWS)
    assert relative_error(gradient, held["grad"]) <= 1e-5
    assert relative_error(target, held["latents"] - OFFICIAL_VIEWS * held["grad"]) <= 1e-5
    if views == OFFICIAL_VIEWS:
        assert loss.item() == pytest.approx(official[f"{case}.loss"].item(), rel=1e-5)


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value - reference).double().norm() / reference.double().norm()).item()


@pytest.mark.parametrize(
    ("step", "least", "greatest"),
    [
        (0, 980, 980),
        (1, 979, 979),
        (2, 979, 979),
        (10, 978, 979),
        (100, 968, 974),
        (1000, 860, 919),
        (2000, 740, 860),
        (3999, 500, 740),
        (4000, 500, 740),
        (5000, 380, 679),
        (6000, 260, 620),
        (7999, 20, 500),
        (8000, 20, 500),
        (8001, 20, 500),
        (12499, 20, 500),
    ],
)
def test_timestep_range_truncates_as_the_released_schedule(step, least, greatest):
    assert timestep_range(OFFICIAL, step) == (least, greatest)


def test_rescale_moves_each_group_by_its_own_factor():
    """Guided prediction twice the conditional: factor 1/2, so x0 is multiplied by 0.2 * 0.5 + 0.8 = 0.9."""
    alphas = torch.full((1000,), 0.5)
    t = torch.tensor(3)
    x0 = torch.randn(8, 4, 2, 2)
    x0[4:] *= 7.0
    noisy = torch.zeros_like(x0)
    eps_cond = -x0  # predict_x0 at alpha 1/2 and x_t = 0 is -eps
    eps_uncond = torch.zeros_like(x0)
    target = reconstruction_target(
        noisy, eps_cond, eps_uncond, t, alphas, guidance_scale=2.0, std_rescale=0.2
    )
    torch.testing.assert_close(target, 2 * x0 * 0.9)


def test_matched_colour_is_a_mean_over_all_or_per_channel():
    background = torch.zeros(2, 3, 3, 3)
    background[..., 0] = 0.9
    background[0, ..., 1] = 0.6
    assert matched_colour(background, "colour") == pytest.approx((0.9, 0.3, 0.0))
    assert matched_colour(background, "grey") == pytest.approx((0.4, 0.4, 0.4))
