"""Marching rays through an occupancy grid: which intervals of each ray have to be looked at.

Ray r carries the fixed lattice t_k = near_r + k step. Interval [t_k, t_{k+1}] is a sample if its midpoint
lies in the box [-1, 1]^3 and in an occupied cell. This is the traversal of nerfacc 0.5's ``traverse_grids``
with one level and no cone; that walks cell by cell where this looks at midpoints, so that an interval whose
midpoint lies within rounding of a cell border may differ.

The kernels go over the rays twice. To count, each ray walks cell by cell too: all midpoints that lie well
inside one cell share its bit, and all that lie well inside an empty block of cells are none. To write, the
lattice between a ray's first and last sample is tested point by point, which keeps the writes side by side.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._triton import KernelBackend, constant, jit, tl, use_triton
from ._tuning import Launch
from .occupancy_bits import EDGE, pack_occupancy, word_count
from .samples import MOST_SAMPLES, Samples, allot, buffers, pack, share_out

BOX_DIAGONAL = 2 * math.sqrt(3.0)

LATTICE_POINTS = 2**22
"""Most lattice points that plain PyTorch looks at together."""

WRITE = Launch.of(RAYS=8, CHUNK=32, warps=4)
COUNT = Launch.of(RAYS=32, WRITTEN=WRITE["RAYS"], warps=1)


def march(
    origins: Tensor,
    directions: Tensor,
    occupied: Tensor,
    step: float,
    near: Tensor | None = None,
    *,
    capacity: int | None = None,
    backend: KernelBackend = "auto",
) -> Samples:
    """Samples of rays in the occupied cells of the box [-1, 1]^3.

    origins, directions [R, 3] (unit directions), occupied bool [G, G, G] indexed (x, y, z), ``step`` the
    interval's length in scene units, near [R] where each ray's lattice begins (default 0). With a
    ``capacity`` the samples come in buffers of that many rows and nothing waits for the device; without it
    there are as many rows as samples. Not differentiable. Raises ``ValueError`` for shapes that do not fit.

    >>> occupied = torch.ones(1, 1, 1, dtype=torch.bool)
    >>> s = march(torch.tensor([[0.0, -2.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]]), occupied, step=1.0)
    >>> s.t_starts, s.packed_info
    (tensor([1., 2.]), tensor([[0, 2]]))
    """
    if origins.shape != directions.shape or origins.dim() != 2 or origins.shape[1] != 3:
        raise ValueError(
            f"origins {tuple(origins.shape)}, directions {tuple(directions.shape)}; both must be [R, 3]"
        )
    if occupied.dim() != 3 or occupied.dtype != torch.bool or len(set(occupied.shape)) != 1:
        raise ValueError(f"occupied is {occupied.dtype} {tuple(occupied.shape)}; it must be bool [G, G, G]")
    if not step > 0:
        raise ValueError(f"step is {step}; it must be positive")
    if near is not None and near.shape != origins.shape[:1]:
        raise ValueError(f"near is {tuple(near.shape)}; it must be [{origins.shape[0]}]")
    with torch.no_grad():
        if use_triton(backend, origins, directions, near, dtypes=(torch.float32,)):
            return _march_triton(origins, directions, occupied, step, near, capacity)
        samples = march_reference(origins, directions, occupied, step, near)
    return samples if capacity is None else samples.within(capacity)


def march_reference(
    origins: Tensor, directions: Tensor, occupied: Tensor, step: float, near: Tensor | None = None
) -> Samples:
    """The same in plain PyTorch, which evaluates the whole lattice of a few rays at once."""
    n_rays = origins.shape[0]
    if near is None:
        near = origins.new_zeros(n_rays)
    chunk = max(1, LATTICE_POINTS // lattice_points(step))
    parts = []
    for start in range(0, max(n_rays, 1), chunk):
        rows = slice(start, start + chunk)
        part = _march_lattice(origins[rows], directions[rows], occupied, step, near[rows])
        parts.append((part[0] + start, *part[1:]))
    ray_indices, t_starts, t_ends = (torch.cat(column) for column in zip(*parts, strict=True))
    return pack(ray_indices, t_starts, t_ends, n_rays)


def lattice_points(step: float) -> int:
    """How many lattice points a ray may have in the box.

    One is added in front and one behind: rounding must not lose the first or the last interval.
    """
    return math.ceil(BOX_DIAGONAL / step) + 2


def _march_lattice(
    origins: Tensor, directions: Tensor, occupied: Tensor, step: float, near: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grid = occupied.shape[0]
    # An axis along which the ray does not move would divide by zero; the slab test only needs a huge
    # quotient.
    safe = torch.where(directions.abs() < 1e-10, torch.full_like(directions, 1e-10), directions)
    to_low, to_high = (-1.0 - origins) / safe, (1.0 - origins) / safe
    enter = torch.minimum(to_low, to_high).amax(dim=1)
    leave = torch.maximum(to_low, to_high).amin(dim=1)
    first = ((enter - near) / step - 0.5).ceil().sub_(1.0).clamp_min_(0.0)
    k = first[:, None] + torch.arange(lattice_points(step), device=origins.device, dtype=origins.dtype)
    middle = torch.add(near[:, None], k + 0.5, alpha=step)
    inside = (middle >= enter[:, None]) & (middle < leave[:, None])
    cell = torch.zeros(middle.shape, dtype=torch.int64, device=origins.device)
    for axis in range(3):
        start, slope = (origins[:, axis] + 1.0) * (grid / 2), directions[:, axis] * (grid / 2)
        coordinate = torch.addcmul(start[:, None], slope[:, None], middle).clamp_(0, grid - 1)
        cell.mul_(grid).add_(coordinate.to(torch.int64))
    inside &= occupied.reshape(-1).take(cell)
    ray_indices, column = inside.nonzero(as_tuple=True)
    t_starts = near[ray_indices] + k[ray_indices, column] * step
    return ray_indices, t_starts, t_starts + step


def _march_triton(
    origins: Tensor,
    directions: Tensor,
    occupied: Tensor,
    step: float,
    near: Tensor | None,
    capacity: int | None,
) -> Samples:
    n_rays = origins.shape[0]
    if n_rays * lattice_points(step) > MOST_SAMPLES:
        raise ValueError(f"{n_rays} rays of up to {lattice_points(step)} samples are too many for one call")
    bits = pack_occupancy(occupied, backend="triton")
    blocks = -(-n_rays // WRITE["RAYS"])
    new = bits.words.new_empty
    counts, sums, spans = new(n_rays), new(blocks), new(n_rays, 2, dtype=torch.float32)
    origins, directions = origins.contiguous(), directions.contiguous()
    if near is not None:
        near = near.contiguous()
    grid = (bits.words, bits.resolution, word_count(bits.resolution))
    lattice = (step, lattice_points(step))
    _count_kernel[(-(-n_rays // COUNT["RAYS"]),)](
        origins, directions, near, *grid, *lattice, counts, sums, spans, n_rays, blocks, **COUNT.options
    )
    allotment = allot(counts, sums, WRITE["RAYS"], capacity)
    samples = buffers(allotment, n_rays, capacity)
    _write_kernel[(blocks,)](
        origins,
        directions,
        near,
        bits.words,
        bits.resolution,
        step,
        counts,
        spans,
        *allotment,
        samples.ray_indices,
        samples.t_starts,
        samples.t_ends,
        samples.packed_info,
        n_rays,
        **WRITE.options,
    )
    return samples


MARGIN = constant(1e-3)
"""In cells: midpoints so close to a border are looked at one by one, whatever rounding does to them."""

CELLS = constant(EDGE)


@jit
def _bit(p_words, x, y, z, grid, m):
    cell = (x * grid + y) * grid + z
    return (tl.load(p_words + (cell >> 5), mask=m, other=0) >> (cell & 31)) & 1


@jit
def _ahead(coordinate, start, inverse, edge):
    """Distance along the ray at which it has almost left the block of ``edge`` cells, by one axis."""
    low = tl.floor(coordinate / edge) * edge
    return (tl.where(inverse > 0, low + edge - MARGIN, low + MARGIN) - start) * inverse


@jit
def _load_rays(p_origins, p_directions, p_near, ray, m_ray):
    """Origins and directions of rays, and where their lattices begin."""
    near = tl.zeros(ray.shape, dtype=tl.float32)
    if p_near is not None:
        near = tl.load(p_near + ray, mask=m_ray, other=0.0)
    ox = tl.load(p_origins + ray * 3, mask=m_ray, other=0.0)
    oy = tl.load(p_origins + ray * 3 + 1, mask=m_ray, other=0.0)
    oz = tl.load(p_origins + ray * 3 + 2, mask=m_ray, other=0.0)
    dx = tl.load(p_directions + ray * 3, mask=m_ray, other=1.0)
    dy = tl.load(p_directions + ray * 3 + 1, mask=m_ray, other=1.0)
    dz = tl.load(p_directions + ray * 3 + 2, mask=m_ray, other=1.0)
    return ox, oy, oz, dx, dy, dz, near


@jit
def _middle(near, k, step):
    """Where along the ray the middle of an interval lies."""
    # Fused by name: both kernels must round alike, for one writes what the other counted.
    return tl.fma(k + 0.5, step, near)


@jit
def _cell(start, slope, middle, grid):
    """The coordinate of a point in cells, by one axis."""
    return tl.minimum(tl.maximum(tl.fma(slope, middle, start), 0.0), grid - 1.0)


@jit
def _count_kernel(
    p_origins,
    p_directions,
    p_near,
    p_words,
    grid,
    cell_words,
    step,
    points,
    p_counts,
    p_sums,
    p_spans,
    n_rays,
    n_sums,
    RAYS: tl.constexpr,
    WRITTEN: tl.constexpr,
):
    """How many samples RAYS rays have, and between which points of the lattice they lie.

    The numbers are also summed over WRITTEN rays, those that are written by one program.
    """
    ray = tl.program_id(0) * RAYS + tl.arange(0, RAYS)
    m_ray = ray < n_rays
    ox, oy, oz, dx, dy, dz, near = _load_rays(p_origins, p_directions, p_near, ray, m_ray)
    enter_x, leave_x, inverse_x = _slab(ox, dx)
    enter_y, leave_y, inverse_y = _slab(oy, dy)
    enter_z, leave_z, inverse_z = _slab(oz, dz)
    enter = tl.maximum(tl.maximum(enter_x, enter_y), enter_z)
    leave = tl.minimum(tl.minimum(leave_x, leave_y), leave_z)

    # Points of the lattice are numbered in floating point, where far ones cannot overflow.
    k = tl.maximum(tl.ceil((enter - near) / step - 0.5) - 1.0, 0.0)
    last = tl.minimum(k + points, tl.ceil((leave - near) / step - 0.5) + 1.0)
    # Both may be too generous by rounding and by the point added to make up for it.
    for _ in tl.static_range(3):
        k = tl.where(_middle(near, k, step) < enter, k + 1.0, k)
        last = tl.where(_middle(near, last - 1.0, step) >= leave, last - 1.0, last)
    last = tl.where(m_ray & (enter < leave), last, 0.0)

    # From here on in cells.
    half = grid / 2.0
    ox, oy, oz = (ox + 1.0) * half, (oy + 1.0) * half, (oz + 1.0) * half
    dx, dy, dz = dx * half, dy * half, dz * half
    inverse_x, inverse_y, inverse_z = inverse_x / half, inverse_y / half, inverse_z / half
    blocks = (grid + CELLS - 1) // CELLS
    count = tl.zeros((RAYS,), dtype=tl.int32)
    first = tl.zeros((RAYS,), dtype=tl.float32)
    end = tl.zeros((RAYS,), dtype=tl.float32)
    m = k < last
    while tl.max(m.to(tl.int32)) > 0:
        middle = _middle(near, k, step)
        x, y, z = _cell(ox, dx, middle, grid), _cell(oy, dy, middle, grid), _cell(oz, dz, middle, grid)
        cx, cy, cz = x.to(tl.int32), y.to(tl.int32), z.to(tl.int32)
        occupied = m & (_bit(p_words, cx, cy, cz, grid, m) == 1)
        block = _bit(p_words + cell_words, cx // CELLS, cy // CELLS, cz // CELLS, blocks, m)
        edge = tl.where(block == 1, 1.0, CELLS)
        ahead = tl.minimum(
            tl.minimum(_ahead(x, ox, inverse_x, edge), _ahead(y, oy, inverse_y, edge)),
            _ahead(z, oz, inverse_z, edge),
        )
        # Every midpoint before ``ahead`` lies in the same cell or empty block as this one.
        after = tl.minimum(tl.maximum(tl.ceil((ahead - near) / step - 0.5), k + 1.0), last)
        first = tl.where(occupied & (count == 0), k, first)
        count += tl.where(occupied, (after - k).to(tl.int32), 0)
        end = tl.where(occupied, after, end)
        k = after
        m = k < last
    tl.store(p_counts + ray, count, mask=m_ray)
    block = tl.program_id(0) * (RAYS // WRITTEN) + tl.arange(0, RAYS // WRITTEN)
    sums = tl.sum(tl.reshape(count, (RAYS // WRITTEN, WRITTEN)), axis=1)
    tl.store(p_sums + block, sums, mask=block < n_sums)
    tl.store(p_spans + ray * 2, first, mask=m_ray)
    tl.store(p_spans + ray * 2 + 1, end, mask=m_ray)


@jit
def _write_kernel(
    p_origins,
    p_directions,
    p_near,
    p_words,
    grid,
    step,
    p_counts,
    p_spans,
    p_begins,
    p_totals,
    p_ray_indices,
    p_t_starts,
    p_t_ends,
    p_packed_info,
    n_rays,
    RAYS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write the samples of RAYS rays, CHUNK lattice points of each at a time.

    Blocks are [CHUNK, RAYS]: where the compiler sees no order among addresses it puts neighbouring threads along
    the first axis, and neighbours along a ray are written side by side.
    """
    ray = tl.program_id(0) * RAYS + tl.arange(0, RAYS)
    m_ray = ray < n_rays
    limit, begin = share_out(p_counts, p_begins, p_totals, p_packed_info, ray, m_ray)
    k = tl.load(p_spans + ray * 2, mask=m_ray, other=0.0)
    end = tl.where(limit > 0, tl.load(p_spans + ray * 2 + 1, mask=m_ray, other=0.0), 0.0)
    ox, oy, oz, dx, dy, dz, near = _load_rays(p_origins, p_directions, p_near, ray, m_ray)
    half = grid / 2.0
    ox, oy, oz = ((ox + 1.0) * half)[None, :], ((oy + 1.0) * half)[None, :], ((oz + 1.0) * half)[None, :]
    dx, dy, dz = (dx * half)[None, :], (dy * half)[None, :], (dz * half)[None, :]
    written = tl.zeros((RAYS,), dtype=tl.int32)
    longest = tl.max(end - k)
    done = 0
    while done < longest:
        point = (k + done)[None, :] + tl.arange(0, CHUNK)[:, None].to(tl.float32)
        m = point < end[None, :]
        middle = _middle(near[None, :], point, step)
        x, y, z = _cell(ox, dx, middle, grid), _cell(oy, dy, middle, grid), _cell(oz, dz, middle, grid)
        sample = tl.where(m, _bit(p_words, x.to(tl.int32), y.to(tl.int32), z.to(tl.int32), grid, m), 0)
        number = written[None, :] + tl.cumsum(sample, axis=0) - 1
        m_sample = (sample == 1) & (number < limit[None, :])
        start = near[None, :] + point * step
        row = begin[None, :] + number
        tl.store(p_ray_indices + row, tl.broadcast_to(ray[None, :], (CHUNK, RAYS)), mask=m_sample)
        tl.store(p_t_starts + row, start, mask=m_sample)
        tl.store(p_t_ends + row, start + step, mask=m_sample)
        written += tl.sum(sample, axis=0)
        done += CHUNK


@jit
def _slab(origin, direction):
    """Where a ray enters and leaves the box along one axis, and the inverse of its direction there."""
    # An axis along which the ray does not move would divide by zero.
    inverse_of = tl.where(tl.abs(direction) < 1e-10, 1e-10, direction)
    to_low = tl.div_rn(-1.0 - origin, inverse_of)
    to_high = tl.div_rn(1.0 - origin, inverse_of)
    return tl.minimum(to_low, to_high), tl.maximum(to_low, to_high), 1.0 / inverse_of
