"""A 3x3 convolution of small feature maps, with what follows it: bias and residual sum. Or behind a doubling.

    y[n, :, i, j] = sum over a, b of W[:, :, a, b] x[n, :, i + a - 1, j + b - 1] + bias + residual[n, :, i, j]

for x [N, C, H, W], zero outside of the map. It is a matrix product of N H W rows whose inner dimension runs over taps
and channels; the tensor memory accelerator copies a tap's pixels as one shifted box, and puts the zeros. Maps of the
UNet's lower levels have few rows: there the inner dimension is cut into parts that a second kernel adds, so that all
multiprocessors have work; cuDNN leaves up to two thirds of them idle, whatever it is allowed to try.

Behind a nearest doubling of the map, the taps of each parity of row and column see 2x2 pixels of the small map:

    y[n, :, 2i + p, 2j + q] = sum over a, b of V[p, q, :, :, a, b] x[n, :, i + a + p - 1, j + b + q - 1] + bias

with V of :func:`doubled_weight`, four ninths of the products.

The kernel is for Hopper and for no gradients; :func:`fits` says of what. The rest is PyTorch's.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ._group_tiles import is_channels_last
from ._triton import (
    HALF,
    KernelBackend,
    dense_box,
    gl,
    gluon,
    gluon_jit,
    hopper,
    jit,
    tl,
    triton,
    use_triton,
)
from ._tuning import Launch

ROWS = 64
"""Pixels of a warpgroup's tile."""
DEPTH = 64
"""Channels of a step: what 128 bytes, the widest swizzle of shared memory, hold."""
MOST_PARTS = 16
"""Into which the inner dimension is cut."""
MOST_PIXELS = 256
"""Of a map. More of them fill the device with cuDNN's tiles, too."""
LARGEST = 2**23
"""Most elements of x: numbers of rows and columns of the parts are 32 bits wide."""
PROCESSORS = 132
STEP_TIME, ENDS_TIME, PART_TIME = {1: 0.29, 2: 0.36, 3: 0.45}, 2.0, 3.7e-6
"""Of an H200: multiprocessors; microseconds of a step of so many warpgroups, of a tile's beginning and end, of an
element of a part, written and read."""
BLOCK = 1024
"""Elements that a program of the adding kernel takes."""


