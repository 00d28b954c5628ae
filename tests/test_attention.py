"""Multi-view self-attention against its written-out reference, hand-computed cases, and backends."""

from __future__ import annotations

import doctest
import sys
from types import ModuleType

import pytest
import torch
from rounding import DTYPES, ROUNDING_STEPS, assert_close, leaf, randn
from torch import Tensor

from imagedream_rt.kernels import attention
from imagedream_rt.kernels.attention import (
    check_attention_backend,
    multi_view_attention,
    multi_view_attention_reference,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_assert_close_sees_one_step_too_many(dtype: torch.dtype) -> None:
    truth = torch.ones(4, dtype=torch.float64)
    step = torch.finfo(dtype).eps
    assert_close((truth * (1 + (ROUNDING_STEPS[dtype] - 1) * step)).to(dtype), truth)
    with pytest.raises(AssertionError):
        assert_close((truth * (1 + (ROUNDING_STEPS[dtype] + 1) * step)).to(dtype), truth)


MULTI_VIEW_SHAPES = [
    (1, 1, 1, 1, 1),  # one token: the output is its value
    (2, 5, 7, 3, 8),  # odd token count, five frames, two groups
    (1, 4, 16, 2, 64),  # the smallest level of a real model, head width 64
    (2, 4, 1, 1, 80),  # one pixel a frame; head width not a power of two
    (1, 5, 64, 1, 32),  # the embedded model
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MULTI_VIEW_SHAPES, ids=str)
def test_multi_view_attention_equals_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    b, f, t, h, d = shape
    # The truth starts from the rounded input, so that only the operator's own rounding is judged.
    qkv = leaf(randn(b, f, t, 3, h, d, seed=1).to(dtype).double(), dtype)
    exact = leaf(qkv.detach(), torch.float64)
    cotangent = randn(b, f, t, h * d, seed=2).to(dtype)

    out, truth = multi_view_attention(qkv), multi_view_attention_reference(exact)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_close(out, truth)

    out.backward(cotangent)
    truth.backward(cotangent.double())
    assert qkv.grad is not None
    assert exact.grad is not None
    assert_close(qkv.grad, exact.grad)


def test_multi_view_attention_mixes_the_frames_of_a_group_and_no_others() -> None:
    qkv = randn(2, 3, 4, 3, 1, 8, seed=3)
    base = multi_view_attention(qkv)
    changed = qkv.clone()
    changed[0, 2, 3] += 1.0
    difference = (multi_view_attention(changed) - base).abs().amax(dim=(2, 3))
    assert (difference[0] > 1e-6).all()
    assert difference[1].max() == 0


def test_multi_view_attention_by_hand() -> None:
    # One head of width 1; query 1 sees keys 0 and ln 3 of two frames, so the weights are 1/4 and 3/4.
    qkv = torch.zeros(1, 2, 1, 3, 1, 1, dtype=torch.float64)
    qkv[0, :, 0, 0] = 1.0
    qkv[0, 1, 0, 1] = torch.log(torch.tensor(3.0, dtype=torch.float64))
    qkv[0, :, 0, 2, 0, 0] = torch.tensor([4.0, 8.0], dtype=torch.float64)
    torch.testing.assert_close(multi_view_attention(qkv).flatten(), torch.tensor([7.0, 7.0]).double())


def test_multi_view_attention_takes_strided_input() -> None:
    packed = randn(1, 2, 3, 2, 3, 8, seed=4)  # heads before q, k, v
    strided = packed.transpose(3, 4)
    torch.testing.assert_close(multi_view_attention(strided), multi_view_attention(strided.contiguous()))


@pytest.mark.parametrize("shape", [(2, 4, 16, 3, 8), (1, 2, 3, 2, 1, 8)], ids=str)
def test_multi_view_attention_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[B, F, T, 3, H, D\]"):
        multi_view_attention(torch.zeros(shape))


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'flash'.*torch, xformers"):
        check_attention_backend("flash")
    with pytest.raises(ValueError, match="'flash'"):
        multi_view_attention(torch.zeros(1, 1, 1, 3, 1, 1), "flash")  # type: ignore[arg-type]


def test_missing_xformers_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(ImportError, match=r"imagedream-rt\[xformers\]"):
        check_attention_backend("xformers")
    with pytest.raises(ImportError, match=r"imagedream-rt\[xformers\]"):
        multi_view_attention(torch.zeros(1, 1, 1, 3, 1, 1), "xformers")


def test_xformers_backend_passes_its_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with xformers' documented contract: [B, L, H, D] in and out, scale 1/sqrt(D)."""
    calls: list[torch.Size] = []

    def memory_efficient_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        calls.append(query.shape)
        scores = torch.einsum("blhd,bmhd->bhlm", query, key) * query.shape[-1] ** -0.5
        return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), value)

    ops = ModuleType("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    check_attention_backend("xformers")
    qkv = randn(2, 4, 9, 3, 2, 8, seed=5)
    torch.testing.assert_close(multi_view_attention(qkv, "xformers"), multi_view_attention_reference(qkv))
    assert calls == [torch.Size((2, 36, 2, 8))]


@pytest.mark.gpu
def test_xformers_itself_equals_reference() -> None:
    pytest.importorskip("xformers")
    qkv = randn(2, 5, 64, 3, 5, 64, seed=6, dtype=torch.float16).cuda()
    truth = multi_view_attention_reference(qkv.double())
    assert_close(multi_view_attention(qkv, "xformers"), truth)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_attention_on_the_gpu_equals_reference(dtype: torch.dtype) -> None:
    qkv = randn(2, 5, 64, 3, 5, 64, seed=6, dtype=dtype).cuda()
    assert_close(multi_view_attention(qkv), multi_view_attention_reference(qkv.double()))


def test_docstring_examples() -> None:
    result = doctest.testmod(attention)
    assert result.attempted > 0
    assert result.failed == 0
