"""Decoupled cross-attention: text and image prompt, each with its own softmax, over shared queries.

    out = softmax(Q K_text^T / sqrt(D)) V_text + image_scale * softmax(Q K_image^T / sqrt(D)) V_image

Queries [N, T, H, D] of N frames, keys and values [B, L, H, D] that N / B consecutive frames share; float16,
bfloat16 or float32 with accumulation in float32.

Source: IP-Adapter (arXiv 2308.06721, equation 5), as ImageDream uses it (arXiv 2312.02201, section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ._triton import KernelBackend, constant, jit, tl, triton, use_triton
from ._tuning import Launch, Tuned

HEAD_SIZES = (32, 64, 128)
"""Those that the kernel takes."""

LOG2_E = constant(1.4426950408889634)


def decoupled_cross_attention_reference(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_image: Tensor | None = None,
    v_image: Tensor | None = None,
    image_scale: float = 1.0,
) -> Tensor:
    """The formula above with repeated keys and an explicit softmax in float32 or wider; the tests' oracle.

    Shapes as :func:`decoupled_cross_attention`.
    """
    wide = torch.promote_types(q.dtype, torch.float32)

    def branch(k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.to(wide).repeat_interleave(q.shape[0] // x.shape[0], dim=0) for x in (k, v))
        scores = torch.einsum("nthd,nlhd->nhtl", q.to(wide), k) * q.shape[-1] ** -0.5
        return torch.einsum("nhtl,nlhd->nthd", torch.softmax(scores, dim=-1), v)

    out = branch(k_text, v_text)
    if k_image is not None and v_image is not None:
        out = out + image_scale * branch(k_image, v_image)
    return out.flatten(2).to(q.dtype)


@jit
def _block(
    q, k, v, stride, first, top, total, mix, scale, KEYS: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr
):
    """One block of keys more in the running softmax of q's rows: its maximum, its sum and the mixed values."""
    key = first + tl.arange(0, BLOCK)
    column = tl.arange(0, D)
    there = key < KEYS
    b_k = tl.load(k + column[:, None] + key[None, :] * stride, there[None, :], other=0.0)
    b_v = tl.load(v + key[:, None] * stride + column[None, :], there[:, None], other=0.0)
    scores = tl.dot(q, b_k, input_precision="tf32x3")
    scores = tl.where(there[None, :], scores, float("-inf"))
    raised = tl.maximum(top, tl.max(scores, axis=1))
    weights = tl.exp2(scores * scale - (raised * scale)[:, None])
    fade = tl.exp2((top - raised) * scale)
    total = total * fade + tl.sum(weights, axis=1)
    mix = tl.dot(weights.to(b_v.dtype), b_v, mix * fade[:, None], input_precision="tf32x3")
    return raised, total, mix


