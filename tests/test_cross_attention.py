"""Decoupled cross-attention against its written-out reference and hand-computed cases."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
from ahead import compile_ahead
from graphs import captured
from rounding import DTYPES, assert_close, leaf, randn

from imagedream_rt.kernels import cross_attention
from imagedream_rt.kernels._tuning import Launch
from imagedream_rt.kernels.cross_attention import (
    decoupled_cross_attention,
    decoupled_cross_attention_reference,
)

pytestmark = pytest.mark.usefixtures("untuned")


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


KERNEL_SHAPES = [
    # N, T, H, D, text rows, Lt, image rows, Li (0: no image)
    (4, 9, 2, 32, 2, 77, 2, 16),  # two groups of frames; a tile of queries that ends between frames
    (6, 5, 1, 64, 2, 5, 3, 17),  # text for three frames, pictures for two: only single frames share both
    (2, 33, 1, 128, 1, 64, 1, 0),  # text alone, whole blocks of keys
    (2, 3, 1, 32, 2, 16, 1, 257),  # an unresampled picture: several blocks and one key more
    (2, 3, 1, 32, 1, 200, 1, 0),  # more text than is held at once, no image
]
REAL_SHAPES = [
    (10, 1024, 5, 64, 2, 77, 2, 16),
    (10, 256, 10, 64, 2, 77, 2, 16),
    (10, 64, 20, 64, 2, 77, 2, 16),
    (10, 16, 20, 64, 10, 77, 2, 257),
]
HALF_AND_SINGLE = [torch.float32, torch.float16, torch.bfloat16]


def inputs_of(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Any]:
    """Queries, keys and values; None for those of an image without tokens."""
    n, t, h, d, text_rows, text, image_rows, image = shape
    sizes = [(n, t, h, d), *[(text_rows, text, h, d)] * 2, *[(image_rows, image, h, d)] * 2]
    return [
        leaf(randn(*size, seed=seed).to(device), dtype) if image or seed < 3 else None
        for seed, size in enumerate(sizes)
    ]


def assert_kernel_equals_reference(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    inputs = inputs_of(shape, dtype, device)
    exact: list[Any] = [None if x is None else leaf(x.detach(), torch.float64) for x in inputs]
    q, k_text, v_text, k_image, v_image = inputs
    out = decoupled_cross_attention(q, k_text, v_text, k_image, v_image, 0.7, backend="triton")
    q, k_text, v_text, k_image, v_image = exact
    truth = decoupled_cross_attention_reference(q, k_text, v_text, k_image, v_image, 0.7)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_close(out, truth)

    cotangent = randn(*out.shape, seed=9).to(device).to(dtype)
    out.backward(cotangent)
    truth.backward(cotangent.double())
    for x, y in zip(inputs, exact, strict=True):
        if x is not None and y is not None:
            assert_close(x.grad, y.grad)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", KERNEL_SHAPES, ids=str)
def test_kernel_equals_reference(
    shape: tuple[int, ...], dtype: torch.dtype, kernel_device: torch.device
) -> None:
    if dtype == torch.bfloat16 and kernel_device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies no bfloat16 matrices")
    assert_kernel_equals_reference(shape, dtype, kernel_device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", REAL_SHAPES, ids=str)
def test_kernel_equals_reference_at_real_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Values alone: gradients are plain PyTorch, whose sums over 5120 queries round more than the bound allows."""
    with torch.no_grad():
        inputs = inputs_of(shape, dtype, torch.device("cuda"))
        q, k_text, v_text, k_image, v_image = inputs
        out = decoupled_cross_attention(q, k_text, v_text, k_image, v_image, 0.7, backend="triton")
        q, k_text, v_text, k_image, v_image = (x.double() for x in inputs)
        assert_close(out, decoupled_cross_attention_reference(q, k_text, v_text, k_image, v_image, 0.7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_launch_computes_the_same(
    dtype: torch.dtype, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for image in (16, 257):
        launches = cross_attention._candidates(32, 77, image, dtype)
        assert len(launches) > 1
        for launch in launches:
            monkeypatch.setattr(cross_attention._TUNED, "choose", lambda *_, one=launch: one)
            assert_kernel_equals_reference((4, 9, 2, 32, 2, 77, 2, image), dtype, kernel_device)


def test_kernel_of_no_queries(kernel_device: torch.device) -> None:
    for n, t in ((2, 0), (0, 3)):
        inputs = inputs_of((n, t, 1, 32, 1, 5, 1, 4), torch.float32, kernel_device)
        q, k_text, v_text, k_image, v_image = inputs
        out = decoupled_cross_attention(q, k_text, v_text, k_image, v_image, backend="triton")
        assert out.shape == (n, t, 32)
        out.sum().backward()
        for x in inputs:
            torch.testing.assert_close(x.grad, torch.zeros_like(x))


def test_kernel_reads_strides(kernel_device: torch.device) -> None:
    packed = randn(2, 7, 3, 2, 32, seed=1, dtype=torch.float32).to(kernel_device)
    q, k, v = packed.unbind(2)  # as one stacked projection writes them
    for parts in ((q, k, v), (q, k, v.contiguous()), (q.mT.contiguous().mT, k, v)):
        out = decoupled_cross_attention(*parts, k[:, 2:], v[:, 2:], backend="triton")
        truth = decoupled_cross_attention_reference(*parts, k[:, 2:], v[:, 2:])
        torch.testing.assert_close(out, truth, rtol=1e-5, atol=1e-5)


def test_reference_gradcheck() -> None:
    inputs = [*inputs_of((2, 3, 1, 2, 1, 4, 2, 3), torch.float64, torch.device("cpu")), 0.7]
    assert torch.autograd.gradcheck(decoupled_cross_attention_reference, inputs)


@pytest.mark.parametrize("arch", [80, 90])
def test_kernel_builds_ahead_of_time(arch: int) -> None:
    tensors = ("q", "k_text", "v_text", "k_image", "v_image", "out")
    numbers = [
        "rows",
        "text_share",
        "image_share",
        *(f"q_stride_{axis}" for axis in ("group", "row", "head")),
    ]
    numbers += [f"{keys}_stride_{axis}" for keys in ("text", "image") for axis in ("row", "key", "head")]
    for dtype, name, problems in (
        (torch.float16, "fp16", [(64, 77, 16), (128, 77, 257)]),
        (torch.float32, "fp32", [(128, 77, 16)]),  # the largest tiles
    ):
        builds: list[tuple[dict[str, int], Launch]] = [
            (cross_attention._constants(text, image, size, launch), launch)
            for size, text, image in problems
            for launch in cross_attention._candidates(size, text, image, dtype)[: 128 // size]
        ]
        compile_ahead(
            "cross_attention",
            "_forward_kernel",
            {**dict.fromkeys(tensors, f"*{name}"), **dict.fromkeys(numbers, "i32"), "image_scale": "fp32"},
            [constants for constants, _ in builds],
            arch,
            warps=[launch.warps for _, launch in builds],
            stages=[launch.stages for _, launch in builds],
        )


@pytest.mark.gpu
def test_kernel_in_a_cuda_graph() -> None:
    with torch.no_grad():
        q, k_text, v_text, *image = inputs_of(REAL_SHAPES[2], torch.float16, torch.device("cuda"))
        replay, out = captured(lambda: decoupled_cross_attention(q, k_text, v_text, *image))
        out.fill_(float("nan"))
        q.neg_()
        replay()
        q, k_text, v_text, k_image, v_image = (x.double() for x in (q, k_text, v_text, *image))
        assert_close(out, decoupled_cross_attention_reference(q, k_text, v_text, k_image, v_image))


def test_kernel_refuses_what_it_cannot_take(kernel_device: torch.device) -> None:
    q, k = (torch.zeros(2, 3, 1, 48, device=kernel_device) for _ in range(2))
    with pytest.raises(ValueError, match="head sizes 32, 64, 128"):
        decoupled_cross_attention(q, k, k, backend="triton")
    q, k = torch.zeros(2, 3, 1, 32, device=kernel_device), q[..., :32].half()
    with pytest.raises(ValueError, match=r"float16, torch\.float32"):
        decoupled_cross_attention(q, k, k, backend="triton")
    with pytest.raises(ValueError, match="unknown backend"):
        decoupled_cross_attention(q, q, q, backend="fast")  # type: ignore[arg-type]


@pytest.mark.gpu
def test_kernel_stays_one_call_in_a_compiled_function() -> None:
    q, k, v = (torch.randn(2, n, 2, 64, device="cuda", dtype=torch.float16) for n in (70, 77, 77))
    out = torch.compile(lambda q: decoupled_cross_attention(q, k, v) + 1, fullgraph=True)(q)
    assert_close(out, decoupled_cross_attention_reference(q.double(), k.double(), v.double()) + 1)


def test_docstring_examples() -> None:
    result = doctest.testmod(cross_attention)
    assert result.attempted > 0
    assert result.failed == 0
