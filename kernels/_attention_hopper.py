"""Multi-view self-attention with Hopper's own instructions: FlashAttention-3 in Gluon, for long sequences.

One persistent program on each multiprocessor. A producer warp copies keys and values into a ring of shared
memory with the tensor memory accelerator, straight from the packed tokens; two or three warpgroups, each with 64
queries of the program's tile, multiply asynchronously, so that the exponentials of one block of keys run beside
the products of the next. Source: arXiv 2407.08608.

Tiles rarely fill the multiprocessors evenly (5120 tokens of 2 x 5 heads: 270 tiles of 192 queries for 132), so
those beyond full rounds are cut along the keys into equal shares, computed first; a second kernel adds up the
parts by the online-softmax rule, always in the same order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._triton import dense_box, gl, gluon, gluon_jit, hopper, jit, tl, triton
from ._tuning import Launch

KEYS = 128
"""Keys in a block; the number of tokens must be a multiple."""

SHORTEST = 1024
"""Tokens below which a program for each tile is faster."""

_PART_ROWS = 64
"""Rows of partial results that one program of the adding kernel takes."""


def fits(tokens: Tensor) -> bool:
    """Whether the kernel takes these tokens [B, L, 3, H, D], float16 or bfloat16, D a power of two up to 128."""
    length = tokens.shape[1]
    return (
        gluon is not None
        and tokens.is_cuda
        and torch.cuda.get_device_capability(tokens.device)[0] == 9
        and length >= SHORTEST
        and length % KEYS == 0
        and tokens.is_contiguous()
        and tokens.data_ptr() % 16 == 0
    )


def launches(dim: int) -> list[Launch]:
    """Ways to launch it for heads of ``dim`` numbers: as many warpgroups as the registers allow, or fewer."""
    return [
        Launch.of(KEYS=KEYS, WARPGROUPS=warpgroups, RING=4, REGISTERS=registers)
        for warpgroups, registers in ((3, 160), (2, 240))
        if dim <= 64 or warpgroups == 2
    ]


def attend(tokens: Tensor, out: Tensor, log_sums: Tensor, launch: Launch) -> None:
    """Write the attention of ``tokens`` [B, L, 3, H, D] to ``out`` [B, Q, H*D], ``log_sums`` [B, H, Q] (base 2).

    Q is L, or the number of the first tokens that are queries.
    """
    b, length, _, h, d = tokens.shape
    q_length = out.shape[1]
    rows = 64 * launch["WARPGROUPS"]
    blocks = length // KEYS
    tiles = b * h * triton.cdiv(q_length, rows)
    programs = torch.cuda.get_device_properties(tokens.device).multi_processor_count
    shared_tiles = tiles % programs
    sharers = max(1, min(programs, shared_tiles * blocks))
    parts = torch.empty(sharers, 2, rows, d, dtype=torch.float32, device=tokens.device)
    statistics = torch.empty(sharers, 2, 2, rows, dtype=torch.float32, device=tokens.device)
    numbers = (h, length, q_length, shared_tiles, sharers)
    hopper_kernel[(programs,)](
        *(_box(tokens, size) for size in (64, KEYS)),
        out,
        log_sums,
        parts,
        statistics,
        *numbers,
        tiles // programs,
        math.log2(math.e) / math.sqrt(d),
        D=d,
        **launch.options,
    )
    if shared_tiles:
        smallest_share = shared_tiles * blocks // sharers
        most_parts = triton.next_power_of_2((blocks - 2) // smallest_share + 2)
        rows_at_once = max(1, _PART_ROWS // most_parts)
        add_parts_kernel[(shared_tiles * rows // rows_at_once,)](
            parts,
            statistics,
            out,
            log_sums,
            *numbers,
            D=d,
            KEYS=KEYS,
            QUERIES=rows,
            PARTS=most_parts,
            ROWS=rows_at_once,
        )


def _box(tokens: Tensor, rows: int) -> Any:
    """What copies ``rows`` tokens' D numbers of one head and one of q, k, v."""
    b, length, _, h, d = tokens.shape
    return dense_box(tokens, [b * length, 3 * h * d], [rows, d])


