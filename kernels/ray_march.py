"""Marching rays through an occupancy grid: which intervals of each ray have to be looked at.

Ray r carries the fixed lattice t_k = near_r + k step. Interval [t_k, t_{k+1}] is a sample if its midpoint
lies in the box [-1, 1]^3 and in an occupied cell. This is the traversal of nerfacc 0.5's ``traverse_grids``
with one level and no cone; that walks cell by cell where this looks at midpoints, so that an interval whose
midpoint lies within rounding of a cell border may differ.

The kernels walk cell by cell too, as a way to skip: all midpoints that lie well inside one cell share its
bit, and all that lie well inside an empty block of cells are none. They go over the rays twice, to count the
samples and to write them.
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

LAUNCH = Launch.of(RAYS=32, CHUNK=16, warps=1)


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
    return pack(*(torch.cat(column) for column in zip(*parts, strict=True)), n_rays)


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
    blocks = -(-n_rays // LAUNCH["RAYS"])
    counts, sums = (torch.empty(n, dtype=torch.int32, device=origins.device) for n in (n_rays, blocks))

    def launch(*out: Tensor | None) -> None:
        _march_kernel[(blocks,)](
            origins.contiguous(),
            directions.contiguous(),
            None if near is None else near.contiguous(),
            bits.words,
            counts,
            sums,
            *out,
            n_rays,
            bits.resolution,
            word_count(bits.resolution),
            step,
            lattice_points(step),
            **LAUNCH.options,
        )

    launch(*[None] * 6)
    allotment = allot(counts, sums, LAUNCH["RAYS"], capacity)
    samples = buffers(allotment, n_rays, capacity)
    launch(*allotment, samples.ray_indices, samples.t_starts, samples.t_ends, samples.packed_info)
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
def _march_kernel(
    p_origins,
    p_directions,
    p_near,
    p_words,
    p_counts,
    p_sums,
    p_begins,
    p_totals,
    p_ray_indices,
    p_t_starts,
    p_t_ends,
    p_packed_info,
    n_rays,
    grid,
    cell_words,
    step,
    points,
    RAYS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Count the samples of RAYS rays; where ``p_begins`` is given, write them."""
    ray = tl.program_id(0) * RAYS + tl.arange(0, RAYS)
    m_ray = ray < n_rays
    near = tl.zeros((RAYS,), dtype=tl.float32)
    if p_near is not None:
        near = tl.load(p_near + ray, mask=m_ray, other=0.0)
    half = grid / 2.0
    ox = tl.load(p_origins + ray * 3, mask=m_ray, other=0.0)
    oy = tl.load(p_origins + ray * 3 + 1, mask=m_ray, other=0.0)
    oz = tl.load(p_origins + ray * 3 + 2, mask=m_ray, other=0.0)
    dx = tl.load(p_directions + ray * 3, mask=m_ray, other=1.0)
    dy = tl.load(p_directions + ray * 3 + 1, mask=m_ray, other=1.0)
    dz = tl.load(p_directions + ray * 3 + 2, mask=m_ray, other=1.0)
    enter_x, leave_x, inverse_x = _slab(ox, dx)
    enter_y, leave_y, inverse_y = _slab(oy, dy)
    enter_z, leave_z, inverse_z = _slab(oz, dz)
    enter = tl.maximum(tl.maximum(enter_x, enter_y), enter_z)
    leave = tl.minimum(tl.minimum(leave_x, leave_y), leave_z)

    # Lattice points are counted in floating point, where far ones cannot overflow.
    k = tl.maximum(tl.ceil((enter - near) / step - 0.5) - 1.0, 0.0)
    last = tl.minimum(k + points, tl.ceil((leave - near) / step - 0.5) + 1.0)
    # Both may be too generous by rounding and by the point added to make up for it.
    for _ in tl.static_range(3):
        k = tl.where(near + (k + 0.5) * step < enter, k + 1.0, k)
        last = tl.where(near + (last - 0.5) * step >= leave, last - 1.0, last)
    last = tl.where(m_ray & (enter < leave), last, 0.0)

    # From here on in cells.
    ox, oy, oz = (ox + 1.0) * half, (oy + 1.0) * half, (oz + 1.0) * half
    dx, dy, dz = dx * half, dy * half, dz * half
    inverse_x, inverse_y, inverse_z = inverse_x / half, inverse_y / half, inverse_z / half
    top = grid - 1.0
    blocks = (grid + CELLS - 1) // CELLS

    limit = tl.full((RAYS,), 2**31 - 1, dtype=tl.int32)
    if p_begins is not None:
        limit, begin = share_out(p_counts, p_begins, p_totals, p_packed_info, ray, m_ray)
    found = tl.zeros((RAYS,), dtype=tl.int32)
    m = (k < last) & (found < limit)
    while tl.max(m.to(tl.int32)) > 0:
        middle = near + (k + 0.5) * step
        x = tl.minimum(tl.maximum(ox + dx * middle, 0.0), top)
        y = tl.minimum(tl.maximum(oy + dy * middle, 0.0), top)
        z = tl.minimum(tl.maximum(oz + dz * middle, 0.0), top)
        cx, cy, cz = x.to(tl.int32), y.to(tl.int32), z.to(tl.int32)
        occupied = _bit(p_words, cx, cy, cz, grid, m)
        block = _bit(p_words + cell_words, cx // CELLS, cy // CELLS, cz // CELLS, blocks, m)
        edge = tl.where(block == 1, 1.0, CELLS)
        ahead = tl.minimum(
            tl.minimum(_ahead(x, ox, inverse_x, edge), _ahead(y, oy, inverse_y, edge)),
            _ahead(z, oz, inverse_z, edge),
        )
        # Every midpoint before ``ahead`` lies in the same cell or empty block as this one.
        after = tl.minimum(tl.maximum(tl.ceil((ahead - near) / step - 0.5), k + 1.0), last)
        if p_begins is not None:
            after = tl.where(occupied == 1, tl.minimum(after, k + CHUNK), after)
            number = tl.arange(0, CHUNK)[None, :]
            run = tl.where(m & (occupied == 1), tl.minimum((after - k).to(tl.int32), limit - found), 0)
            m_sample = number < run[:, None]
            start = near[:, None] + (k[:, None] + number) * step
            row = (begin + found)[:, None] + number
            tl.store(p_ray_indices + row, tl.broadcast_to(ray[:, None], (RAYS, CHUNK)), mask=m_sample)
            tl.store(p_t_starts + row, start, mask=m_sample)
            tl.store(p_t_ends + row, start + step, mask=m_sample)
            found += run
        else:
            found += tl.where(m & (occupied == 1), (after - k).to(tl.int32), 0)
        k = after
        m = (k < last) & (found < limit)
    if p_begins is None:
        tl.store(p_counts + ray, found, mask=m_ray)
        tl.store(p_sums + tl.program_id(0), tl.sum(found))


@jit
def _slab(origin, direction):
    """Where a ray enters and leaves the box along one axis, and the inverse of its direction there."""
    # An axis along which the ray does not move would divide by zero.
    inverse_of = tl.where(tl.abs(direction) < 1e-10, 1e-10, direction)
    to_low = tl.div_rn(-1.0 - origin, inverse_of)
    to_high = tl.div_rn(1.0 - origin, inverse_of)
    return tl.minimum(to_low, to_high), tl.maximum(to_low, to_high), 1.0 / inverse_of
