"""How the group-norm kernels share out feature maps: programs own whole groups, tiles are [pixels, channels].

Two plans. "Whole": a program holds a few neighbouring groups of a sample, with all pixels, in registers.
"Chunked": it walks through a range of a sample's pixels, ROWS at a time; a second kernel adds the ranges up.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ._triton import KernelBackend, constant, jit, overlap, tl, triton, use_triton
from ._tuning import Launch

LOG2_E = constant(1.4426950408889634)

WHOLE_LIMIT = 32768
"""Most elements of a program's narrowest tile that holds whole groups, times the number of tensors it reads."""


@jit
def program_channels(
    block,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Channels [WIDTH] and groups [SLOTS] of a block of GROUPS groups, their masks, and who belongs to whom."""
    o_w = tl.arange(0, WIDTH)
    o_s = tl.arange(0, SLOTS)
    o_c = block * (GROUPS * PER_GROUP) + o_w
    o_g = block * GROUPS + o_s
    m_c = (o_w < GROUPS * PER_GROUP) & (o_c < CHANNELS)
    m_g = (o_s < GROUPS) & (o_g < CHANNELS // PER_GROUP)
    member = (o_w // PER_GROUP)[None, :] == o_s[:, None]
    return o_c, m_c, o_g, m_g, member


@jit
def over_groups(b_c, member, PER_GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """[WIDTH] -> [SLOTS]: the sum over each group's channels."""
    if b_c.shape[0] == PER_GROUP * GROUPS:
        return tl.sum(tl.reshape(b_c, [GROUPS, PER_GROUP]), axis=1)
    else:
        return tl.sum(tl.where(member, b_c[None, :], 0.0), axis=1)


@jit
def over_channels(b_g, member, PER_GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """[SLOTS] -> [WIDTH]: each channel gets its group's value."""
    if member.shape[1] == PER_GROUP * GROUPS:
        return tl.reshape(tl.broadcast_to(b_g[:, None], [GROUPS, PER_GROUP]), [GROUPS * PER_GROUP])
    else:
        return tl.sum(tl.where(member, b_g[:, None], 0.0), axis=0)


@jit
def load_float(p, offset, mask):
    return tl.load(p + offset, mask=mask, other=0.0).to(tl.float32)


@jit
def shifted(b_x, b_shift):
    """x + shift, rounded to the dtype of x, in float32."""
    if b_shift is not None:
        b_x = (b_x.to(tl.float32) + b_shift).to(b_x.dtype)
    return b_x.to(tl.float32)


@jit
def tile_places(
    o_p, o_c, m_c, pixels, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, EVEN: tl.constexpr
):
    """Offsets of pixels x channels within a sample, and which of them exist; EVEN: all pixels do."""
    o_p, o_c, mask = o_p[:, None], o_c[None, :], m_c[None, :]
    offset = o_p * CHANNELS + o_c if CHANNELS_LAST else o_p + o_c * pixels
    if not EVEN:
        mask &= o_p < pixels
    return offset, mask


@jit
def load_pivot(x, shift, o_p, o_c, mask, pixels, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """x and x + shift at one pixel: what deviations are summed from.

    A pivot lies among the values, so that in the worst case, an outlier, the variance loses no more digits than
    their number has.
    """
    b_shift = None if shift is None else load_float(shift, o_c, mask)
    b_first = tl.load(
        x + (o_p * CHANNELS + o_c if CHANNELS_LAST else o_c * pixels + o_p), mask=mask, other=0.0
    )
    return b_first, shifted(b_first, b_shift)


@jit
def deviations(x, b_shift, b_first, b_pivot, offset, mask, EVEN: tl.constexpr):
    """x + shift - pivot, zero where no pixel is.

    What a load puts in place of a missing value also keeps the compiler from waiting for one load before it
    issues the next.
    """
    b_x = shifted(tl.load(x + offset, mask=mask, other=b_first[None, :]), b_shift) - b_pivot[None, :]
    return b_x if EVEN else tl.where(mask, b_x, 0.0)


@jit
def gate(b_z):
    """The square root of sigmoid(z): 1 / (1 + exp(-z)) without the care that a division takes of huge divisors."""
    return tl.rsqrt(1.0 + tl.exp2(b_z * -LOG2_E))


@jit
def activated(b_z, SILU: tl.constexpr):
    if SILU:
        b_gate = gate(b_z)
        b_z *= b_gate * b_gate
    return b_z


def whole_candidates(
    samples: int, channels: int, pixels: int, groups: int, inputs: int, *_: Hashable
) -> list[Launch]:
    """Launches in which a program has whole groups to itself; none where they are too large.

    Tiles have powers of two as sides: groups of 10, 20, 40 or 80 channels fill them best by threes. Small tiles
    stay in registers; larger ones are better walked through twice, with the second walk's loads in the cache.
    """
    per_group, rows = channels // groups, triton.next_power_of_2(pixels)
    least = min(groups, triton.cdiv(8, per_group))

    def width(number: int) -> int:
        return triton.next_power_of_2(number * per_group)

    def resident(number: int) -> list[Launch]:
        warps = [max(1, rows * width(number) * inputs // (32 * values)) for values in (64, 128)]
        return [Launch.of(warps=w, GROUPS=number, ROWS=rows, STEPS=1, STAGES=1) for w in warps if w <= 16]

    def walked(number: int) -> list[Launch]:
        part = min(rows, max(1, 4096 // inputs // width(number)))
        return [
            Launch.of(warps=warps, GROUPS=number, ROWS=part, STEPS=rows // part, STAGES=stages)
            for warps, stages in ((8, 1), (4, 3))
        ]

    tile = rows * width(least) * inputs
    threes = 3 * least <= groups and width(3 * least) < 2.5 * width(least)
    numbers = [3 * least, least] if threes else [least]
    if tile > WHOLE_LIMIT:
        found = []
    elif tile > WHOLE_LIMIT // 2:
        found = [*(launch for number in numbers for launch in walked(number)), *resident(least)[-1:]]
    elif tile > WHOLE_LIMIT // 4:
        found = resident(numbers[0]) + walked(numbers[0])
    else:
        found = [launch for number in numbers for launch in resident(number)]
    return list(dict.fromkeys(found))


def chunked_candidates(
    samples: int, channels: int, pixels: int, groups: int, inputs: int, *_: Hashable
) -> list[Launch]:
    """Launches that walk through chunks of pixels: STEPS tiles for the sums, WALK tiles for the result.

    About two programs for each processor of a large GPU add up; more of them normalise.
    """
    per_group, tile = channels // groups, 8192 // inputs
    programs = 256 * inputs
    steps = 1 << max(0, round(math.log2(max(1, samples * pixels * channels / (tile * programs)))))
    found = []
    for width, warps, stages in ((64, 8, 3), (64, 8, 1), (128, 8, 3), (128, 4, 3), (128, 8, 1)):
        number = max(1, min(groups, width // per_group))
        rows = max(1, tile // triton.next_power_of_2(number * per_group))
        walk = max(1, steps // (2 if stages == 3 else 4))
        found.append(Launch.of(warps=warps, GROUPS=number, ROWS=rows, STEPS=steps, WALK=walk, STAGES=stages))
    return list(dict.fromkeys(found))


def constants(x: Tensor, groups: int, launch: Launch, steps: int) -> dict[str, Any]:
    """Keyword arguments that all kernels share; the tile walks through ``steps`` places."""
    channels, pixels, number = x.shape[1], x.shape[2] * x.shape[3], launch["GROUPS"]
    per_group = channels // groups
    return {
        "CHANNELS": channels,
        "PER_GROUP": per_group,
        "GROUPS": number,
        "SLOTS": triton.next_power_of_2(number),
        "WIDTH": triton.next_power_of_2(number * per_group),
        "ROWS": launch["ROWS"],
        "STEPS": steps,
        "CHANNELS_LAST": is_channels_last(x),
        "EVEN": pixels % (launch["ROWS"] * steps) == 0,
        "STAGES": launch["STAGES"],
        "num_warps": launch.warps,
        **overlap(x),
    }


def tuning_key(x: Tensor, groups: int, inputs: int) -> tuple[int, int, int, int, int, torch.dtype, str]:
    """Arguments of the candidates, for a kernel that reads ``inputs`` tensors like x; dtype and layout matter too."""
    samples, channels, height, width = x.shape
    layout = "channels_last" if is_channels_last(x) else "contiguous"
    return samples, channels, height * width, groups, inputs, x.dtype, layout


def dense(weight: Tensor, bias: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As the kernels read them: neighbouring channels side by side."""
    if shift is not None and shift.stride(1) != 1:
        shift = shift.contiguous()
    return weight.contiguous(), bias.contiguous(), shift


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def on_kernel(backend: KernelBackend, x: Tensor, *others: Tensor | None) -> bool:
    """Whether Triton normalises ``x``. Raises ``ValueError`` if it is told to and cannot."""
    fits = (is_channels_last(x) or x.is_contiguous()) and x.numel() < x.shape[0] * 2**31
    if not use_triton(backend, x, *others):
        return False
    if backend == "triton" and not fits:
        raise ValueError(
            "backend 'triton' takes channels-last or contiguous x with fewer than 2^31 elements a sample, got "
            f"shape {tuple(x.shape)} with strides {x.stride()}"
        )
    return fits
