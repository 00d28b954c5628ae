"""Group normalisation with what surrounds it: a per-sample shift before, SiLU behind.

    y = act((x' - mean_g) * rstd_g * weight_c + bias_c),    x' = x + shift_nc,    rstd_g = 1 / sqrt(var_g + eps)

for x [N, C, H, W]; mean and (biased) variance run over the C / G channels and all pixels of a sample's group,
and act is SiLU or nothing. ``shift`` is the time embedding that residual blocks add between their convolutions.
Statistics and arithmetic are in float32 whatever the dtypes; the sum x' is rounded to the dtype of x.

The kernels take channels-last memory, where a pixel's channels are neighbours, and contiguous [N, C, H, W]. A
group that fits into the registers of one program takes one launch, which reads x once. Larger ones take two:
the mean and the summed squared deviation of chunks of pixels, then the normalisation, which first combines the
chunks and then walks backwards over the pixels, to find in the cache what was read last.

Source: Wu and He 2018, "Group Normalization" (arXiv 1803.08494); combining moments: Chan, Golub and LeVeque
1979, "Updating formulae and a pairwise algorithm for computing sample variances".
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ._group_tiles import (
    activated,
    chunked_candidates,
    constants,
    dense,
    deviations,
    is_channels_last,
    load_float,
    load_pivot,
    on_kernel,
    over_channels,
    over_groups,
    program_channels,
    shifted,
    tile_places,
    tuning_key,
    whole_candidates,
)
from ._triton import KernelBackend, jit, tl, triton
from ._tuning import Launch, Tuned
from .group_norm_backward import gradients


def group_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int = 32,
    eps: float,
    silu: bool = False,
    shift: Tensor | None = None,
) -> Tensor:
    """The formula above in float32 or wider; arguments as :func:`group_norm`."""
    if shift is not None:
        x = (x + shift[:, :, None, None]).to(x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = functional.group_norm(x.to(wide), groups, weight.to(wide), bias.to(wide), eps)
    y = (functional.silu(y) if silu else y).to(x.dtype)
    return y.contiguous(memory_format=torch.channels_last) if is_channels_last(x) else y.contiguous()


@jit
def _whole_kernel(
    x,
    weight,
    bias,
    shift,
    y,
    mean,
    rstd,
    pixels,
    shift_stride,
    eps,
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
    """All pixels of GROUPS groups of one sample, in registers if they are one tile, else walked through twice."""
    sample = tl.program_id(1)
    o_c, m_c, o_g, m_g, member = program_channels(tl.program_id(0), CHANNELS, PER_GROUP, GROUPS, SLOTS, WIDTH)
    x += sample.to(tl.int64) * pixels * CHANNELS
    y += sample.to(tl.int64) * pixels * CHANNELS
    if shift is not None:
        shift += sample * shift_stride
    if PDL:
        tl.extra.cuda.gdc_wait()
    b_shift = None if shift is None else load_float(shift, o_c, m_c)[None, :]
    o_f = o_c // PER_GROUP * PER_GROUP
    b_first, b_pivot = load_pivot(x, shift, 0, o_f, m_c, pixels, CHANNELS, CHANNELS_LAST)
    _, b_pivot_g = load_pivot(x, shift, 0, o_g * PER_GROUP, m_g, pixels, CHANNELS, CHANNELS_LAST)
    b_weight, b_bias = load_float(weight, o_c, m_c), load_float(bias, o_c, m_c)
    if STEPS == 1:
        offset, mask = tile_places(tl.arange(0, ROWS), o_c, m_c, pixels, CHANNELS, CHANNELS_LAST, EVEN)
        b_x = deviations(x, b_shift, b_first, b_pivot, offset, mask, EVEN)
        b_sum, b_square = tl.sum(b_x, axis=0), tl.sum(b_x * b_x, axis=0)
    else:
        b_sums = tl.zeros([ROWS, WIDTH], tl.float32)
        b_squares = tl.zeros([ROWS, WIDTH], tl.float32)
        for step in tl.range(0, STEPS, num_stages=STAGES):
            o_p = step * ROWS + tl.arange(0, ROWS)
            offset, mask = tile_places(o_p, o_c, m_c, pixels, CHANNELS, CHANNELS_LAST, False)
            b_x = deviations(x, b_shift, b_first, b_pivot, offset, mask, EVEN)
            b_sums += b_x
            b_squares += b_x * b_x
        b_sum, b_square = tl.sum(b_sums, axis=0), tl.sum(b_squares, axis=0)

    share = 1.0 / (pixels * PER_GROUP)
    b_mean = over_groups(b_sum, member, PER_GROUP, GROUPS) * share
    b_variance = over_groups(b_square, member, PER_GROUP, GROUPS) * share - b_mean * b_mean
    b_rstd = tl.rsqrt(tl.maximum(b_variance, 0.0) + eps)
    o_statistics = sample * (CHANNELS // PER_GROUP) + o_g
    tl.store(mean + o_statistics, b_mean + b_pivot_g, m_g)
    tl.store(rstd + o_statistics, b_rstd, m_g)
    b_scale = over_channels(b_rstd, member, PER_GROUP, GROUPS) * b_weight
    b_offset = over_channels(b_mean, member, PER_GROUP, GROUPS)
    if STEPS == 1:
        b_z = b_x * b_scale[None, :] + (b_bias - b_offset * b_scale)[None, :]
        tl.store(y + offset, activated(b_z, SILU).to(y.dtype.element_ty), mask)
    else:
        b_centre = b_pivot + b_offset
        for step in tl.range(0, STEPS, num_stages=STAGES):
            o_p = (STEPS - 1 - step) * ROWS + tl.arange(0, ROWS)
            offset, mask = tile_places(o_p, o_c, m_c, pixels, CHANNELS, CHANNELS_LAST, False)
            b_x = shifted(tl.load(x + offset, mask=mask, other=0.0), b_shift)
            b_z = (b_x - b_centre[None, :]) * b_scale[None, :] + b_bias[None, :]
            tl.store(y + offset, activated(b_z, SILU).to(y.dtype.element_ty), mask)


@jit
def _moments_kernel(
    x,
    shift,
    moments,
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
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Mean and summed squared deviation of each group in a chunk of ROWS * STEPS pixels -> [N, chunks, 2, G]."""
    chunk, sample = tl.program_id(0), tl.program_id(2)
    o_c, m_c, o_g, m_g, member = program_channels(tl.program_id(1), CHANNELS, PER_GROUP, GROUPS, SLOTS, WIDTH)
    x += sample.to(tl.int64) * pixels * CHANNELS
    if shift is not None:
        shift += sample * shift_stride
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    b_shift = None if shift is None else load_float(shift, o_c, m_c)[None, :]
    first = chunk * (ROWS * STEPS)
    o_f = o_c // PER_GROUP * PER_GROUP
    b_first, b_pivot = load_pivot(x, shift, first, o_f, m_c, pixels, CHANNELS, CHANNELS_LAST)
    _, b_pivot_g = load_pivot(x, shift, first, o_g * PER_GROUP, m_g, pixels, CHANNELS, CHANNELS_LAST)
    b_sums = tl.zeros([ROWS, WIDTH], tl.float32)
    b_squares = tl.zeros([ROWS, WIDTH], tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        o_p = first + step * ROWS + tl.arange(0, ROWS)
        offset, mask = tile_places(o_p, o_c, m_c, pixels, CHANNELS, CHANNELS_LAST, False)
        b_x = deviations(x, b_shift, b_first, b_pivot, offset, mask, EVEN)
        b_sums += b_x
        b_squares += b_x * b_x

    b_sum = over_groups(tl.sum(b_sums, axis=0), member, PER_GROUP, GROUPS)
    b_square = over_groups(tl.sum(b_squares, axis=0), member, PER_GROUP, GROUPS)
    b_mean = b_sum / (tl.minimum(pixels - first, ROWS * STEPS) * PER_GROUP)
    b_square = tl.maximum(b_square - b_sum * b_mean, 0.0)
    b_mean += b_pivot_g
    o_moments = (sample * tl.num_programs(0) + chunk) * (2 * (CHANNELS // PER_GROUP)) + o_g
    tl.store(moments + o_moments, b_mean, m_g)
    tl.store(moments + o_moments + CHANNELS // PER_GROUP, b_square, m_g)


@jit
def _normalise_kernel(
    x,
    weight,
    bias,
    shift,
    moments,
    y,
    mean,
    rstd,
    pixels,
    shift_stride,
    eps,
    chunks,
    span,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SEATS: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    EVEN: tl.constexpr,
    SILU: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Combine the moments of the chunks of ``span`` pixels; normalise ROWS * STEPS, the last pixels first."""
    part = tl.num_programs(0) - 1 - tl.program_id(0)
    sample = tl.num_programs(2) - 1 - tl.program_id(2)
    o_c, m_c, o_g, m_g, member = program_channels(tl.program_id(1), CHANNELS, PER_GROUP, GROUPS, SLOTS, WIDTH)
    o_k = tl.arange(0, SEATS)
    b_count = tl.minimum(tl.maximum(pixels - o_k * span, 0), span).to(tl.float32)[:, None]
    o_moments = (sample * chunks + o_k)[:, None] * (2 * (CHANNELS // PER_GROUP)) + o_g[None, :]
    m_moments = (o_k < chunks)[:, None] & m_g[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    b_pivot = load_float(moments, sample * chunks * (2 * (CHANNELS // PER_GROUP)) + o_g, m_g)
    b_means = load_float(moments, o_moments, m_moments) - b_pivot[None, :]
    b_squares = load_float(moments, o_moments + CHANNELS // PER_GROUP, m_moments)
    b_weight, b_bias = load_float(weight, o_c, m_c), load_float(bias, o_c, m_c)
    b_shift = None if shift is None else load_float(shift + sample * shift_stride, o_c, m_c)[None, :]
    b_weighed = b_means * b_count
    b_square = tl.sum(b_squares + b_weighed * b_means * PER_GROUP, axis=0)
    b_mean = tl.sum(b_weighed, axis=0) / pixels
    b_square = tl.maximum(b_square - b_mean * b_mean * (pixels * PER_GROUP), 0.0)
    b_mean += b_pivot
    b_rstd = tl.rsqrt(b_square / (pixels * PER_GROUP) + eps)
    if part == 0:
        o_statistics = sample * (CHANNELS // PER_GROUP) + o_g
        tl.store(mean + o_statistics, b_mean, m_g)
        tl.store(rstd + o_statistics, b_rstd, m_g)

    b_centre = over_channels(b_mean, member, PER_GROUP, GROUPS)[None, :]
    b_scale = (over_channels(b_rstd, member, PER_GROUP, GROUPS) * b_weight)[None, :]
    x += sample.to(tl.int64) * pixels * CHANNELS
    y += sample.to(tl.int64) * pixels * CHANNELS
    for step in tl.range(0, STEPS, num_stages=STAGES):
        o_p = (part * STEPS + STEPS - 1 - step) * ROWS + tl.arange(0, ROWS)
        offset, mask = tile_places(o_p, o_c, m_c, pixels, CHANNELS, CHANNELS_LAST, False)
        b_x = shifted(tl.load(x + offset, mask=mask, other=0.0), b_shift)
        b_z = (b_x - b_centre) * b_scale + b_bias[None, :]
        tl.store(y + offset, activated(b_z, SILU).to(y.dtype.element_ty), mask, eviction_policy="evict_first")


Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]  # x, weight, bias, shift
Outputs = tuple[Tensor, Tensor, Tensor]  # y; mean and rstd [N, G]


def _run_whole(inputs: Inputs, outputs: Outputs, eps: float, silu: bool, launch: Launch) -> None:
    (x, _, _, shift), groups = inputs, outputs[1].shape[1]
    samples, _, height, width = x.shape
    _whole_kernel[(triton.cdiv(groups, launch["GROUPS"]), samples)](
        *inputs,
        *outputs,
        *(height * width, 0 if shift is None else shift.stride(0), eps),
        SILU=silu,
        **constants(x, groups, launch, launch["STEPS"]),
    )


def _run_chunked(inputs: Inputs, outputs: Outputs, eps: float, silu: bool, launch: Launch) -> None:
    (x, _, _, shift), groups = inputs, outputs[1].shape[1]
    samples, _, height, width = x.shape
    pixels, stride = height * width, 0 if shift is None else shift.stride(0)
    span, walk = (launch["ROWS"] * launch[steps] for steps in ("STEPS", "WALK"))
    chunks, blocks = triton.cdiv(pixels, span), triton.cdiv(groups, launch["GROUPS"])
    moments = x.new_empty(samples, chunks, 2, groups, dtype=torch.float32)
    _moments_kernel[(chunks, blocks, samples)](
        x, shift, moments, pixels, stride, **constants(x, groups, launch, launch["STEPS"])
    )
    _normalise_kernel[(triton.cdiv(pixels, walk), blocks, samples)](
        *inputs,
        moments,
        *outputs,
        *(pixels, stride, eps, chunks, span),
        SEATS=triton.next_power_of_2(chunks),
        SILU=silu,
        **constants(x, groups, launch, launch["WALK"]),
    )


_WHOLE = Tuned("group_norm_whole", _whole_kernel, whole_candidates)
_CHUNKED = Tuned("group_norm_chunked", _normalise_kernel, chunked_candidates)


@torch.library.custom_op("imagedream_rt::group_norm", mutates_args=())
def group_norm_and_moments(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and rstd [N, G] for the backward pass."""
    mean, rstd = (x.new_empty(len(x), groups, dtype=torch.float32) for _ in range(2))
    inputs, outputs = (x, *dense(weight, bias, shift)), (torch.empty_like(x), mean, rstd)
    key = tuning_key(x, groups, 1)
    plan, run = (_WHOLE, _run_whole) if whole_candidates(*key) else (_CHUNKED, _run_chunked)
    run(inputs, outputs, eps, silu, plan.choose(x.device, key, partial(run, inputs, outputs, eps, silu)))
    return outputs


@group_norm_and_moments.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[0], groups, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), mean, rstd


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, shift, _, _, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias, shift, *output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    return (*gradients(grad, ctx.saved_tensors, ctx.silu, ctx.needs_input_grad[:4]), None, None, None)


group_norm_and_moments.register_autograd(_differentiate, setup_context=_remember)


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int = 32,
    eps: float,
    silu: bool = False,
    shift: Tensor | None = None,
    backend: KernelBackend = "auto",
) -> Tensor:
    """Normalise the groups of channels of ``x + shift``, scale and shift them, and apply SiLU if asked to.

    ``x`` [N, C, H, W], ``weight`` and ``bias`` [C], ``shift`` [N, C] or None, each of any floating dtype. Returns y
    [N, C, H, W] in the dtype and memory format of ``x``. Differentiable (once, where Triton runs) with respect to all
    tensors. Under ``auto``, an ``x`` that is neither channels-last nor contiguous goes to plain PyTorch.

    Raises ``ValueError`` for shapes that do not fit together, or if ``triton`` is asked for such a strided ``x``.

    >>> x = torch.tensor([1.0, 3.0, 5.0, 7.0]).view(1, 2, 1, 2)
    >>> group_norm(x, torch.ones(2), torch.zeros(2), groups=2, eps=0.0).flatten().tolist()
    [-1.0, 1.0, -1.0, 1.0]
    """
    check(x, weight, bias, groups, shift)
    if not x.numel():
        return x.clone()
    if on_kernel(backend, x, weight, bias, shift):
        return group_norm_and_moments(x, weight, bias, shift, groups, eps, silu)[0]
    return group_norm_reference(x, weight, bias, groups=groups, eps=eps, silu=silu, shift=shift)


def check(x: Tensor, weight: Tensor, bias: Tensor, groups: int, shift: Tensor | None) -> None:
    """Raises ``ValueError`` for shapes that do not fit together."""
    if x.dim() != 4:
        raise ValueError(f"x must be [N, C, H, W], got {tuple(x.shape)}")
    samples, channels = x.shape[:2]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide the {channels} channels of x, got {groups}")
    if weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(f"weight and bias must be [{channels}], got {[*weight.shape]} and {[*bias.shape]}")
    if shift is not None and shift.shape != (samples, channels):
        raise ValueError(f"shift must be [{samples}, {channels}], got {tuple(shift.shape)}")
