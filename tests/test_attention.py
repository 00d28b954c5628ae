"""Multi-view self-attention against its written-out reference, hand-computed cases, and backends."""

from __future__ import annotations

import doctest
import math
import sys
from types import ModuleType

import pytest
import torch
from ahead import compile_ahead
from graphs import captured
from rounding import DTYPES, ROUNDING_STEPS, assert_close, leaf, randn
from torch import Tensor

from imagedream_rt.kernels import _attention_backward, _attention_hopper, _triton, attention
from imagedream_rt.kernels._triton import interpreted
from imagedream_rt.kernels._tuning import Launch
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


pytestmark = pytest.mark.usefixtures("untuned")


TUNED = (attention._tuned, _attention_backward._query_tuned, _attention_backward._key_value_tuned)

KERNEL_SHAPES = [
    (1, 1, 1, 1, 32),  # one token
    (1, 5, 16, 2, 64),  # the smallest level of a real model: 80 tokens
    (2, 3, 11, 3, 32),  # odd token count, two groups
    (1, 4, 40, 1, 64),  # more keys than one block, and a ragged rest
    (1, 2, 64, 1, 128),  # two whole blocks of keys
]


def assert_kernel_equals_reference(qkv: Tensor, *, parts: tuple[int, ...] = (0, 1, 2)) -> None:
    """Values and gradients dQ, dK, dV of the kernels for ``qkv`` of any strides, against float64."""
    given, exact = qkv.detach().requires_grad_(), qkv.detach().double().requires_grad_()
    out, truth = multi_view_attention(given, "triton"), multi_view_attention_reference(exact)
    cotangent = randn(*out.shape, seed=2).to(qkv)
    assert out.dtype == qkv.dtype
    assert out.is_contiguous()
    assert_close(out, truth)
    out.backward(cotangent)
    truth.backward(cotangent.double())
    assert given.grad is not None
    assert exact.grad is not None
    assert given.grad.isfinite().all()
    for part in parts:  # each by its own size; one token has no dQ and dK
        if exact.grad[:, :, :, part].norm() > 0:
            assert_close(given.grad[:, :, :, part], exact.grad[:, :, :, part])


def packed(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, seed: int = 1) -> Tensor:
    if dtype == torch.bfloat16 and interpreted():
        pytest.skip("Triton's interpreter has no bfloat16 products")
    b, f, t, h, d = shape
    return randn(b, f, t, 3, h, d, seed=seed).to(device, dtype)


@pytest.mark.parametrize("dtype", attention.DTYPES, ids=str)
@pytest.mark.parametrize("shape", KERNEL_SHAPES, ids=str)
def test_kernel_equals_reference(
    shape: tuple[int, ...], dtype: torch.dtype, kernel_device: torch.device
) -> None:
    assert_kernel_equals_reference(packed(shape, dtype, kernel_device))


def test_kernel_of_large_scores(kernel_device: torch.device) -> None:
    # Scores about -240: weights that are not relative to their row's largest would all vanish, and those of
    # keys past the end, whose score is 0, would be infinite.
    qkv = 0.1 * packed((1, 3, 11, 1, 32), torch.float16, kernel_device)
    qkv[:, :, :, 0] -= 7
    qkv[:, :, :, 1] += 6
    assert_kernel_equals_reference(qkv, parts=(2,))  # rounding is all that is left of dQ and dK


def test_kernel_takes_strided_input(kernel_device: torch.device) -> None:
    heads_first = randn(1, 2, 9, 2, 3, 32, seed=4).to(kernel_device, torch.float16).transpose(3, 4)
    frames_inside = randn(1, 9, 2, 3, 2, 32, seed=5).to(kernel_device, torch.float16).transpose(1, 2)
    features_first = randn(1, 2, 9, 3, 32, 2, seed=6).to(kernel_device, torch.float16).transpose(4, 5)
    same_for_all_groups = packed((1, 2, 9, 2, 32), torch.float16, kernel_device).expand(2, -1, -1, -1, -1, -1)
    for qkv in (heads_first, frames_inside, features_first, same_for_all_groups):
        assert not qkv.is_contiguous()
        assert_kernel_equals_reference(qkv)


def test_kernel_reads_no_tokens_past_the_end(kernel_device: torch.device) -> None:
    qkv = packed((3, 1, 21, 1, 32), torch.float16, kernel_device)
    qkv[1] = float("nan")
    assert_kernel_equals_reference(qkv[::2])


