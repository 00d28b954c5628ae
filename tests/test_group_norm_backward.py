"""Gradients of group normalisation against those of the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ahead import compile_ahead
from feature_maps import DTYPES_AND_LAYOUTS, LAYOUTS, SHAPES, Inputs, inputs
from graphs import captured
from rounding import assert_close, randn, relative_error
from torch import Tensor

from imagedream_rt.kernels import group_norm_backward as module
from imagedream_rt.kernels._group_tiles import chunked_candidates, constants, whole_candidates
from imagedream_rt.kernels._tuning import Launch
from imagedream_rt.kernels.group_norm import group_norm, group_norm_reference

EPS = 1e-5
REAL_SHAPES = [(10, 320, 32, 32), (10, 1280, 8, 8), (4, 128, 256, 256), (4, 256, 128, 128), (4, 512, 64, 64)]
PLANS = {
    "whole": Launch.of(warps=1, GROUPS=2, ROWS=64, STEPS=1, STAGES=1),
    "walked": Launch.of(warps=1, GROUPS=3, ROWS=4, STEPS=16, STAGES=1),
    "chunked": Launch.of(warps=1, GROUPS=2, ROWS=4, STEPS=2, WALK=3, STAGES=1),
    "chunked, one group": Launch.of(warps=1, GROUPS=1, ROWS=8, STEPS=1, WALK=1, STAGES=1),
}


pytestmark = pytest.mark.usefixtures("untuned")


def truth(given: Inputs, cotangent: Tensor, **options: Any) -> list[Tensor]:
    """Gradients in float64, of x, weight, bias and, if there is one, shift."""
    exact = given.exact()
    y = exact.call(group_norm_reference, eps=EPS, **options)
    return list(torch.autograd.grad(y, exact.leaves(), cotangent.double()))


def assert_gradients(found: list[Tensor], wanted: list[Tensor], given: Inputs) -> None:
    for value, source in zip(found, given.leaves(), strict=True):
        assert value.dtype == source.dtype
        assert value.shape == source.shape
    assert_close(found[0], wanted[0])
    for value, exact in zip(found[1:3], wanted[1:3], strict=True):
        assert relative_error(value, exact) <= 1e-5  # float32 sums over all pixels
    # Sums of many roundings: what x's gradient loses shows in shift's, relative to the gradient's own size.
    if given.shift is not None:
        step = torch.finfo(given.x.dtype).eps
        pixels = given.x.shape[2] * given.x.shape[3]
        scale = wanted[0].norm() * pixels**0.5
        assert (found[3].double() - wanted[3]).norm() <= 4 * step * scale


@pytest.mark.parametrize(("dtype", "layout"), DTYPES_AND_LAYOUTS, ids=str)
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_gradients_equal_reference(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, layout: str, kernel_device: torch.device
) -> None:
    for silu, shift in ((True, True), (False, False)):
        if shift and dtype == torch.bfloat16 and kernel_device.type == "cpu":
            continue  # Triton's interpreter truncates to bfloat16 instead of rounding
        given = inputs(shape, dtype, kernel_device, layout, shift=shift)
        cotangent = randn(*shape, seed=8).to(given.x)
        y = given.call(group_norm, groups=groups, eps=EPS, silu=silu, backend="triton")
        found = list(torch.autograd.grad(y, given.leaves(), cotangent))
        assert found[0].stride() == given.x.stride()
        assert_gradients(found, truth(given, cotangent, groups=groups, silu=silu), given)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_plan_equals_reference(plan: str, layout: str, kernel_device: torch.device) -> None:
    for shape, groups in SHAPES[:2]:
        given = inputs(shape, torch.float16, kernel_device, layout)
        cotangent = randn(*shape, seed=8).to(given.x).contiguous(memory_format=LAYOUTS[layout])
        found = run_plan(PLANS[plan], given, cotangent, groups=groups, silu=True)
        for value, exact in zip(found, truth(given, cotangent, groups=groups, silu=True), strict=False):
            assert_close(value, exact)


def run_plan(
    launch: Launch, given: Inputs, cotangent: Tensor, *, groups: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias as one launch configuration computes them; fresh memory holds NaN."""
    exact = given.exact()
    normed = exact.x.detach()
    if exact.shift is not None:
        normed = normed + exact.shift.detach()[:, :, None, None]
    grouped = normed.unflatten(1, (groups, -1)).flatten(2)
    mean, rstd = grouped.mean(-1).float(), (grouped.var(-1, correction=0) + EPS).rsqrt().float()
    x, weight, bias, shift = (None if tensor is None else tensor.detach() for tensor in given)
    grad_x = torch.full_like(given.x, torch.nan, requires_grad=False)
    run = module._run_chunked if "WALK" in dict(launch.constants) else module._run_whole
    sums = run((cotangent, x, weight, bias, shift, mean, rstd), None, grad_x, silu, True, launch)
    assert sums is not None
    grad_bias, grad_weight = sums.sum((0, 1))
    return grad_x, grad_weight, grad_bias


