"""Multi-view self-attention: one softmax over the tokens of all frames of a group.

For each group b and head h, with L = F * T tokens (frame-major, then row-major pixels),

    out = softmax(Q K^T / sqrt(D)) V,        Q, K, V in R^{L x D};

of the frames behind the first ``keep``, if given, only keys and values count.

Source: the inflated "3D" self-attention of MVDream (arXiv 2308.16512, section 3.1), which ImageDream keeps; the
kernel is FlashAttention-2 (arXiv 2307.08691), and on Hopper FlashAttention-3 for long sequences
(``_attention_hopper``); the gradient is in ``_attention_backward``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from . import _attention_hopper
from ._attention_backward import attention_gradient
from ._triton import HALF, jit, tl, triton, use_triton
from ._tuning import Launch, Tuned

AttentionBackend = Literal["auto", "triton", "torch", "xformers"]
"""``auto``: ``triton`` where it can be used, else ``torch``, which is PyTorch's scaled_dot_product_attention."""

HEAD_DIMS = (32, 64, 128)
"""Head sizes of the Triton kernels."""

DTYPES = HALF
"""What the Triton kernels multiply in, with sums in float32; float32 itself is left to SDPA."""


def multi_view_attention_reference(qkv: Tensor) -> Tensor:
    """The formula above, written out with an explicit softmax in float32 or wider; slow, the tests' oracle.

    ``qkv`` [B, F, T, 3, H, D] -> [B, F, T, H*D] in the dtype of ``qkv``.
    """
    b, f, t, _, h, d = qkv.shape
    wide = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    q, k, v = wide.reshape(b, f * t, 3, h, d).permute(2, 0, 3, 1, 4)
    weights = torch.softmax(q @ k.transpose(-1, -2) * d**-0.5, dim=-1)
    return (weights @ v).transpose(1, 2).reshape(b, f, t, h * d).to(qkv.dtype)


@jit
def attention_kernel(
    tokens,
    out,
    log_sums,
    stride_group,
    stride_token,
    stride_part,
    stride_head,
    heads,
    length,
    q_length,
    scale,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    EVEN_QUERIES: tl.constexpr,
    EVEN_KEYS: tl.constexpr,
):
    """One program for each tile of queries of each group and head; ``scale`` is log2(e) / sqrt(D).

    The first ``q_length`` of ``length`` tokens have queries.
    """
    tiles = tl.cdiv(q_length, QUERIES)
    row = tl.program_id(0) // tiles
    group, head = (row // heads).to(tl.int64), row % heads
    step = tl.cast(stride_token, tl.int64)
    queries = tl.program_id(0) % tiles * QUERIES + tl.arange(0, QUERIES)
    columns = tl.arange(0, KEYS)
    d = tl.arange(0, D)
    start = tokens + group * stride_group + head * stride_head
    q_places = start + (queries * step)[:, None] + d[None, :]
    k_places = start + stride_part + columns[None, :] * stride_token + d[:, None]
    v_places = start + 2 * stride_part + columns[:, None] * stride_token + d[None, :]
    q = (
        tl.load(q_places)
        if EVEN_QUERIES
        else tl.load(q_places, mask=(queries < q_length)[:, None], other=0.0)
    )
    peak = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, D], tl.float32)
    whole = length // KEYS * KEYS
    for first in tl.range(0, whole, KEYS):
        k = tl.load(k_places + step * first)
        scores = tl.dot(q, k)
        v = tl.load(v_places + step * first)
        peak, total, acc = _add_block(scores, v, scale, peak, total, acc)
    if not EVEN_KEYS:
        inside = whole + columns < length
        k = tl.load(k_places + step * whole, mask=inside[None, :], other=0.0)
        v = tl.load(v_places + step * whole, mask=inside[:, None], other=0.0)
        scores = tl.where(inside[None, :], tl.dot(q, k), float("-inf"))
        peak, total, acc = _add_block(scores, v, scale, peak, total, acc)
    values = (acc / total[:, None]).to(out.dtype.element_ty)
    log_sum = peak + tl.log2(total)
    out_places = out + (((group * q_length + queries) * heads + head) * D)[:, None] + d[None, :]
    sum_places = log_sums + row.to(tl.int64) * q_length + queries
    if EVEN_QUERIES:
        tl.store(out_places, values)
        tl.store(sum_places, log_sum)
    else:
        tl.store(out_places, values, mask=(queries < q_length)[:, None])
        tl.store(sum_places, log_sum, mask=queries < q_length)