def test_kernel_of_a_gradient_that_is_not_contiguous(kernel_device: torch.device) -> None:
    qkv = packed((1, 2, 9, 2, 32), torch.float16, kernel_device).requires_grad_()
    multi_view_attention(qkv, "triton").sum().backward()  # an expanded one
    assert qkv.grad is not None
    exact = qkv.detach().double().requires_grad_()
    multi_view_attention_reference(exact).sum().backward()
    assert exact.grad is not None
    assert_close(qkv.grad[:, :, :, 2], exact.grad[:, :, :, 2])


@pytest.mark.parametrize("keep", [1, 3, 4])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_queries_of_the_first_frames(
    keep: int, backend: attention.AttentionBackend, kernel_device: torch.device
) -> None:
    qkv = packed((2, 4, 9, 2, 32), torch.float16, kernel_device)
    whole, exact = qkv.double().requires_grad_(), qkv.detach().requires_grad_()
    wanted = multi_view_attention_reference(whole)[:, :keep]
    for given in (qkv, exact):
        out = multi_view_attention(given, backend, keep)
        assert out.shape == (2, keep, 9, 64)
        assert out.is_contiguous()
        assert_close(out, wanted)
    cotangent = randn(*wanted.shape, seed=2).to(qkv)
    out.backward(cotangent)
    wanted.backward(cotangent.double())
    assert exact.grad is not None
    assert whole.grad is not None
    for part in range(3):
        assert_close(exact.grad[:, :, :, part], whole.grad[:, :, :, part])


@pytest.mark.parametrize("keep", [0, 5])
def test_frames_that_are_not_there_have_no_queries(keep: int) -> None:
    with pytest.raises(ValueError, match=rf"keep is {keep}; of 4 frames"):
        multi_view_attention(torch.zeros(1, 4, 1, 3, 1, 1), keep=keep)


@pytest.mark.parametrize("shape", [(0, 4, 4, 2, 32), (1, 4, 0, 2, 32), (1, 4, 4, 0, 32)], ids=str)
def test_kernel_of_nothing(shape: tuple[int, ...], kernel_device: torch.device) -> None:
    qkv = packed(shape, torch.float16, kernel_device).requires_grad_()
    out = multi_view_attention(qkv, "triton")
    out.sum().backward()
    assert out.shape == (*shape[:3], shape[3] * shape[4])
    assert qkv.grad is not None
    assert qkv.grad.shape == qkv.shape


def test_kernel_is_an_operator_for_the_compiler(kernel_device: torch.device) -> None:
    tokens = packed((1, 1, 5, 2, 32), torch.float16, kernel_device).flatten(1, 2).requires_grad_()
    torch.library.opcheck(attention._attention, (tokens, 5))
    torch.library.opcheck(attention._attention, (tokens.detach(), 3))


def test_gradcheck_of_the_reference() -> None:
    qkv = randn(1, 2, 2, 3, 2, 3, seed=7).requires_grad_()
    assert torch.autograd.gradcheck(multi_view_attention_reference, (qkv,))


def test_automatic_backend_leaves_to_sdpa_what_the_kernels_do_not_take(
    monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    monkeypatch.setattr(attention, "_attention", None)  # a call of the kernels would fail
    for dtype, d in ((torch.float32, 64), (torch.float16, 80), (torch.float64, 32)):
        qkv = packed((1, 2, 3, 1, d), dtype, kernel_device)
        assert_close(multi_view_attention(qkv), multi_view_attention_reference(qkv.double()))


def test_kernel_refuses_other_dtypes_and_heads(kernel_device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"takes torch\.float16, torch\.bfloat16, got torch\.float32"):
        multi_view_attention(packed((1, 1, 2, 1, 32), torch.float32, kernel_device), "triton")
    with pytest.raises(ValueError, match=r"head sizes \(32, 64, 128\), got 48"):
        multi_view_attention(packed((1, 1, 2, 1, 48), torch.float16, kernel_device), "triton")


def test_missing_triton_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "triton", None)
    with pytest.raises(ImportError, match="pip install triton"):
        check_attention_backend("triton")


