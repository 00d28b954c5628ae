"""Dropping the samples that cannot be seen: too little light arrives there, or too little is absorbed.

With the optical depth d_i = sigma_i (t_end - t_start), sample i stays if the light that arrives, T_i =
exp(-sum_{j < i} d_j) over the samples before i on the same ray, is at least ``transmittance_stop`` and the
part of it that is absorbed, 1 - exp(-d_i), at least ``alpha_least``. The rule is that of nerfacc 0.5's
``render_visibility_from_density``. As T falls along a ray, the kernel leaves it where the light ends. It goes
over the rays twice, to count the samples and to write them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._transmittance import absorbed, load_rays, optical_depth
from ._triton import KernelBackend, jit, tl, use_triton
from ._tuning import Launch
from .composite import check_density, sum_before
from .samples import Samples, allot, buffers, share_out

LAUNCH = Launch.of(RAYS=16, CHUNK=16, warps=4)


def prune(
    sigma: Tensor,
    samples: Samples,
    transmittance_stop: float,
    alpha_least: Tensor | float,
    *,
    capacity: int | None = None,
    backend: KernelBackend = "auto",
) -> Samples:
    """The samples with densities sigma [N] where that much light arrives and that much of it is absorbed.

    sigma >= 0 per scene unit; ``alpha_least`` a number or a scalar on the device. With a ``capacity`` the
    samples come in buffers of that many rows and nothing waits for the device; without it there are as many
    rows as samples. Not differentiable. Raises ``ValueError`` if the number of densities is not that of the
    samples.

    >>> one, start, end = torch.tensor([0]), torch.tensor([2.0]), torch.tensor([3.0])
    >>> samples = Samples(one, start, end, packed_info=torch.tensor([[0, 1]]))
    >>> len(prune(torch.tensor([0.5]), samples, 1e-4, 0.3)), len(prune(torch.tensor([0.5]), samples, 1e-4, 0.4))
    (1, 0)
    """
    check_density(sigma, samples)
    with torch.no_grad():
        if use_triton(backend, sigma, samples.t_starts):
            return _prune_triton(sigma, samples, transmittance_stop, alpha_least, capacity)
        samples = samples.trim()
        sigma = sigma[: len(samples)]
        kept = samples.keep(visible(sigma, samples, transmittance_stop, alpha_least))
    return kept if capacity is None else kept.within(capacity)


def visible(
    sigma: Tensor, samples: Samples, transmittance_stop: float, alpha_least: Tensor | float
) -> Tensor:
    """Mask [N] of the samples that :func:`prune` keeps, in plain PyTorch.

    For samples in arrays of exactly their number. Raises ``ValueError`` as :func:`prune` does.
    """
    check_density(sigma, samples)
    with torch.no_grad():
        depth = sigma * (samples.t_ends - samples.t_starts)
        passed = torch.exp(-sum_before(depth, samples)).to(sigma.dtype)
        return (passed >= transmittance_stop) & (-torch.expm1(-depth) >= alpha_least)


def _prune_triton(
    sigma: Tensor,
    samples: Samples,
    transmittance_stop: float,
    alpha_least: Tensor | float,
    capacity: int | None,
) -> Samples:
    n_rays = len(samples.packed_info)
    blocks = -(-n_rays // LAUNCH["RAYS"])
    counts, sums = (torch.empty(n, dtype=torch.int32, device=sigma.device) for n in (n_rays, blocks))
    if not isinstance(alpha_least, Tensor):
        alpha_least = torch.full((), alpha_least, device=sigma.device)

    def launch(*out: Tensor | None) -> None:
        _prune_kernel[(blocks,)](
            sigma.contiguous(),
            samples.t_starts.contiguous(),
            samples.t_ends.contiguous(),
            samples.packed_info.contiguous(),
            alpha_least,
            counts,
            sums,
            *out,
            n_rays,
            transmittance_stop,
            **LAUNCH.options,
        )

    launch(*[None] * 6)
    allotment = allot(counts, sums, LAUNCH["RAYS"], capacity)
    kept = buffers(allotment, n_rays, capacity)
    launch(*allotment, kept.ray_indices, kept.t_starts, kept.t_ends, kept.packed_info)
    return kept


@jit
def _prune_kernel(
    p_sigma,
    p_t_starts,
    p_t_ends,
    p_packed_info,
    p_alpha_least,
    p_counts,
    p_sums,
    p_begins,
    p_totals,
    p_kept_rays,
    p_kept_starts,
    p_kept_ends,
    p_kept_info,
    n_rays,
    transmittance_stop,
    RAYS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Count the samples that RAYS rays keep; where ``p_begins`` is given, write them.

    Blocks are [CHUNK, RAYS]: where the compiler sees no order among addresses it puts neighbouring threads along
    the first axis, and neighbours along a ray are written side by side.
    """
    ray, m_ray, begin, count = load_rays(tl.program_id(0), p_packed_info, n_rays, RAYS)
    alpha_least = tl.load(p_alpha_least)
    limit = tl.full((RAYS,), 2**31 - 1, dtype=tl.int32)
    if p_begins is not None:
        limit, target = share_out(p_counts, p_begins, p_totals, p_kept_info, ray, m_ray)
    depth_before = tl.zeros((RAYS,), dtype=tl.float32)
    kept = tl.zeros((RAYS,), dtype=tl.int32)
    done = 0
    while done < tl.max(count):
        place = done + tl.arange(0, CHUNK)
        m = place[:, None] < count[None, :]
        row = begin[None, :] + place[:, None]
        start = tl.load(p_t_starts + row, mask=m, other=0.0)
        end = tl.load(p_t_ends + row, mask=m, other=0.0)
        depth = optical_depth(p_sigma, end - start, row, m)
        passed = tl.exp(depth - depth_before[None, :] - tl.cumsum(depth, axis=0))
        seen = (m & (passed >= transmittance_stop) & (absorbed(depth) >= alpha_least)).to(tl.int32)
        if p_begins is not None:
            number = kept[None, :] + tl.cumsum(seen, axis=0) - 1
            m_kept = (seen == 1) & (number < limit[None, :])
            to = target[None, :] + number
            tl.store(p_kept_rays + to, tl.broadcast_to(ray[None, :], (CHUNK, RAYS)), mask=m_kept)
            tl.store(p_kept_starts + to, start, mask=m_kept)
            tl.store(p_kept_ends + to, end, mask=m_kept)
        kept += tl.sum(seen, axis=0)
        depth_before += tl.sum(depth, axis=0)
        # Behind the last light, or with its share written, a ray is over.
        count = tl.where((tl.exp(-depth_before) >= transmittance_stop) & (kept < limit), count, 0)
        done += CHUNK
    if p_begins is None:
        tl.store(p_counts + ray, kept, mask=m_ray)
        tl.store(p_sums + tl.program_id(0), tl.sum(kept))
