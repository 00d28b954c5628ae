"""The background against the released code, its kernel against plain PyTorch."""

from __future__ import annotations

import doctest

import pytest
import torch
from ahead import compile_ahead
from graphs import captured
from nerf_references import recorded, relative_error
from ragged import poisoned_memory
from torch import Tensor

from imagedream_rt.kernels import background as module
from imagedream_rt.kernels._triton import KernelBackend
from imagedream_rt.kernels.background import (
    SHAPES,
    background,
    background_reference,
    spherical_harmonics,
)


def problem(*shape: int) -> tuple[Tensor, list[Tensor]]:
    """Unit directions, and weights that saturate nothing."""
    generator = torch.Generator().manual_seed(2)
    directions = torch.randn(*shape, 3, generator=generator)
    weights = [torch.randn(size, generator=generator) * (2 / size[1]) ** 0.5 for size in SHAPES]
    return torch.nn.functional.normalize(directions, dim=-1), weights


def everything(directions: Tensor, weights: list[Tensor], backend: KernelBackend) -> list[Tensor]:
    """Colours, and gradients for a fixed random gradient."""
    weights = [weight.detach().requires_grad_() for weight in weights]
    colour = background(directions, weights, backend=backend)
    cotangent = torch.randn(colour.shape, generator=torch.Generator().manual_seed(3)).to(colour)
    return [colour.detach(), *torch.autograd.grad(colour, weights, cotangent)]


def test_recorded_spherical_harmonics() -> None:
    fixture = recorded()
    assert relative_error(spherical_harmonics(fixture["sh3.dirs"]), fixture["sh3.out"]) < 1e-6


def test_gradcheck() -> None:
    directions, weights = problem(5)
    given = [directions.double().requires_grad_(), *(weight.double().requires_grad_() for weight in weights)]
    assert torch.autograd.gradcheck(lambda x, *w: background_reference(x, w), given)


@pytest.mark.parametrize("shape", [(1,), (64,), (3, 7, 11), (0, 5)])
def test_kernel_against_reference(
    shape: tuple[int, ...], kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that a program has more than one block.
    monkeypatch.setattr(module, "PROGRAMS", 3)
    directions, weights = problem(*shape)
    wanted = everything(directions.double(), [weight.double() for weight in weights], "torch")
    with poisoned_memory():
        got = everything(
            directions.to(kernel_device), [weight.to(kernel_device) for weight in weights], "triton"
        )
    assert got[0].shape == (*shape, 3)
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == torch.float32
        assert (one.cpu() - other).norm() <= 1e-5 * other.norm()


def test_kernel_takes_strides_and_gives_hidden_directions_no_gradient(kernel_device: torch.device) -> None:
    directions, weights = problem(70)
    strided = torch.stack((directions, directions), dim=-1)[..., 0].to(kernel_device)
    there = [weight.t().contiguous().t().to(kernel_device).requires_grad_() for weight in weights]
    colour = background(strided, there, backend="triton")
    torch.testing.assert_close(colour.cpu(), background_reference(directions, weights), rtol=1e-5, atol=1e-6)
    (colour * 0.0).sum().backward()
    assert all(weight.grad is not None and not weight.grad.any() for weight in there)


def test_other_widths_and_directions_with_a_gradient_take_plain_pytorch() -> None:
    directions, weights = problem(4)
    narrow = [torch.ones(2, 9), torch.ones(2, 2), torch.ones(3, 2)]
    assert background(directions, narrow).shape == (4, 3)
    directions.requires_grad_()
    background(directions, weights).sum().backward()
    assert directions.grad is not None
    assert directions.grad.any()


def test_errors() -> None:
    directions, weights = problem(4)
    with pytest.raises(ValueError, match=r"directions have shape \(4, 2\); they must be \[..., 3\]"):
        background(directions[:, :2], weights)
    with pytest.raises(ValueError, match=r"the weights are \(\(16, 9\), \(3, 16\)\)"):
        background(directions, weights[::2], backend="triton")
    with pytest.raises(ValueError, match="without gradient"):
        background(directions.requires_grad_(), weights, backend="triton")


def test_examples() -> None:
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_ahead_of_time(arch: int) -> None:
    names = ("p_directions", "p_first", "p_second", "p_last", "p_colour")
    pointers = dict.fromkeys(names, "*fp32")
    grads = dict.fromkeys(("p_grad", "p_sums"), "*fp32")
    for kernel, given, launch in (
        ("_forward_kernel", pointers, module.FORWARD),
        ("_backward_kernel", pointers | grads, module.BACKWARD),
    ):
        options = {"warps": launch.warps, "stages": launch.stages}
        compile_ahead("background", kernel, given | {"n": "i32"}, [dict(launch.constants)], arch, **options)


@pytest.mark.gpu
def test_many_rays_and_a_graph() -> None:
    directions, weights = (
        x.cuda() if isinstance(x, Tensor) else [w.cuda() for w in x] for x in problem(4, 256, 256)
    )
    wanted = everything(directions.double(), [weight.double() for weight in weights], "torch")
    still = torch.zeros_like(directions)
    given = [weight.requires_grad_() for weight in weights]
    cotangent = torch.randn(directions.shape, generator=torch.Generator().manual_seed(3)).cuda()

    def step() -> list[Tensor]:
        colour = background(still, given, backend="triton")
        return [colour, *torch.autograd.grad(colour, given, cotangent)]

    replay, got = captured(step)
    still.copy_(directions)
    replay()
    for one, other in zip(got, wanted, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
