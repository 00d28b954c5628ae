"""The bias and the residual sum in one pass, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from ahead import compile_ahead
from feature_maps import DTYPES_AND_LAYOUTS, LAYOUTS
from graphs import captured
from rounding import assert_close, leaf, randn, relative_error
from torch import Tensor

from imagedream_rt.kernels.bias_residual import (
    _TUNED,
    _candidates,
    _kernel,
    bias_residual,
    bias_residual_reference,
)

pytestmark = pytest.mark.usefixtures("untuned")

# Channels that fill no power of two, a few, one, and more than a tile has; one pixel; rows left over.
SHAPES = [(2, 20, 5, 3), (1, 3, 4, 9), (2, 1, 3, 3), (1, 320, 3, 5), (3, 8, 1, 1)]


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, layout: str = "channels_last"
) -> list[Tensor]:
    """x, bias and residual as leaves."""
    x, residual = (
        randn(*shape, seed=seed).to(device, dtype).contiguous(memory_format=LAYOUTS[layout])
        for seed in (1, 2)
    )
    bias = randn(shape[1], seed=3).to(device, dtype)
    return [tensor.requires_grad_() for tensor in (x, bias, residual)]


@pytest.mark.parametrize(("dtype", "layout"), DTYPES_AND_LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, kernel_device: torch.device
) -> None:
    given = inputs(shape, dtype, kernel_device, layout)
    # Of one sign: the bias's gradient is its sum, which must not be small for what it is summed of.
    cotangent = randn(*shape, seed=4).abs().to(given[0])
    for count in (2, 3):
        exact = [leaf(tensor.detach(), torch.float64) for tensor in given[:count]]
        wanted = bias_residual_reference(*exact)
        wanted_gradients = torch.autograd.grad(wanted, exact, cotangent.double())
        y = bias_residual(*given[:count], backend="triton")
        assert y.dtype == dtype
        assert y.stride() == given[0].stride()
        assert_close(y, wanted)
        for value, truth in zip(
            torch.autograd.grad(y, given[:count], cotangent), wanted_gradients, strict=True
        ):
            assert_close(value, truth)


def test_the_reference_is_the_sum() -> None:
    x, bias, residual = (
        tensor.detach() for tensor in inputs((2, 4, 3, 2), torch.float64, torch.device("cpu"))
    )
    assert torch.equal(bias_residual(x, bias, residual), x + bias.view(1, 4, 1, 1) + residual)
    half = bias_residual(x.half(), bias.half(), residual.half())
    assert torch.equal(
        half, (x.half().double() + bias.half().double().view(1, 4, 1, 1) + residual.half()).half()
    )


def test_the_sum_is_rounded_once(kernel_device: torch.device) -> None:
    # 2049 is no float16: rounded after the first sum, 2048 + 1 + 1 is 2048.
    one = torch.ones(1, device=kernel_device, dtype=torch.float16)
    x = torch.full((1, 1, 1, 1), 2048.0, device=kernel_device, dtype=torch.float16)
    for backend in ("triton", "torch"):
        assert bias_residual(x, one, one.view(1, 1, 1, 1), backend).item() == 2050


def test_a_residual_of_another_layout_and_dtype(kernel_device: torch.device) -> None:
    x, bias, _ = (tensor.detach() for tensor in inputs((2, 20, 5, 3), torch.float16, kernel_device))
    residual = randn(2, 20, 5, 3, seed=9, dtype=torch.float32).to(kernel_device).requires_grad_()
    wide = bias.repeat_interleave(2).float()
    y = bias_residual(x, wide[::2], residual, "triton")
    assert_close(y, bias_residual_reference(x.double(), bias.double(), residual.double()))
    y.sum().backward()
    assert residual.grad is not None
    assert relative_error(residual.grad, torch.ones_like(residual)) == 0


def test_errors(kernel_device: torch.device) -> None:
    x, bias = torch.ones(1, 4, 2, 2, device=kernel_device), torch.ones(4, device=kernel_device)
    with pytest.raises(ValueError, match=r"bias \[C\], got \[1, 4, 2, 2\] and \[3\]"):
        bias_residual(x, bias[:3])
    with pytest.raises(ValueError, match=r"residual must be \[1, 4, 2, 2\]"):
        bias_residual(x, bias, x[..., :1])
    big = torch.ones(1, 4, 4, 4, device=kernel_device)[..., ::2, ::2]
    with pytest.raises(ValueError, match="channels-last or contiguous"):
        bias_residual(big, bias, backend="triton")
    assert torch.equal(bias_residual(big, bias), big + 1)
    assert bias_residual(x[:0], bias, x[:0], "triton").shape == (0, 4, 2, 2)


def test_every_candidate(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x, bias, residual = (tensor.detach() for tensor in inputs((2, 40, 7, 5), torch.float16, kernel_device))
    wanted = bias_residual_reference(x.double(), bias.double(), residual.double())
    launches = _candidates(70, 40, 2, torch.float16)
    assert len(set(launches)) > 1
    for launch in launches:
        monkeypatch.setattr(_TUNED, "choose", lambda *_, launch=launch: launch)
        assert_close(bias_residual(x, bias, residual, "triton"), wanted)


def test_registration(kernel_device: torch.device) -> None:
    for layout in LAYOUTS:
        given = inputs((2, 4, 3, 2), torch.float32, kernel_device, layout)
        for arguments in (tuple(given), (*given[:2], None)):
            torch.library.opcheck(
                torch.ops.imagedream_rt.bias_residual.default,
                arguments,
                test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
            )


@pytest.mark.parametrize("arch", [80, 90])
def test_kernel_compiles_ahead(arch: int) -> None:
    pytest.importorskip("triton")
    types = {**dict.fromkeys(("x", "bias", "residual", "y"), "*fp16"), "rows": "i32", "columns": "i32"}
    launches = [
        launch for columns in (128, 320) for launch in _candidates(65536, columns, 2, torch.float16)[:1]
    ]
    fixed = [
        {**dict(launch.constants), "CHANNELS": 320, "CHANNELS_LAST": last, "PDL": arch >= 90}
        for launch, last in zip(launches, (True, False), strict=True)
    ]
    assert set(types) | set(fixed[0]) == set(_kernel.arg_names)
    warps = [launch.warps for launch in launches]
    compile_ahead("bias_residual", "_kernel", types, fixed, arch, warps=warps)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 128, 256, 256), (10, 320, 32, 32), (4, 3, 256, 256)], ids=str)
def test_real_shapes_and_capture(shape: tuple[int, ...]) -> None:
    x, bias, residual = (tensor.detach() for tensor in inputs(shape, torch.float16, torch.device("cuda")))
    wanted = bias_residual_reference(x.double(), bias.double(), residual.double())
    assert_close(bias_residual(x, bias, residual), wanted)
    replay, found = captured(lambda: bias_residual(x, bias, residual))
    replay()
    assert_close(found, wanted)
