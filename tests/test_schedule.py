"""Noise schedule and DDIM against numbers recorded from the released code."""

import doctest
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from imagedream_rt.engine import schedule as module
from imagedream_rt.engine.errors import InputError
from imagedream_rt.engine.schedule import (
    alphas_cumprod,
    betas,
    ddim_step,
    ddim_table,
    ddim_timesteps,
    predict_x0,
    q_sample,
)

RECORDED = load_file(Path(__file__).parent / "fixtures" / "ddim.safetensors")


def relative_l2(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def test_tables_equal_the_released_ones_bit_for_bit():
    assert torch.equal(betas(), RECORDED["schedule.betas"])
    assert torch.equal(alphas_cumprod(), RECORDED["schedule.alphas_cumprod"])


@pytest.mark.parametrize("steps", [10, 20, 25, 30, 50, 100])
def test_timesteps_and_alphas_per_step_count(steps):
    timesteps, alpha, alpha_prev = ddim_table(steps, alphas_cumprod())
    assert torch.equal(timesteps.flip(0), RECORDED[f"S{steps}.timesteps"])
    assert torch.equal(alpha.flip(0), RECORDED[f"S{steps}.ddim_alphas"])
    assert torch.equal(alpha_prev.flip(0), RECORDED[f"S{steps}.ddim_alphas_prev"].float())


def test_docstring_examples():
    assert doctest.testmod(module) == (0, 1)


def test_thirty_steps_are_thirty_one():
    assert ddim_timesteps(30) == [*range(1, 992, 33)]
    assert len(ddim_timesteps(30)) == 31


def test_every_allowed_step_count_stays_in_the_table():
    for steps in range(1, 1001):
        visited = ddim_timesteps(steps)
        assert visited == sorted(set(visited))
        assert visited[0] == 1
        assert visited[-1] <= 999
        assert len(visited) >= steps - 1


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True, "30"])
def test_other_step_counts_are_refused(steps):
    with pytest.raises(InputError, match="from 1 to 1000"):
        ddim_timesteps(steps)


def test_ten_step_trajectory_of_the_released_sampler():
    matrix, cond, uncond = (RECORDED[f"run10.{name}"] for name in ("M", "bias_cond", "bias_uncond"))

    def stub(x, t, bias):
        return torch.einsum("oc,bchw->bohw", matrix, x) + (t / 1000) * bias[:, :, None, None]

    x = RECORDED["run10.x_T"]
    table = ddim_table(10, alphas_cumprod())
    called = []
    for step, (t, alpha, alpha_prev) in enumerate(zip(*table, strict=True)):
        called.append(int(t))
        eps_uncond = stub(x, t, uncond)
        eps = eps_uncond + 5.0 * (stub(x, t, cond) - eps_uncond)
        assert (
            relative_l2(predict_x0(x, eps, t, alphas_cumprod()), RECORDED["run10.pred_x0_steps"][step]) < 1e-5
        )
        x = ddim_step(x, eps, alpha, alpha_prev)
        assert relative_l2(x, RECORDED["run10.x_steps"][step]) < 1e-5
    assert called == RECORDED["run10.t_called"][:, 0].tolist()
    assert relative_l2(x, RECORDED["run10.final"]) < 1e-5


@pytest.mark.parametrize("t", [torch.tensor(500), torch.tensor([0, 20, 999])])
def test_predict_x0_undoes_q_sample(t):
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 4, 5, 5, generator=generator)
    x_t = q_sample(x0, t, noise, alphas_cumprod())
    back = predict_x0(x_t, noise, t, alphas_cumprod())
    assert (back - x0).abs().max() < 1e-4  # at t = 999 the noise is 14 times the signal
    assert torch.allclose(
        q_sample(torch.ones(1, 1), torch.tensor(0), torch.zeros(1, 1), alphas_cumprod()) ** 2,
        alphas_cumprod()[:1],
    )


def test_half_precision_latents_are_noised_in_float32():
    half = torch.ones(2, 4, 3, 3, dtype=torch.float16)
    noised = q_sample(half, torch.tensor(981), torch.zeros_like(half), alphas_cumprod())
    assert noised.dtype == torch.float32
    assert torch.equal(
        noised, q_sample(half.float(), torch.tensor(981), torch.zeros(half.shape), alphas_cumprod())
    )
