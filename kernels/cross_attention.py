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

FEW_KEYS = constant(160)
"""So many, text and image together, have all their scores in registers at once."""

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
def _append(items, item):
    return items + (item,)  # noqa: RUF005


@jit
def _blocks(p, stride, COUNT: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, D: tl.constexpr):
    """Keys or values [COUNT, D] as whole blocks of BLOCK rows and a last one of REST, zero where nothing is."""
    column = tl.arange(0, D)[None, :]
    blocks = ()
    for first in tl.static_range(0, COUNT // BLOCK * BLOCK, BLOCK):
        row = first + tl.arange(0, BLOCK)[:, None]
        blocks = _append(blocks, tl.load(p + row * stride + column))
    if REST > 0:
        row = COUNT // BLOCK * BLOCK + tl.arange(0, REST)[:, None]
        blocks = _append(blocks, tl.load(p + row * stride + column, row < COUNT, other=0.0))
    return blocks


@jit
def _scores(q, keys, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Products of the queries and each block of keys, minus infinity where there is no key."""
    scores = ()
    for number in tl.static_range(len(keys)):
        score = tl.dot(q, keys[number].T, input_precision="tf32x3")
        if number * BLOCK + score.shape[1] > COUNT:
            key = number * BLOCK + tl.arange(0, score.shape[1])[None, :]
            score = tl.where(key < COUNT, score, float("-inf"))
        scores = _append(scores, score)
    return scores


@jit
def _mean(scores, values, scale, factor):
    """``factor`` times the values' mean under weights 2 ** (scale * scores): all keys at once."""
    top = tl.max(scores[0], axis=1)
    for number in tl.static_range(1, len(scores)):
        top = tl.maximum(top, tl.max(scores[number], axis=1))
    mix = tl.zeros((scores[0].shape[0], values[0].shape[1]), tl.float32)
    total = tl.zeros((scores[0].shape[0],), tl.float32)
    for number in tl.static_range(len(scores)):
        weights = tl.exp2(scores[number] * scale - (top * scale)[:, None])
        total += tl.sum(weights, axis=1)
        mix = tl.dot(weights.to(values[number].dtype), values[number], mix, input_precision="tf32x3")
    return mix * (factor / total)[:, None]


@jit
def _running_mean(
    q,
    k,
    v,
    stride,
    scale,
    factor,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    D: tl.constexpr,
):
    """The same for any number of keys, block after block: a greater maximum scales down what was summed before."""
    ROWS: tl.constexpr = q.shape[0]
    LEFT: tl.constexpr = COUNT % BLOCK
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mix = tl.zeros((ROWS, D), tl.float32)
    for _ in range(COUNT // BLOCK):
        keys, values = _blocks(k, stride, BLOCK, BLOCK, 0, D), _blocks(v, stride, BLOCK, BLOCK, 0, D)
        top, total, mix = _add_block(top, total, mix, _scores(q, keys, BLOCK, BLOCK)[0], values[0], scale)
        k += BLOCK * stride
        v += BLOCK * stride
    if REST > 0:
        keys, values = _blocks(k, stride, LEFT, BLOCK, REST, D), _blocks(v, stride, LEFT, BLOCK, REST, D)
        top, total, mix = _add_block(top, total, mix, _scores(q, keys, LEFT, BLOCK)[0], values[0], scale)
    return mix * (factor / total)[:, None]


@jit
def _add_block(top, total, mix, scores, values, scale):
    raised = tl.maximum(top, tl.max(scores, axis=1))
    fade = tl.exp2((top - raised) * scale)
    weights = tl.exp2(scores * scale - (raised * scale)[:, None])
    total = total * fade + tl.sum(weights, axis=1)
    mix = tl.dot(weights.to(values.dtype), values, mix * fade[:, None], input_precision="tf32x3")
    return raised, total, mix


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
    q_stride_group,
    q_stride_row,
    q_stride_head,
    text_stride_row,
    text_stride_key,
    text_stride_head,
    image_stride_row,
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
    """One head of ROWS queries of one group of frames. Heads vary fastest, since they lie side by side."""
    head, first, group = tl.program_id(0), tl.program_id(1) * ROWS, tl.program_id(2)
    heads = tl.num_programs(0)
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, D)[None, :]
    there = row < rows - first
    scale = LOG2_E * D**-0.5
    q += group.to(tl.int64) * q_stride_group + first.to(tl.int64) * q_stride_row + head * q_stride_head
    o_text = (group // text_share).to(tl.int64) * text_stride_row + head * text_stride_head
    o_image = (group // image_share).to(tl.int64) * image_stride_row + head * image_stride_head
    k_text, v_text, k_image, v_image = k_text + o_text, v_text + o_text, k_image + o_image, v_image + o_image

    b_q = tl.load(q + row * q_stride_row + column, there, other=0.0)
    if TEXT + IMAGE <= FEW_KEYS:
        # All loads of keys before the first product, then those of the values, so that they overlap.
        keys_text = _blocks(k_text, text_stride_key, TEXT, KEYS, TEXT_REST, D)
        keys_image = _blocks(k_image, image_stride_key, IMAGE, KEYS, IMAGE_REST, D)
        scores_text = _scores(b_q, keys_text, TEXT, KEYS)
        scores_image = _scores(b_q, keys_image, IMAGE, KEYS)
        values_text = _blocks(v_text, text_stride_key, TEXT, KEYS, TEXT_REST, D)
        values_image = _blocks(v_image, image_stride_key, IMAGE, KEYS, IMAGE_REST, D)
        mean = _mean(scores_text, values_text, scale, 1.0)
        if IMAGE > 0:
            mean += _mean(scores_image, values_image, scale, image_scale)
    else:
        mean = _running_mean(b_q, k_text, v_text, text_stride_key, scale, 1.0, TEXT, KEYS, TEXT_REST, D)
        if IMAGE > 0:
            mean += _running_mean(
                b_q, k_image, v_image, image_stride_key, scale, image_scale, IMAGE, KEYS, IMAGE_REST, D
            )
    out += (group.to(tl.int64) * rows + first) * (heads * D) + head * D
    tl.store(out + row * (heads * D) + column, mean.to(out.dtype.element_ty), there)


def _candidates(size: int, text: int, image: int, dtype: torch.dtype, *grid: int) -> Sequence[Launch]:
    if dtype == torch.float32:
        return [Launch.of(ROWS=rows, KEYS=32, warps=4) for rows in (64, 32)]
    if text + image <= FEW_KEYS:
        return [Launch.of(ROWS=64, KEYS=64, warps=4), Launch.of(ROWS=128, KEYS=64, warps=8)]
    return [
        Launch.of(ROWS=64, KEYS=keys, warps=4, stages=stages) for keys, stages in ((64, 3), (64, 2), (32, 2))
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
    """Keys and values of the same strides, channels contiguous; what two projections give is taken as it is."""
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
    text, image = k_text.shape[1], 0
    if k_image is None or v_image is None:
        k_image, v_image = k_text, v_text  # there to be passed, not read
    else:
        k_image, v_image = _side_by_side(k_image, v_image)
        image = k_image.shape[1]

    def run(launch: Launch) -> None:
        _forward_kernel[(heads, triton.cdiv(rows, launch["ROWS"]), groups)](
            *(q, k_text, v_text, k_image, v_image, out, image_scale, rows),
            *(groups // k_text.shape[0], groups // k_image.shape[0]),
            *(q.stride()[:3] + k_text.stride()[:3] + k_image.stride()[:3]),
            **_constants(text, image, size, launch),
            num_warps=launch.warps,
            num_stages=launch.stages,
        )

    run(_TUNED.choose(q.device, (size, text, image, q.dtype, rows, heads, groups), run))
    return out


@_attention.register_fake
def _(q: Tensor, *others: Any) -> Tensor:
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
    """Gradients of q, k and v for one softmax, in float32. In plain PyTorch: few keys have small weights."""
    shape, scale = q.shape, q.shape[-1] ** -0.5
    grad, q = (x.float().reshape(k.shape[0], -1, *shape[2:]).transpose(1, 2) for x in (grad, q))
    k, v = (x.float().transpose(1, 2) for x in (k, v))
    weights = torch.softmax(q @ k.mT * scale, dim=-1)
    slope = grad @ v.mT
    slope = weights * (slope - (weights * slope).sum(-1, keepdim=True)) * scale
    grad_q, grad_k, grad_v = (x.transpose(1, 2) for x in (slope @ k, slope.mT @ q, weights.mT @ grad))
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
        backend: ``"auto"``, ``"triton"`` (head sizes 32, 64, 128) or ``"torch"`` (two of PyTorch's attentions).

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
    given = (q, k_text, v_text, k_image)
    if use_triton(backend, *given, v_image) and _fits(backend, *given):
        # Queries do not see each other, so the frames that share all their keys are one longer row of queries.
        n, t, h, d = q.shape
        shared = max(1, n // k_text.shape[0])
        if k_image is not None and k_image.shape[0] != k_text.shape[0]:
            shared = math.gcd(shared, n // k_image.shape[0])
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
