"""3x3 convolutions of small maps: the mathematics and the launches everywhere, the kernel on Hopper against float32."""

from __future__ import annotations

import pytest
import torch
from ahead import compile_ahead
from graphs import captured
from operators import Operators
from rounding import assert_close, randn, relative_error
from torch import Tensor, nn
from torch.nn import functional

from imagedream_rt.engine.blocks import Upsample
from imagedream_rt.engine.layers import Convolution, GroupNorm, normalised_convolution
from imagedream_rt.kernels import _triton, convolution
from imagedream_rt.kernels._tuning import Launch

pytestmark = pytest.mark.usefixtures("untuned")

PARTS = sorted({launch["PARTS"] for launch in convolution.launches()})
SHAPES = [launch for launch in convolution.launches() if launch["PARTS"] == 1]


def doubled_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.conv2d(functional.interpolate(x, scale_factor=2.0), weight, bias, padding=1)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 2)], ids=str)
def test_weights_of_a_doubling_by_parity(size: tuple[int, int]) -> None:
    """The formula: of each parity of row and column a convolution with 2x2 taps, that begins before it or at it."""
    x, weight = randn(2, 3, *size, seed=1).double(), randn(5, 3, 3, 3, seed=2).double()
    found = torch.empty(2, 5, 2 * size[0], 2 * size[1], dtype=torch.float64)
    both = convolution.doubled_weight(weight)
    assert both.shape == (2, 2, 5, 3, 2, 2)
    assert both.flatten(0, 2).is_contiguous(memory_format=torch.channels_last)
    for p in range(2):
        for q in range(2):
            bordered = functional.pad(x, (1 - q, q, 1 - p, p))
            found[:, :, p::2, q::2] = functional.conv2d(bordered, both[p, q])
    torch.testing.assert_close(found, doubled_reference(x, weight, None))


@pytest.mark.parametrize("added", [False, True])
def test_parts_are_added_with_bias_and_residual(kernel_device: torch.device, added: bool) -> None:
    parts = randn(3, 7, 5, seed=1).to(kernel_device)
    bias, residual = randn(5, seed=2).to(kernel_device).half(), randn(7, 5, seed=3).to(kernel_device).half()
    y = torch.full((7, 5), float("nan"), device=kernel_device, dtype=torch.float16)
    given = (bias, residual) if added else (None, None)
    convolution.add_parts_kernel[(3,)](parts, *given, y, 35, 5, PARTS=3, BLOCK=16)
    assert_close(y, parts.double().sum(0) + (bias.double() + residual.double() if added else 0.0))


