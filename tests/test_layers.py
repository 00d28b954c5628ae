"""Layers on kernels: PyTorch's own with the same parameters, and the choice of who computes them."""

from __future__ import annotations

import pytest
import torch
from operators import Operators
from torch import nn
from torch.nn import functional

from imagedream_rt.engine.layers import (
    Convolution,
    GroupNorm,
    KernelLayer,
    LayerNorm,
    fast_memory_format,
    normalised_convolution,
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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("summed", [False, True])
def test_a_convolution_has_its_bias_and_residual(
    kernel_device: torch.device, untuned: None, layout: torch.memory_format, size: int, summed: bool
) -> None:
    torch.manual_seed(0)
    theirs = nn.Conv2d(3, 8, size, padding=size // 2).to(kernel_device, memory_format=layout)  # type: ignore[call-overload]
    x, residual = (torch.randn(2, n, 4, 6, device=kernel_device).to(memory_format=layout) for n in (3, 8))
    gradients = []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        wanted = theirs(x) + residual if summed else theirs(x)
        for backend in ("torch", "triton"):
            own = Convolution.taking_over(theirs)
            use_kernels(own, backend)
            with Operators() as ran:
                found = own(x, residual if summed else None)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
            assert found.is_contiguous(memory_format=layout)
            assert not ran.rearranging()
            gradients.append(torch.autograd.grad(found.square().mean(), list(own.parameters())))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_a_gradient_by_the_input_is_a_convolution_with_turned_weights(
    kernel_device: torch.device, untuned: None, monkeypatch: pytest.MonkeyPatch, trained: bool
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(Convolution, "TURNED_FROM", 8)
    layer = Convolution(8, 16, 3, padding=1).to(kernel_device, torch.float16).requires_grad_(trained)
    use_kernels(layer, "triton")
    x = torch.randn(2, 8, 3, 4, device=kernel_device, dtype=torch.float16, requires_grad=True)
    cotangent = torch.randn(2, 16, 3, 4, device=kernel_device, dtype=torch.float16)
    with Operators() as ran:
        (found,) = torch.autograd.grad(layer(x), x, cotangent)
    assert ran.others["convolution_backward"] == trained
    assert ran.others["convolution"] == 2 - trained
    assert layer.bias is not None
    exact = x.detach().double().requires_grad_()
    y = functional.conv2d(exact, layer.weight.double(), layer.bias.double(), padding=1)
    (wanted,) = torch.autograd.grad(y, exact, cotangent.double())
    assert ((found - wanted).norm() / wanted.norm()).item() <= 1e-3
    with Operators() as ran:
        layer(x.detach())
    assert ran.others["flip"] == 0  # nothing to prepare for


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
