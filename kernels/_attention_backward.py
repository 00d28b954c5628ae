"""Triton kernels for the gradient of multi-view self-attention: FlashAttention-2's, over packed tokens.

With S = Q K^T / sqrt(D), P = softmax(S), O = P V and the gradient G of O, for each group and head,

    delta_i = sum_d G_id O_id,      dV = P^T G,      dS = P * (G V^T - delta),
    dQ = dS K / sqrt(D),            dK = dS^T Q / sqrt(D).

P is computed again from the stored logarithm of each row's sum. One kernel makes delta and dQ, a second one
dK and dV. Source: arXiv 2307.08691, algorithm 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._triton import jit, tl, triton
from ._tuning import Key, Launch, Tuned


@jit
def _rows(pointer, rows, stride, length, D: tl.constexpr, EVEN: tl.constexpr):
    """[rows, D] values of a head; zeros past the last token."""
    places = pointer + (rows * tl.cast(stride, tl.int64))[:, None] + tl.arange(0, D)[None, :]
    if EVEN:
        return tl.load(places)
    return tl.load(places, mask=(rows < length)[:, None], other=0.0)


@jit
def _store_rows(pointer, rows, stride, length, values, D: tl.constexpr, EVEN: tl.constexpr):
    places = pointer + (rows * tl.cast(stride, tl.int64))[:, None] + tl.arange(0, D)[None, :]
    values = values.to(pointer.dtype.element_ty)
    if EVEN:
        tl.store(places, values)
    else:
        tl.store(places, values, mask=(rows < length)[:, None])


@jit
def query_gradient_kernel(
    tokens,
    out,
    grad,
    log_sums,
    delta,
    grad_tokens,
    stride_group,
    stride_token,
    stride_part,
    stride_head,
    heads,
    length,
    scale,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    EVEN_QUERIES: tl.constexpr,
    EVEN_KEYS: tl.constexpr,
):
    """One program for each query tile of each group and head: delta and dQ of its rows."""
    tiles = tl.cdiv(length, QUERIES)
    row = tl.program_id(0) // tiles
    group, head = (row // heads).to(tl.int64), row % heads
    queries = (tl.program_id(0) % tiles) * QUERIES + tl.arange(0, QUERIES)
    start = tokens + group * stride_group + head * stride_head
    merged = group * length * heads * D + head * D
    o = _rows(out + merged, queries, heads * D, length, D, EVEN_QUERIES)
    g = _rows(grad + merged, queries, heads * D, length, D, EVEN_QUERIES)
    q = _rows(start, queries, stride_token, length, D, EVEN_QUERIES)
    places = row.to(tl.int64) * length + queries
    inside = queries < length
    log_sum = tl.load(log_sums + places, mask=inside, other=float("inf"))
    dots = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    tl.store(delta + places, dots, mask=inside)
    dq = tl.zeros([QUERIES, D], tl.float32)
    for first in tl.range(0, length, KEYS):
        keys = first + tl.arange(0, KEYS)
        k = _rows(start + stride_part, keys, stride_token, length, D, EVEN_KEYS)
        v = _rows(start + 2 * stride_part, keys, stride_token, length, D, EVEN_KEYS)
        p = tl.exp2(tl.dot(q, tl.trans(k)) * (scale * 1.4426950408889634) - log_sum[:, None])
        if not EVEN_KEYS:
            p = tl.where((keys < length)[None, :], p, 0.0)
        ds = p * (tl.dot(g, tl.trans(v)) - dots[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq)
    target = grad_tokens + group * length * heads * (3 * D) + head * D
    _store_rows(target, queries, 3 * heads * D, length, dq * scale, D, EVEN_QUERIES)


@jit
def key_value_gradient_kernel(
    tokens,
    grad,
    log_sums,
    delta,
    grad_tokens,
    stride_group,
    stride_token,
    stride_part,
    stride_head,
    heads,
    length,
    scale,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    EVEN_QUERIES: tl.constexpr,
    EVEN_KEYS: tl.constexpr,
):
    """One program for each key tile of each group and head: dK and dV of its rows."""
    tiles = tl.cdiv(length, KEYS)
    row = tl.program_id(0) // tiles
    group, head = (row // heads).to(tl.int64), row % heads
    keys = (tl.program_id(0) % tiles) * KEYS + tl.arange(0, KEYS)
    start = tokens + group * stride_group + head * stride_head
    merged = group * length * heads * D + head * D
    k = _rows(start + stride_part, keys, stride_token, length, D, EVEN_KEYS)
    v = _rows(start + 2 * stride_part, keys, stride_token, length, D, EVEN_KEYS)
    dk = tl.zeros([KEYS, D], tl.float32)
    dv = tl.zeros([KEYS, D], tl.float32)
    for first in tl.range(0, length, QUERIES):
        queries = first + tl.arange(0, QUERIES)
        q = _rows(start, queries, stride_token, length, D, EVEN_QUERIES)
        g = _rows(grad + merged, queries, heads * D, length, D, EVEN_QUERIES)
        places = row.to(tl.int64) * length + queries
        if EVEN_QUERIES:
            log_sum = tl.load(log_sums + places)
            dots = tl.load(delta + places)
        else:  # queries past the end have no weight
            log_sum = tl.load(log_sums + places, mask=queries < length, other=float("inf"))
            dots = tl.load(delta + places, mask=queries < length, other=0.0)
        p = tl.exp2(tl.dot(k, tl.trans(q)) * (scale * 1.4426950408889634) - log_sum[None, :])
        dv = tl.dot(p.to(g.dtype), g, dv)
        ds = p * (tl.dot(v, tl.trans(g)) - dots[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk)
    target = grad_tokens + group * length * heads * (3 * D) + head * D
    _store_rows(target + heads * D, keys, 3 * heads * D, length, dk * scale, D, EVEN_KEYS)
    _store_rows(target + 2 * heads * D, keys, 3 * heads * D, length, dv, D, EVEN_KEYS)


def _candidates(groups: int, length: int, heads: int, dim: int) -> list[Launch]:
    if dim == 128:
        sizes = [(64, 64, 4, 2), (64, 64, 8, 2), (32, 64, 4, 2), (64, 32, 4, 2), (64, 128, 8, 2)]
    else:
        sizes = [
            (64, 64, 4, 2),
            (64, 64, 4, 3),
            (64, 128, 8, 2),
            (128, 64, 8, 2),
            (32, 64, 4, 2),
            (64, 32, 4, 2),
        ]
    return [Launch.of(QUERIES=m, KEYS=n, warps=warps, stages=stages) for m, n, warps, stages in sizes]


_query_tuned = Tuned("attention dQ", query_gradient_kernel, _candidates)
_key_value_tuned = Tuned("attention dK dV", key_value_gradient_kernel, _candidates)


def attention_gradient(tokens: Tensor, out: Tensor, log_sums: Tensor, grad: Tensor) -> Tensor:
    """Gradient of the tokens [B, L, 3, H, D], contiguous, from that of the output [B, L, H*D].

    ``out`` and ``log_sums`` [B, H, L] (base 2) are what the forward kernel wrote; ``out`` and ``grad`` are
    contiguous.
    """
    b, length, _, h, d = tokens.shape
    grad_tokens = torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)
    delta = torch.empty_like(log_sums)
    numbers = (*tokens.stride()[:4], h, length, 1 / math.sqrt(d))
    key: Key = (b, length, h, d)

    def query_gradient(launch: Launch) -> None:
        query_gradient_kernel[(b * h * triton.cdiv(length, launch["QUERIES"]),)](
            tokens,
            out,
            grad,
            log_sums,
            delta,
            grad_tokens,
            *numbers,
            D=d,
            **_even(launch, length),
            **launch.options,
        )

    def key_value_gradient(launch: Launch) -> None:
        key_value_gradient_kernel[(b * h * triton.cdiv(length, launch["KEYS"]),)](
            tokens,
            grad,
            log_sums,
            delta,
            grad_tokens,
            *numbers,
            D=d,
            **_even(launch, length),
            **launch.options,
        )

    query_gradient(_query_tuned.choose(tokens.device, key, query_gradient))
    key_value_gradient(_key_value_tuned.choose(tokens.device, key, key_value_gradient))
    return grad_tokens


def _even(launch: Launch, length: int) -> dict[str, bool]:
    """Whether the tiles cover the tokens with nothing left over, so that no load needs a mask."""
    return {f"EVEN_{name}": length % launch[name] == 0 for name in ("QUERIES", "KEYS")}
