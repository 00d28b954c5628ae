"""Every scheduler that can be named, driven by the exact denoiser of a single known latent."""

import warnings

import diffusers
import numpy as np
import pytest
import torch

from imagedream_rt.engine.errors import InputError, MissingDependency
from imagedream_rt.engine.schedule import alphas_cumprod, ddim_timesteps
from imagedream_rt.engine.schedulers import MAX_STEPS, SHORT_NAMES, named_scheduler

# diffusers calls numpy in ways that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

TARGET = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(7))


def fits(name: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            named_scheduler(name, 8, alphas_cumprod())
    except InputError:
        return False
    return True


FITTING = [name for name in dir(diffusers) if name.endswith("Scheduler") and fits(name)]


def sample(name: str, steps: int, seed: int = 1) -> torch.Tensor:
    """Latents after all steps if the model knows that every clean latent is TARGET."""
    generator = torch.Generator().manual_seed(seed)
    scheduler = named_scheduler(name, steps, alphas_cumprod())
    latents = scheduler.start(torch.randn(TARGET.shape, generator=generator))
    log_alpha = alphas_cumprod().double().log().numpy()
    for step, t in enumerate(scheduler.timesteps):
        assert t.ndim == 0
        assert 0 <= float(t) <= 999
        alpha = float(np.exp(np.interp(float(t), np.arange(1000), log_alpha)))
        shown = scheduler.model_input(step, latents)
        eps = (shown - alpha**0.5 * TARGET) / (1 - alpha) ** 0.5
        latents = scheduler.step(step, latents, eps, generator)
    return latents


def test_the_usual_ones_fit():
    assert {*SHORT_NAMES.values(), "DDIMScheduler", "DPMSolverSinglestepScheduler"} <= {*FITTING}


@pytest.mark.parametrize("name", ["ddim", "DDIM", "Euler", *FITTING])
def test_every_scheduler_arrives_at_the_target(name):
    error = (sample(name, 12) - TARGET).norm() / TARGET.norm()
    assert error < 0.05  # those that stop at abar_0 keep sqrt(1 - abar_0) = 0.03 of noise
    assert torch.equal(sample(name, 12), sample(name, 12))


@pytest.mark.parametrize("name", FITTING)
def test_two_steps_give_finite_latents(name):
    assert sample(name, 2).isfinite().all()


@pytest.mark.parametrize("name", ["deis", "dpmsolver++", "unipc"])
def test_the_most_steps_give_finite_latents(name):
    """With one more, these divide by the zero width of a doubled timestep."""
    assert sample(name, MAX_STEPS).isfinite().all()


def test_a_scheduler_that_cannot_take_so_many_steps_says_so():
    with pytest.raises(InputError, match="LCMScheduler cannot take 900 steps"):
        named_scheduler("LCMScheduler", 900, alphas_cumprod())


@pytest.mark.parametrize("name", ["DDIMScheduler", "euler", "euler-a", "ddpm", "lms"])
def test_steps_are_spaced_as_released(name):
    timesteps = named_scheduler(name, 50, alphas_cumprod()).timesteps
    assert [float(t) for t in timesteps] == ddim_timesteps(50)[::-1]


def test_ours_is_diffusers_ddim_where_both_take_the_same_steps():
    assert ddim_timesteps(50)[::-1] == [
        int(t) for t in named_scheduler("DDIMScheduler", 50, alphas_cumprod()).timesteps
    ]
    assert torch.allclose(sample("ddim", 50), sample("DDIMScheduler", 50), atol=1e-5)


def test_stochastic_schedulers_follow_the_generator():
    assert not torch.equal(sample("ddpm", 5, seed=1), sample("ddpm", 5, seed=2))


@pytest.mark.parametrize("name", ["nope", "NopeScheduler", "", "UNet2DModel"])
def test_unknown_names_are_answered_with_known_ones(name):
    with pytest.raises(InputError, match=r"unknown scheduler.*ddim, euler.*dpmsolver"):
        named_scheduler(name, 10, alphas_cumprod())


@pytest.mark.parametrize(
    "name", ["FlowMatchEulerDiscreteScheduler", "DDIMInverseScheduler", "EDMEulerScheduler"]
)
def test_schedulers_for_other_models_are_refused(name):
    with pytest.raises(InputError, match=r"does not sample with a model that predicts noise.*take ddim"):
        named_scheduler(name, 10, alphas_cumprod())


def test_a_scheduler_whose_package_is_absent_says_so(monkeypatch):
    class Absent:
        _backends = ("torchsde",)

    monkeypatch.setattr(diffusers, "DPMSolverSDEScheduler", Absent)
    with pytest.raises(MissingDependency, match="needs torchsde"):
        named_scheduler("DPMSolverSDEScheduler", 10, alphas_cumprod())


@pytest.mark.parametrize("name", ["ddim", "euler"])
@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_step_counts_follow_one_rule(name, steps):
    with pytest.raises(InputError, match="from 1 to 1000"):
        named_scheduler(name, steps, alphas_cumprod())


def test_the_last_steps_are_for_ddim_only():
    assert len(named_scheduler("ddim", 1000, alphas_cumprod()).timesteps) == 999
    with pytest.raises(InputError, match="takes 1 to 998"):
        named_scheduler("euler", 999, alphas_cumprod())