def test_gradient_by_hand(kernel_device: torch.device) -> None:
    # x = (-1, 1) has mean 0 and rstd 1; of dy = (3, 1) neither the mean nor the part along x reaches x.
    given = inputs((1, 1, 1, 2), torch.float32, kernel_device, shift=False)
    x = torch.tensor([-1.0, 1.0], device=kernel_device).view(1, 1, 1, 2).requires_grad_()
    weight, bias = given.weight, given.bias
    y = group_norm(x, weight, bias, groups=1, eps=0.0, backend="triton")
    grads = torch.autograd.grad(
        y, (x, weight, bias), torch.tensor([3.0, 1.0], device=kernel_device).view_as(y)
    )
    torch.testing.assert_close(grads[0].cpu().flatten(), torch.zeros(2), rtol=0, atol=1e-5)
    assert [round(grad.item(), 5) for grad in grads[1:]] == [-2.0, 4.0]


def test_frozen_parameters_cost_nothing(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    run = module._run_whole
    monkeypatch.setattr(module, "_run_whole", lambda *given: asked.append(given[-2]) or run(*given))
    given = inputs((2, 20, 5, 3), torch.float32, kernel_device, shift=False)
    for frozen in (False, True):
        weight, bias = given.weight.detach(), given.bias if not frozen else given.bias.detach()
        y = group_norm(given.x, weight, bias, groups=2, eps=EPS, backend="triton")
        y.sum().backward()
    assert asked == [True, False]
    assert given.weight.grad is None
    assert given.bias.grad is not None
    torch.testing.assert_close(given.bias.grad, torch.full_like(given.bias, 2 * 5 * 3))


def test_gradient_of_another_layout(kernel_device: torch.device) -> None:
    given = inputs((2, 20, 5, 3), torch.float32, kernel_device)
    cotangent = randn(2, 20, 5, 3, seed=8).to(given.x)
    assert not cotangent.is_contiguous(memory_format=torch.channels_last)
    for dy in (cotangent, cotangent[:1, :, :, :1].expand_as(cotangent)):
        y = given.call(group_norm, groups=2, eps=EPS, silu=True, backend="triton")
        (found,) = torch.autograd.grad(y, given.x, dy)
        assert_close(found, truth(given, dy, groups=2, silu=True)[0])


def test_reference_gradcheck() -> None:
    given = inputs((2, 4, 3, 2), torch.float64, "cpu", parameters=torch.float64).leaves()

    def function(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
        return group_norm_reference(x, weight, bias, shift=shift, groups=2, eps=EPS, silu=True)

    assert torch.autograd.gradcheck(function, given)


def test_registration(kernel_device: torch.device) -> None:
    """Fake tensors, strides, autograd: what torch.compile relies on."""
    for layout in LAYOUTS:
        given = inputs((1, 4, 2, 3), torch.float32, kernel_device, layout)
        torch.library.opcheck(
            torch.ops.imagedream_rt.group_norm.default,
            (*given, 2, EPS, True),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )
        x, weight, bias, shift = (tensor.detach() for tensor in given.leaves())
        statistics = x.new_ones(2, 1, 2)
        for parameters in (False, True):
            torch.library.opcheck(
                torch.ops.imagedream_rt.group_norm_gradient.default,
                (x, x, weight, bias, shift, *statistics, True, parameters),
                test_utils=("test_schema", "test_faketensor"),
            )


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kernel", ["_whole_gradient_kernel", "_gradient_sums_kernel", "_gradient_kernel"])
def test_kernels_compile_ahead(kernel: str, arch: int) -> None:
    pytest.importorskip("triton")
    whole = kernel.startswith("_whole")
    shape = (10, 320, 32, 32) if whole else (4, 128, 256, 256)
    x = torch.empty(shape, dtype=torch.float16, device="meta").contiguous(memory_format=torch.channels_last)
    key = (shape[0], shape[1], shape[2] * shape[3], 32, 2)
    launch = (whole_candidates(*key) if whole else chunked_candidates(*key))[0]
    given = {**constants(x, 32, launch, launch["STEPS"]), "SILU": True, "PDL": arch >= 90, "SEATS": 64}
    types = {
        **dict.fromkeys(("grad", "x", "weight", "bias", "shift", "beside", "grad_x"), "*fp16"),
        **dict.fromkeys(("mean", "rstd", "parts", "sums"), "*fp32"),
        **dict.fromkeys(("pixels", "shift_stride", "chunks"), "i32"),
    }
    names = getattr(module, kernel).arg_names
    fixed = {name: value for name, value in given.items() if name in names}
    run_time = {name: types[name] for name in names if name not in fixed}
    compile_ahead("group_norm_backward", kernel, run_time, [fixed], arch, warps=launch.warps)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", REAL_SHAPES, ids=str)
def test_real_shapes(shape: tuple[int, ...]) -> None:
    given = inputs(shape, torch.float16, "cuda", shift=False)
    cotangent = randn(*shape, seed=8).to(given.x)
    y = given.call(group_norm, eps=EPS, silu=True, backend="triton")
    found = list(torch.autograd.grad(y, given.leaves(), cotangent))
    assert_gradients(found, truth(given, cotangent, silu=True), given)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(10, 320, 32, 32), (4, 512, 64, 64)], ids=str)