@jit
def _attend(
    q,
    k,
    v,
    stride,
    scale,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
):
    """softmax(scale / log2(e) * q k^T) v over all keys: whole blocks, then a smaller one for the rest."""
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mix = tl.zeros((ROWS, D), tl.float32)
    for number in range(KEYS // BLOCK):
        top, total, mix = _block(q, k, v, stride, number * BLOCK, top, total, mix, scale, KEYS, BLOCK, D)
    if REST > 0:
        whole: tl.constexpr = KEYS // BLOCK * BLOCK
        top, total, mix = _block(q, k, v, stride, whole, top, total, mix, scale, KEYS, REST, D)
    return mix / total[:, None]


@jit
def _forward_kernel(
    q,
    k_text,
    v_text,
    k_image,
    v_image,
    out,
    image_scale,
    rows,
    text_share,
    image_share,
    q_stride_frame,
    q_stride_row,
    q_stride_head,
    text_stride_frame,
    text_stride_key,
    text_stride_head,
    image_stride_frame,
    image_stride_key,
    image_stride_head,
    TEXT: tl.constexpr,
    IMAGE: tl.constexpr,
    TEXT_REST: tl.constexpr,
    IMAGE_REST: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One head of ROWS queries of one group of frames; heads vary fastest, since they lie side by side."""
    head, group = tl.program_id(0), tl.program_id(2)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, D)[None, :]
    there = row < rows
    q += group.to(tl.int64) * q_stride_frame + head * q_stride_head
    b_q = tl.load(q + row * q_stride_row + column, there, other=0.0)
    scale = LOG2_E / tl.sqrt(float(D))
    o_text = (group // text_share).to(tl.int64) * text_stride_frame + head * text_stride_head
    result = _attend(
        b_q, k_text + o_text, v_text + o_text, text_stride_key, scale, TEXT, KEYS, TEXT_REST, ROWS, D
    )
    if IMAGE > 0:
        o_image = (group // image_share).to(tl.int64) * image_stride_frame + head * image_stride_head
        result += image_scale * _attend(
            b_q,
            k_image + o_image,
            v_image + o_image,
            image_stride_key,
            scale,
            IMAGE,
            KEYS,
            IMAGE_REST,
            ROWS,
            D,
        )
    heads = tl.num_programs(0)
    out += group.to(tl.int64) * rows * heads * D + head * D
    tl.store(out + row * (heads * D) + column, result.to(out.dtype.element_ty), there)


def _candidates(
    rows: int, heads: int, groups: int, size: int, text: int, image: int, dtype: torch.dtype
) -> Sequence[Launch]:
    if dtype == torch.float32:
        return [Launch.of(ROWS=64, KEYS=32, warps=4), Launch.of(ROWS=32, KEYS=32, warps=4)]
    return [
        Launch.of(ROWS=64, KEYS=64, warps=4),
        Launch.of(ROWS=128, KEYS=64, warps=8),
        Launch.of(ROWS=128, KEYS=64, warps=4),
        Launch.of(ROWS=32, KEYS=64, warps=2),
        Launch.of(ROWS=16, KEYS=64, warps=1),
    ]


_TUNED = Tuned("cross_attention", _forward_kernel, _candidates)


def _constants(text: int, image: int, size: int, launch: Launch) -> dict[str, int]:
    """Compile-time constants for these numbers of keys and this head size."""
    return {
        "TEXT": text,
        "IMAGE": image,
        "TEXT_REST": _rest(text, launch["KEYS"]),
        "IMAGE_REST": _rest(image, launch["KEYS"]),
        "D": size,
        **dict(launch.constants),
    }


def _rest(keys: int, block: int) -> int:
    """Size of the last block: what whole ones leave, up to a power of two that a matrix product can take."""
    return max(16, triton.next_power_of_2(keys % block)) if keys % block else 0


def _side_by_side(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with the same strides, channels contiguous: two views of a projection stay what they are."""
    fits = k.stride() == v.stride() and k.stride(3) == 1
    return (k, v) if fits else (k.contiguous(), v.contiguous())


@torch.library.custom_op("imagedream_rt::cross_attention", mutates_args=())
def _attention(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_image: Tensor | None,
    v_image: Tensor | None,
    image_scale: float,
) -> Tensor:
    """q [P, R, H, D]: R queries that share their keys."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not q.numel():
        return out
    groups, rows, heads, size = q.shape
    q = q if q.stride(3) == 1 else q.contiguous()
    k_text, v_text = _side_by_side(k_text, v_text)
    image = 0 if k_image is None else k_image.shape[1]
    k_image, v_image = (
        (k_text, v_text) if k_image is None or v_image is None else _side_by_side(k_image, v_image)
    )
    text = k_text.shape[1]

    def run(launch: Launch) -> None:
        _forward_kernel[(heads, triton.cdiv(rows, launch["ROWS"]), groups)](
            *(q, k_text, v_text, k_image, v_image, out, image_scale, rows),
            *(groups // k_text.shape[0], groups // k_image.shape[0]),
            *(q.stride()[:3] + k_text.stride()[:3] + k_image.stride()[:3]),
            **_constants(text, image, size, launch),
            num_warps=launch.warps,
            num_stages=launch.stages,
        )

    run(_TUNED.choose(q.device, (rows, heads, groups, size, text, image, q.dtype), run))
    return out


@_attention.register_fake
def _(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_image: Tensor | None,
    v_image: Tensor | None,
    image_scale: float,
) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.image_scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k_text, v_text, k_image, v_image = ctx.saved_tensors
    grad_q, *grads_text = _branch_gradients(grad, q, k_text, v_text)
    grads_image: Sequence[Tensor | None] = (None, None)
    if k_image is not None:
        more, *grads_image = _branch_gradients(ctx.image_scale * grad.float(), q, k_image, v_image)
        grad_q = grad_q + more
    wanted = (grad_q, *grads_text, *grads_image)
    return *(None if x is None else x.to(q.dtype) for x in wanted), None


def _branch_gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for one softmax, in float32.

    In plain PyTorch: keys are few, so that the matrix of weights is smaller than the queries at two hundred
    channels, and these are five large matrix products.
    """
    shape, scale = q.shape, q.shape[-1] ** -0.5
    grad, q = (x.float().reshape(k.shape[0], -1, *shape[2:]).transpose(1, 2) for x in (grad, q))
    k, v = (x.float().transpose(1, 2) for x in (k, v))
    weights = torch.softmax(q @ k.mT * scale, dim=-1)
    slope = grad @ v.mT
    slope = weights * (slope - (weights * slope).sum(-1, keepdim=True)) * scale
    grads = slope @ k, slope.mT @ q, weights.mT @ grad
    grad_q, grad_k, grad_v = (x.transpose(1, 2) for x in grads)
    return grad_q.reshape(shape), grad_k, grad_v


_attention.register_autograd(_differentiate, setup_context=_remember)


def decoupled_cross_attention(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_image: Tensor | None = None,
    v_image: Tensor | None = None,
    image_scale: float = 1.0,
    backend: KernelBackend = "auto",
) -> Tensor:
    """Text attention plus ``image_scale`` times image attention; softmax scale 1/sqrt(D); differentiable.

    N counts frames. A key/value row serves N / rows consecutive frames: with N = B*F frames, B rows hold one
    prompt per group of F views, and N rows one per view. The image may have more or fewer rows than the text.

    Args:
        q: [N, T, H, D], any strides, as for keys and values.
        k_text, v_text: [B, Lt, H, D], B divides N.
        k_image, v_image: [B', Li, H, D], B' divides N; both None for text only.
        image_scale: weight of the image branch, 1 as trained.
        backend: ``"auto"``, ``"triton"`` (head sizes 32, 64 and 128) or ``"torch"``
            (scaled_dot_product_attention, twice).

    Returns:
        [N, T, H*D] in the dtype of ``q``, contiguous.

    Raises:
        ValueError: a shape does not fit, only one of ``k_image`` and ``v_image`` is given, or the backend is
            unknown or cannot take the tensors.
        ImportError: ``"triton"`` is asked for and not installed.

    Example:
        >>> q, k = torch.zeros(2, 1, 1, 1), torch.zeros(1, 2, 1, 1)  # equal scores: each branch is a mean
        >>> v = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)
        >>> decoupled_cross_attention(q, k, v, k, 10 * v, image_scale=0.5).flatten().tolist()
        [12.0, 12.0]
    """
    if (k_image is None) != (v_image is None):
        raise ValueError("k_image and v_image must be given together")
    _check(q, k_text, v_text, "text")
    if k_image is not None and v_image is not None:
        _check(q, k_image, v_image, "image")
    if use_triton(backend, q, k_text, v_text, k_image, v_image) and _fits(
        backend, q, k_text, v_text, k_image
    ):
        # Queries do not see each other, so the frames that share all their keys are one longer row of queries.
        n, t, h, d = q.shape
        shared = math.gcd(*(n // k.shape[0] for k in (k_text, k_image) if k is not None)) or 1
        rows = q.reshape(n // shared, shared * t, h, d)
        return _attention(rows, k_text, v_text, k_image, v_image, image_scale).view(n, t, h * d)
    out = _attend_torch(q, k_text, v_text)
    if k_image is not None and v_image is not None:
        out = out + image_scale * _attend_torch(q, k_image, v_image)
    return out


def _check(q: Tensor, k: Tensor, v: Tensor, name: str) -> None:
    fits = q.ndim == 4 and k.ndim == 4 and k.shape == v.shape and k.shape[2:] == q.shape[2:]
    if not fits or 0 in k.shape or q.shape[0] % k.shape[0]:
        raise ValueError(
            f"q must be [N, T, H, D] and k_{name}, v_{name} [B, L, H, D] with B dividing N, "
            f"got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )


def _fits(backend: str, *tensors: Tensor | None) -> bool:
    """Whether the kernel takes these heads; raises if it was asked for in spite of it."""
    given = [tensor for tensor in tensors if tensor is not None]
    dtypes, size = {tensor.dtype for tensor in given}, given[0].shape[-1]
    fits = size in HEAD_SIZES and len(dtypes) == 1
    if not fits and backend == "triton":
        raise ValueError(
            f"backend 'triton' takes head sizes {', '.join(map(str, HEAD_SIZES))} and tensors of one dtype, "
            f"got {size} and {', '.join(sorted(map(str, dtypes)))}"
        )
    return fits


def _attend_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One softmax, [N, T, H*D], by scaled_dot_product_attention."""
    n, t, h, d = q.shape
    # Queries do not see each other, so the frames that share a key/value row are one longer row of queries.
    rows = q.reshape(k.shape[0], -1, h, d).transpose(1, 2)
    out = functional.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).reshape(n, t, h * d)