@pytest.mark.parametrize("frames", [5, 10, 20])
def test_small_maps_are_cut_into_parts_and_fill_the_device(frames: int) -> None:
    """Of the UNet's: no multiprocessor idles for lack of tiles, where parts can be had."""
    for side, channels in ((16, 640), (8, 1280), (4, 1280)):
        rows = frames * side**2
        launch = convolution.plan(rows, channels, 9 * channels // 64, 1)
        tiles = -(-rows // (64 * launch["WARPGROUPS"])) * -(-channels // launch["COLUMNS"])
        assert tiles * launch["PARTS"] >= 0.7 * convolution.PROCESSORS
        assert launch["PARTS"] > 1 or side > 4
    assert convolution.plan(2**14, 1280, 180, 1)["PARTS"] == 1


def test_the_cpu_and_gradients_are_left_to_pytorch() -> None:
    x, weight = torch.zeros(2, 64, 4, 4), torch.zeros(64, 64, 3, 3)
    assert not convolution.fits("auto", x.half(), weight.half())
    layer, norm = nn.Conv2d(64, 64, 3, padding=1), GroupNorm(2, 64, eps=1e-5)
    with Operators() as ran:
        normalised_convolution(layer, norm, x + 1, torch.zeros(2, 64))
        Upsample(64)(x)
    assert not ran.ours
    assert ran.others["convolution"] == 2


@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("launch", SHAPES, ids=str)
def test_kernel_compiles_without_a_gpu(launch: Launch, whole: bool, doubled: bool) -> None:
    layouts = _triton.gl
    if layouts is None:
        pytest.skip(f"Gluon of Triton {_triton.GLUON_OF}x is not installed")
    pixels, columns = [4, 4, 4, 64], [launch["COLUMNS"], 64]
    boxes = {
        name: f"tensordesc<fp16{box},{layouts.NVMMASharedLayout.get_default_for(box, layouts.float16)!r}>"
        for name, box in (("x_box", pixels), ("w_box", columns))
    }
    pointers = {"out": "*fp16", "bias": "*fp16", "residual": "*fp16"} if whole else {"out": "*fp32"}
    constants = {"H": 4, "W": 4, "DOUBLED": doubled, "WHOLE": whole}
    constants |= {name: launch[name] for name in ("WARPGROUPS", "COLUMNS", "RING")}
    if not whole:
        constants |= {"bias": None, "residual": None}  # type: ignore[dict-item]
    types = {**boxes, **pointers, "rows": "i32", "channels": "i32", "per_tap": "i32"}
    (ptx,) = compile_ahead("convolution", "convolution_kernel", types, [constants], 90)
    assert "wgmma.mma_async" in ptx
    assert "cp.async.bulk.tensor.4d" in ptx


@pytest.fixture
def hopper() -> torch.device:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the kernel is for Hopper")
    return torch.device("cuda")


REAL = [
    (10, 320, 640, 16),
    (10, 1280, 1280, 8),
    (20, 640, 640, 16),
    (3, 128, 200, 4),  # samples, columns and rows left over
    (1, 64, 8, 2),
    (5, 192, 128, 1),
]


def given(
    shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype, side_scale: int = 1
) -> tuple[Tensor, ...]:
    """x, weight, bias, residual; x amid numbers that must not be read."""
    samples, channels, out, side = shape
    x = torch.full((samples + 2, channels, side, side), float("nan"), device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    x[1:-1] = randn(samples, channels, side, side, seed=1).to(x)
    weight = randn(out, channels, 3, 3, seed=2).div_((9 * channels) ** 0.5).to(x)
    residual = randn(samples, out, side_scale * side, side_scale * side, seed=4).to(x)
    last = torch.channels_last
    return (
        x[1:-1],
        weight.contiguous(memory_format=last),
        randn(out, seed=3).to(x),
        residual.contiguous(memory_format=last),
    )


def exactly(x: Tensor, weight: Tensor, *others: Tensor | None) -> Tensor:
    wide = [x.double(), weight.double(), *(None if t is None else t.double() for t in others)]
    bias, residual = (*wide[2:], None, None)[:2]
    y = functional.conv2d(wide[0], wide[1], bias, padding=1)  # type: ignore[arg-type]
    return y if residual is None else y + residual


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", _triton.HALF, ids=str)
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_kernel_equals_reference(
    shape: tuple[int, int, int, int], dtype: torch.dtype, hopper: torch.device
) -> None:
    x, weight, bias, residual = given(shape, hopper, dtype)
    for others in ((None, None), (bias, None), (bias, residual)):
        assert convolution.fits("auto", x, weight, *others)
        y = convolution.convolution(x, weight, *others)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert_close(y, exactly(x, weight, *others))
    y = convolution.doubled_convolution(x, convolution.doubled_weight(weight), bias)
    assert y.is_contiguous(memory_format=torch.channels_last)
    # The sums of weights are rounded, too.
    wanted = doubled_reference(x.double(), weight.double(), bias.double())
    assert relative_error(y, wanted) <= 2 * torch.finfo(dtype).eps


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [1, 2, PARTS[-1]])
@pytest.mark.parametrize("launch", SHAPES, ids=str)
def test_every_launch_equals_reference(
    launch: Launch, parts: int, hopper: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = next(
        other
        for other in convolution.launches()
        if (other["WARPGROUPS"], other["PARTS"]) == (launch["WARPGROUPS"], parts)
    )
    monkeypatch.setattr(convolution, "plan", lambda *_: found)
    for shape in (REAL[0], REAL[3]):
        x, weight, bias, residual = given(shape, hopper, torch.float16)
        y = convolution.convolution(x, weight, bias, residual)
        assert_close(y, exactly(x, weight, bias, residual))
        y = convolution.doubled_convolution(x, convolution.doubled_weight(weight), bias)
        assert relative_error(y, doubled_reference(x.double(), weight.double(), bias.double())) <= 2e-3


@pytest.mark.gpu
def test_kernel_in_a_graph_and_as_an_operator(hopper: torch.device) -> None:
    x, weight, bias, residual = given(REAL[3], hopper, torch.float16)
    operator = torch.ops.imagedream_rt.convolution.default
    torch.library.opcheck(
        operator, (x, weight, bias, residual, False), test_utils=("test_schema", "test_faketensor")
    )
    replay, y = captured(lambda: convolution.convolution(x, weight, bias, residual))
    x.copy_(randn(*x.shape, seed=9).to(x))
    replay()
    assert_close(y, exactly(x, weight, bias, residual))


@pytest.mark.gpu
def test_layers_take_it(hopper: torch.device) -> None:
    x, weight, bias, residual = given((2, 64, 64, 8), hopper, torch.float16)
    layer = Convolution(64, 64, 3, padding=1).to(hopper, torch.float16, memory_format=torch.channels_last)  # type: ignore[call-overload]
    layer.load_state_dict({"weight": weight, "bias": bias})
    norm = GroupNorm(32, 64, eps=1e-5).to(hopper)
    up = Upsample(64).to(hopper, torch.float16, memory_format=torch.channels_last).requires_grad_(False)  # type: ignore[call-overload]
    with torch.no_grad(), Operators() as ran:
        assert_close(layer(x, residual), exactly(x, weight, bias, residual))
        normed = normalised_convolution(layer, norm, x, bias.expand(2, -1))
        doubled = up(x)
    assert ran.ours == {"convolution": 3, "group_norm": 1}
    assert relative_error(normed, norm(exactly(x, weight, bias).float())) <= 2e-3
    exact = doubled_reference(x.float(), up.conv.weight.float(), up.conv.bias.float())
    assert relative_error(doubled, exact) <= 2e-3
    # With a gradient it is PyTorch's.
    with Operators() as ran:
        layer(x, residual)
    assert "convolution" not in ran.ours