@jit
def _add_block(scores, v, scale, peak, total, acc):
    """The online softmax: weighted sum and its weights' total, both relative to the largest score so far."""
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None])
    return new_peak, total * shrink + tl.sum(weights, 1), acc


def _candidates(b: int, length: int, heads: int, dim: int, hopper: bool) -> list[Launch]:
    if length <= 128:  # all keys at once
        sizes = [(32, 128, 4, 1), (64, 128, 4, 1), (16, 128, 4, 1), (64, 64, 4, 2), (16, 16, 1, 5)]
    elif dim == 128:
        sizes = [
            (64, 64, 4, 2),
            (128, 64, 8, 2),
            (128, 64, 8, 3),
            (64, 64, 4, 3),
            (128, 128, 8, 2),
            (64, 32, 4, 3),
        ]
    else:
        sizes = [
            (64, 64, 4, 3),
            (128, 64, 4, 3),
            (128, 64, 8, 3),
            (64, 64, 4, 2),
            (64, 128, 4, 2),
            (64, 32, 4, 4),
        ]
    tiles = [Launch.of(QUERIES=m, KEYS=n, warps=warps, stages=stages) for m, n, warps, stages in sizes]
    return [*_attention_hopper.launches(dim), *tiles] if hopper else tiles


_tuned = Tuned("attention", attention_kernel, _candidates)


@torch.library.custom_op(
    "imagedream_rt::multi_view_attention",
    mutates_args=(),
    schema="(Tensor tokens, SymInt q_length) -> (Tensor, Tensor)",
)
def _attention(tokens: Tensor, q_length: int) -> tuple[Tensor, Tensor]:
    """[B, L, 3, H, D] -> of the first Q tokens [B, Q, H*D] and the base-2 logarithms of the sums [B, H, Q]."""
    b, length, _, h, d = tokens.shape
    out, log_sums = _empty(tokens, q_length)
    if out.numel() == 0:
        return out, log_sums

    def run(launch: Launch) -> None:
        if launch in _attention_hopper.launches(d):
            _attention_hopper.attend(tokens, out, log_sums, launch)
            return
        grid = (b * h * triton.cdiv(q_length, launch["QUERIES"]),)
        lengths = {"QUERIES": q_length, "KEYS": length}
        even = {f"EVEN_{name}": count % launch[name] == 0 for name, count in lengths.items()}
        scale = math.log2(math.e) / math.sqrt(d)
        attention_kernel[grid](
            tokens,
            out,
            log_sums,
            *tokens.stride()[:4],
            h,
            length,
            q_length,
            scale,
            D=d,
            **even,
            **launch.options,
        )

    run(_tuned.choose(tokens.device, (b, length, h, d, _attention_hopper.fits(tokens)), run))
    return out, log_sums


@_attention.register_fake
def _empty(tokens: Tensor, q_length: int) -> tuple[Tensor, Tensor]:
    b, _, _, h, d = tokens.shape
    return tokens.new_empty(b, q_length, h * d), tokens.new_empty(b, h, q_length, dtype=torch.float32)


@torch.library.custom_op(
    "imagedream_rt::multi_view_attention_gradient",
    mutates_args=(),
    schema="(Tensor tokens, Tensor out, Tensor log_sums, Tensor grad) -> Tensor",
)
def _attention_gradient(tokens: Tensor, out: Tensor, log_sums: Tensor, grad: Tensor) -> Tensor:
    if out.numel() == 0:
        return torch.empty_like(tokens, memory_format=torch.contiguous_format)
    return attention_gradient(tokens, out, log_sums, grad.contiguous())


