"""Group normalisation against its reference, by hand, over layouts, plans of launching, and refusals."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
from ahead import compile_ahead
from feature_maps import DTYPES_AND_LAYOUTS, LAYOUTS, SHAPES, inputs
from graphs import captured
from rounding import assert_close, randn
from torch import Tensor
from torch.nn import functional

from imagedream_rt.kernels import group_norm as module
from imagedream_rt.kernels._group_tiles import chunked_candidates, constants, whole_candidates
from imagedream_rt.kernels._triton import HALF_AND_SINGLE
from imagedream_rt.kernels._tuning import Launch
from imagedream_rt.kernels.group_norm import group_norm, group_norm_reference

EPS = 1e-5

# What a UNet of 10 frames and the image encoder of 4 views normalise.
REAL_SHAPES = [
    *(
        (10, 320, 32, 32),
        (10, 640, 16, 16),
        (10, 1280, 8, 8),
        (10, 2560, 4, 4),
        (10, 640, 32, 32),
        (10, 2560, 16, 16),
    ),
    *((4, 128, 256, 256), (4, 512, 64, 64), (4, 512, 32, 32)),
]

PLANS = {
    "whole": Launch.of(warps=1, GROUPS=2, ROWS=64, STEPS=1, STAGES=1),
    "whole, one group": Launch.of(warps=1, GROUPS=1, ROWS=64, STEPS=1, STAGES=1),
    "walked": Launch.of(warps=1, GROUPS=3, ROWS=4, STEPS=16, STAGES=1),
    "chunked": Launch.of(warps=1, GROUPS=2, ROWS=4, STEPS=2, WALK=3, STAGES=1),
    "chunked, one group": Launch.of(warps=1, GROUPS=1, ROWS=8, STEPS=1, WALK=1, STAGES=1),
}


pytestmark = pytest.mark.usefixtures("untuned")


def run_plan(
    launch: Launch, x: Tensor, weight: Tensor, bias: Tensor, *, shift: Tensor | None, groups: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and rstd as one launch configuration computes them; fresh memory holds NaN."""
    y = torch.full_like(x, torch.nan)
    mean, rstd = x.new_full((2, len(x), groups), torch.nan, dtype=torch.float32)
    run = module._run_chunked if "WALK" in dict(launch.constants) else module._run_whole
    run((x, weight, bias, shift), (y, mean, rstd), EPS, silu, launch)
    return y, mean, rstd


