"""How the group-norm kernels share out feature maps: programs own whole groups, tiles are [pixels, channels].

Two plans. "Whole": a program holds a few neighbouring groups of a sample, with all pixels, in registers.
"Chunked": it walks through a range of a sample's pixels, ROWS at a time; a second kernel adds the ranges up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._triton import constant, jit, tl, triton
from ._tuning import Launch

LOG2_E = constant(1.4426950408889634)


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
    """Offsets of pixels x channels within a sample, and which of them exist."""
    o_p, o_c = o_p[:, None], o_c[None, :]
    offset = o_p * CHANNELS + o_c if CHANNELS_LAST else o_p + o_c * pixels
    mask = m_c[None, :]
    if not EVEN:
        mask &= o_p < pixels
    return offset, mask


@jit
def pivot(
    x,
    shift,
    o_p,
    o_c,
    mask,
    pixels,
    PER_GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """For each channel its group's first one, at one pixel: what deviations are summed from.

    It lies within the group's values, so that even the worst case, an outlier, costs the variance no more digits
    than their number has.
    """
    o_c = o_c // PER_GROUP * PER_GROUP
    offset = o_p * CHANNELS + o_c if CHANNELS_LAST else o_c * pixels + o_p
    b_shift = None if shift is None else load_float(shift, o_c, mask)
    return shifted(tl.load(x + offset, mask=mask, other=0.0), b_shift)


@jit
def deviations(x, b_shift, b_pivot, offset, mask, EVEN: tl.constexpr):
    """x + shift - pivot, zero where nothing is."""
    b_x = shifted(tl.load(x + offset, mask=mask, other=0.0), b_shift) - b_pivot[None, :]
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
    samples: int, channels: int, pixels: int, groups: int, itemsize: int, inputs: int
) -> list[Launch]:
    """Launches in which a program has whole groups to itself; none where there would be too few programs."""
    per_group, rows = channels // groups, triton.next_power_of_2(pixels)
    found = []
    for number in (g for g in (1, 2, 3, 4) if g <= groups):
        tile = rows * triton.next_power_of_2(number * per_group)
        for each in (32, 16):
            warps = max(1, tile * inputs // (32 * each))
            if warps <= 32:
                found.append(Launch.of(warps=warps, GROUPS=number, ROWS=rows, STEPS=1, STAGES=1))
    return found


def chunked_candidates(
    samples: int, channels: int, pixels: int, groups: int, itemsize: int, inputs: int
) -> list[Launch]:
    """Launches that walk through chunks of pixels: STEPS tiles for the sums, WALK tiles for the result."""
    per_group = channels // groups
    number = max(1, min(groups, 128 // per_group))
    rows = 64 * 128 // triton.next_power_of_2(number * per_group)
    return [Launch.of(warps=8, GROUPS=number, ROWS=rows, STEPS=4, WALK=2, STAGES=1)]


def constants(x: Tensor, groups: int, launch: Launch, steps: int) -> dict[str, Any]:
    """Keyword arguments that all kernels share; the tile walks through ``steps`` places.

    From Hopper on, a kernel may start while the one before it ends: it then waits itself before it reads.
    """
    channels, pixels, number = x.shape[1], x.shape[2] * x.shape[3], launch["GROUPS"]
    per_group = channels // groups
    overlap = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
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
        "PDL": overlap,
        "num_warps": launch.warps,
        **({"launch_pdl": True} if overlap else {}),
    }


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)
