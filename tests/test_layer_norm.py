"""LayerNorm, alone and with the residual sum: the kernels against their references, and by hand."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
from ahead import compile_ahead
from graphs import captured
from rounding import assert_close, leaf, randn
from torch import Tensor
from torch.nn import functional

from imagedream_rt.kernels import layer_norm as module
from imagedream_rt.kernels.layer_norm import (
    WIDEST,
    add_layer_norm,
    add_layer_norm_reference,
    layer_norm,
    layer_norm_reference,
)

SHAPES = [(7,), (3, 5, 37), (2, 640), (13, 320), (2, 1280), (1, 4100)]
REAL_SHAPES = [(10, 1024, 320), (10, 256, 640), (10, 64, 1280), (10, 16, 1280)]
HALF_AND_SINGLE = [torch.float32, torch.float16, torch.bfloat16]
Result = tuple[Tensor, ...]


pytestmark = pytest.mark.usefixtures("untuned")


def compare(
    inputs: list[Tensor], found: Result, exact: list[Tensor], truth: Result, dtype: torch.dtype
) -> None:
    """Results, then gradients of all inputs for random cotangents."""
    cotangents = [randn(*x.shape, seed=9 + i).to(x.device).to(dtype) for i, x in enumerate(found)]
    for out, wanted in zip(found, truth, strict=True):
        assert out.dtype == dtype
        assert out.is_contiguous()
        assert_close(out, wanted)
    torch.autograd.backward(found, cotangents)
    torch.autograd.backward(truth, [x.double() for x in cotangents])
    for x, y in zip(inputs, exact, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        assert x.grad.dtype == x.dtype
        assert_close(x.grad, y.grad)


def assert_kernels_equal_references(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, weights: torch.dtype = torch.float32
) -> None:
    # A mean that would swallow the variance if squares were summed in half precision. In eighths, since the
    # residual sum is rounded before it is normalised: these sums need no rounding.
    x, delta = ((8 * randn(*shape, seed=seed).to(device)).round() / 8 for seed in (1, 2))
    x += 3
    weight, bias = (1 + randn(shape[-1], seed=seed).to(device) / 4 for seed in (3, 4))

    def inputs_of(*activations: Tensor) -> list[Any]:
        return [*(leaf(part, dtype) for part in activations), leaf(weight, weights), leaf(bias, weights)]

    inputs = b_x, b_weight, b_bias = inputs_of(x)
    exact = e_x, e_weight, e_bias = [leaf(part.detach(), torch.float64) for part in inputs]
    found = layer_norm(b_x, b_weight, b_bias, backend="triton")
    compare(inputs, (found,), exact, (layer_norm_reference(e_x, e_weight, e_bias),), dtype)

    inputs = b_x, b_delta, b_weight, b_bias = inputs_of(x, delta)
    exact = e_x, e_delta, e_weight, e_bias = [leaf(part.detach(), torch.float64) for part in inputs]
    both = add_layer_norm(b_x, b_delta, b_weight, b_bias, backend="triton")
    compare(inputs, both, exact, add_layer_norm_reference(e_x, e_delta, e_weight, e_bias), dtype)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_equal_references(
    shape: tuple[int, ...], dtype: torch.dtype, kernel_device: torch.device
) -> None:
    assert_kernels_equal_references(shape, dtype, kernel_device)


def test_weights_in_half_precision(kernel_device: torch.device) -> None:
    assert_kernels_equal_references((5, 48), torch.float16, kernel_device, weights=torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", REAL_SHAPES, ids=str)
def test_kernels_equal_references_at_real_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_kernels_equal_references(shape, dtype, torch.device("cuda"))


@pytest.mark.parametrize("channels", [320, 1280])
def test_every_launch_computes_the_same(
    channels: int, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = module._candidates(5, channels, torch.float16, False)
    assert len(launches) > 1
    for launch in launches:
        monkeypatch.setattr(module._FORWARD, "choose", lambda *_, launch=launch: launch)
        assert_kernels_equal_references((5, channels), torch.float16, kernel_device)


def test_layer_norm_by_hand(kernel_device: torch.device) -> None:
    # Means 2 and 0; deviations (-1, 1) and (-3, 3); variances 1 and 9.
    x = torch.tensor([[1.0, 3.0], [-3.0, 3.0]], device=kernel_device)
    weight, bias = (
        torch.tensor([2.0, 4.0], device=kernel_device),
        torch.tensor([0.0, 1.0], device=kernel_device),
    )
    for backend in ("triton", "torch"):
        out = layer_norm(x, weight, bias, eps=1e-9, backend=backend)
        torch.testing.assert_close(out.cpu(), torch.tensor([[-2.0, 5.0], [-2.0, 5.0]]))
        total, out = add_layer_norm(x, -x + 7, weight, bias, backend=backend)
        torch.testing.assert_close(total.cpu(), torch.full((2, 2), 7.0))
        torch.testing.assert_close(out.cpu(), bias.cpu().expand(2, 2))
        alone = layer_norm(x[:, :1], weight[:1], bias[1:], backend=backend)  # one channel is its own mean
        assert alone.flatten().tolist() == [1.0, 1.0]


def test_a_large_mean_does_not_hide_the_variance(kernel_device: torch.device) -> None:
    x = 1000 + torch.arange(64, dtype=torch.float32, device=kernel_device)[None] / 64
    ones = torch.ones(64, device=kernel_device)
    out = layer_norm(x, ones, 0 * ones, backend="triton")
    torch.testing.assert_close(
        out, layer_norm_reference(x.double(), ones, 0 * ones).float(), rtol=1e-4, atol=1e-4
    )


def test_strided_input_and_gradient(kernel_device: torch.device) -> None:
    wide = randn(3, 4, 20, seed=1, dtype=torch.float32).to(kernel_device)
    for x in (wide[:, ::2, 3:13], wide.mT[:, 4:12], wide[..., ::2], wide.expand(2, 3, 4, 20)):
        x = x.detach().requires_grad_()
        weight, bias = (
            randn(x.shape[-1], 2, seed=s, dtype=torch.float32).to(kernel_device)[:, 0] for s in (2, 3)
        )
        found = add_layer_norm(x, 2 * x, weight, bias, backend="triton")
        truth = add_layer_norm_reference(x, 2 * x, weight, bias)
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)
        cotangent = randn(1, *x.shape[1:-1], 1, seed=4, dtype=torch.float32).to(kernel_device).expand(x.shape)
        (found_grad,) = torch.autograd.grad(found[1], x, cotangent)
        (true_grad,) = torch.autograd.grad(truth[1], x, cotangent)
        torch.testing.assert_close(found_grad, true_grad, rtol=1e-4, atol=1e-5)


def test_nothing_in_nothing_out(kernel_device: torch.device) -> None:
    for shape in ((0, 8), (3, 0)):
        x = torch.zeros(shape, device=kernel_device, requires_grad=True)
        weight = torch.ones(shape[1], device=kernel_device, requires_grad=True)
        for out in (
            layer_norm(x, weight, weight, backend="triton"),
            *add_layer_norm(x, x, weight, weight, backend="triton"),
        ):
            assert out.shape == shape
            grads = torch.autograd.grad(
                out.sum(), (x, weight), allow_unused=True, materialize_grads=True, retain_graph=True
            )
            assert [grad.shape for grad in grads] == [x.shape, weight.shape]
            assert not grads[1].any()


def test_references_gradcheck() -> None:
    inputs = [
        leaf(randn(*shape, seed=i), torch.float64) for i, shape in enumerate(((3, 8), (3, 8), (8,), (8,)))
    ]
    x, delta, weight, bias = inputs
    assert torch.autograd.gradcheck(layer_norm_reference, (x, weight, bias))
    assert torch.autograd.gradcheck(add_layer_norm_reference, (x, delta, weight, bias))


def test_reference_is_torch_layer_norm() -> None:
    x, weight, bias = randn(5, 16, seed=1), randn(16, seed=2), randn(16, seed=3)
    torch.testing.assert_close(
        layer_norm_reference(x, weight, bias, 1e-3), functional.layer_norm(x, (16,), weight, bias, 1e-3)
    )


@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_build_ahead_of_time(arch: int) -> None:
    tensors = ("x", "delta", "total", "out")
    types = {**dict.fromkeys(tensors, "*fp16"), "weight": "*fp32", "bias": "*fp32", "eps": "fp32"}
    types |= dict.fromkeys(("rows", "x_stride", "delta_stride"), "i32")
    launches = module._candidates(640, 1280, torch.float16, True)[::2]
    constants = [{"ADD": 1, "CHANNELS": 1280, **dict(launch.constants)} for launch in launches]
    warps = [launch.warps for launch in launches]
    compile_ahead("layer_norm", "_forward_kernel", types, constants, arch, warps=warps)
    types = {**dict.fromkeys(("grad", "x", "grad_x"), "*fp16"), "weight": "*fp32", "eps": "fp32"}
    types |= dict.fromkeys(("grad_weight", "grad_bias"), "*fp32")
    types |= dict.fromkeys(("rows", "grad_stride", "x_stride"), "i32")
    launch = module._backward_launch(1280)
    constants = [{"CHANNELS": 1280, **dict(launch.constants)}]
    compile_ahead("layer_norm", "_backward_kernel", types, constants, arch, warps=launch.warps)


@pytest.mark.gpu
def test_kernels_in_a_cuda_graph() -> None:
    x, delta = (torch.randn(64, 320, device="cuda", dtype=torch.float16) for _ in range(2))
    weight, bias = torch.randn(2, 320, device="cuda")
    replay, (total, sum_norm, norm) = captured(
        lambda: (*add_layer_norm(x, delta, weight, bias), layer_norm(x, weight, bias))
    )
    for out in (total, sum_norm, norm):
        out.fill_(float("nan"))
    x.neg_()
    replay()
    weight, bias = weight.double(), bias.double()
    assert torch.equal(total, x + delta)
    assert_close(sum_norm, layer_norm_reference(total.double(), weight, bias))
    assert_close(norm, layer_norm_reference(x.double(), weight, bias))


@pytest.mark.gpu
def test_kernels_stay_one_call_in_a_compiled_function() -> None:
    x = torch.randn(64, 320, device="cuda", dtype=torch.float16)
    weight, bias = torch.randn(2, 320, device="cuda")
    out = torch.compile(lambda x: add_layer_norm(x, x, weight, bias)[1], fullgraph=True)(x)
    assert_close(out, layer_norm_reference(2 * x.double(), weight.double(), bias.double()))


def test_layer_norm_refuses_what_does_not_fit(kernel_device: torch.device) -> None:
    x, ones = torch.zeros(2, 4, device=kernel_device), torch.ones(4, device=kernel_device)
    with pytest.raises(ValueError, match=r"weight and bias \[C\], got \[2, 4\], \[3\] and \[4\]"):
        layer_norm(x, ones[:3], ones)
    with pytest.raises(ValueError, match="weight and bias"):
        add_layer_norm(x, x, ones, ones[:1])
    with pytest.raises(ValueError, match=r"delta must have .* \[2, 4\] in torch.float32, got \[1, 4\]"):
        add_layer_norm(x, x[:1], ones, ones)
    with pytest.raises(ValueError, match="float16"):
        add_layer_norm(x, x.half(), ones, ones)
    with pytest.raises(ValueError, match="float64"):
        layer_norm(x.double(), ones, ones, backend="triton")
    with pytest.raises(ValueError, match="unknown backend"):
        layer_norm(x, ones, ones, backend="fast")  # type: ignore[arg-type]
    wide = torch.zeros(1, WIDEST + 1, device=kernel_device)
    with pytest.raises(ValueError, match=f"up to {WIDEST} channels, got {WIDEST + 1}"):
        layer_norm(wide, wide[0], wide[0], backend="triton")


def test_docstring_examples() -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