def test_every_candidate(shape: tuple[int, ...]) -> None:
    given = inputs(shape, torch.float16, "cuda")
    cotangent = randn(*shape, seed=8).to(given.x).contiguous(memory_format=torch.channels_last)
    wanted = truth(given, cotangent, silu=True)
    key = (shape[0], shape[1], shape[2] * shape[3], 32, 2)
    launches = whole_candidates(*key) or chunked_candidates(*key)
    assert len(launches) > 1
    for launch in launches:
        for value, exact in zip(
            run_plan(launch, given, cotangent, groups=32, silu=True), wanted, strict=False
        ):
            assert_close(value, exact)


@pytest.mark.gpu
def test_captured_in_a_graph_and_compiled() -> None:
    given = inputs((2, 64, 16, 16), torch.float16, "cuda")
    cotangent = torch.randn_like(given.x)

    def gradient(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
        y = group_norm(x, weight, bias, eps=EPS, silu=True, shift=shift)
        return torch.autograd.grad(y, x, cotangent)[0]

    wanted = gradient(*given)
    replay, found = captured(lambda: gradient(*given))
    replay()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)

    compiled = torch.compile(group_norm, fullgraph=True)
    y = compiled(given.x, given.weight, given.bias, eps=EPS, silu=True, shift=given.shift)
    compiled_gradient = torch.autograd.grad(y, given.x, cotangent)[0]
    torch.testing.assert_close(compiled_gradient, wanted, rtol=2**-8, atol=2**-8)
