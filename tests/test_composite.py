"""Compositing against nerfacc's recorded results, hand-computed rays and autograd."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from ahead import compile_ahead
from nerf_references import recorded, relative_error
from ragged import COUNTS, moved, padded, poisoned_memory, ragged
from torch import Tensor

from imagedream_rt.kernels import composite as module
from imagedream_rt.kernels._triton import KernelBackend
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


FEW = [0, 3, 1, 0, 8, 2, 0]


def test_gradients_against_autograd() -> None:
    samples = ragged(FEW, dtype=torch.float64)
    sigma = torch.rand(len(samples), dtype=torch.float64).mul(3).requires_grad_()
    cotangent = torch.randn_like(sigma)
    got, wanted = render_weights(sigma, samples), plain_weights(sigma, samples)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(got, sigma, cotangent), torch.autograd.grad(wanted, sigma, cotangent)
    )


def test_gradcheck_of_everything() -> None:
    samples = ragged(FEW, dtype=torch.float64)
    sigma = torch.rand(len(samples), dtype=torch.float64).mul(3).requires_grad_()
    values = torch.rand(len(samples), 2, dtype=torch.float64).requires_grad_()

    def everything(sigma: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        got = composite(sigma, values, samples)
        return got.weights, got.values, got.opacity, got.depth, got.z_variance

    assert torch.autograd.gradcheck(everything, (sigma, values))


def test_late_rays_are_as_exact_as_early_ones() -> None:
    # Sums along a ray are differences of one running sum, here 5e7 in the end: float32 would keep no digit.
    one = ragged([50])
    sigma = torch.rand(50) * 2
    alone = render_weights(sigma, one)
    n = 2000
    many = pack(torch.arange(n).repeat_interleave(50), one.t_starts.repeat(n), one.t_ends.repeat(n), n_rays=n)
    dense = torch.cat((sigma.repeat(n - 1) * 1000, sigma))
    got = render_weights(dense, many)[-50:]
    torch.testing.assert_close(got, alone, rtol=1e-6, atol=1e-7)


def test_opaque_matter_keeps_weights_in_range() -> None:
    samples = ragged([20, 20])
    sigma = torch.full((40,), 1e6).requires_grad_()
    weights = render_weights(sigma, samples)
    weights.sum().backward()
    torch.testing.assert_close(weights[[0, 20]], torch.ones(2))
    assert sigma.grad is not None
    assert sigma.grad.isfinite().all()


def test_no_samples() -> None:
    samples = ragged([0, 0], dtype=torch.float64)
    sigma = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    got = composite(sigma, torch.zeros(0, 3, dtype=torch.float64), samples)
    got.values.sum().backward()
    assert got.values.tolist() == [[0.0] * 3] * 2
    assert got.depth.tolist() == [0.0, 0.0]


def test_errors() -> None:
    with pytest.raises(ValueError, match="there are 14 samples"):
        composite(torch.zeros(3), torch.zeros(3, 3), ragged(FEW, dtype=torch.float64))


def test_examples() -> None:
    assert doctest.testmod(module).failed == 0


def everything(
    sigma: Tensor, values: Tensor, samples: Samples, backend: KernelBackend, outputs: str = "wvodz"
) -> list[Tensor]:
    """Results, and gradients for fixed random gradients by those of the results that ``outputs`` names."""
    sigma, values = sigma.detach().requires_grad_(), values.detach().requires_grad_()
    results = vars(composite(sigma, values, samples, backend=backend)).values()
    torch.manual_seed(11)
    cotangents = [torch.randn(result.shape).to(result) for result in results]
    chosen = [number for number, name in enumerate("wvodz") if name in outputs]
    loss = sum((list(results)[number] * cotangents[number]).sum() for number in chosen)
    grads = torch.autograd.grad(loss, (sigma, values), allow_unused=True, materialize_grads=True)
    return [*(x.detach() for x in results), *grads]


def check_kernel(
    counts: list[int], channels: int, device: torch.device, outputs: str = "wvodz", bound: float = 2e-6
) -> None:
    torch.manual_seed(3)
    sigma = torch.rand(sum(counts)).mul(4) * torch.rand(sum(counts))
    values = torch.randn(sum(counts), channels)
    exact = ragged(counts, dtype=torch.float64)
    wanted = everything(sigma.double(), values.double(), exact, "torch", outputs)
    with poisoned_memory():
        on_device = (sigma.to(device), values.to(device), ragged(counts, device=device))
        got = everything(*on_device, "triton", outputs)
    for number, (one, other) in enumerate(zip(got, wanted, strict=True)):
        assert one.dtype == torch.float32
        error = (one.cpu().double() - other).norm()
        assert error <= bound * other.norm(), (number, error / other.norm())


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_kernel_against_reference(channels: int, kernel_device: torch.device) -> None:
    check_kernel(COUNTS, channels, kernel_device)


@pytest.mark.parametrize("outputs", ["w", "v", "o", "d", "z", "vo", "wdz"])
def test_kernel_where_only_some_results_have_gradients(outputs: str, kernel_device: torch.device) -> None:
    check_kernel([2, 0, 19], 3, kernel_device, outputs)


@pytest.mark.parametrize("counts", [[], [0, 0], [1], [16], [17] * 9, [100]])
def test_kernel_on_odd_sizes(counts: list[int], kernel_device: torch.device) -> None:
    check_kernel(counts, 2, kernel_device)


def test_kernel_in_buffers_of_a_fixed_capacity(kernel_device: torch.device) -> None:
    sigma, values = torch.rand(sum(COUNTS)) * 3, torch.randn(sum(COUNTS), 3)
    samples = ragged(COUNTS)
    wanted = everything(sigma, values, samples, "torch")
    roomy = moved(samples.within(99), kernel_device)
    wide = (padded(sigma, 99).to(kernel_device), padded(values, 99).to(kernel_device), roomy)
    backends: tuple[KernelBackend, ...] = ("triton", "torch")
    for backend in backends:
        with poisoned_memory():
            got = everything(*wide, backend)
        for result in (got[0], *got[5:]):
            assert not result[len(samples) :].any(), "no sample, so no weight and no gradient"
        fixed = composite(*wide, backend=backend)
        torch.testing.assert_close(fixed.values.cpu(), wanted[1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(fixed.weights.cpu()[: len(samples)], wanted[0], rtol=1e-5, atol=1e-6)


def test_kernel_takes_half_precision_and_strides(kernel_device: torch.device) -> None:
    torch.manual_seed(5)
    samples = ragged(COUNTS)
    sigma, values = torch.rand(len(samples), 2)[:, 0] * 3, torch.randn(3, len(samples)).half().t()
    wanted = everything(sigma, values.float(), samples, "torch")
    got = everything(
        sigma.to(kernel_device), values.to(kernel_device), moved(samples, kernel_device), "triton"
    )
    for one, other in zip(got[:-1], wanted[:-1], strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-5)
    assert got[-1].dtype == torch.float16
    torch.testing.assert_close(got[-1].cpu().float(), wanted[-1], rtol=1e-3, atol=1e-5)


def test_kernel_keeps_the_digits_of_thin_and_of_opaque_matter(kernel_device: torch.device) -> None:
    samples = ragged([60, 60])
    sigma = torch.cat((torch.full((60,), 1e-6), torch.full((60,), 1e6)))
    wanted = everything(
        sigma.double(), torch.ones(120, 1).double(), ragged([60, 60], dtype=torch.float64), "torch"
    )
    got = everything(
        sigma.to(kernel_device), torch.ones(120, 1).to(kernel_device), moved(samples, kernel_device), "triton"
    )
    for rows in (slice(60), slice(60, 120)):
        assert relative_error(got[0][rows].cpu().double(), wanted[0][rows]) < 1e-6
    torch.testing.assert_close(got[4].cpu().double(), wanted[4], rtol=1e-5, atol=1e-10)
    assert got[5].isfinite().all()


def test_without_gradient_of_the_values(kernel_device: torch.device) -> None:
    samples = ragged(COUNTS, device=kernel_device)
    sigma = torch.rand(len(samples), device=kernel_device).requires_grad_()
    values = torch.rand(len(samples), 3, device=kernel_device)
    backends: tuple[KernelBackend, ...] = ("triton", "torch")
    for backend in backends:
        composite(sigma, values, samples, backend=backend).values.sum().backward()
    assert sigma.grad is not None
    assert sigma.grad.isfinite().all()


@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_ahead_of_time(arch: int) -> None:
    common = dict.fromkeys(("p_values", "p_t_starts", "p_t_ends", "p_weights", "p_passed"), "*fp32")
    common |= dict.fromkeys(("p_opacity", "p_depth"), "*fp32") | {"p_packed_info": "*i32", "n_rays": "i32"}
    sizes = dict(module.LAUNCH.constants)
    builds = [{"CHANNELS": 3, "CHANNELS_PADDED": 4, **sizes}, {"CHANNELS": 6, "CHANNELS_PADDED": 8, **sizes}]
    forward = common | dict.fromkeys(("p_sigma", "p_seen", "p_z_variance"), "*fp32")
    compile_ahead("composite", "_forward_kernel", forward, builds, arch, warps=module.LAUNCH.warps)
    grads = ("p_grad_weights", "p_grad_seen", "p_grad_opacity", "p_grad_depth", "p_grad_z_variance")
    backward = common | dict.fromkeys((*grads, "p_grad_sigma", "p_grad_values"), "*fp32")
    compile_ahead("composite", "_backward_kernel", backward, builds, arch, warps=module.LAUNCH.warps)


@pytest.mark.gpu
def test_many_rays() -> None:
    counts = torch.randint(300, (3000,)).mul(torch.rand(3000) < 0.5)
    check_kernel(counts.tolist(), 6, torch.device("cuda"), bound=1e-5)


@pytest.mark.gpu
def test_captured_in_a_graph() -> None:
    samples = ragged(COUNTS * 20, device="cuda").within(3000)
    sigma, values = torch.rand(3000, device="cuda"), torch.rand(3000, 6, device="cuda")
    wanted = everything(sigma, values, samples, "triton")
    still = (torch.zeros_like(sigma).requires_grad_(), torch.zeros_like(values).requires_grad_())
    graph = torch.cuda.CUDAGraph()

    def step() -> list[Tensor]:
        seen = composite(*still, samples, backend="triton")
        loss = (seen.values.square().sum() + seen.opacity.sum()) / 2
        return [seen.weights, seen.values, *torch.autograd.grad(loss, still)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        got = step()
    with torch.no_grad():
        still[0].copy_(sigma)
        still[1].copy_(values)
    graph.replay()
    torch.testing.assert_close(got[0], wanted[0])
    torch.testing.assert_close(got[1], wanted[1])
    for one, other in zip(got[2:], step()[2:], strict=True):
        torch.testing.assert_close(one, other)
    assert got[2].abs().sum() > 0
