"""Group normalisation at the start of a residual path: one gradient for both ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from feature_maps import DTYPES_AND_LAYOUTS, SHAPES, Inputs, inputs
from operators import Operators
from rounding import assert_close, randn, relative_error
from torch import Tensor

from imagedream_rt.kernels import group_norm_backward
from imagedream_rt.kernels._tuning import Launch
from imagedream_rt.kernels.forked_group_norm import forked_group_norm
from imagedream_rt.kernels.group_norm import group_norm_reference

EPS = 1e-5

pytestmark = pytest.mark.usefixtures("untuned")


def block(norm: Callable[..., Any], given: Inputs, cotangent: Tensor, **options: Any) -> list[Tensor]:
    """Value and gradients of a norm, something that is not linear behind it, and the residual sum."""
    y, path = norm(given.x, given.weight, given.bias, eps=EPS, **options)
    out = y * y.detach() + 2 * path
    return [out.detach(), *torch.autograd.grad(out, given.leaves(), cotangent)]


def plainly(x: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return group_norm_reference(x, weight, bias, **options), x


@pytest.mark.parametrize(("dtype", "layout"), DTYPES_AND_LAYOUTS, ids=str)
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_gradients_of_both_ways_are_added(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, layout: str, kernel_device: torch.device
) -> None:
    given = inputs(shape, dtype, kernel_device, layout, shift=False)
    cotangent = randn(*shape, seed=8).to(given.x)
    for silu in (True, False):
        found = block(forked_group_norm, given, cotangent, groups=groups, silu=silu, backend="triton")
        wanted = block(plainly, given.exact(), cotangent.double(), groups=groups, silu=silu)
        step = torch.finfo(dtype).eps
        assert found[1].stride() == given.x.stride()
        for value, truth in zip(found, wanted, strict=True):
            # What is multiplied and added outside of the kernel is rounded, too.
            assert relative_error(value, truth) <= 8 * step
        assert torch.equal(
            forked_group_norm(given.x, given.weight, given.bias, groups=groups, eps=EPS)[1], given.x
        )


@pytest.mark.parametrize(
    "launch",
    [
        Launch.of(warps=1, GROUPS=2, ROWS=64, STEPS=1, STAGES=1),
        Launch.of(warps=1, GROUPS=3, ROWS=4, STEPS=16, STAGES=1),
        Launch.of(warps=1, GROUPS=2, ROWS=4, STEPS=2, WALK=3, STAGES=1),
    ],
    ids=["whole", "walked", "chunked"],
)
def test_every_plan_adds_what_comes_from_elsewhere(launch: Launch, kernel_device: torch.device) -> None:
    (shape, groups), module = SHAPES[0], group_norm_backward
    given = inputs(shape, torch.float32, kernel_device, shift=False)
    x, weight, bias, _ = (None if tensor is None else tensor.detach() for tensor in given)
    assert x is not None
    grad, beside = (torch.empty_like(x).copy_(randn(*shape, seed=seed)) for seed in (8, 9))
    moments = torch.zeros(2, shape[0], groups, device=kernel_device) + 0.5
    run = module._run_chunked if "WALK" in dict(launch.constants) else module._run_whole
    found = []
    for extra in (None, beside):
        grad_x = torch.full_like(x, torch.nan)
        run((grad, x, weight, bias, None, *moments), extra, grad_x, True, False, launch)
        found.append(grad_x)
    assert_close(found[1], found[0].double() + beside.double())


@pytest.mark.parametrize("unused", ["norm", "path"])
def test_a_way_without_a_gradient(unused: str, kernel_device: torch.device) -> None:
    given = inputs(SHAPES[0][0], torch.float32, kernel_device, shift=False)
    cotangent = randn(*given.x.shape, seed=8).to(given.x)
    y, path = forked_group_norm(given.x, given.weight, given.bias, groups=2, eps=EPS, backend="triton")
    (found,) = torch.autograd.grad(path if unused == "norm" else y, given.x, cotangent)
    exact = given.exact()
    y, path = plainly(exact.x, exact.weight, exact.bias, groups=2, eps=EPS)
    (wanted,) = torch.autograd.grad(path if unused == "norm" else y, exact.x, cotangent.double())
    assert_close(found, wanted)


def test_no_pass_of_its_own_adds_the_gradients(kernel_device: torch.device) -> None:
    given = inputs(SHAPES[0][0], torch.float32, kernel_device, shift=False)
    for backend, sums in (("triton", 0), ("torch", 1)):
        y, path = forked_group_norm(given.x, given.weight, given.bias, groups=2, eps=EPS, backend=backend)
        out = torch.cat((y, path))
        with Operators() as ran:
            torch.autograd.grad(out, given.x, torch.ones_like(out))
        assert ran.others["add"] + ran.others["add_"] == sums


def test_without_gradients_and_without_pixels(kernel_device: torch.device) -> None:
    given = inputs(SHAPES[0][0], torch.float32, kernel_device, shift=False)
    with torch.no_grad():
        y, path = forked_group_norm(given.x, given.weight, given.bias, groups=2, eps=EPS, backend="triton")
    assert path is given.x
    assert_close(y, given.exact().call(group_norm_reference, groups=2, eps=EPS))
    nothing = torch.empty(0, 4, 2, 2, device=kernel_device, requires_grad=True)
    ones = torch.ones(4, device=kernel_device)
    y, path = forked_group_norm(nothing, ones, ones, groups=2, eps=EPS, backend="triton")
    assert y.shape == path.shape == nothing.shape


def test_shapes_that_do_not_fit() -> None:
    ones = torch.ones(4)
    with pytest.raises(ValueError, match="groups must divide"):
        forked_group_norm(torch.ones(1, 4, 2, 2), ones, ones, groups=3, eps=EPS)


def test_compiled(kernel_device: torch.device) -> None:
    """In a compiled function the operators stay what they are."""
    given = inputs((2, 8, 4, 4), torch.float32, kernel_device, shift=False)

    def sums(x: Tensor) -> Tensor:
        y, path = forked_group_norm(x, given.weight, given.bias, groups=2, eps=EPS, backend="triton")
        return y.square() + path

    compiled = torch.compile(sums, fullgraph=True, backend="aot_eager")
    found, wanted = (torch.autograd.grad(f(given.x).sum(), given.x)[0] for f in (compiled, sums))
    torch.testing.assert_close(found, wanted)