@gluon_jit
def _piece(step, blocks, shared_tiles, sharers):
    """A program's work in one step: for one tile, blocks ``first`` to ``last`` of the keys.

    Steps 0 and 1 are its share of the tiles that are cut, which touches two of them at most (one or both steps
    may be empty); every further step is a whole tile.
    """
    program = gl.program_id(0)
    if step < 2:
        units = shared_tiles * blocks
        start = gl.minimum(program, sharers) * units // sharers
        stop = gl.minimum(program + 1, sharers) * units // sharers
        tile = start // blocks + step
        first = gl.maximum(start - tile * blocks, 0)
        last = gl.minimum(stop - tile * blocks, blocks)
    else:
        tile = shared_tiles + program + (step - 2) * gl.num_programs(0)
        first = 0
        last = blocks
    return tile, first, last


@gluon_jit
def _produce(query_box, key_box, buffers, barriers, sizes):
    """The producer warp: for each piece the queries, then keys and values in turns."""
    queries, ring = buffers
    q_ready, q_read, ready, read = barriers
    heads, length, q_length, shared_tiles, sharers, whole_tiles = sizes
    RING: gl.constexpr = ring.shape[0]
    KEYS: gl.constexpr = ring.shape[1]
    D: gl.constexpr = ring.shape[2]
    WARPGROUPS: gl.constexpr = queries.shape[0]
    ROWS: gl.constexpr = 64 * WARPGROUPS
    tiles = gl.cdiv(q_length, ROWS)
    item = 0
    q_phase = 1
    for step in range(2 + whole_tiles):
        tile, first, last = _piece(step, length // KEYS, shared_tiles, sharers)
        if first < last:
            start = tile // tiles // heads * length
            column = tile // tiles % heads * D
            hopper.mbarrier.wait(q_read, q_phase)
            q_phase ^= 1
            hopper.mbarrier.expect(q_ready, ROWS * D * 2)
            for part in gl.static_range(WARPGROUPS):
                place = [start + tile % tiles * ROWS + part * 64, column]
                hopper.tma.async_copy_global_to_shared(query_box, place, q_ready, queries.index(part))
            for block in range(first, last):
                for part in gl.static_range(1, 3):
                    slot = item % RING
                    hopper.mbarrier.wait(read.index(slot), (item // RING & 1) ^ 1)
                    hopper.mbarrier.expect(ready.index(slot), KEYS * D * 2)
                    place = [start + block * KEYS, column + part * heads * D]
                    hopper.tma.async_copy_global_to_shared(
                        key_box, place, ready.index(slot), ring.index(slot)
                    )
                    item += 1


@gluon_jit
def _consume(part: gl.constexpr, buffers, barriers, results, sizes, scale):
    """A warpgroup: rows ``64 * part`` to ``64 * part + 63`` of each tile."""
    queries, ring = buffers
    q_ready, q_read, ready, read = barriers
    out, log_sums, parts, statistics = results
    heads, length, q_length, shared_tiles, sharers, whole_tiles = sizes
    RING: gl.constexpr = ring.shape[0]
    KEYS: gl.constexpr = ring.shape[1]
    D: gl.constexpr = ring.shape[2]
    ROWS: gl.constexpr = 64 * queries.shape[0]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    tiles = gl.cdiv(q_length, ROWS)
    q = queries.index(part)
    zeros = gl.zeros([64, KEYS], gl.float32, s_layout)
    item = 0  # the keys at hand; their values are the next item
    q_phase = 0
    for step in range(2 + whole_tiles):
        tile, first, last = _piece(step, length // KEYS, shared_tiles, sharers)
        if first < last:
            hopper.mbarrier.wait(q_ready, q_phase)
            q_phase ^= 1
            hopper.mbarrier.wait(ready.index(item % RING), item // RING & 1)
            k = ring.index(item % RING).permute((1, 0))
            s = hopper.warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
            s = hopper.warpgroup_mma_wait(0, deps=[s])
            hopper.mbarrier.arrive(read.index(item % RING))
            peak = gl.max(s, 1) * scale
            e = gl.exp2(s * scale - peak[:, None])
            total = gl.sum(e, 1)
            p = gl.convert_layout(e.to(ring.dtype), p_layout)
            acc = gl.zeros([64, D], gl.float32, o_layout)
            _wait_for_keys(ready, item + 2, first + 1 < last, RING)
            for block in range(first + 1, last):
                item += 2
                # The scores of this block, then the values of the one before, whose weights are ready.
                k = ring.index(item % RING).permute((1, 0))
                s = hopper.warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
                old = item - 1
                hopper.mbarrier.wait(ready.index(old % RING), old // RING & 1)
                acc = hopper.warpgroup_mma(p, ring.index(old % RING), acc, is_async=True)
                s, acc = hopper.warpgroup_mma_wait(1, deps=[s, acc])
                hopper.mbarrier.arrive(read.index(item % RING))
                new_peak = gl.maximum(peak, gl.max(s, 1) * scale)
                e = gl.exp2(s * scale - new_peak[:, None])
                shrink = gl.exp2(peak - new_peak)
                total = total * shrink + gl.sum(e, 1)
                peak = new_peak
                # Stands here because its branch keeps the assembler from waiting for the values any sooner.
                _wait_for_keys(ready, item + 2, block + 1 < last, RING)
                acc, p, e = hopper.warpgroup_mma_wait(0, deps=[acc, p, e])
                hopper.mbarrier.arrive(read.index(old % RING))
                acc = acc * gl.convert_layout(shrink, o_rows)[:, None]
                p = gl.convert_layout(e.to(ring.dtype), p_layout)
            hopper.mbarrier.arrive(q_read)
            old = item + 1
            hopper.mbarrier.wait(ready.index(old % RING), old // RING & 1)
            acc = hopper.warpgroup_mma(p, ring.index(old % RING), acc, is_async=True)
            acc = hopper.warpgroup_mma_wait(0, deps=[acc])
            hopper.mbarrier.arrive(read.index(old % RING))
            item += 2

            d = gl.arange(0, D, gl.SliceLayout(0, o_layout))
            inner = part * 64 + gl.arange(0, 64, o_rows)
            s_inner = part * 64 + gl.arange(0, 64, s_rows)
            if step < 2:
                place = 2 * gl.program_id(0) + step
                gl.store(parts + (place * ROWS + inner)[:, None] * D + d[None, :], acc)
                gl.store(statistics + 2 * place * ROWS + s_inner, peak)
                gl.store(statistics + (2 * place + 1) * ROWS + s_inner, total)
            else:
                row = tile // tiles
                start = tile % tiles * ROWS
                places = ((row // heads).to(gl.int64) * q_length + start + inner) * heads + row % heads
                values = (acc / gl.convert_layout(total, o_rows)[:, None]).to(ring.dtype)
                seen = start + inner < q_length
                gl.store(out + places[:, None] * D + d[None, :], values, mask=seen[:, None])
                places = row.to(gl.int64) * q_length + start + s_inner
                gl.store(log_sums + places, peak + gl.log2(total), mask=start + s_inner < q_length)


@gluon_jit
def _wait_for_keys(ready, item, needed, RING: gl.constexpr):
    hopper.mbarrier.wait(ready.index(item % RING), item // RING & 1, pred=needed)


@gluon_jit
def hopper_kernel(
    query_box,
    key_box,
    out,
    log_sums,
    parts,
    statistics,
    heads,
    length,
    q_length,
    shared_tiles,
    sharers,
    whole_tiles,
    scale,
    D: gl.constexpr,
    KEYS: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    RING: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """Each program's ``whole_tiles`` to ``out`` and ``log_sums``, its share of the others to ``parts``.

    The first ``q_length`` of ``length`` tokens have queries. ``parts`` [sharers, 2, 64 * WARPGROUPS, D] are weighted
    sums of values, ``statistics`` [sharers, 2, 2, 64 * WARPGROUPS] the largest score and the sum of the weights.
    """
    barrier: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    queries = gl.allocate_shared_memory(query_box.dtype, [WARPGROUPS, 64, D], query_box.layout)
    ring = gl.allocate_shared_memory(key_box.dtype, [RING, KEYS, D], key_box.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], barrier)
    q_read = gl.allocate_shared_memory(gl.int64, [1], barrier)
    ready = gl.allocate_shared_memory(gl.int64, [RING, 1], barrier)
    read = gl.allocate_shared_memory(gl.int64, [RING, 1], barrier)
    hopper.mbarrier.init(q_ready, count=1)
    hopper.mbarrier.init(q_read, count=WARPGROUPS)
    for slot in gl.static_range(RING):
        hopper.mbarrier.init(ready.index(slot), count=1)
        hopper.mbarrier.init(read.index(slot), count=WARPGROUPS)
    hopper.fence_async_shared()
    buffers = (queries, ring)
    barriers = (q_ready, q_read, ready, read)
    results = (out, log_sums, parts, statistics)
    sizes = (heads, length, q_length, shared_tiles, sharers, whole_tiles)
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, buffers, barriers, results, sizes, scale)),
                (_consume, (1, buffers, barriers, results, sizes, scale)),
                (_produce, (query_box, key_box, buffers, barriers, sizes)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (0, buffers, barriers, results, sizes, scale)),
                (_consume, (1, buffers, barriers, results, sizes, scale)),
                (_consume, (2, buffers, barriers, results, sizes, scale)),
                (_produce, (query_box, key_box, buffers, barriers, sizes)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )


@jit
def add_parts_kernel(
    parts,
    statistics,
    out,
    log_sums,
    heads,
    length,
    q_length,
    shared_tiles,
    sharers,
    D: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Each program adds up ROWS of the QUERIES rows of a shared tile, of which PARTS programs have parts at most."""
    tile = tl.program_id(0) // (QUERIES // ROWS)
    inner = tl.program_id(0) % (QUERIES // ROWS) * ROWS + tl.arange(0, ROWS)
    blocks = length // KEYS
    units = shared_tiles * blocks
    # The sharer of a unit u is the last one whose share starts at or before u.
    sharer = ((tile * blocks + 1) * sharers - 1) // units + tl.arange(0, PARTS)
    seen = sharer <= ((tile + 1) * blocks * sharers - 1) // units
    place = 2 * sharer + tile - sharer * units // sharers // blocks
    rows = place[:, None] * QUERIES + inner[None, :]
    places = 2 * place[:, None] * QUERIES + inner[None, :]
    peaks = tl.load(statistics + places, mask=seen[:, None], other=float("-inf"))
    totals = tl.load(statistics + places + QUERIES, mask=seen[:, None], other=0.0)
    d = tl.arange(0, D)
    values = tl.load(parts + rows[:, :, None] * D + d[None, None, :], mask=seen[:, None, None], other=0.0)
    peak = tl.max(peaks, 0)
    weights = tl.exp2(peaks - peak[None, :])
    total = tl.sum(totals * weights, 0)
    value = tl.sum(values * weights[:, :, None], 0) / total[:, None]
    tiles = tl.cdiv(q_length, QUERIES)
    row = tile // tiles
    queries = tile % tiles * QUERIES + inner
    inside = queries < q_length
    places = ((row // heads).to(tl.int64) * q_length + queries) * heads + row % heads
    tl.store(out + places[:, None] * D + d[None, :], value.to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(log_sums + row.to(tl.int64) * q_length + queries, peak + tl.log2(total), mask=inside)
