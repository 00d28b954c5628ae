"""The first convolution on its kernels, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from ahead import compile_ahead
from feature_maps import LAYOUTS
from graphs import captured
from operators import Operators
from rounding import assert_close, leaf, randn
from torch import Tensor

from imagedream_rt.engine.layers import Convolution, use_kernels
from imagedream_rt.kernels import picture_convolution as module
from imagedream_rt.kernels._triton import interpreted
from imagedream_rt.kernels.picture_convolution import (
    _candidates,
    fits,
    picture_convolution,
    picture_convolution_reference,
)

pytestmark = pytest.mark.usefixtures("untuned")

# (x, channels of y): more pixels than a program has, with some left over; one pixel; one row; channels that fill no
# power of two, and more than a step has.
SHAPES = [((2, 3, 9, 11), 8), ((1, 3, 1, 1), 20), ((3, 1, 1, 7), 16), ((1, 2, 5, 3), 144)]


def inputs(
    shape: tuple[int, ...], out: int, dtype: torch.dtype, device: torch.device, layout: str = "contiguous"
) -> list[Tensor]:
    """x as a leaf, weight and bias."""
    x = randn(*shape, seed=1).to(device, dtype).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    weight = randn(out, shape[1], 3, 3, seed=2) / (9 * shape[1]) ** 0.5
    return [
        x,
        weight.to(device, dtype).contiguous(memory_format=torch.channels_last),
        randn(out, seed=3).to(device, dtype),
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "out"), SHAPES, ids=str)
def test_values_and_gradients(
    shape: tuple[int, ...], out: int, dtype: torch.dtype, layout: str, kernel_device: torch.device
) -> None:
    if dtype == torch.bfloat16 and interpreted():
        pytest.skip("Triton's interpreter has no bfloat16 products")
    given = inputs(shape, out, dtype, kernel_device, layout)
    assert fits("triton", *given)
    y = picture_convolution(*given)
    exact = [leaf(tensor.detach(), torch.float64) for tensor in given]
    wanted = picture_convolution_reference(*exact)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, wanted)
    cotangent = randn(*y.shape, seed=4).to(y)
    (found,) = torch.autograd.grad(y, given[0], cotangent)
    assert found.stride() == given[0].stride()
    assert_close(found, torch.autograd.grad(wanted, exact[0], cotangent.double())[0])


def test_by_hand(kernel_device: torch.device) -> None:
    """A lone pixel shows the taps turned around; the gradient of a lone pixel shows them as they are."""
    weight = torch.arange(9.0, device=kernel_device, dtype=torch.float16).view(1, 1, 3, 3)
    x = torch.zeros(1, 1, 3, 3, device=kernel_device, dtype=torch.float16)
    x[0, 0, 1, 1] = 1
    x.requires_grad_()
    y = picture_convolution(x, weight, torch.ones_like(weight[:, 0, 0, 0]))
    assert y.flatten().tolist() == [9, 8, 7, 6, 5, 4, 3, 2, 1]
    (found,) = torch.autograd.grad(y[0, 0, 1, 1], x)
    assert found.flatten().tolist() == list(range(9))


def test_pictures_that_are_parts_of_larger_ones(kernel_device: torch.device) -> None:
    large, weight, bias = inputs((2, 3, 8, 10), 16, torch.float16, kernel_device)
    x = large[:, :, 1:6, ::2]
    y = picture_convolution(x, weight, bias)
    assert_close(y, picture_convolution_reference(x.double(), weight.double(), bias.double()))
    cotangent = randn(*y.shape, seed=4).to(y)
    (found,) = torch.autograd.grad(y, large, cotangent)
    exact = leaf(large.detach(), torch.float64)
    wanted = picture_convolution_reference(exact[:, :, 1:6, ::2], weight.double(), bias.double())
    assert_close(found, torch.autograd.grad(wanted, exact, cotangent.double())[0])


def test_what_fits(kernel_device: torch.device) -> None:
    x, weight, bias = inputs((1, 3, 4, 4), 8, torch.float16, kernel_device)
    assert fits("triton", x, weight, bias)
    assert not fits("torch", x, weight, bias)
    assert not fits("triton", x, weight, None)
    assert not fits("triton", x[:0], weight, bias)
    assert not fits("triton", x.float(), weight, bias)
    assert not fits("triton", x.float(), weight.float(), bias.float())
    assert not fits("triton", x, weight.contiguous(), bias)  # whose maps are not channels-last
    assert not fits("triton", *inputs((1, 4, 4, 4), 8, torch.float16, kernel_device))
    weight.requires_grad_()
    assert not fits("triton", x, weight, bias)
    with torch.no_grad():
        assert fits("triton", x, weight, bias)


@pytest.mark.parametrize("trained", [False, True])
def test_a_layer_uses_it(kernel_device: torch.device, trained: bool) -> None:
    x, weight, bias = inputs((2, 3, 4, 6), 8, torch.float16, kernel_device)
    layer = Convolution(3, 8, 3, padding=1).to(kernel_device, torch.float16)
    layer.to(memory_format=torch.channels_last).requires_grad_(trained)  # type: ignore[call-overload]
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    use_kernels(layer, "triton")
    with Operators() as ran:
        y = layer(x)
        torch.autograd.grad(y, x, torch.ones_like(y))
    assert ran.ours["picture_convolution"] == ran.ours["picture_convolution_gradient"] == (not trained)
    assert ran.others["convolution"] == trained
    assert_close(y, picture_convolution_reference(x.double(), weight.double(), bias.double()))


def test_every_candidate(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = inputs((1, 3, 7, 10), 24, torch.float16, kernel_device)
    exact = leaf(x.detach(), torch.float64)
    wanted = picture_convolution_reference(exact, weight.double(), bias.double())
    cotangent = randn(*wanted.shape, seed=4).to(x)
    (wanted_gradient,) = torch.autograd.grad(wanted, exact, cotangent.double())
    for launch in _candidates(70, 24, torch.float16):
        for tuned in (module._FORWARD, module._GRADIENT):
            monkeypatch.setattr(tuned, "choose", lambda *_, launch=launch: launch)
        y = picture_convolution(x, weight, bias)
        assert_close(y, wanted)
        assert_close(torch.autograd.grad(y, x, cotangent)[0], wanted_gradient)


def test_registration(kernel_device: torch.device) -> None:
    for layout in LAYOUTS:
        x, weight, bias = inputs((2, 3, 4, 2), 8, torch.float16, kernel_device, layout)
        torch.library.opcheck(
            torch.ops.imagedream_rt.picture_convolution.default,
            (x, weight, bias),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )
        grad = picture_convolution(x, weight, bias).detach()
        torch.library.opcheck(
            torch.ops.imagedream_rt.picture_convolution_gradient.default,
            (grad, x.detach(), weight),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kernel", ["_forward_kernel", "_products_kernel", "_fold_kernel"])
def test_kernels_compile_ahead(kernel: str, arch: int) -> None:
    pytest.importorskip("triton")
    types = {
        **dict.fromkeys(("x", "weight", "bias", "y", "grad", "grad_x"), "*fp16"),
        "products": "*fp32",
        **dict.fromkeys(("rows", "height", "width", *(f"{side}_stride" for side in "nchw")), "i32"),
    }
    folded = kernel == "_fold_kernel"
    launches = _candidates(2**18, 128, torch.float16)[: 1 if folded else None]
    common = {"IN": 3, "OUT": 128, "NEIGHBOURS": 32, "COLUMNS": 128, "DEPTH": 128, "PDL": arch >= 90}
    names = getattr(module, kernel).arg_names
    fixed = [
        {
            name: value
            for name, value in {**common, "ROWS": module.FOLDED_ROWS if folded else launch["ROWS"]}.items()
            if name in names
        }
        for launch in launches
    ]
    run_time = {name: types[name] for name in names if name not in fixed[0]}
    warps = [launch.warps for launch in launches]
    compile_ahead("picture_convolution", kernel, run_time, fixed, arch, warps=warps)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 3, 256, 256), (8, 3, 192, 192), (1, 3, 64, 64)], ids=str)
def test_real_shapes_and_capture(shape: tuple[int, ...]) -> None:
    x, weight, bias = inputs(shape, 128, torch.float16, torch.device("cuda"))
    exact = leaf(x.detach(), torch.float64)
    wanted = picture_convolution_reference(exact, weight.double(), bias.double())
    cotangent = randn(*wanted.shape, seed=4).to(x)
    (wanted_gradient,) = torch.autograd.grad(wanted, exact, cotangent.double())

    def both() -> tuple[Tensor, Tensor]:
        y = picture_convolution(x, weight, bias)
        return y.detach(), torch.autograd.grad(y, x, cotangent)[0]

    replay, found = captured(both)
    replay()
    for value, truth in zip(found, (wanted, wanted_gradient), strict=True):
        assert_close(value, truth)
