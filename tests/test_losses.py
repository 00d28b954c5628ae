"""Fusion losses against the released code's values, and against numbers computed by hand."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from imagedream_rt.engine.config import OFFICIAL
from imagedream_rt.engine.losses import (
    opaque_loss,
    orientation_loss,
    reconstruction_loss,
    sparsity_loss,
    z_variance_loss,
)

FIXTURE = Path(__file__).parent / "fixtures" / "fusion_losses.safetensors"


@pytest.mark.parametrize("case", ["loss", "train"])
def test_orientation_and_sparsity_equal_the_released_code(case):
    """``train`` is a whole rendered step of the released system, ``loss`` a small random case."""
    held = {name.removeprefix(f"{case}."): tensor for name, tensor in load_file(FIXTURE).items()}
    facing = (held["normal"] * held["t_dirs"]).sum(-1).clamp(min=0.0)
    orientation = orientation_loss(held["weights"][:, 0] * facing.square(), held["opacity"])
    torch.testing.assert_close(orientation, held["orient"], rtol=1e-6, atol=0)
    torch.testing.assert_close(sparsity_loss(held["opacity"]), held["sparsity"], rtol=1e-6, atol=0)


def test_orientation_weight_follows_the_released_schedule():
    schedule = {
        0: 10.0,
        1: 10.198,
        100: 29.8,
        1000: 208.0,
        2500: 505.0,
        4999: 999.802,
        5000: 1000.0,
        12000: 1000.0,
    }
    assert {step: OFFICIAL.lambda_orient.at(step) for step in schedule} == pytest.approx(schedule, rel=1e-12)


def test_orientation_by_hand():
    facing_away, opacity = torch.tensor([[0.0], [0.5], [0.36]]), torch.tensor([[0.0], [0.2], [0.9]])
    assert orientation_loss(facing_away, opacity).item() == pytest.approx(0.86 / 2)


def test_orientation_of_an_empty_picture_is_zero():
    assert orientation_loss(torch.zeros(4), torch.zeros(4)).item() == 0.0


def test_reconstruction_gradient_is_difference_over_views():
    latents = torch.randn(8, 4, 3, 5, requires_grad=True)
    target = torch.randn(8, 4, 3, 5, requires_grad=True)
    reconstruction_loss(latents, target).backward()
    torch.testing.assert_close(latents.grad, (latents - target).detach() / 8)
    assert target.grad is None


def test_opaque_is_least_at_the_ends_and_ln2_in_the_middle():
    assert opaque_loss(torch.tensor([0.5])).item() == pytest.approx(0.693147, abs=1e-6)
    ends = opaque_loss(torch.tensor([0.0, 1.0])).item()
    assert ends == pytest.approx(-(1e-3 * -6.907755 + 0.999 * -0.0010005), abs=1e-6)


def test_z_variance_counts_only_solid_pixels():
    variance = torch.tensor([1.0, 2.0, 300.0])
    assert z_variance_loss(variance, torch.tensor([0.6, 0.9, 0.5])).item() == pytest.approx(1.5)
    assert z_variance_loss(variance, torch.zeros(3)).item() == 0.0