def doubled_weight(weight: Tensor) -> Tensor:
    """[C', C, 3, 3] -> V [2, 2, C', C, 2, 2] of the formula above, by parity of row and column; channels-last."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))

    def parities(taps: Tensor, side: int) -> tuple[Tensor, Tensor]:
        before, here, behind = taps.unbind(side)
        return torch.stack((before, here + behind), side), torch.stack((before + here, behind), side)

    both = torch.stack([torch.stack(parities(rows, 3)) for rows in parities(wide, 2)])
    return both.to(weight.dtype).permute(0, 1, 2, 4, 5, 3).contiguous().permute(0, 1, 2, 5, 3, 4)


@gluon_jit
def _produce(
    x_box, w_box, rings, barriers, place, per_tap, H: gl.constexpr, W: gl.constexpr, DOUBLED: gl.constexpr
):
    """The producer warp: boxes of pixels for each warpgroup, and the weights that all of them multiply with."""
    x_ring, w_ring = rings
    ready, read = barriers
    row, _, w_row, parity, first, last = place
    RING: gl.constexpr = w_ring.shape[0]
    WARPGROUPS: gl.constexpr = x_ring.shape[0] // RING
    DEPTH: gl.constexpr = w_ring.shape[2]
    BYTES: gl.constexpr = (64 * WARPGROUPS + w_ring.shape[1]) * DEPTH * 2
    for step in range(first, last):
        slot = (step - first) % RING
        hopper.mbarrier.wait(read.index(slot), ((step - first) // RING & 1) ^ 1)
        hopper.mbarrier.expect(ready.index(slot), BYTES)
        tap = step // per_tap
        if DOUBLED:
            down = tap // 2 + parity // 2 - 1
            right = tap % 2 + parity % 2 - 1
        else:
            down = tap // 3 - 1
            right = tap % 3 - 1
        for part in gl.static_range(WARPGROUPS):
            pixel = row + 64 * part
            corner = [pixel // (H * W), pixel % (H * W) // W + down, right, step % per_tap * DEPTH]
            box = x_ring.index(slot * WARPGROUPS + part)
            hopper.tma.async_copy_global_to_shared(x_box, corner, ready.index(slot), box)
        hopper.tma.async_copy_global_to_shared(
            w_box, [w_row, step * DEPTH], ready.index(slot), w_ring.index(slot)
        )


@gluon_jit
def _consume(
    part: gl.constexpr,
    rings,
    barriers,
    place,
    results,
    rows,
    channels,
    W: gl.constexpr,
    DOUBLED: gl.constexpr,
    WHOLE: gl.constexpr,
):
    """A warpgroup: 64 pixels of the tile."""
    x_ring, w_ring = rings
    ready, read = barriers
    row, column, _, parity, first, last = place
    out, bias, residual = results
    RING: gl.constexpr = w_ring.shape[0]
    WARPGROUPS: gl.constexpr = x_ring.shape[0] // RING
    COLUMNS: gl.constexpr = w_ring.shape[1]
    DEPTH: gl.constexpr = w_ring.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    acc = gl.zeros([64, COLUMNS], gl.float32, layout)
    for item in range(last - first):
        slot = item % RING
        hopper.mbarrier.wait(ready.index(slot), item // RING & 1)
        pixels = x_ring.index(slot * WARPGROUPS + part).reshape([64, DEPTH])
        acc = hopper.warpgroup_mma(pixels, w_ring.index(slot).permute((1, 0)), acc, is_async=True)
        acc = hopper.warpgroup_mma_wait(1, deps=[acc])  # for the product before this one
        hopper.mbarrier.arrive(read.index((item + RING - 1) % RING), pred=item > 0)
    acc = hopper.warpgroup_mma_wait(0, deps=[acc])
    o_row = row + 64 * part + gl.arange(0, 64, gl.SliceLayout(1, layout))
    o_column = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    m_column = o_column < channels
    mask = (o_row < rows)[:, None] & m_column[None, :]
    o_out = o_row
    if DOUBLED:
        o_out = o_row // W * (4 * W) + o_row % W * 2 + parity // 2 * (2 * W) + parity % 2
    if WHOLE:
        places = o_out[:, None] * channels + o_column[None, :]
        if bias is not None:
            acc += gl.load(bias + o_column, mask=m_column, other=0.0).to(gl.float32)[None, :]
        if residual is not None:
            acc += gl.load(residual + places, mask=mask, other=0.0).to(gl.float32)
        gl.store(out + places, acc.to(out.dtype.element_ty), mask=mask)
    else:
        o_out += gl.program_id(1) * rows * (4 if DOUBLED else 1)
        gl.store(out + o_out[:, None] * channels + o_column[None, :], acc, mask=mask)


@gluon_jit
def convolution_kernel(
    x_box,
    w_box,
    out,
    bias,
    residual,
    rows,
    channels,
    per_tap,
    H: gl.constexpr,
    W: gl.constexpr,
    DOUBLED: gl.constexpr,
    WHOLE: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    COLUMNS: gl.constexpr,
    RING: gl.constexpr,
):
    """A tile of 64 * WARPGROUPS rows and COLUMNS of ``channels``, one part of the inner dimension, one parity.

    ``out``: y if WHOLE, else what the parts are, [parts, rows of y, channels] in float32.
    """
    tiles = gl.cdiv(rows, 64 * WARPGROUPS)
    row = gl.program_id(0) % tiles * (64 * WARPGROUPS)
    column = gl.program_id(0) // tiles * COLUMNS
    parity = gl.program_id(2)
    steps = (4 if DOUBLED else 9) * per_tap
    first = gl.program_id(1) * steps // gl.num_programs(1)
    last = (gl.program_id(1) + 1) * steps // gl.num_programs(1)
    x_ring = gl.allocate_shared_memory(x_box.dtype, [RING * WARPGROUPS] + x_box.block_shape, x_box.layout)  # noqa: RUF005
    w_ring = gl.allocate_shared_memory(w_box.dtype, [RING] + w_box.block_shape, w_box.layout)  # noqa: RUF005
    barrier: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    ready = gl.allocate_shared_memory(gl.int64, [RING, 1], barrier)
    read = gl.allocate_shared_memory(gl.int64, [RING, 1], barrier)
    for slot in gl.static_range(RING):
        hopper.mbarrier.init(ready.index(slot), count=1)
        hopper.mbarrier.init(read.index(slot), count=WARPGROUPS)
    hopper.fence_async_shared()
    rings = (x_ring, w_ring)
    barriers = (ready, read)
    place = (row, column, parity * channels + column, parity, first, last)
    results = (out, bias, residual)
    if WARPGROUPS == 1:
        gl.warp_specialize(
            [
                (_consume, (0, rings, barriers, place, results, rows, channels, W, DOUBLED, WHOLE)),
                (_produce, (x_box, w_box, rings, barriers, place, per_tap, H, W, DOUBLED)),
            ],
            [1],
            [24],
        )
    elif WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, rings, barriers, place, results, rows, channels, W, DOUBLED, WHOLE)),
                (_consume, (1, rings, barriers, place, results, rows, channels, W, DOUBLED, WHOLE)),
                (_produce, (x_box, w_box, rings, barriers, place, per_tap, H, W, DOUBLED)),
            ],
            [4, 1],
            [208, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (0, rings, barriers, place, results, rows, channels, W, DOUBLED, WHOLE)),
                (_consume, (1, rings, barriers, place, results, rows, channels, W, DOUBLED, WHOLE)),
                (_consume, (2, rings, barriers, place, results, rows, channels, W, DOUBLED, WHOLE)),
                (_produce, (x_box, w_box, rings, barriers, place, per_tap, H, W, DOUBLED)),
            ],
            [4, 4, 1],
            [152, 152, 24],
        )


@jit
def add_parts_kernel(parts, bias, residual, y, total, channels, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """y = the sum of the parts, in their order, + bias + residual."""
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < total
    b_y = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        b_y += tl.load(parts + part * total + offset, mask, other=0.0)
    if bias is not None:
        b_y += tl.load(bias + offset % channels, mask, other=0.0).to(tl.float32)
    if residual is not None:
        b_y += tl.load(residual + offset, mask, other=0.0).to(tl.float32)
    tl.store(y + offset, b_y.to(y.dtype.element_ty), mask)


@lru_cache
def plan(rows: int, channels: int, steps: int, parities: int) -> Launch:
    """The launch that should end first, by what a step and the adding of parts take on an H200, in microseconds."""

    def time(launch: Launch) -> float:
        parts, columns = launch["PARTS"], launch["COLUMNS"]
        tiles = triton.cdiv(rows, ROWS * launch["WARPGROUPS"]) * triton.cdiv(channels, columns) * parities
        rounds = triton.cdiv(tiles * parts, PROCESSORS)
        adding = parts * rows * parities * channels * PART_TIME if parts > 1 else 0
        return rounds * (triton.cdiv(steps, parts) * STEP_TIME[launch["WARPGROUPS"]] + ENDS_TIME) + adding

    return min(launches(), key=time)


def launches() -> list[Launch]:
    """Those there are."""
    return [
        Launch.of(WARPGROUPS=warpgroups, COLUMNS=128, RING=ring, PARTS=parts)
        for warpgroups, ring in ((2, 4), (3, 4), (1, 6))
        for parts in range(1, MOST_PARTS + 1)
    ]


@torch.library.custom_op("imagedream_rt::convolution", mutates_args=())
def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, doubled: bool
) -> Tensor:
    """Channels-last x [N, C, H, W] and weight, [C', C, 3, 3], or if ``doubled`` [2, 2, C', C, 2, 2]."""
    samples, channels, height, width = x.shape
    y = _empty(x, weight, bias, residual, doubled)
    out_channels, taps, parities = weight.shape[-4], 4 if doubled else 9, 4 if doubled else 1
    rows, steps = samples * height * width, taps * channels // DEPTH
    launch = plan(rows, out_channels, steps, parities)
    parts, columns = launch["PARTS"], launch["COLUMNS"]
    whole = parts == 1
    out = y if whole else x.new_empty(parts, parities * rows, out_channels, dtype=torch.float32)
    lines = min(height, ROWS // width)
    tiles = triton.cdiv(rows, ROWS * launch["WARPGROUPS"]) * triton.cdiv(out_channels, columns)
    if bias is not None:
        bias = bias.contiguous()
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    convolution_kernel[(tiles, parts, parities)](
        dense_box(x, [samples, height, width, channels], [ROWS // (lines * width), lines, width, DEPTH]),
        dense_box(weight, [parities * out_channels, taps * channels], [columns, DEPTH]),
        out,
        bias if whole else None,
        residual if whole else None,
        *(rows, out_channels, channels // DEPTH),
        H=height,
        W=width,
        DOUBLED=doubled,
        WHOLE=whole,
        **{name: launch[name] for name in ("WARPGROUPS", "COLUMNS", "RING")},
        num_warps=4,
    )
    if not whole:
        grid = (triton.cdiv(y.numel(), BLOCK),)
        add_parts_kernel[grid](out, bias, residual, y, y.numel(), out_channels, PARTS=parts, BLOCK=BLOCK)
    return y


@_convolution.register_fake
def _empty(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, doubled: bool) -> Tensor:
    samples, _, height, width = x.shape
    scale = 2 if doubled else 1
    shape = (samples, weight.shape[-4], scale * height, scale * width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def fits(backend: KernelBackend, x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernel takes these, and should: small maps, half precision, channels-last, no gradient wanted.

    The map's sides are powers of two, and the channels of ``x`` a multiple of 64. A kernel on larger maps would not
    be faster than the library.
    """
    given = [tensor for tensor in (x, weight, *others) if tensor is not None]
    if backend == "torch" or gluon is None or torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return False
    height, width = x.shape[2:]
    return (
        all(tensor.is_cuda for tensor in given)
        and torch.cuda.get_device_capability(x.device)[0] == 9
        and use_triton("auto", *given, dtypes=HALF)
        and x.dtype == weight.dtype
        and not torch.is_autocast_enabled("cuda")
        and 0 < x.numel() <= LARGEST
        and x.shape[1] % DEPTH == 0
        and height * width <= MOST_PIXELS
        and all(side & (side - 1) == 0 for side in (height, width))
        and all(is_channels_last(tensor) for tensor in (x, weight.flatten(0, -4)))
        and all(tensor.data_ptr() % 16 == 0 for tensor in (x, weight))
    )


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """3x3 with a border of zeros, ``+ bias + residual``, rounded once; of what :func:`fits`.

    ``x`` [N, C, H, W], ``weight`` [C', C, 3, 3], ``bias`` [C'] -> [N, C', H, W], as ``residual``; channels-last.
    """
    return _convolution(x, weight, bias, residual, False)


def doubled_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same behind a nearest doubling, of what :func:`fits`.

    ``x`` [N, C, H, W], ``weight`` [2, 2, C', C, 2, 2] of :func:`doubled_weight`, ``bias`` [C'] -> [N, C', 2H, 2W].
    """
    return _convolution(x, weight, bias, None, True)