@pytest.mark.parametrize(("dtype", "layout"), DTYPES_AND_LAYOUTS, ids=str)
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_kernel_equals_reference(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, layout: str, kernel_device: torch.device
) -> None:
    for silu, shift, parameters in ((True, True, torch.float32), (False, False, dtype)):
        if not silu and dtype != torch.float32:
            continue
        given = inputs(shape, dtype, kernel_device, layout, shift=shift, parameters=parameters)
        y = given.call(group_norm, groups=groups, eps=EPS, silu=silu, backend="triton")
        assert y.dtype == dtype
        assert y.stride() == given.x.stride()
        assert_close(y, given.exact().call(group_norm_reference, groups=groups, eps=EPS, silu=silu))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_plan_equals_reference(plan: str, layout: str, kernel_device: torch.device) -> None:
    for shape, groups in SHAPES[:2]:
        for silu, shift in ((False, False), (True, True)):
            given = inputs(shape, torch.float16, kernel_device, layout, shift=shift)
            with torch.no_grad():
                y, mean, rstd = run_plan(PLANS[plan], *given[:3], shift=given.shift, groups=groups, silu=silu)
            exact = given.exact()
            assert_close(y, exact.call(group_norm_reference, groups=groups, eps=EPS, silu=silu))
            normed = exact.x if exact.shift is None else exact.x + exact.shift[:, :, None, None]
            grouped = normed.unflatten(1, (groups, -1)).flatten(2)
            torch.testing.assert_close(mean.double(), grouped.mean(-1), rtol=1e-5, atol=1e-5)
            variance = grouped.var(-1, correction=0)
            torch.testing.assert_close(rstd.double(), (variance + EPS).rsqrt(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("plan", PLANS)
def test_a_mean_far_above_the_spread_costs_no_digits(plan: str, kernel_device: torch.device) -> None:
    # With sums of x and x^2 in float32 the variance of 1 would drown in 64 * 3000^2 * 2^-24.
    given = inputs((2, 8, 8, 8), torch.float32, kernel_device, shift=False, mean=3000.0)
    with torch.no_grad():
        _, _, rstd = run_plan(PLANS[plan], *given[:3], shift=None, groups=2, silu=False)
    variance = given.x.detach().double().unflatten(1, (2, -1)).flatten(2).var(-1, correction=0)
    torch.testing.assert_close(rstd.double(), (variance + EPS).rsqrt(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("plan", PLANS)
def test_first_pixel_far_from_the_others(plan: str, kernel_device: torch.device) -> None:
    # Deviations are taken from the first pixel while they are summed.
    given = inputs((1, 4, 8, 8), torch.float32, kernel_device, shift=False)
    with torch.no_grad():
        given.x[:, :, 0, 0] = -1000.0
        y, *_ = run_plan(PLANS[plan], *given[:3], shift=None, groups=2, silu=False)
    truth = given.exact().call(group_norm_reference, groups=2, eps=EPS)
    torch.testing.assert_close(y.double(), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plan", PLANS)
def test_a_shift_far_above_the_spread_costs_no_digits(plan: str, kernel_device: torch.device) -> None:
    given = inputs((2, 8, 8, 8), torch.float32, kernel_device)
    shift = torch.full((2, 8), 4096.0, device=kernel_device)
    with torch.no_grad():
        x = (given.x + shift[:, :, None, None]) - shift[
            :, :, None, None
        ]  # so that adding shift rounds nothing
        _, _, rstd = run_plan(PLANS[plan], x, *given[1:3], shift=shift, groups=2, silu=False)
    variance = x.double().unflatten(1, (2, -1)).flatten(2).var(-1, correction=0)
    torch.testing.assert_close(rstd.double(), (variance + EPS).rsqrt(), rtol=1e-4, atol=0)


def test_constant_groups_give_the_bias(kernel_device: torch.device) -> None:
    x = torch.full((1, 4, 3, 5), 7.0, device=kernel_device)
    weight, bias = torch.ones(4, device=kernel_device), torch.arange(4.0, device=kernel_device)
    for launch in PLANS.values():
        y, *_ = run_plan(launch, x, weight, bias, shift=None, groups=2, silu=False)
        torch.testing.assert_close(y, bias[:, None, None].expand_as(x)[None].squeeze(0))


def test_by_hand(kernel_device: torch.device) -> None:
    # Group 0 holds 1, 3, 5, 7 (mean 4, variance 5), group 1 holds twice 2 (variance 0).
    x = torch.tensor([[1.0, 3.0], [5.0, 7.0], [2.0, 2.0], [2.0, 2.0]]).view(1, 4, 1, 2).to(kernel_device)
    weight = torch.tensor([2.0, 1.0, 1.0, 1.0]).to(kernel_device)
    bias = torch.tensor([0.0, 1.0, -1.0, 0.5]).to(kernel_device)
    s = 5**-0.5
    wanted = torch.tensor([[-6 * s, -2 * s], [1 + s, 1 + 3 * s], [-1.0, -1.0], [0.5, 0.5]]).view(1, 4, 1, 2)
    shift = torch.tensor([[10.0, 10.0, -3.0, -3.0]]).to(kernel_device)
    for backend in ("triton", "torch"):
        y = group_norm(x, weight, bias, groups=2, eps=1e-12, backend=backend)
        torch.testing.assert_close(y.cpu(), wanted)
        # A shift that is the same for a whole group changes nothing.
        y = group_norm(x, weight, bias, groups=2, eps=1e-12, silu=True, shift=shift, backend=backend)
        torch.testing.assert_close(y.cpu(), wanted * wanted.sigmoid())


def test_reference_is_torch_group_norm() -> None:
    x, weight, bias, shift = (randn(*shape, seed=9) for shape in ((2, 6, 4, 5), (6,), (6,), (2, 6)))
    truth = functional.silu(functional.group_norm(x + shift[:, :, None, None], 3, weight, bias, 1e-3))
    torch.testing.assert_close(
        group_norm_reference(x, weight, bias, groups=3, eps=1e-3, silu=True, shift=shift), truth
    )
    last = x.contiguous(memory_format=torch.channels_last)
    y = group_norm_reference(last, weight, bias, groups=3, eps=1e-3)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_example() -> None:
    assert doctest.testmod(module).attempted == 2


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3)], ids=str)
def test_nothing_in_nothing_out(shape: tuple[int, ...], kernel_device: torch.device) -> None:
    x = torch.zeros(shape, device=kernel_device, requires_grad=True)
    weight = torch.ones(4, device=kernel_device, requires_grad=True)
    y = group_norm(x, weight, weight, groups=2, eps=EPS, silu=True, backend="triton")
    assert y.shape == shape
    grads = torch.autograd.grad(y.sum(), (x, weight), allow_unused=True, materialize_grads=True)
    assert [grad.shape for grad in grads] == [x.shape, weight.shape]
    assert not grads[1].any()


def test_other_strides_take_the_reference_or_are_refused(kernel_device: torch.device) -> None:
    x = randn(2, 4, 6, 8, seed=1, dtype=torch.float32).to(kernel_device)[..., ::2]
    ones = torch.ones(4, device=kernel_device)
    y = group_norm(x, ones, ones, groups=2, eps=EPS)
    torch.testing.assert_close(y, functional.group_norm(x, 2, ones, ones, EPS))
    with pytest.raises(ValueError, match=r"channels-last or contiguous x .* strides \(192, 48, 8, 2\)"):
        group_norm(x, ones, ones, groups=2, eps=EPS, backend="triton")


def test_strided_parameters(kernel_device: torch.device) -> None:
    x = randn(2, 4, 3, 3, seed=1, dtype=torch.float32).to(kernel_device)
    weight, bias = (randn(4, 2, seed=s, dtype=torch.float32).to(kernel_device)[:, 0] for s in (2, 3))
    shift = randn(4, 2, seed=4, dtype=torch.float32).to(kernel_device).T
    y = group_norm(x, weight, bias, shift=shift, groups=2, eps=EPS, backend="triton")
    torch.testing.assert_close(y, group_norm_reference(x, weight, bias, shift=shift, groups=2, eps=EPS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4, 3)}, r"x must be \[N, C, H, W\], got \(2, 4, 3\)"),
        ({"groups": 3}, "groups must divide the 4 channels of x, got 3"),
        ({"groups": 0}, "groups must divide the 4 channels of x, got 0"),
        ({"bias": torch.zeros(3)}, r"weight and bias must be \[4\], got \[4\] and \[3\]"),
        ({"shift": torch.zeros(1, 4)}, r"shift must be \[2, 4\], got \(1, 4\)"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    given = {"x": torch.zeros(2, 4, 3, 3), "weight": torch.ones(4), "bias": torch.zeros(4), "groups": 2}
    with pytest.raises(ValueError, match=message):
        group_norm(**{**given, **change}, eps=EPS)


def test_float64_takes_the_reference(kernel_device: torch.device) -> None:
    x, weight, bias = (randn(*shape, seed=1).to(kernel_device) for shape in ((1, 4, 2, 2), (4,), (4,)))
    assert torch.equal(
        group_norm(x, weight, bias, groups=2, eps=EPS),
        group_norm_reference(x, weight, bias, groups=2, eps=EPS),
    )
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        group_norm(x, weight, bias, groups=2, eps=EPS, backend="triton")


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kernel", ["_whole_kernel", "_moments_kernel", "_normalise_kernel"])
def test_kernels_compile_ahead(kernel: str, arch: int) -> None:
    pytest.importorskip("triton")
    whole = kernel.startswith("_whole")
    shape = (10, 320, 32, 32) if whole else (4, 128, 256, 256)
    x = torch.empty(shape, dtype=torch.float16, device="meta").contiguous(memory_format=torch.channels_last)
    key = (shape[0], shape[1], shape[2] * shape[3], 32, 1)
    launch = (whole_candidates(*key) if whole else chunked_candidates(*key))[0]
    given = {**constants(x, 32, launch, launch["STEPS"]), "SILU": True, "PDL": arch >= 90, "SEATS": 64}
    types = {
        **dict.fromkeys(("x", "weight", "bias", "shift", "y"), "*fp16"),
        **dict.fromkeys(("mean", "rstd", "moments"), "*fp32"),
        **dict.fromkeys(("pixels", "shift_stride", "chunks", "span"), "i32"),
        "eps": "fp32",
    }
    names = getattr(module, kernel).arg_names
    fixed = {name: value for name, value in given.items() if name in names}
    run_time = {name: types[name] for name in names if name not in fixed}
    compile_ahead("group_norm", kernel, run_time, [fixed], arch, warps=launch.warps)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, torch.float16) for shape in REAL_SHAPES),
        *((REAL_SHAPES[0], dtype) for dtype in HALF_AND_SINGLE[1:]),
    ],
    ids=str,
)
def test_real_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given = inputs(shape, dtype, "cuda")
    with torch.no_grad():
        y = given.call(group_norm, eps=EPS, silu=True, backend="triton")
        assert_close(y, given.exact().call(group_norm_reference, eps=EPS, silu=True))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(10, 320, 32, 32), (10, 1280, 8, 8), (4, 512, 64, 64)], ids=str)
