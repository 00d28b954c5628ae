"""Pruning against nerfacc's recorded visibility, hand-computed rays and plain PyTorch."""

from __future__ import annotations

import doctest

import pytest
import torch
from ahead import compile_ahead
from graphs import captured
from nerf_references import recorded
from ragged import COUNTS, assert_same_samples, moved, number, padded, poisoned_memory, ragged
from torch import Tensor

from imagedream_rt.kernels import prune as module
from imagedream_rt.kernels._triton import KernelBackend
from imagedream_rt.kernels.prune import prune, visible
from imagedream_rt.kernels.samples import Samples, pack


def recorded_samples() -> Samples:
    fixture = recorded()
    return pack(
        fixture["composite.ray_indices"], fixture["composite.t_starts"], fixture["composite.t_ends"], n_rays=7
    )


def unit_samples(count: int) -> Samples:
    starts = torch.arange(float(count))
    return pack(torch.zeros(count, dtype=torch.int64), starts, starts + 1, 1)


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, kernel_device: torch.device) -> KernelBackend:
    return request.param


def test_recorded_visibility(backend: KernelBackend, kernel_device: torch.device) -> None:
    samples, sigma = recorded_samples(), recorded()["composite.sigmas"]
    mask = recorded()["composite.visibility_eps1e-4_alpha0.01"]
    assert torch.equal(visible(sigma, samples, 1e-4, 0.01), mask)
    got = prune(sigma.to(kernel_device), moved(samples, kernel_device), 1e-4, 0.01, backend=backend)
    assert_same_samples(moved(got, "cpu"), samples.keep(mask))


def test_by_hand(backend: KernelBackend, kernel_device: torch.device) -> None:
    sigma, samples = (
        torch.tensor([0.001, 5.0, 5.0, 5.0]).to(kernel_device),
        moved(unit_samples(4), kernel_device),
    )
    # Light e^-5 = 0.0067 reaches the third, e^-10 = 4.5e-5 the fourth; the first absorbs a thousandth.
    got = prune(sigma, samples, 1e-4, 0.01, backend=backend)
    assert got.t_starts.tolist() == [1.0, 2.0]
    assert got.packed_info.tolist() == [[0, 2]]
    assert len(prune(sigma, samples, 0.0, torch.zeros((), device=kernel_device), backend=backend)) == 4


def scene(device: torch.device) -> tuple[Tensor, Samples]:
    torch.manual_seed(7)
    sigma = torch.rand(sum(COUNTS)) * torch.rand(sum(COUNTS)) * 8
    return sigma.to(device), ragged(COUNTS, device=device)


@pytest.mark.parametrize(("stop", "least"), [(1e-4, 0.01), (0.3, 0.3), (0.0, 0.0), (2.0, 0.0)])
def test_kernel_against_reference(stop: float, least: float, kernel_device: torch.device) -> None:
    sigma, samples = scene(kernel_device)
    wanted = prune(sigma, samples, stop, least, backend="torch")
    with poisoned_memory():
        got = prune(sigma, samples, stop, torch.tensor(least, device=kernel_device), backend="triton")
    assert_same_samples(got, wanted)
    assert (len(wanted) < len(samples)) == (stop > 0)


@pytest.mark.parametrize("capacity", [100, 20, 3, 0])
def test_fixed_capacity_in_and_out(
    capacity: int, backend: KernelBackend, kernel_device: torch.device
) -> None:
    sigma, samples = scene(kernel_device)
    wanted = prune(sigma, samples, 1e-2, 0.05, backend="torch").within(capacity)
    with poisoned_memory():
        got = prune(padded(sigma, 99), samples.within(99), 1e-2, 0.05, capacity=capacity, backend=backend)
    assert_same_samples(got, wanted)
    assert number(wanted.found) > 20


def test_light_ends_where_matter_is_opaque(backend: KernelBackend, kernel_device: torch.device) -> None:
    sigma = torch.full((100,), 1e6, device=kernel_device)
    got = prune(sigma, moved(unit_samples(100), kernel_device), 1e-4, 0.01, backend=backend)
    assert got.t_starts.tolist() == [0.0]


def test_thin_matter_keeps_its_digits(backend: KernelBackend, kernel_device: torch.device) -> None:
    # 1 - exp(-1e-5) would be wrong by a percent in float32.
    sigma, samples = torch.full((5,), 1e-5, device=kernel_device), moved(unit_samples(5), kernel_device)
    assert len(prune(sigma, samples, 1e-4, 0.9999e-5, backend=backend)) == 5
    assert len(prune(sigma, samples, 1e-4, 1.0001e-5, backend=backend)) == 0


def test_strided_and_empty(kernel_device: torch.device) -> None:
    sigma, samples = scene(kernel_device)
    strided = torch.stack((sigma, sigma), dim=1)[:, 0]
    assert_same_samples(
        prune(strided, samples, 1e-4, 0.01, backend="triton"),
        prune(sigma, samples, 1e-4, 0.01, backend="torch"),
    )
    for counts in ([], [0, 0]):
        nothing = ragged(counts, device=kernel_device)
        kept = prune(nothing.t_starts, nothing, 1e-4, 0.01, backend="triton")
        assert kept.packed_info.tolist() == [[0, 0]] * len(counts)


def test_errors() -> None:
    with pytest.raises(ValueError, match="there are 85 samples"):
        prune(torch.zeros(3), ragged(COUNTS), 1e-4, 0.01)


@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_ahead_of_time(arch: int) -> None:
    arguments = dict.fromkeys(("p_sigma", "p_t_starts", "p_t_ends", "p_alpha_least"), "*fp32")
    arguments |= dict.fromkeys(("p_packed_info", "p_counts", "p_sums"), "*i32")
    arguments |= {"n_rays": "i32", "transmittance_stop": "fp32"}
    integers = ("p_begins", "p_totals", "p_kept_rays", "p_kept_info")
    written = dict.fromkeys(integers, "*i32") | dict.fromkeys(("p_kept_starts", "p_kept_ends"), "*fp32")
    sizes, warps = dict(module.LAUNCH.constants), module.LAUNCH.warps
    compile_ahead("prune", "_prune_kernel", {**arguments, **written}, [sizes], arch, warps=warps)
    counting = {**dict.fromkeys(written), **sizes}
    compile_ahead("prune", "_prune_kernel", arguments, [counting], arch, warps=warps)


def test_examples() -> None:
    assert doctest.testmod(module).failed == 0


@pytest.mark.gpu
def test_many_rays_and_a_captured_graph() -> None:
    device = torch.device("cuda")
    counts = torch.randint(200, (5000,)).mul(torch.rand(5000) < 0.5)
    samples = ragged(counts.tolist(), device=device)
    sigma = torch.rand(len(samples), device=device) * 3
    wanted = prune(sigma, samples, 1e-4, 0.1, backend="torch")
    still = torch.zeros_like(sigma)
    replay, got = captured(lambda: prune(still, samples, 1e-4, 0.1, capacity=len(samples)))
    still.copy_(sigma)
    replay()
    # At the thresholds rounding decides.
    assert abs(number(got.count) - len(wanted)) <= 5
    if number(got.count) == len(wanted):
        assert_same_samples(got.trim(), wanted)