@pytest.mark.parametrize(("shared_tiles", "sharers", "parts"), [(2, 1, 2), (2, 3, 4), (3, 4, 2)])
def test_parts_of_shared_tiles_are_added_up(
    shared_tiles: int, sharers: int, parts: int, kernel_device: torch.device
) -> None:
    """Parts that are written one unit (a tile and a block of keys) after another, as the shares say."""
    heads, length, dim, rows, keys = shared_tiles, 40, 32, 64, 16
    blocks = length // keys  # the last tokens are no keys, but have queries
    q, k, v = randn(3, heads, length, dim, seed=8).to(kernel_device)
    scores = q @ k[:, : blocks * keys].mT
    places = torch.zeros(sharers, 2, rows, dim), torch.zeros(sharers, 2, 2, rows)
    written, statistics = (place.fill_(float("nan")).to(kernel_device) for place in places)
    units = [(tile, block) for tile in range(shared_tiles) for block in range(blocks)]
    for sharer in range(sharers):
        share = units[sharer * len(units) // sharers : (sharer + 1) * len(units) // sharers]
        tiles = sorted({tile for tile, _ in share})
        # A share of more than two tiles does not occur: whole tiles are not shared.
        assert len(tiles) <= 2 or sharers == 1
        for step, tile in enumerate(tiles[:2]):
            mine = [block for other, block in share if other == tile]
            part = slice(mine[0] * keys, (mine[-1] + 1) * keys)
            peak = scores[tile, :, part].amax(1)
            weights = torch.exp2(scores[tile, :, part] - peak[:, None])
            written[sharer, step, :length] = (weights @ v[tile, part]).float()
            statistics[sharer, step, :, :length] = torch.stack((peak, weights.sum(1))).float()
    out = torch.empty(1, length, heads * dim, device=kernel_device)
    log_sums = torch.empty(1, heads, length, device=kernel_device)
    _attention_hopper.add_parts_kernel[(shared_tiles * rows // 16,)](
        written,
        statistics,
        out,
        log_sums,
        heads,
        length,
        length,
        shared_tiles,
        sharers,
        D=dim,
        KEYS=keys,
        QUERIES=rows,
        PARTS=parts,
        ROWS=16,
    )
    weights = torch.softmax(scores * math.log(2), -1)
    truth = (weights @ v[:, : blocks * keys]).transpose(0, 1).reshape(1, length, heads * dim)
    assert_close(out, truth)
    assert_close(log_sums, (scores * math.log(2)).logsumexp(-1)[None] / math.log(2))


def build(
    module: str, kernel: str, tensors: dict[str, str], launches: list[Launch], dim: int, arch: int
) -> None:
    sizes = ["stride_group", "stride_token", "stride_part", "stride_head", "heads", "length"]
    sizes += ["q_length"] * (kernel == "attention_kernel")
    even = {"D": dim, "EVEN_QUERIES": False, "EVEN_KEYS": False}
    compile_ahead(
        module,
        kernel,
        {**tensors, **dict.fromkeys(sizes, "i32"), "scale": "fp32"},
        [{**dict(launch.constants), **even} for launch in launches],
        arch,
        warps=[launch.warps for launch in launches],
        stages=[launch.stages for launch in launches],
    )


FORWARD = ("attention", "attention_kernel", {"tokens": "*fp16", "out": "*fp16", "log_sums": "*fp32"})
_HALVES, _SUMS = (
    dict.fromkeys(("tokens", "grad", "grad_tokens"), "*bf16"),
    {"log_sums": "*fp32", "delta": "*fp32"},
)
QUERY_GRADIENT = ("_attention_backward", "query_gradient_kernel", {**_HALVES, "out": "*bf16", **_SUMS})
KEY_VALUE_GRADIENT = ("_attention_backward", "key_value_gradient_kernel", {**_HALVES, **_SUMS})


@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_compile_without_a_gpu(arch: int) -> None:
    build(*FORWARD, [attention._candidates(1, length, 1, 64, False)[0] for length in (80, 320)], 64, arch)
    for kernel in (QUERY_GRADIENT, KEY_VALUE_GRADIENT):
        build(*kernel, _attention_backward._candidates(1, 320, 1, 64)[:1], 64, arch)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("arch", [80, 90])
def test_every_launch_compiles_without_a_gpu(arch: int, dim: int) -> None:
    for length in (80, 320):
        build(*FORWARD, attention._candidates(1, length, 1, dim, False), dim, arch)
    for kernel in (QUERY_GRADIENT, KEY_VALUE_GRADIENT):
        build(*kernel, _attention_backward._candidates(1, 320, 1, dim), dim, arch)


@pytest.mark.parametrize("dim", [64, 128])
def test_hopper_kernel_compiles_without_a_gpu(dim: int) -> None:
    layouts = _triton.gl
    if layouts is None:
        pytest.skip(f"Gluon of Triton {_triton.GLUON_OF}x is not installed")
    numbers = ("heads", "length", "q_length", "shared_tiles", "sharers", "whole_tiles")
    for launch in _attention_hopper.launches(dim)[:1]:
        boxes = {
            name: f"tensordesc<bf16[{rows},{dim}],"
            f"{layouts.NVMMASharedLayout.get_default_for([rows, dim], layouts.bfloat16)!r}>"
            for name, rows in (("query_box", 64), ("key_box", launch["KEYS"]))
        }
        results = {"out": "*bf16", "log_sums": "*fp32", "parts": "*fp32", "statistics": "*fp32"}
        (ptx,) = compile_ahead(
            "_attention_hopper",
            "hopper_kernel",
            {**boxes, **results, **dict.fromkeys(numbers, "i32"), "scale": "fp32"},
            [{**dict(launch.constants), "D": dim}],
            90,
            warps=launch.warps,
        )
        assert "wgmma.mma_async" in ptx
        assert "cp.async.bulk.tensor" in ptx


REAL_SHAPES = [
    (2, 5, 1024, 5, 64),
    (4, 5, 256, 10, 64),
    (2, 5, 64, 20, 64),
    (4, 5, 16, 20, 64),
    (1, 4, 1024, 5, 64),  # without a picture's frame
    (1, 4, 256, 2, 64),  # fewer tiles than multiprocessors
    (3, 4, 384, 11, 64),  # whole tiles only, for 132 multiprocessors
    (1, 4, 256, 3, 32),
    (1, 5, 256, 3, 128),
    (1, 3, 347, 2, 64),  # 1041 tokens
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", attention.DTYPES, ids=str)
@pytest.mark.parametrize("shape", REAL_SHAPES, ids=str)
def test_kernel_equals_reference_at_real_sizes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_kernel_equals_reference(packed(shape, dtype, torch.device("cuda")))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [REAL_SHAPES[1], REAL_SHAPES[3], REAL_SHAPES[-2]], ids=str)
def test_every_launch_equals_reference(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    b, f, t, h, d = shape
    qkv = packed(shape, torch.float16, torch.device("cuda"))
    tokens = qkv.flatten(1, 2)
    truth = multi_view_attention_reference(qkv.double())
    q, k, _ = tokens.double().permute(2, 0, 3, 1, 4)
    sums = (q @ k.mT * d**-0.5).logsumexp(-1) / math.log(2)
    for launch in attention._candidates(b, f * t, h, d, _attention_hopper.fits(tokens)):
        monkeypatch.setattr(attention._tuned, "choose", lambda *_, launch=launch: launch)
        out, log_sums = attention._attention(tokens, f * t)
        assert_close(out.view(truth.shape), truth)
        assert_close(log_sums, sums)
        for q_length in (t, (f - 1) * t):
            few, few_sums = attention._attention(tokens, q_length)
            assert_close(few, truth.flatten(1, 2)[:, :q_length])
            assert_close(few_sums, sums[:, :, :q_length])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 5, 64, 3, 64), (2, 5, 64, 3, 128)], ids=str)
