"""Decoupled cross-attention against its written-out reference and hand-computed cases."""

from __future__ import annotations

import doctest

import pytest
import torch
from rounding import DTYPES, assert_close, leaf, randn

from imagedream_rt.kernels import cross_attention
from imagedream_rt.kernels.cross_attention import (
    decoupled_cross_attention,
    decoupled_cross_attention_reference,
)

CROSS_SHAPES = [
    # N, T, H, D, text rows, Lt, image rows, Li
    (1, 1, 1, 2, 1, 2, 1, 2),  # the least that has a softmax
    (10, 7, 3, 8, 2, 77, 2, 16),  # two groups of five, odd token count
    (8, 4, 2, 32, 8, 77, 2, 257),  # a text for each view, one picture a group; unresampled picture
    (4, 9, 1, 80, 1, 5, 4, 4),  # one text, a picture for each view; odd head width
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CROSS_SHAPES, ids=str)
def test_decoupled_cross_attention_equals_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    n, t, h, d, text_rows, text, image_rows, image = shape
    sizes = [(n, t, h, d), *[(text_rows, text, h, d)] * 2, *[(image_rows, image, h, d)] * 2]
    inputs = [leaf(randn(*size, seed=seed).to(dtype).double(), dtype) for seed, size in enumerate(sizes)]
    exact = [leaf(x.detach(), torch.float64) for x in inputs]
    cotangent = randn(n, t, h * d, seed=9).to(dtype)

    q, k_text, v_text, k_image, v_image = inputs
    out = decoupled_cross_attention(q, k_text, v_text, k_image, v_image, image_scale=0.7)
    q, k_text, v_text, k_image, v_image = exact
    truth = decoupled_cross_attention_reference(q, k_text, v_text, k_image, v_image, image_scale=0.7)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_close(out, truth)

    out.backward(cotangent)
    truth.backward(cotangent.double())
    for x, y in zip(inputs, exact, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        assert_close(x.grad, y.grad)


def test_key_rows_serve_consecutive_frames() -> None:
    q = randn(6, 4, 2, 8, seed=1)
    k, v = randn(2, 5, 2, 8, seed=2), randn(2, 5, 2, 8, seed=3)
    out = decoupled_cross_attention(q, k, v)
    for frame in range(6):
        row = slice(frame // 3, frame // 3 + 1)
        alone = decoupled_cross_attention(q[frame : frame + 1], k[row], v[row])
        torch.testing.assert_close(out[frame : frame + 1], alone)


def test_decoupled_cross_attention_by_hand() -> None:
    # Text weights 1/4 and 3/4 as above; the image has one token, whose weight is 1.
    q = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    k_text = torch.tensor([1.0, 3.0], dtype=torch.float64).log().view(1, 2, 1, 1)
    v_text = torch.tensor([4.0, 8.0], dtype=torch.float64).view(1, 2, 1, 1)
    out = decoupled_cross_attention(q, k_text, v_text, q, 10 * q, image_scale=0.5)
    torch.testing.assert_close(out.flatten(), torch.tensor([7.0 + 5.0]).double())


def test_image_scale_zero_is_text_alone() -> None:
    q, k, v = randn(4, 3, 1, 8, seed=1), randn(2, 5, 1, 8, seed=2), randn(2, 5, 1, 8, seed=3)
    text = decoupled_cross_attention(q, k, v)
    torch.testing.assert_close(decoupled_cross_attention(q, k, v, k, v, image_scale=0.0), text)
    torch.testing.assert_close(decoupled_cross_attention(q, k, v, k, v), 2 * text)


def test_cross_attention_refuses_what_does_not_fit() -> None:
    q, k = torch.zeros(4, 3, 1, 8), torch.zeros(2, 5, 1, 8)
    with pytest.raises(ValueError, match="k_text"):
        decoupled_cross_attention(q, torch.zeros(3, 5, 1, 8), torch.zeros(3, 5, 1, 8))  # 3 does not divide 4
    with pytest.raises(ValueError, match="k_text"):
        decoupled_cross_attention(q, k, k[:, :4])
    with pytest.raises(ValueError, match="k_image"):
        decoupled_cross_attention(q, k, k, k[..., :4], k[..., :4])
    with pytest.raises(ValueError, match="together"):
        decoupled_cross_attention(q, k, k, k)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cross_attention_on_the_gpu_equals_reference(dtype: torch.dtype) -> None:
    q, k, v = (randn(n, t, 5, 64, seed=n + t, dtype=dtype).cuda() for n, t in ((10, 64), (2, 77), (2, 77)))
    truth = decoupled_cross_attention_reference(
        q.double(), k.double(), v.double(), k[:, :16].double(), v[:, :16].double()
    )
    assert_close(decoupled_cross_attention(q, k, v, k[:, :16], v[:, :16]), truth)


def test_docstring_examples() -> None:
    result = doctest.testmod(cross_attention)
    assert result.attempted > 0
    assert result.failed == 0
