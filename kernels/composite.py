"""Volume rendering of packed samples: weights from densities, and sums along rays.

w_i = T_i (1 - exp(-sigma_i d_i)) with T_i = exp(-sum_{j < i} sigma_j d_j) over the samples before i on the
same ray
(Max 1995; Mildenhall et al. 2020, equation 3). Sums along a ray are differences of one running sum over all
samples, taken in float64 so that they do not lose digits with the number of rays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .ray_march import Samples


@dataclass(frozen=True)
class Composite:
    """What R rays see, without any background."""

    weights: Tensor
    """[N] of the samples."""
    values: Tensor
    """[R, C]: sum of weight times value."""
    opacity: Tensor
    """[R]: sum of the weights."""
    depth: Tensor
    """[R]: sum of weight times midpoint; not divided by the opacity."""
    z_variance: Tensor
    """[R]: sum of weight times (midpoint - depth)^2."""


def _before(x: Tensor, samples: Samples) -> Tensor:
    """Sum of x [N] over the earlier samples of the same ray, float64."""
    running = x.double().cumsum(0)
    exclusive = running - x
    begin = samples.packed_info[:, 0].index_select(0, samples.ray_indices)
    return exclusive - exclusive.index_select(0, begin)


def _after(x: Tensor, samples: Samples) -> Tensor:
    """Sum of x [N] over the later samples of the same ray, float64."""
    running = x.double().cumsum(0)
    end = samples.packed_info.sum(1).sub_(1).index_select(0, samples.ray_indices)
    return running.index_select(0, end) - running


class _Weights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sigma: Tensor, samples: Samples) -> Tensor:
        length = samples.t_ends - samples.t_starts
        depth = sigma * length
        passed = torch.exp(-_before(depth, samples)).to(sigma.dtype)
        weights = passed * -torch.expm1(-depth)
        ctx.samples = samples
        ctx.save_for_backward(weights, passed - weights, length)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        weights, passed_after, length = ctx.saved_tensors
        behind = _after(grad * weights, ctx.samples).to(grad.dtype)
        return (grad * passed_after - behind) * length, None


def _check(sigma: Tensor, samples: Samples) -> None:
    if sigma.shape != samples.t_starts.shape:
        raise ValueError(f"sigma has shape {tuple(sigma.shape)}; there are {len(samples)} samples")


def render_weights(sigma: Tensor, samples: Samples) -> Tensor:
    """Weights w [N] of samples with densities sigma [N] >= 0 per scene unit; differentiable in sigma.

    Raises ``ValueError`` if the number of densities is not that of the samples.
    """
    _check(sigma, samples)
    return _Weights.apply(sigma, samples)


def accumulate(weights: Tensor, values: Tensor, samples: Samples) -> Tensor:
    """Sum of weights [N] times values [N, C] along each ray -> [R, C]; differentiable in both."""
    total = values.new_zeros(values.shape[1], samples.packed_info.shape[0])
    return total.index_add(1, samples.ray_indices, weights * values.t()).t()


def composite(sigma: Tensor, values: Tensor, samples: Samples) -> Composite:
    """Render R rays from densities sigma [N] and any values [N, C] of their samples; differentiable in both.

    Rays without samples get zeros. Raises ``ValueError`` if the number of densities is not that of the
    samples.

    >>> one, start, end = torch.tensor([1]), torch.tensor([2.0]), torch.tensor([3.0])
    >>> samples = Samples(one, start, end, packed_info=torch.tensor([[0, 0], [0, 1]]))
    >>> composite(torch.tensor([100.0]), torch.tensor([[0.5]]), samples).values
    tensor([[0.0000],
            [0.5000]])
    """
    weights = render_weights(sigma, samples)
    middle = (samples.t_starts + samples.t_ends) / 2
    ones = torch.ones_like(middle)
    sums = accumulate(weights, torch.cat((torch.stack((ones, middle), dim=1), values), dim=1), samples)
    depth = sums[:, 1]
    spread = (middle - depth.index_select(0, samples.ray_indices)) ** 2
    z_variance = accumulate(weights, spread[:, None], samples)[:, 0]
    return Composite(weights, sums[:, 2:], sums[:, 0], depth, z_variance)


def visible(
    sigma: Tensor, samples: Samples, transmittance_stop: float, alpha_least: Tensor | float
) -> Tensor:
    """Mask [N] of the samples where at least that much light arrives and at least that much is absorbed.

    sigma [N] as in :func:`render_weights`; not differentiable. The same rule as nerfacc 0.5's
    ``render_visibility_from_density``.
    """
    _check(sigma, samples)
    with torch.no_grad():
        depth = sigma * (samples.t_ends - samples.t_starts)
        passed = torch.exp(-_before(depth, samples)).to(sigma.dtype)
        return (passed >= transmittance_stop) & (-torch.expm1(-depth) >= alpha_least)