def test_every_launch_of_the_gradient_equals_reference(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    b, f, t, h, d = shape
    qkv = packed(shape, torch.float16, torch.device("cuda"))
    for launch in _attention_backward._candidates(b, f * t, h, d):
        for tuned in TUNED[1:]:
            monkeypatch.setattr(tuned, "choose", lambda *_, launch=launch: launch)
        assert_kernel_equals_reference(qkv)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", REAL_SHAPES[:4], ids=str)
def test_kernel_in_a_graph(shape: tuple[int, ...]) -> None:
    device = torch.device("cuda")
    qkv = packed(shape, torch.float16, device)
    replay, out = captured(lambda: multi_view_attention(qkv))
    for seed in (2, 3):
        qkv.copy_(packed(shape, torch.float16, device, seed=seed))
        replay()
        assert_close(out, multi_view_attention(qkv.double(), "torch"))


@pytest.mark.gpu
def test_kernel_under_the_compiler() -> None:
    qkv = packed((1, 5, 64, 2, 64), torch.float16, torch.device("cuda"))
    compiled = torch.compile(lambda x: multi_view_attention(x * 2).sin(), fullgraph=True)
    assert_close(compiled(qkv), multi_view_attention_reference(qkv.double() * 2).sin())


def test_docstring_examples() -> None:
    result = doctest.testmod(attention)
    assert result.attempted > 0
    assert result.failed == 0
