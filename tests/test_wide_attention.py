"""Attention of one wide head by products, against the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ahead import compile_ahead
from graphs import captured
from operators import Operators
from rounding import leaf, randn, relative_error
from torch import Tensor

from imagedream_rt.kernels import wide_attention as module
from imagedream_rt.kernels.wide_attention import wide_attention

# (samples, tokens, channels): tokens that fill no power of two, one, more than one warp's.
SHAPES = [(2, 19, 24), (1, 1, 8), (2, 64, 16), (1, 300, 8)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def formula(qkv: Tensor) -> Tensor:
    q, k, v = qkv.chunk(3, dim=-1)
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v


def given(shape: tuple[int, int, int], dtype: torch.dtype, device: Any, scale: float = 2.0) -> Tensor:
    samples, tokens, channels = shape
    return (scale * randn(samples, tokens, 3 * channels, seed=1)).to(device, dtype).requires_grad_()


def results(function: Any, qkv: Tensor, cotangent: Tensor) -> list[Tensor]:
    """Value, and the gradients by queries, keys and values."""
    attended = function(qkv)
    (gradient,) = torch.autograd.grad(attended, qkv, cotangent)
    return [attended.detach(), *gradient.chunk(3, dim=-1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(
    shape: tuple[int, int, int], dtype: torch.dtype, kernel_device: torch.device
) -> None:
    qkv = given(shape, dtype, kernel_device)
    cotangent = randn(*shape, seed=2).to(kernel_device, dtype)
    found = results(lambda x: wide_attention(x, "triton"), qkv, cotangent)
    wanted = results(formula, leaf(qkv.detach(), torch.float64), cotangent.double())
    step = torch.finfo(dtype).eps
    for value, truth in zip(found, wanted, strict=True):
        assert value.dtype == dtype
        # One token has no choice: its scores' gradient is nothing but rounding.
        assert (value.double() - truth).norm() <= 6 * step * (truth.norm() or cotangent.norm())


def test_sharp_and_large_scores(kernel_device: torch.device) -> None:
    """Where one token has almost all of a row, dS is a difference of almost equal numbers."""
    qkv = given((1, 40, 32), torch.float16, kernel_device, scale=12.0)
    cotangent = 1e-2 * randn(1, 40, 32, seed=2).to(qkv)
    found = results(lambda x: wide_attention(x, "triton"), qkv, cotangent)
    wanted = results(formula, leaf(qkv.detach(), torch.float64), cotangent.double())
    for value, truth in zip(found, wanted, strict=True):
        assert relative_error(value, truth) <= 2e-3


def test_by_hand() -> None:
    # Equal scores: the mean of the values.
    qkv = torch.tensor([[[0.0, 1.0, 3.0], [0.0, 2.0, 5.0]]])
    assert wide_attention(qkv).tolist() == [[[4.0], [4.0]]]


def test_pytorch_attends_where_the_products_would_be_too_large(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LONGEST", 8)
    monkeypatch.setattr(module, "use_triton", lambda *_: True)
    for tokens, ours in ((8, 1), (9, 0)):
        qkv = given((1, tokens, 4), torch.float32, kernel_device)
        with torch.no_grad(), Operators() as ran:
            found = wide_attention(qkv)
        assert ran.ours["wide_attention"] == ours
        assert relative_error(found, formula(qkv.detach().double())) <= 1e-6


def test_errors_and_nothing(kernel_device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"\[N, T, 3C\], got \[2, 3, 4\]"):
        wide_attention(torch.ones(2, 3, 4))
    assert wide_attention(torch.ones(0, 3, 6, device=kernel_device), "triton").shape == (0, 3, 2)


def test_registration(kernel_device: torch.device) -> None:
    qkv = given((2, 5, 4), torch.float32, kernel_device)
    torch.library.opcheck(
        torch.ops.imagedream_rt.wide_attention.default,
        (qkv,),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    p = torch.ones(2, 5, 5, device=kernel_device) / 5
    torch.library.opcheck(
        torch.ops.imagedream_rt.wide_attention_gradient.default,
        (qkv.detach()[..., :4].contiguous(), qkv.detach(), p),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kernel", ["_softmax_kernel", "_softmax_gradient_kernel"])
def test_kernels_compile_ahead(kernel: str, arch: int) -> None:
    pytest.importorskip("triton")
    half, single = ("p", "grad_scores"), ("scores", "grad_p")
    types = {
        **dict.fromkeys(half, "*fp16"),
        **dict.fromkeys(single, "*fp32"),
        "scale": "fp32",
        "tokens": "i32",
    }
    names = getattr(module, kernel).arg_names
    run_time = {name: types[name] for name in names if name in types}
    compile_ahead("wide_attention", kernel, run_time, [{"WIDTH": 4096}], arch, warps=8)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_encoders_shape_is_as_exact_as_pytorchs_and_captured(dtype: torch.dtype) -> None:
    qkv = given((2, 1024, 512), dtype, "cuda")
    cotangent = randn(2, 1024, 512, seed=2).to(qkv)
    wanted = results(formula, leaf(qkv.detach(), torch.float64), cotangent.double())
    plain = results(lambda x: wide_attention(x, "torch"), qkv, cotangent)
    found = results(wide_attention, qkv, cotangent)
    for value, theirs, truth in zip(found, plain, wanted, strict=True):
        assert (
            relative_error(value, truth) <= 1.2 * relative_error(theirs, truth) + torch.finfo(dtype).eps / 4
        )
    replay, again = captured(lambda: results(wide_attention, qkv, cotangent))
    replay()
    for value, expected in zip(again, found, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0)
