"""Densities along rays as far as light reaches: what pruning needs, without the dark.

sigma_i is the radiance field's density at the midpoint of sample i where the light that arrives, T_i =
exp(-sum_{j < i} sigma_j d_j) over the samples before i on the same ray, is at least ``transmittance_stop``. No
sample behind is seen, so that its density need not be known; before opaque matter that spares most of the
field's evaluations (Mueller et al. 2022, appendix C). Plain PyTorch, where they cannot be spared, computes all.

A program walks along a few rays together, a few samples of each at a time, and evaluates the field on its way; then
along a few others, with the perceptron at hand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._field_launch import programs_at_once
from ._field_network import (
    count_levels,
    density_at,
    field_levels,
    load_field_levels,
    load_inner,
    load_outer,
    load_vectors,
    split,
    transposed,
)
from ._grid_lookup import GridLevel
from ._transmittance import DARK, load_intervals, load_rays
from ._triton import KernelBackend, jit, tl, use_triton
from ._tuning import Launch
from .radiance_field import MOST_HIDDEN, Weights, radiance_density
from .samples import Samples, midpoints

LAUNCH = Launch.of(RAYS=8, CHUNK=8, warps=4, stages=1)


def lit_density(
    origins: Tensor,
    directions: Tensor,
    samples: Samples,
    transmittance_stop: float,
    table: Tensor,
    levels: Sequence[GridLevel],
    density: Weights,
    *,
    blob_strength: float = 10.0,
    blob_radius: float = 0.5,
    lookup: torch.dtype | None = None,
    backend: KernelBackend = "auto",
) -> Tensor:
    """Densities [N] of samples on rays with origins and directions [R, 3]; in the dark they may be 0 instead.

    The field is that of :func:`~.radiance_field.radiance_density`, with its ``table``, ``levels``, ``density``
    and ``lookup``. Rows of a buffer that are no samples get 0. Not differentiable. The kernel needs float32, two
    features and at most 128 hidden units; otherwise plain PyTorch computes all densities. Raises ``ValueError``
    if backend "triton" is asked for something else.
    """
    known = table.shape[1] == 2 and density[0].shape[0] <= MOST_HIDDEN
    if backend == "triton" and not known:
        raise ValueError(
            f"backend 'triton' takes two features and at most {MOST_HIDDEN} hidden units;"
            f" the table is {tuple(table.shape)}, inner {tuple(density[0].shape)}"
        )
    with torch.no_grad():
        if known and use_triton(backend, origins, directions, table, *density, dtypes=(torch.float32,)):
            entries, bias = table.to(lookup or table.dtype), (blob_strength, blob_radius)
            return _lit_density_triton(
                origins, directions, samples, transmittance_stop, entries, tuple(levels), density, bias
            )
        return radiance_density(
            midpoints(origins, directions, samples),
            table,
            levels,
            density,
            blob_strength=blob_strength,
            blob_radius=blob_radius,
            count=samples.count,
            backend="torch",
        )


def _lit_density_triton(
    origins: Tensor,
    directions: Tensor,
    samples: Samples,
    transmittance_stop: float,
    table: Tensor,
    levels: tuple[GridLevel, ...],
    density: Weights,
    bias: tuple[float, float],
) -> Tensor:
    n_rays = len(samples.packed_info)
    hidden, features = density[0].shape
    intervals = (samples.t_starts, samples.t_ends, samples.packed_info)
    sigma = torch.zeros(len(samples), device=origins.device)
    # An odd number of programs: with an even one some would get one column of the picture, full or empty, alone.
    programs = programs_at_once(origins.device) | 1
    _lit_density_kernel[(min(programs, -(-n_rays // LAUNCH["RAYS"])),)](
        *(tensor.contiguous() for tensor in (origins, directions, *intervals, table)),
        field_levels(levels, origins.device),
        *(matrix.contiguous() for matrix in density),
        sigma,
        n_rays,
        transmittance_stop,
        *bias,
        LEVELS=count_levels(levels),
        WIDTH_IN=features,
        H=hidden,
        HIDDEN=max(16, 1 << (hidden - 1).bit_length()),
        **LAUNCH.options,
    )
    return sigma


@jit
def _lit_density_kernel(
    p_origins,
    p_directions,
    p_t_starts,
    p_t_ends,
    p_packed_info,
    p_table,
    p_levels,
    p_inner,
    p_outer,
    p_sigma,
    n_rays,
    transmittance_stop,
    strength,
    radius,
    LEVELS: tl.constexpr,
    WIDTH_IN: tl.constexpr,
    H: tl.constexpr,
    HIDDEN: tl.constexpr,
    RAYS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    BLOCK: tl.constexpr = RAYS * CHUNK
    level = load_field_levels(p_levels, LEVELS)
    inner = transposed(split(load_inner(p_inner, H, WIDTH_IN, HIDDEN, 2 * LEVELS)))
    outer = load_outer(p_outer, 0, H, HIDDEN)
    block, blocks = tl.program_id(0), tl.cdiv(n_rays, RAYS)
    while block < blocks:
        ray, m_ray, begin, count = load_rays(block, p_packed_info, n_rays, RAYS)
        ox, oy, oz = load_vectors(p_origins, ray, m_ray)
        dx, dy, dz = load_vectors(p_directions, ray, m_ray)
        depth_before = tl.zeros((RAYS,), dtype=tl.float32)
        longest = tl.max(count)
        done = 0
        while done < longest:
            place = done + tl.arange(0, CHUNK)
            m = place[None, :] < count[:, None]
            row = begin[:, None] + place[None, :]
            middle, length = load_intervals(p_t_starts, p_t_ends, row, m)
            # Where there is no sample, the field is looked up at the ray's origin.
            x = tl.reshape(ox[:, None] + dx[:, None] * middle, (BLOCK,))
            y = tl.reshape(oy[:, None] + dy[:, None] * middle, (BLOCK,))
            z = tl.reshape(oz[:, None] + dz[:, None] * middle, (BLOCK,))
            sigma = density_at(p_table, level, inner, outer, x, y, z, strength, radius, BLOCK, LEVELS)
            sigma = tl.reshape(sigma, (RAYS, CHUNK))
            tl.store(p_sigma + row, sigma, mask=m)
            depth_before += tl.sum(tl.minimum(sigma * length, DARK), axis=1)
            count = tl.where(tl.exp(-depth_before) >= transmittance_stop, count, 0)
            longest = tl.max(count)
            done += CHUNK
        block += tl.num_programs(0)