@_attention_gradient.register_fake
def _empty_gradient(tokens: Tensor, out: Tensor, log_sums: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_like(tokens, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    assert inputs[1] == inputs[0].shape[1], "the gradient is of all queries"
    ctx.save_for_backward(inputs[0], *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
    return _attention_gradient(*ctx.saved_tensors, grad), None


_attention.register_autograd(_backward, setup_context=_save)


def check_attention_backend(backend: str) -> None:
    """Raise ValueError for an unknown backend and ImportError for one that is not installed."""
    if backend not in get_args(AttentionBackend):
        raise ValueError(
            f"unknown attention backend {backend!r}; there are {', '.join(get_args(AttentionBackend))}"
        )
    if backend == "triton" and triton is None:
        raise ImportError("attention backend 'triton' needs the package triton: pip install triton")
    if backend == "xformers":
        _xformers_attention()


def multi_view_attention(qkv: Tensor, backend: AttentionBackend = "auto", keep: int | None = None) -> Tensor:
    """Self-attention over all F*T tokens of each group; softmax scale 1/sqrt(D); differentiable once.

    Args:
        qkv: [B, F, T, 3, H, D], floating point; queries, keys and values packed on axis 3, so that one
            projection with stacked weights can write it. The Triton kernels read it in place with any
            strides if D is contiguous and F and T can be merged to one axis; otherwise it is copied first.
        backend: ``"triton"``: this package's kernels, for float16 and bfloat16 on CUDA devices from Ampere on
            and D of 32, 64 or 128. ``"torch"``: scaled_dot_product_attention. ``"xformers"``: its
            memory-efficient attention; needs the ``xformers`` extra and a device that it supports.
            ``"auto"``: ``"triton"`` for what it takes, else ``"torch"``.
        keep: only the first so many frames are queries; by default F.

    Returns:
        [B, keep, T, H*D] in the dtype of ``qkv``, contiguous.

    Raises:
        ValueError: ``qkv`` has another shape, ``keep`` is not in 1..F, the backend is unknown, or ``"triton"``
            does not take ``qkv``.
        ImportError: the backend is not installed.

    Example:
        >>> qkv = torch.zeros(1, 2, 1, 3, 1, 1)  # equal scores: the mean over the two frames
        >>> qkv[0, :, 0, 2, 0, 0] = torch.tensor([1.0, 3.0])
        >>> multi_view_attention(qkv).flatten().tolist()
        [2.0, 2.0]
    """
    if qkv.ndim != 6 or qkv.shape[3] != 3:
        raise ValueError(f"qkv must be [B, F, T, 3, H, D], got {list(qkv.shape)}")
    check_attention_backend(backend)
    b, f, t, _, h, d = qkv.shape
    if keep is not None and not 1 <= keep <= f:
        raise ValueError(f"keep is {keep}; of {f} frames it must lie in 1..{f}")
    tokens, q_length = qkv.flatten(1, 2), f * t if keep is None else keep * t
    if backend == "xformers":
        q, k, v = tokens.unbind(2)
        out = _xformers_attention()(q if keep is None else q[:, :q_length], k, v)
    elif _takes(backend, qkv):
        # The gradient's kernels take all queries.
        every = torch.is_grad_enabled() and qkv.requires_grad
        tokens = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
        out = _attention(tokens, f * t if every else q_length)[0]
        out = out[:, :q_length].contiguous() if every and keep is not None else out
    else:
        q, k, v = tokens.permute(2, 0, 3, 1, 4)
        q = q if keep is None else q[:, :, :q_length]
        out = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return out.reshape(b, f if keep is None else keep, t, h * d)


def _takes(backend: AttentionBackend, qkv: Tensor) -> bool:
    """Whether the Triton kernels are to compute it; ValueError if they cannot, but must."""
    if backend == "torch" or (backend == "auto" and qkv.shape[-1] not in HEAD_DIMS):
        return False
    if qkv.shape[-1] not in HEAD_DIMS:
        raise ValueError(f"backend 'triton' takes head sizes {HEAD_DIMS}, got {qkv.shape[-1]}")
    return use_triton(backend, qkv, dtypes=DTYPES)


def _xformers_attention() -> Callable[..., Tensor]:
    """xformers' ``memory_efficient_attention``: [B, L, H, D] tensors, scale 1/sqrt(D)."""
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise ImportError(
            "attention backend 'xformers' needs the package xformers: pip install 'imagedream-rt[xformers]' "
            f"({error})"
        ) from error
    return memory_efficient_attention
