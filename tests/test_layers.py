"""Layers on kernels: PyTorch's own with the same parameters, and the choice of who computes them."""

from __future__ import annotations

import pytest
import torch
from operators import Operators
from torch import nn
from torch.nn import functional

from imagedream_rt.engine.layers import (
    GroupNorm,
    KernelLayer,
    LayerNorm,
    fast_memory_format,
    normalised_convolution,
    sum_of_convolutions,
    use_kernels,
)


def randomised(norm: nn.GroupNorm | nn.LayerNorm) -> None:
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)


@pytest.mark.parametrize("shape", [(2, 8, 3, 5), (2, 8, 7)], ids=str)
def test_group_norm_takes_over_parameters_and_meaning(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    theirs = nn.GroupNorm(4, 8, eps=1e-3)
    randomised(theirs)
    x = torch.randn(shape)
    own = GroupNorm.taking_over(theirs)
    assert own.weight is theirs.weight
    assert own.bias is theirs.bias
    torch.testing.assert_close(own(x), theirs(x))
    shift = torch.randn(shape[:2])
    shifted = x + shift.view(*shape[:2], *(1 for _ in shape[2:]))
    activated = GroupNorm.taking_over(theirs, silu=True)
    torch.testing.assert_close(activated(x, shift), functional.silu(theirs(shifted)))


def test_layer_norm_alone_and_after_a_sum() -> None:
    torch.manual_seed(0)
    theirs, own = nn.LayerNorm(8), LayerNorm(8)
    randomised(theirs)
    own.load_state_dict(theirs.state_dict())
    x, delta = torch.randn(2, 3, 5, 8).unbind(0)
    torch.testing.assert_close(own(x), theirs(x))
    total, normed = own.after_sum(x, delta)
    torch.testing.assert_close(total, x + delta)
    torch.testing.assert_close(normed, theirs(x + delta))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shifted", [False, True])
def test_a_normalised_convolution_has_its_bias_or_the_shift(device: str, shifted: bool) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 8, 3, stride=2, padding=1).to(device)
    assert convolution.bias is not None
    nn.init.normal_(convolution.bias)
    norm = GroupNorm(2, 8, eps=1e-5, silu=True).to(device)
    x, shift = torch.randn(2, 3, 6, 6, device=device), torch.randn(2, 8, device=device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        found = normalised_convolution(convolution, norm, x, shift if shifted else None)
        wanted = convolution(x)
    if shifted:
        wanted = wanted + (shift - convolution.bias)[:, :, None, None]
    torch.testing.assert_close(found, norm(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_sum_of_convolutions_has_both_biases(device: str, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(5, 8, 3, padding=1).to(device, memory_format=layout)  # type: ignore[call-overload]
    pointwise = nn.Conv2d(3, 8, 1).to(device, memory_format=layout)  # type: ignore[call-overload]
    h, x = (torch.randn(2, n, 4, 6, device=device).to(memory_format=layout) for n in (5, 3))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), Operators() as ran:
        found = sum_of_convolutions(convolution, h, pointwise, x)
        wanted = convolution(h) + pointwise(x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert found.is_contiguous(memory_format=layout)
    assert not ran.rearranging()
    found.square().mean().backward()
    gradients = [p.grad for p in (*convolution.parameters(), *pointwise.parameters())]
    convolution.zero_grad()
    pointwise.zero_grad()
    wanted.square().mean().backward()
    for gradient, p in zip(gradients, (*convolution.parameters(), *pointwise.parameters()), strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-5)


def test_the_choice_reaches_every_layer() -> None:
    network = nn.Sequential(GroupNorm(2, 4, eps=1e-5), nn.Sequential(LayerNorm(4), nn.SiLU()))
    chosen = [module for module in network.modules() if isinstance(module, KernelLayer)]
    assert [layer.backend for layer in chosen] == ["auto", "auto"]
    use_kernels(network, "torch")
    assert [layer.backend for layer in chosen] == ["torch", "torch"]
    # Another network's choice is its own.
    assert LayerNorm(4).backend == "auto"


def test_memory_format_stays_on_the_cpu() -> None:
    convolution = nn.Conv2d(4, 4, 3)
    fast_memory_format(convolution)
    assert convolution.weight.is_contiguous()


@pytest.mark.gpu
def test_memory_format_on_the_gpu() -> None:
    convolution, linear = nn.Conv2d(4, 4, 3).cuda(), nn.Linear(4, 4).cuda()
    fast_memory_format(nn.Sequential(convolution, linear))
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    assert linear.weight.is_contiguous()