def test_every_candidate(shape: tuple[int, ...]) -> None:
    given = inputs(shape, torch.float16, "cuda")
    truth = given.exact().call(group_norm_reference, eps=EPS, silu=True)
    key = (shape[0], shape[1], shape[2] * shape[3], 32, 1)
    launches = whole_candidates(*key) or chunked_candidates(*key)
    assert len(launches) > 1
    for launch in launches:
        with torch.no_grad():
            y, *_ = run_plan(launch, *given[:3], shift=given.shift, groups=32, silu=True)
        assert_close(y, truth)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 64, 16, 16), (1, 64, 128, 128)], ids=str)
def test_captured_in_a_graph(shape: tuple[int, ...]) -> None:
    given = inputs(shape, torch.float16, "cuda")
    arguments = {"eps": EPS, "silu": True, "backend": "triton"}
    with torch.no_grad():
        replay, y = captured(lambda: given.call(group_norm, **arguments))
        given.x.copy_(randn(*shape, seed=77).to(given.x))
        replay()
        torch.testing.assert_close(y, given.call(group_norm, **arguments), rtol=0, atol=0)


@pytest.mark.gpu
def test_compiled_as_one_call() -> None:
    given = inputs((2, 64, 16, 16), torch.float16, "cuda")

    def block(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
        return 2 * group_norm(x * 2, weight, bias, eps=EPS, silu=True, shift=shift)

    found = torch.compile(block, fullgraph=True)(*given)
    # Two units in the last place: the compiler may fuse the products around the call.
    torch.testing.assert_close(found, block(*given), rtol=2**-8, atol=1e-3)
    assert found.stride() == given.x.stride()
