"""Gradient of group normalisation with SiLU, with respect to its input and, if asked for, weight and bias.

    xhat = (x' - mean_g) * rstd_g,   z = xhat * weight + bias,   dz = dy * act'(z),
    dx = rstd_g * (dz * weight - mean_g(dz * weight) - xhat * mean_g(dz * weight * xhat)),
    dbias = sum(dz),   dweight = sum(dz * xhat)   over samples and pixels,

in the notation of ``group_norm``, where the means run over a group's channels and pixels. Everything but mean and
rstd is computed again from x. What else x gets, from the residual path around a block, is added before dx is
rounded. The two plans are those of the forward pass: x and dy read once if a sample's group fits into registers,
else twice.

Source: Ioffe and Szegedy 2015, "Batch Normalization" (arXiv 1502.03167), section 3, over a group's extent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._group_tiles import (
    chunked_candidates,
    constants,
    dense,
    gate,
    is_channels_last,
    load_float,
    over_channels,
    over_groups,
    program_channels,
    shifted,
    tile_places,
    tuning_key,
    whole_candidates,
)
from ._triton import jit, tl, triton
from ._tuning import Launch, Tuned


@jit
def channel_values(
    weight, bias, mean, rstd, sample, o_c, m_c, CHANNELS: tl.constexpr, PER_GROUP: tl.constexpr
):
    """Weight and bias of channels, mean and rstd of their groups."""
    o_g = sample * (CHANNELS // PER_GROUP) + o_c // PER_GROUP
    b_mean, b_rstd = load_float(mean, o_g, m_c), load_float(rstd, o_g, m_c)
    return load_float(weight, o_c, m_c), load_float(bias, o_c, m_c), b_mean, b_rstd


@jit
def tile_gradient(grad, x, offset, mask, b_shift, b_weight, b_bias, b_mean, b_rstd, SILU: tl.constexpr):
    """xhat and dz of a tile; dz is zero where no pixel is."""
    b_x = shifted(tl.load(x + offset, mask=mask, other=0.0), b_shift)
    b_hat = (b_x - b_mean[None, :]) * b_rstd[None, :]
    b_grad = load_float(grad, offset, mask)
    if SILU:
        b_z = b_hat * b_weight[None, :] + b_bias[None, :]
        b_gate = gate(b_z)
        b_gate *= b_gate
        b_grad *= b_gate * (1.0 + b_z * (1.0 - b_gate))
    return b_hat, b_grad


@jit
def _whole_gradient_kernel(
    grad,
    x,
    weight,
    bias,
    shift,
    mean,
    rstd,
    beside,
    grad_x,
    sums,
    pixels,
    shift_stride,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    EVEN: tl.constexpr,
    SILU: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """All pixels of GROUPS groups of one sample; ``sums`` [N, 1, 2, C] or None gets those of dz and dz * xhat."""
    sample = tl.program_id(1)
    o_c, m_c, _, _, member = program_channels(tl.program_id(0), CHANNELS, PER_GROUP, GROUPS, SLOTS, WIDTH)
    base = sample.to(tl.int64) * pixels * CHANNELS
    grad, x, grad_x = grad + base, x + base, grad_x + base
    if PDL:
        tl.extra.cuda.gdc_wait()
    b_shift = None if shift is None else load_float(shift + sample * shift_stride, o_c, m_c)[None, :]
    b_weight, b_bias, b_mean, b_rstd = channel_values(
        weight, bias, mean, rstd, sample, o_c, m_c, CHANNELS, PER_GROUP
    )
    if STEPS == 1:
        offset, mask = tile_places(tl.arange(0, ROWS), o_c, m_c, pixels, CHANNELS, CHANNELS_LAST, EVEN)
        b_hat, b_grad = tile_gradient(grad, x, offset, mask, b_shift, b_weight, b_bias, b_mean, b_rstd, SILU)
        b_sum, b_along = tl.sum(b_grad, axis=0), tl.sum(b_grad * b_hat, axis=0)
    else:
        b_sums = tl.zeros([ROWS, WIDTH], tl.float32)
        b_alongs = tl.zeros([ROWS, WIDTH], tl.float32)
        for step in tl.range(0, STEPS, num_stages=STAGES):
            o_p = step * ROWS + tl.arange(0, ROWS)
            offset, mask = tile_places(o_p, o_c, m_c, pixels, CHANNELS, CHANNELS_LAST, False)
            b_hat, b_grad = tile_gradient(
                grad, x, offset, mask, b_shift, b_weight, b_bias, b_mean, b_rstd, SILU
            )
            b_sums += b_grad
            b_alongs += b_grad * b_hat
        b_sum, b_along = tl.sum(b_sums, axis=0), tl.sum(b_alongs, axis=0)
    if sums is not None:
        o_sums = sample * (2 * CHANNELS) + o_c
        tl.store(sums + o_sums, b_sum, m_c)
        tl.store(sums + o_sums + CHANNELS, b_along, m_c)

    share = 1.0 / (pixels * PER_GROUP)
    b_sum = over_groups(b_sum * b_weight, member, PER_GROUP, GROUPS) * share
    b_along = over_groups(b_along * b_weight, member, PER_GROUP, GROUPS) * share
    b_sum = over_channels(b_sum, member, PER_GROUP, GROUPS)[None, :]
    b_along = over_channels(b_along, member, PER_GROUP, GROUPS)[None, :]
    if STEPS == 1:
        b_dx = (b_grad * b_weight[None, :] - b_sum - b_hat * b_along) * b_rstd[None, :]
        if beside is not None:
            b_dx += load_float(beside + base, offset, mask)
        tl.store(grad_x + offset, b_dx.to(grad_x.dtype.element_ty), mask)
    else:
        for step in tl.range(0, STEPS, num_stages=STAGES):
            o_p = (STEPS - 1 - step) * ROWS + tl.arange(0, ROWS)
            offset, mask = tile_places(o_p, o_c, m_c, pixels, CHANNELS, CHANNELS_LAST, False)
            b_hat, b_grad = tile_gradient(
                grad, x, offset, mask, b_shift, b_weight, b_bias, b_mean, b_rstd, SILU
            )
            b_dx = (b_grad * b_weight[None, :] - b_sum - b_hat * b_along) * b_rstd[None, :]
            if beside is not None:
                b_dx += load_float(beside + base, offset, mask)
            tl.store(grad_x + offset, b_dx.to(grad_x.dtype.element_ty), mask)


@jit
def _gradient_sums_kernel(
    grad,
    x,
    weight,
    bias,
    shift,
    mean,
    rstd,
    parts,
    sums,
    pixels,
    shift_stride,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    EVEN: tl.constexpr,
    SILU: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sums over a chunk of ROWS * STEPS pixels: of dz * weight and dz * weight * xhat over each group ->
    ``parts`` [N, chunks, 2, G]; of dz and dz * xhat over each channel -> ``sums`` [N, chunks, 2, C] or None.
    """
    chunk, sample = tl.program_id(0), tl.program_id(2)
    o_c, m_c, o_g, m_g, member = program_channels(tl.program_id(1), CHANNELS, PER_GROUP, GROUPS, SLOTS, WIDTH)
    base = sample.to(tl.int64) * pixels * CHANNELS
    grad, x = grad + base, x + base
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    b_shift = None if shift is None else load_float(shift + sample * shift_stride, o_c, m_c)[None, :]
    b_weight, b_bias, b_mean, b_rstd = channel_values(
        weight, bias, mean, rstd, sample, o_c, m_c, CHANNELS, PER_GROUP
    )
    b_sums = tl.zeros([ROWS, WIDTH], tl.float32)
    b_alongs = tl.zeros([ROWS, WIDTH], tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        o_p = (chunk * STEPS + step) * ROWS + tl.arange(0, ROWS)
        offset, mask = tile_places(o_p, o_c, m_c, pixels, CHANNELS, CHANNELS_LAST, False)
        b_hat, b_grad = tile_gradient(grad, x, offset, mask, b_shift, b_weight, b_bias, b_mean, b_rstd, SILU)
        b_sums += b_grad
        b_alongs += b_grad * b_hat
    b_sum, b_along = tl.sum(b_sums, axis=0), tl.sum(b_alongs, axis=0)
    part = sample * tl.num_programs(0) + chunk
    if sums is not None:
        o_sums = part * (2 * CHANNELS) + o_c
        tl.store(sums + o_sums, b_sum, m_c)
        tl.store(sums + o_sums + CHANNELS, b_along, m_c)
    o_parts = part * (2 * (CHANNELS // PER_GROUP)) + o_g
    b_sum = over_groups(b_sum * b_weight, member, PER_GROUP, GROUPS)
    b_along = over_groups(b_along * b_weight, member, PER_GROUP, GROUPS)
    tl.store(parts + o_parts, b_sum, m_g)
    tl.store(parts + o_parts + CHANNELS // PER_GROUP, b_along, m_g)


@jit
def _gradient_kernel(
    grad,
    x,
    weight,
    bias,
    shift,
    mean,
    rstd,
    beside,
    parts,
    grad_x,
    pixels,
    shift_stride,
    chunks,
    SEATS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    EVEN: tl.constexpr,
    SILU: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add up the chunks' sums, then the gradient of ROWS * STEPS pixels, the last ones first."""
    part = tl.num_programs(0) - 1 - tl.program_id(0)
    sample = tl.num_programs(2) - 1 - tl.program_id(2)
    o_c, m_c, o_g, m_g, member = program_channels(tl.program_id(1), CHANNELS, PER_GROUP, GROUPS, SLOTS, WIDTH)
    base = sample.to(tl.int64) * pixels * CHANNELS
    grad, x, grad_x = grad + base, x + base, grad_x + base
    o_k = tl.arange(0, SEATS)
    o_parts = (sample * chunks + o_k)[:, None] * (2 * (CHANNELS // PER_GROUP)) + o_g[None, :]
    m_parts = (o_k < chunks)[:, None] & m_g[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
    share = 1.0 / (pixels * PER_GROUP)
    b_sum = tl.sum(load_float(parts, o_parts, m_parts), axis=0) * share
    b_along = tl.sum(load_float(parts, o_parts + CHANNELS // PER_GROUP, m_parts), axis=0) * share
    b_sum = over_channels(b_sum, member, PER_GROUP, GROUPS)[None, :]
    b_along = over_channels(b_along, member, PER_GROUP, GROUPS)[None, :]
    b_shift = None if shift is None else load_float(shift + sample * shift_stride, o_c, m_c)[None, :]
    b_weight, b_bias, b_mean, b_rstd = channel_values(
        weight, bias, mean, rstd, sample, o_c, m_c, CHANNELS, PER_GROUP
    )
    for step in tl.range(0, STEPS, num_stages=STAGES):
        o_p = (part * STEPS + STEPS - 1 - step) * ROWS + tl.arange(0, ROWS)
        offset, mask = tile_places(o_p, o_c, m_c, pixels, CHANNELS, CHANNELS_LAST, False)
        b_hat, b_grad = tile_gradient(grad, x, offset, mask, b_shift, b_weight, b_bias, b_mean, b_rstd, SILU)
        b_dx = (b_grad * b_weight[None, :] - b_sum - b_hat * b_along) * b_rstd[None, :]
        if beside is not None:
            b_dx += load_float(beside + base, offset, mask)
        tl.store(grad_x + offset, b_dx.to(grad_x.dtype.element_ty), mask, eviction_policy="evict_first")


Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]
"""Gradient of y, x, weight, bias, shift, mean, rstd."""


def _run_whole(
    inputs: Inputs, beside: Tensor | None, grad_x: Tensor, silu: bool, parameters: bool, launch: Launch
) -> Tensor | None:
    _, x, _, _, shift, mean, _ = inputs
    (samples, channels, height, width), groups = x.shape, mean.shape[1]
    sums = x.new_empty(samples, 1, 2, channels, dtype=torch.float32) if parameters else None
    _whole_gradient_kernel[(triton.cdiv(groups, launch["GROUPS"]), samples)](
        *inputs,
        *(beside, grad_x, sums, height * width, 0 if shift is None else shift.stride(0)),
        SILU=silu,
        **constants(x, groups, launch, launch["STEPS"]),
    )
    return sums


def _run_chunked(
    inputs: Inputs, beside: Tensor | None, grad_x: Tensor, silu: bool, parameters: bool, launch: Launch
) -> Tensor | None:
    _, x, _, _, shift, mean, _ = inputs
    (samples, channels, height, width), groups = x.shape, mean.shape[1]
    pixels, stride = height * width, 0 if shift is None else shift.stride(0)
    span, walk = (launch["ROWS"] * launch[steps] for steps in ("STEPS", "WALK"))
    chunks, blocks = triton.cdiv(pixels, span), triton.cdiv(groups, launch["GROUPS"])
    parts = x.new_empty(samples, chunks, 2, groups, dtype=torch.float32)
    sums = x.new_empty(samples, chunks, 2, channels, dtype=torch.float32) if parameters else None
    _gradient_sums_kernel[(chunks, blocks, samples)](
        *inputs,
        *(parts, sums, pixels, stride),
        SILU=silu,
        **constants(x, groups, launch, launch["STEPS"]),
    )
    _gradient_kernel[(triton.cdiv(pixels, walk), blocks, samples)](
        *inputs,
        *(beside, parts, grad_x, pixels, stride, chunks),
        SEATS=triton.next_power_of_2(chunks),
        SILU=silu,
        **constants(x, groups, launch, launch["WALK"]),
    )
    return sums


_WHOLE = Tuned("group_norm_gradient_whole", _whole_gradient_kernel, whole_candidates)
_CHUNKED = Tuned("group_norm_gradient_chunked", _gradient_kernel, chunked_candidates)


@torch.library.custom_op("imagedream_rt::group_norm_gradient", mutates_args=())
def group_norm_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    parameters: bool,
    beside: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient of x in its memory format; with ``parameters`` also those of bias and weight, [2, C] in float32.

    ``grad`` [N, C, H, W] is that of y; ``mean`` and ``rstd`` [N, G] are the forward pass's; ``beside`` [N, C, H, W] is
    the gradient that x gets from elsewhere, which is added.
    """
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    grad, grad_x = grad.contiguous(memory_format=layout), torch.empty_like(x)
    beside = None if beside is None else beside.contiguous(memory_format=layout)
    inputs = (grad, x, *dense(weight, bias, shift), mean, rstd)
    key = tuning_key(x, mean.shape[1], 2)
    plan, run = (_WHOLE, _run_whole) if whole_candidates(*key) else (_CHUNKED, _run_chunked)

    def measured(launch: Launch) -> None:
        run(inputs, beside, grad_x, silu, parameters, launch)

    sums = run(inputs, beside, grad_x, silu, parameters, plan.choose(x.device, key, measured))
    return grad_x, x.new_empty(0, dtype=torch.float32) if sums is None else sums.sum((0, 1))


@group_norm_gradient.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    parameters: bool,
    beside: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    size = (2, x.shape[1]) if parameters else (0,)
    return torch.empty_like(x), x.new_empty(size, dtype=torch.float32)


def gradients(
    grad: Tensor, saved: Sequence[Any], silu: bool, needed: Sequence[bool], beside: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """By x, weight, bias and shift, the last three where ``needed``; ``beside`` is added to that by x.

    ``saved``: these four, mean and rstd of the forward pass.
    """
    x, weight, bias, shift, mean, rstd = saved
    _, of_weight, of_bias, of_shift = needed
    grad_x, sums = group_norm_gradient(
        grad, x, weight, bias, shift, mean, rstd, silu, of_weight or of_bias, beside
    )
    return (
        grad_x,
        sums[1].to(weight.dtype) if of_weight else None,
        sums[0].to(bias.dtype) if of_bias else None,
        grad_x.sum((2, 3), dtype=torch.float32).to(shift.dtype) if of_shift else None,
    )
