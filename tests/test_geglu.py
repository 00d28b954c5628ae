"""GEGLU: the kernel against its reference, values and gradients, and by hand."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from ahead import compile_ahead
from graphs import captured
from rounding import assert_close, leaf, randn

from imagedream_rt.kernels import geglu as module
from imagedream_rt.kernels.geglu import geglu, geglu_reference

SHAPES = [(1, 2), (3, 5, 2 * 37), (2, 2 * 640), (9, 2 * 256), (2 * 1030,)]
REAL_SHAPES = [(10, 1024, 2560), (10, 256, 5120), (10, 64, 10240), (10, 16, 10240)]
HALF_AND_SINGLE = [torch.float32, torch.float16, torch.bfloat16]


pytestmark = pytest.mark.usefixtures("untuned")


def assert_kernel_equals_reference(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x = leaf(2 * randn(*shape, seed=1).to(device), dtype)
    exact = leaf(x.detach(), torch.float64)
    out, truth = geglu(x, backend="triton"), geglu_reference(exact)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_close(out, truth)
    cotangent = randn(*out.shape, seed=2).to(device).to(dtype)
    out.backward(cotangent)
    truth.backward(cotangent.double())
    assert x.grad is not None
    assert exact.grad is not None
    assert_close(x.grad, exact.grad)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_equals_reference(
    shape: tuple[int, ...], dtype: torch.dtype, kernel_device: torch.device
) -> None:
    assert_kernel_equals_reference(shape, dtype, kernel_device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", REAL_SHAPES, ids=str)
def test_kernel_equals_reference_at_real_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_kernel_equals_reference(shape, dtype, torch.device("cuda"))


def test_every_launch_computes_the_same(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = module._candidates(5, 300, torch.float16)
    assert len(launches) > 1
    for launch in launches:
        for tuned in (module._FORWARD, module._BACKWARD):
            monkeypatch.setattr(tuned, "choose", lambda *_, launch=launch: launch)
        assert_kernel_equals_reference((5, 600), torch.float16, kernel_device)


def test_every_gate_to_single_precision(kernel_device: torch.device) -> None:
    """Each element for itself: norms would not see an error in small values."""
    gate = torch.linspace(-12, 12, 4801, dtype=torch.float64).float()
    truth = gate.double() * torch.special.erfc(-gate.double() * math.sqrt(0.5)) / 2
    x = torch.cat((torch.ones_like(gate), gate)).to(kernel_device)
    found = geglu(x, backend="triton").cpu().double()
    # Where the exponent reaches 100, its own rounding is 1e-5 of the result.
    torch.testing.assert_close(found, truth, rtol=2e-5, atol=0)
    near = gate.abs() < 2
    torch.testing.assert_close(found[near], truth[near], rtol=2e-6, atol=0)


def test_extreme_gates(kernel_device: torch.device) -> None:
    x = torch.tensor([1.0, 1.0, 1.0, 1.0, -1e30, -1e4, 1e4, 1e30]).to(kernel_device).requires_grad_()
    out = geglu(x, backend="triton")
    assert out.tolist() == [0.0, 0.0, 1e4, float(torch.tensor(1e30))]
    out.sum().backward()
    assert x.grad is not None
    assert x.grad[4:].tolist() == [0.0, 0.0, 1.0, 1.0]


def test_strided_input_and_gradient(kernel_device: torch.device) -> None:
    wide = randn(3, 4, 20, seed=1, dtype=torch.float32).to(kernel_device)
    for x in (wide[:, ::2, 3:13], wide.mT[:, 4:12], wide[..., ::2], wide.expand(2, 3, 4, 20)):
        x = x.detach().requires_grad_()
        out = geglu(x, backend="triton")
        torch.testing.assert_close(out, geglu_reference(x))
        cotangent = (
            randn(1, *out.shape[1:-1], 1, seed=2, dtype=torch.float32).to(kernel_device).expand(out.shape)
        )
        (found,) = torch.autograd.grad(out, x, cotangent)
        (truth,) = torch.autograd.grad(geglu_reference(x), x, cotangent)
        torch.testing.assert_close(found, truth)


def test_nothing_in_nothing_out(kernel_device: torch.device) -> None:
    for shape in ((0, 8), (3, 0)):
        x = torch.zeros(shape, device=kernel_device, requires_grad=True)
        out = geglu(x, backend="triton")
        assert out.shape == (shape[0], shape[1] // 2)
        out.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == shape


def test_reference_gradcheck() -> None:
    assert torch.autograd.gradcheck(geglu_reference, leaf(randn(3, 8, seed=1), torch.float64))


@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_build_ahead_of_time(arch: int) -> None:
    launches = module._candidates(10240, 1280, torch.float16)[:2]
    constants = [{"CHANNELS": 1280, **dict(launch.constants)} for launch in launches]
    warps = [launch.warps for launch in launches]
    tensors = {"projected": "*fp16", "out": "*fp16", "rows": "i32", "stride": "i32"}
    compile_ahead("geglu", "_forward_kernel", tensors, constants, arch, warps=warps)
    tensors = {"grad": "*bf16", "projected": "*bf16", "out": "*bf16"}
    numbers = dict.fromkeys(("rows", "grad_stride", "stride"), "i32")
    compile_ahead("geglu", "_backward_kernel", tensors | numbers, constants[:1], arch, warps=warps[:1])


@pytest.mark.gpu
def test_kernel_in_a_cuda_graph() -> None:
    x = torch.randn(64, 5120, device="cuda", dtype=torch.float16)
    replay, out = captured(lambda: geglu(x))
    out.fill_(float("nan"))
    x.neg_()
    replay()
    assert_close(out, geglu_reference(x.double()))


@pytest.mark.gpu
def test_kernel_stays_one_call_in_a_compiled_function() -> None:
    x = torch.randn(64, 512, device="cuda", dtype=torch.float16)
    out = torch.compile(lambda x: geglu(x) + 1, fullgraph=True)(x)
    assert_close(out, geglu_reference(x.double()) + 1)


def test_geglu_refuses_what_does_not_fit(kernel_device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"projected must be \[..., 2C\], got \[2, 3\]"):
        geglu(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="projected must be"):
        geglu(torch.tensor(1.0))
    with pytest.raises(ValueError, match="float64"):
        geglu(torch.zeros(2, 2, dtype=torch.float64, device=kernel_device), backend="triton")
    with pytest.raises(ValueError, match="unknown backend"):
        geglu(torch.zeros(2), backend="fast")  # type: ignore[arg-type]


def test_docstring_examples() -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
