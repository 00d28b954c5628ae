"""Compositing against nerfacc's recorded results, hand-computed rays and autograd."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from nerf_references import recorded, relative_error
from torch import Tensor

from imagedream_rt.kernels import composite as module
from imagedream_rt.kernels.composite import composite, render_weights
from imagedream_rt.kernels.samples import Samples, pack


def recorded_samples() -> Samples:
    fixture = recorded()
    return pack(
        fixture["composite.ray_indices"], fixture["composite.t_starts"], fixture["composite.t_ends"], n_rays=7
    )


def plain_weights(sigma: Tensor, samples: Samples) -> Tensor:
    """Ray by ray, in operations that autograd knows."""
    parts = []
    for first, count in samples.packed_info.tolist():
        rows = slice(first, first + count)
        depth = sigma[rows] * (samples.t_ends - samples.t_starts)[rows]
        before = torch.cat((depth.new_zeros(1), depth.cumsum(0)))[:count]
        parts.append(torch.exp(-before) * (1 - torch.exp(-depth)))
    return torch.cat(parts)


def random_samples(counts: list[int], dtype: torch.dtype = torch.float64) -> Samples:
    generator = torch.Generator().manual_seed(4)
    rays = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    starts = torch.rand(len(rays), generator=generator, dtype=dtype)
    return pack(rays, starts, starts + torch.rand(len(rays), generator=generator, dtype=dtype), len(counts))


def test_recorded_forward() -> None:
    fixture = recorded()
    got = composite(fixture["composite.sigmas"], fixture["composite.rgb"], recorded_samples())
    for name, value in (
        ("weights", got.weights),
        ("opacity", got.opacity),
        ("color", got.values),
        ("depth", got.depth),
        ("z_variance", got.z_variance),
    ):
        assert relative_error(value, fixture[f"composite.{name}"]) < 1e-6, name


def test_recorded_gradients() -> None:
    fixture = recorded()
    sigma, rgb = (fixture[f"composite.{name}"].clone().requires_grad_() for name in ("sigmas", "rgb"))
    got = composite(sigma, rgb, recorded_samples())
    # The recorded loss: a weighted sum of the colours and the sparsity loss.
    loss = (got.values * fixture["composite.G"]).sum() + (got.opacity.square() + 0.01).sqrt().mean()
    loss.backward()
    assert relative_error(sigma.grad, fixture["composite.grad_sigmas"]) < 1e-6
    assert relative_error(rgb.grad, fixture["composite.grad_rgb"]) < 1e-6


def test_two_samples_by_hand() -> None:
    samples = pack(torch.tensor([0, 0]), torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0]), 1)
    got = composite(torch.tensor([math.log(2.0), math.log(4.0)]), torch.tensor([[1.0], [10.0]]), samples)
    # Half the light stops at the first, three quarters of the rest at the second.
    torch.testing.assert_close(got.weights, torch.tensor([0.5, 0.375]))
    torch.testing.assert_close(got.opacity, torch.tensor([0.875]))
    torch.testing.assert_close(got.values, torch.tensor([[4.25]]))
    depth = 0.5 * 1.5 + 0.375 * 3.5
    torch.testing.assert_close(got.depth, torch.tensor([depth]))
    z_variance = 0.5 * (1.5 - depth) ** 2 + 0.375 * (3.5 - depth) ** 2
    torch.testing.assert_close(got.z_variance, torch.tensor([z_variance]))


COUNTS = [0, 3, 1, 0, 8, 2, 0]


def test_gradients_against_autograd() -> None:
    samples = random_samples(COUNTS)
    sigma = torch.rand(len(samples), dtype=torch.float64).mul(3).requires_grad_()
    cotangent = torch.randn_like(sigma)
    got, wanted = render_weights(sigma, samples), plain_weights(sigma, samples)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(got, sigma, cotangent), torch.autograd.grad(wanted, sigma, cotangent)
    )


def test_gradcheck_of_everything() -> None:
    samples = random_samples(COUNTS)
    sigma = torch.rand(len(samples), dtype=torch.float64).mul(3).requires_grad_()
    values = torch.rand(len(samples), 2, dtype=torch.float64).requires_grad_()

    def everything(sigma: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        got = composite(sigma, values, samples)
        return got.weights, got.values, got.opacity, got.depth, got.z_variance

    assert torch.autograd.gradcheck(everything, (sigma, values))


def test_late_rays_are_as_exact_as_early_ones() -> None:
    # Sums along a ray are differences of one running sum, here 5e7 in the end: float32 would keep no digit.
    one = random_samples([50], torch.float32)
    sigma = torch.rand(50) * 2
    alone = render_weights(sigma, one)
    n = 2000
    many = pack(torch.arange(n).repeat_interleave(50), one.t_starts.repeat(n), one.t_ends.repeat(n), n_rays=n)
    dense = torch.cat((sigma.repeat(n - 1) * 1000, sigma))
    got = render_weights(dense, many)[-50:]
    torch.testing.assert_close(got, alone, rtol=1e-6, atol=1e-7)


def test_opaque_matter_keeps_weights_in_range() -> None:
    samples = random_samples([20, 20], torch.float32)
    sigma = torch.full((40,), 1e6).requires_grad_()
    weights = render_weights(sigma, samples)
    weights.sum().backward()
    torch.testing.assert_close(weights[[0, 20]], torch.ones(2))
    assert sigma.grad is not None
    assert sigma.grad.isfinite().all()


def test_no_samples() -> None:
    samples = random_samples([0, 0])
    sigma = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    got = composite(sigma, torch.zeros(0, 3, dtype=torch.float64), samples)
    got.values.sum().backward()
    assert got.values.tolist() == [[0.0] * 3] * 2
    assert got.depth.tolist() == [0.0, 0.0]


def test_errors() -> None:
    with pytest.raises(ValueError, match="there are 14 samples"):
        composite(torch.zeros(3), torch.zeros(3, 3), random_samples(COUNTS))


def test_examples() -> None:
    assert doctest.testmod(module).failed == 0


@pytest.mark.gpu
def test_cuda_agrees() -> None:
    samples = random_samples([30, 0, 70, 5], torch.float32)
    sigma, values = torch.rand(105) * 5, torch.rand(105, 3)

    def everything(device: str) -> list[Tensor]:
        moved = Samples(*(getattr(samples, name).to(device) for name in Samples.__dataclass_fields__))
        s, v = sigma.to(device).requires_grad_(), values.to(device).requires_grad_()
        got = composite(s, v, moved)
        loss = got.values.square().sum() + got.depth.sum() + got.z_variance.sum()
        return [got.values, got.z_variance, *torch.autograd.grad(loss, (s, v))]

    for got, wanted in zip(everything("cuda"), everything("cpu"), strict=True):
        assert relative_error(got.cpu(), wanted.detach()) < 1e-5
