"""The gradient through a float16 network: at any size as exact as at the best, and scaled exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from rounding import randn, relative_error
from torch import Tensor, nn

from imagedream_rt.engine.gradient_scale import GREATEST, GradientScale
from imagedream_rt.engine.vae import LatentCodec


class Watched(nn.Module):
    """Doubles its input; keeps the gradient that reaches it."""

    def forward(self, x: Tensor) -> Tensor:
        y = 2 * x
        y.register_hook(lambda grad: setattr(self, "seen", grad))
        return y


@pytest.mark.parametrize("greatest", [3.0, 1e-9, 0.7e9, 0.5, 1.0, 2.0**-40])
def test_the_network_sees_a_gradient_of_fixed_size_and_the_input_its_own(greatest: float) -> None:
    x = randn(2, 5, seed=1, dtype=torch.float32).requires_grad_()
    cotangent = randn(2, 5, seed=2, dtype=torch.float32)
    cotangent *= greatest / cotangent.abs().max()
    network, scale = Watched(), GradientScale()
    y = scale.leave(network(scale.enter(x)))
    assert torch.equal(y, 2 * x)
    (gradient,) = torch.autograd.grad(y, x, cotangent)
    assert GREATEST / 2 <= network.seen.abs().max() < GREATEST
    assert torch.equal(gradient, 2 * cotangent)  # exact: powers of two


def test_no_gradient_stays_none() -> None:
    x = torch.ones(3, requires_grad=True)
    scale = GradientScale()
    y = scale.leave(Watched()(scale.enter(x)))
    assert torch.autograd.grad(y, x, torch.zeros(3))[0].tolist() == [0, 0, 0]
    assert (
        not torch.autograd.grad(scale.leave(Watched()(scale.enter(x))), x, torch.full((3,), torch.inf))[0]
        .isfinite()
        .any()
    )


@pytest.fixture(scope="module")
def single() -> LatentCodec:
    torch.manual_seed(0)
    config = {
        "block_out_channels": [16, 32],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "norm_num_groups": 4,
        "scaling_factor": 0.5,
    }
    return LatentCodec.from_config(config).requires_grad_(False)


def latents_and_gradient(codec: LatentCodec, size: float) -> tuple[Tensor, Tensor]:
    pictures = randn(1, 3, 16, 16, seed=1, dtype=torch.float32).requires_grad_()
    noise, cotangent = (randn(1, 4, 8, 8, seed=seed, dtype=torch.float32) for seed in (2, 3))
    latents = codec.encode(pictures, noise)
    (gradient,) = torch.autograd.grad(latents, pictures, size * cotangent)
    return latents.detach(), gradient / size


def test_in_half_precision_no_size_of_the_gradient_loses_more_than_another(single: LatentCodec) -> None:
    half = copy.deepcopy(single).half()
    wanted_latents, wanted = latents_and_gradient(single, 1.0)
    errors = []
    for size in (2.0**-30, 2.0**-3, 2.0**20):
        latents, gradient = latents_and_gradient(half, size)
        assert latents.dtype == gradient.dtype == torch.float32
        assert relative_error(latents, wanted_latents) <= 2e-3
        errors.append(relative_error(gradient, wanted))
    assert max(errors) <= 3e-3
    assert errors[0] == errors[1] == errors[2]


def test_gradients_of_parameters_are_never_scaled(single: LatentCodec) -> None:
    codec = copy.deepcopy(single).half()
    weight = codec.vae.encoder.conv_out.weight.requires_grad_()
    pictures = randn(1, 3, 16, 16, seed=1, dtype=torch.float32).requires_grad_()
    codec.encode(pictures, torch.zeros(1, 4, 8, 8)).sum().backward()
    truth = copy.deepcopy(single)
    exact = truth.vae.encoder.conv_out.weight.requires_grad_()
    truth.encode(pictures, torch.zeros(1, 4, 8, 8)).sum().backward()
    assert weight.grad is not None
    assert exact.grad is not None
    assert relative_error(weight.grad, exact.grad) <= 5e-3
