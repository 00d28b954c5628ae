"""Densities as far as light reaches, against densities everywhere."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from ahead import compile_ahead
from ragged import assert_same_samples, moved, poisoned_memory
from torch import Tensor
from torch.nn.functional import normalize

from imagedream_rt.kernels import lit_density as module
from imagedream_rt.kernels._triton import KernelBackend
from imagedream_rt.kernels.composite import sum_before
from imagedream_rt.kernels.hash_grid import grid_levels
from imagedream_rt.kernels.lit_density import lit_density
from imagedream_rt.kernels.prune import prune
from imagedream_rt.kernels.ray_march import march
from imagedream_rt.kernels.samples import Samples

STOP = 1e-2


@dataclass(frozen=True)
class Ball:
    """A ball with a rough surface; the sharper the more ``strength`` it has."""

    levels: int = 4
    hidden: int = 16
    strength: float = 40.0

    def density(
        self, rays: tuple[Tensor, Tensor], samples: Samples, backend: KernelBackend = "torch"
    ) -> Tensor:
        """On the rays' device; plain PyTorch knows all densities."""
        generator = torch.Generator().manual_seed(0)
        grid = grid_levels(self.levels, 10, 4, 1.5)
        table = torch.randn(grid[-1].offset + grid[-1].entries, 2, generator=generator)
        inner = torch.randn(self.hidden, 2 * self.levels, generator=generator) / 2
        outer = torch.randn(1, self.hidden, generator=generator)
        table, inner, outer = (tensor.to(rays[0]) for tensor in (table, inner, outer))
        field = (table, grid, (inner, outer))
        return lit_density(*rays, samples, STOP, *field, blob_strength=self.strength, backend=backend)


def scene(rays: int, step: float = 0.1) -> tuple[tuple[Tensor, Tensor], Samples]:
    generator = torch.Generator().manual_seed(3)
    origins = torch.randn(rays, 3, generator=generator)
    directions = normalize(torch.randn(rays, 3, generator=generator) * 0.3 - origins, dim=1)
    occupied = torch.rand(4, 4, 4, generator=generator) < 0.8
    return (origins, directions), march(origins, directions, occupied, step)


def to(device: torch.device, rays: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return rays[0].to(device), rays[1].to(device)


def check(ball: Ball, rays: tuple[Tensor, Tensor], samples: Samples, device: torch.device) -> None:
    wanted = ball.density(rays, samples)
    with poisoned_memory():
        got = ball.density(to(device, rays), moved(samples, device), "triton").cpu()
    passed = torch.exp(-sum_before(wanted * (samples.t_ends - samples.t_starts), samples))
    known = got != 0
    assert known[passed > 1.001 * STOP].all()
    torch.testing.assert_close(got[known], wanted[known], rtol=1e-4, atol=1e-4)
    # It looks at several samples at once, and may so know some in the dark, but not all.
    assert 0 < known.sum() < len(samples)
    assert (wanted > 0).all()


# On the CPU 27 rays are more than one block to a program.
@pytest.mark.parametrize(("ball", "rays"), [(Ball(), 27), (Ball(levels=9, hidden=20), 11)], ids=str)
def test_kernel_against_reference(ball: Ball, rays: int, kernel_device: torch.device) -> None:
    given, samples = scene(rays)
    check(ball, given, samples, kernel_device)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_pruning_sees_no_difference(backend: KernelBackend, kernel_device: torch.device) -> None:
    rays, samples = scene(8)
    got = Ball().density(to(kernel_device, rays), moved(samples, kernel_device), backend).cpu()
    wanted = prune(Ball().density(rays, samples), samples, STOP, 0.01)
    assert_same_samples(prune(got, samples, STOP, 0.01), wanted)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_fixed_capacity(backend: KernelBackend, kernel_device: torch.device) -> None:
    rays, samples = scene(6, step=0.2)
    kept = prune(Ball().density(rays, samples), samples, STOP, 0.01)
    roomy = moved(samples.within(len(samples) + 9), kernel_device)
    with poisoned_memory():
        got = Ball().density(to(kernel_device, rays), roomy, backend)
    assert not got[-9:].any()
    assert_same_samples(moved(prune(got, roomy, STOP, 0.01, backend="torch"), "cpu"), kept)


def test_rays_without_samples(kernel_device: torch.device) -> None:
    rays = torch.zeros(3, 3, device=kernel_device)
    occupied = torch.zeros(2, 2, 2, dtype=torch.bool, device=kernel_device)
    for few in (rays[:0], rays):
        nothing = march(few, few + 1, occupied, 0.5)
        assert Ball().density((few, few + 1), nothing, "triton").shape == (0,)


def test_what_the_kernel_does_not_take(kernel_device: torch.device) -> None:
    rays, samples = scene(2)
    wide = Ball(hidden=129)
    assert wide.density(rays, samples).shape == (len(samples),)
    with pytest.raises(ValueError, match=r"at most 128 hidden units; .* inner \(129, 8\)"):
        wide.density(to(kernel_device, rays), moved(samples, kernel_device), "triton")


@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_ahead_of_time(arch: int) -> None:
    pointers = ("p_origins", "p_directions", "p_t_starts", "p_t_ends", "p_inner", "p_outer", "p_sigma")
    arguments = dict.fromkeys(pointers, "*fp32") | dict.fromkeys(("p_packed_info", "p_levels"), "*i32")
    arguments |= {"n_rays": "i32", "p_table": "*fp32"}
    arguments |= dict.fromkeys(("transmittance_stop", "strength", "radius"), "fp32")
    build = {"LEVELS": 16, "WIDTH_IN": 32, "H": 64, "HIDDEN": 64, **dict(module.LAUNCH.constants)}
    launch = {"warps": module.LAUNCH.warps, "stages": module.LAUNCH.stages}
    compile_ahead("lit_density", "_lit_density_kernel", arguments, [build], arch, **launch)


@pytest.mark.gpu
def test_many_rays() -> None:
    rays, samples = scene(3000, step=0.02)
    check(Ball(), rays, samples, torch.device("cuda"))
