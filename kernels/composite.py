"""Volume rendering of packed samples: weights from densities, and sums along rays.

w_i = T_i (1 - exp(-sigma_i d_i)) with T_i = exp(-sum_{j < i} sigma_j d_j) over the samples before i on the
same ray (Max 1995; Mildenhall et al. 2020, equation 3), d_i the sample's length. A ray with midpoints m_i
sees sum w_i times value, opacity O = sum w_i, depth D = sum w_i m_i and z-variance sum w_i (m_i - D)^2.

Backward, with G_i the gradient by w_i, of whatever comes from it (D's part in the z-variance included):
d sigma_i = d_i (G_i T_{i+1} - sum_{j > i} G_j w_j).

In plain PyTorch a sum along a ray is the difference of one running sum over all samples, taken in float64 so
that it does not lose digits with the number of rays. The kernels walk along each ray, in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from ._transmittance import absorbed, load_intervals, load_rays, optical_depth
from ._triton import KernelBackend, jit, tl, use_triton
from ._tuning import Launch
from .samples import Samples

LAUNCH = Launch.of(RAYS=4, CHUNK=8, warps=1)


@dataclass(frozen=True)
class Composite:
    """What R rays see, without any background."""

    weights: Tensor
    """[N] of the samples; zero in the rows of a buffer that are no samples."""
    values: Tensor
    """[R, C]: sum of weight times value."""
    opacity: Tensor
    """[R]: sum of the weights."""
    depth: Tensor
    """[R]: sum of weight times midpoint; not divided by the opacity."""
    z_variance: Tensor
    """[R]: sum of weight times (midpoint - depth)^2."""


def composite(
    sigma: Tensor, values: Tensor, samples: Samples, *, backend: KernelBackend = "auto"
) -> Composite:
    """Render R rays from densities sigma [N] and any values [N, C] of their samples; differentiable in both.

    sigma >= 0 is per scene unit. Rays without samples get zeros. The kernel's results are float32, its
    gradients have the dtypes of sigma and the values. Raises ``ValueError`` if the number of densities or of
    values is not that of the samples.

    >>> one, start, end = torch.tensor([1]), torch.tensor([2.0]), torch.tensor([3.0])
    >>> samples = Samples(one, start, end, packed_info=torch.tensor([[0, 0], [0, 1]]))
    >>> composite(torch.tensor([100.0]), torch.tensor([[0.5]]), samples).values
    tensor([[0.0000],
            [0.5000]])
    """
    check_density(sigma, samples)
    if values.dim() != 2 or len(values) != len(samples):
        raise ValueError(f"values have shape {tuple(values.shape)}; they must be [{len(samples)}, channels]")
    if use_triton(backend, sigma, values):
        return Composite(*_Composite.apply(sigma, values, samples))
    exact = samples.trim()
    n = len(exact)
    seen = composite_reference(sigma[:n], values[:n], exact)
    return replace(seen, weights=pad(seen.weights, (0, len(samples) - n)))


def check_density(sigma: Tensor, samples: Samples) -> None:
    if sigma.shape != samples.t_starts.shape:
        raise ValueError(f"sigma has shape {tuple(sigma.shape)}; there are {len(samples)} samples")


def composite_reference(sigma: Tensor, values: Tensor, samples: Samples) -> Composite:
    """The same in plain PyTorch, for samples in arrays of exactly their number."""
    weights = render_weights(sigma, samples)
    middle = (samples.t_starts + samples.t_ends) / 2
    ones = torch.ones_like(middle)
    sums = accumulate(weights, torch.cat((torch.stack((ones, middle), dim=1), values), dim=1), samples)
    depth = sums[:, 1]
    spread = (middle - depth.index_select(0, samples.ray_indices)) ** 2
    z_variance = accumulate(weights, spread[:, None], samples)[:, 0]
    return Composite(weights, sums[:, 2:], sums[:, 0], depth, z_variance)


def render_weights(sigma: Tensor, samples: Samples) -> Tensor:
    """Weights w [N] of samples with densities sigma [N]; differentiable in sigma.

    Plain PyTorch, for samples in arrays of exactly their number. Raises ``ValueError`` if the number of
    densities is not that of the samples.
    """
    check_density(sigma, samples)
    return _Weights.apply(sigma, samples)


def accumulate(weights: Tensor, values: Tensor, samples: Samples) -> Tensor:
    """Sum of weights [N] times values [N, C] along each ray -> [R, C]; differentiable in both.

    Plain PyTorch, for samples in arrays of exactly their number.
    """
    total = values.new_zeros(values.shape[1], samples.packed_info.shape[0])
    return total.index_add(1, samples.ray_indices, weights * values.t()).t()


def sum_before(x: Tensor, samples: Samples) -> Tensor:
    """Sum of x [N] over the earlier samples of the same ray, float64."""
    running = x.double().cumsum(0)
    exclusive = running - x
    begin = samples.packed_info[:, 0].index_select(0, samples.ray_indices)
    return exclusive - exclusive.index_select(0, begin)


def _sum_after(x: Tensor, samples: Samples) -> Tensor:
    """Sum of x [N] over the later samples of the same ray, float64."""
    running = x.double().cumsum(0)
    end = samples.packed_info.sum(1).sub_(1).index_select(0, samples.ray_indices)
    return running.index_select(0, end) - running


class _Weights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sigma: Tensor, samples: Samples) -> Tensor:
        length = samples.t_ends - samples.t_starts
        depth = sigma * length
        passed = torch.exp(-sum_before(depth, samples)).to(sigma.dtype)
        weights = passed * -torch.expm1(-depth)
        ctx.samples = samples
        ctx.save_for_backward(weights, passed - weights, length)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        weights, passed_after, length = ctx.saved_tensors
        behind = _sum_after(grad * weights, ctx.samples).to(grad.dtype)
        return (grad * passed_after - behind) * length, None


@jit
def _forward_kernel(
    p_sigma,
    p_values,
    p_t_starts,
    p_t_ends,
    p_packed_info,
    p_weights,
    p_passed,
    p_seen,
    p_opacity,
    p_depth,
    p_z_variance,
    n_rays,
    CHANNELS: tl.constexpr,
    CHANNELS_PADDED: tl.constexpr,
    RAYS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    ray, m_ray, begin, count = load_rays(tl.program_id(0), p_packed_info, n_rays, RAYS)
    channel = tl.arange(0, CHANNELS_PADDED)
    m_channel = channel < CHANNELS
    depth_before = tl.zeros((RAYS,), dtype=tl.float32)
    opacity = tl.zeros((RAYS,), dtype=tl.float32)
    # Of the midpoints under the weights: the mean and the sum of squares around it, which keeps the digits
    # that the sum of squares around zero would lose.
    mean = tl.zeros((RAYS,), dtype=tl.float32)
    around = tl.zeros((RAYS,), dtype=tl.float32)
    seen = tl.zeros((RAYS, CHANNELS_PADDED), dtype=tl.float32)
    longest = tl.max(count)
    done = 0
    while done < longest:
        place = done + tl.arange(0, CHUNK)
        m = place[None, :] < count[:, None]
        row = (begin[:, None] + place[None, :]).to(tl.int64)
        middle, length = load_intervals(p_t_starts, p_t_ends, row, m)
        depth = optical_depth(p_sigma, length, row, m)
        depth_behind = depth_before[:, None] + tl.cumsum(depth, axis=1)
        weight = tl.exp(depth - depth_behind) * absorbed(depth)
        tl.store(p_weights + row, weight, mask=m)
        tl.store(p_passed + row, tl.exp(-depth_behind), mask=m)
        m_value = m[:, :, None] & m_channel[None, None, :]
        value = tl.load(
            p_values + row[:, :, None] * CHANNELS + channel[None, None, :], mask=m_value, other=0.0
        )
        seen += tl.sum(weight[:, :, None] * value.to(tl.float32), axis=1)

        new = tl.sum(weight, axis=1)
        total = opacity + new
        new_mean = tl.sum(weight * middle, axis=1) / tl.maximum(new, 1e-30)
        part = new / tl.maximum(total, 1e-30)
        away = middle - new_mean[:, None]
        shift = new_mean - mean
        around += tl.sum(weight * away * away, axis=1) + shift * shift * opacity * part
        mean += shift * part
        opacity = total
        depth_before += tl.sum(depth, axis=1)
        done += CHUNK
    m_seen = m_ray[:, None] & m_channel[None, :]
    tl.store(p_seen + ray[:, None] * CHANNELS + channel[None, :], seen, mask=m_seen)
    depth = opacity * mean
    tl.store(p_opacity + ray, opacity, mask=m_ray)
    tl.store(p_depth + ray, depth, mask=m_ray)
    tl.store(p_z_variance + ray, around + opacity * (mean - depth) * (mean - depth), mask=m_ray)


@jit
def _backward_kernel(
    p_values,
    p_t_starts,
    p_t_ends,
    p_packed_info,
    p_weights,
    p_passed,
    p_opacity,
    p_depth,
    p_grad_weights,
    p_grad_seen,
    p_grad_opacity,
    p_grad_depth,
    p_grad_z_variance,
    p_grad_sigma,
    p_grad_values,
    n_rays,
    CHANNELS: tl.constexpr,
    CHANNELS_PADDED: tl.constexpr,
    RAYS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Gradients of outputs are given, or None for zero."""
    ray, m_ray, begin, count = load_rays(tl.program_id(0), p_packed_info, n_rays, RAYS)
    channel = tl.arange(0, CHANNELS_PADDED)
    m_channel = channel < CHANNELS
    if p_grad_seen is not None:
        m_seen = m_ray[:, None] & m_channel[None, :]
        grad_seen = tl.load(p_grad_seen + ray[:, None] * CHANNELS + channel[None, :], mask=m_seen, other=0.0)
    if p_grad_opacity is not None:
        grad_opacity = tl.load(p_grad_opacity + ray, mask=m_ray, other=0.0)
    if p_grad_depth is not None:
        grad_depth = tl.load(p_grad_depth + ray, mask=m_ray, other=0.0)
    if p_grad_z_variance is not None:
        grad_z_variance = tl.load(p_grad_z_variance + ray, mask=m_ray, other=0.0)
        depth = tl.load(p_depth + ray, mask=m_ray, other=0.0)
        see_through = 1.0 - tl.load(p_opacity + ray, mask=m_ray, other=0.0)
    # From the last sample to the first: of the samples behind, the sum of weight times gradient by it.
    behind = tl.zeros((RAYS,), dtype=tl.float32)
    left = tl.cdiv(tl.max(count), CHUNK) * CHUNK
    while left > 0:
        left -= CHUNK
        place = left + tl.arange(0, CHUNK)
        m = place[None, :] < count[:, None]
        row = (begin[:, None] + place[None, :]).to(tl.int64)
        middle, length = load_intervals(p_t_starts, p_t_ends, row, m)
        weight = tl.load(p_weights + row, mask=m, other=0.0)
        grad = tl.zeros((RAYS, CHUNK), dtype=tl.float32)
        if p_grad_weights is not None:
            grad += tl.load(p_grad_weights + row, mask=m, other=0.0)
        if p_grad_opacity is not None:
            grad += grad_opacity[:, None]
        if p_grad_depth is not None:
            grad += grad_depth[:, None] * middle
        if p_grad_z_variance is not None:
            away = middle - depth[:, None]
            grad += grad_z_variance[:, None] * (away * away - 2.0 * middle * (depth * see_through)[:, None])
        if p_grad_seen is not None:
            m_value = m[:, :, None] & m_channel[None, None, :]
            place_value = row[:, :, None] * CHANNELS + channel[None, None, :]
            value = tl.load(p_values + place_value, mask=m_value, other=0.0).to(tl.float32)
            grad += tl.sum(value * grad_seen[:, None, :], axis=2)
            if p_grad_values is not None:
                tl.store(
                    p_grad_values + place_value, weight[:, :, None] * grad_seen[:, None, :], mask=m_value
                )
        share = tl.where(m, grad * weight, 0.0)
        later = behind[:, None] + tl.cumsum(share, axis=1, reverse=True) - share
        passed = tl.load(p_passed + row, mask=m, other=0.0)
        tl.store(p_grad_sigma + row, length * (grad * passed - later), mask=m)
        behind += tl.sum(share, axis=1)


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sigma: Tensor, values: Tensor, samples: Samples) -> Any:
        n_rays, channels = len(samples.packed_info), values.shape[1]
        values = values.contiguous()
        intervals = [x.contiguous() for x in (samples.t_starts, samples.t_ends, samples.packed_info)]
        # Rows of a buffer that are no samples have no weight.
        fresh = sigma.new_empty if samples.count is None else sigma.new_zeros
        weights = fresh(len(samples), dtype=torch.float32)
        passed = torch.empty_like(weights)
        seen = weights.new_empty(n_rays, channels)
        opacity, depth, z_variance = (weights.new_empty(n_rays) for _ in range(3))
        _forward_kernel[_grid(n_rays)](
            sigma.contiguous(),
            values,
            *intervals,
            weights,
            passed,
            seen,
            opacity,
            depth,
            z_variance,
            n_rays,
            **_channels(channels),
            **LAUNCH.options,
        )
        ctx.set_materialize_grads(False)
        ctx.padded, ctx.sigma_dtype = samples.count is not None, sigma.dtype
        ctx.save_for_backward(values, *intervals, weights, passed, opacity, depth)
        return weights, seen, opacity, depth, z_variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        saved = ctx.saved_tensors
        values, weights, n_rays = saved[0], saved[4], len(saved[6])
        fresh = torch.zeros_like if ctx.padded else torch.empty_like
        grad_sigma = fresh(weights, dtype=ctx.sigma_dtype)
        grad_values = fresh(values) if ctx.needs_input_grad[1] and grads[1] is not None else None
        _backward_kernel[_grid(n_rays)](
            *saved,
            *(None if grad is None else grad.contiguous() for grad in grads),
            grad_sigma,
            grad_values,
            n_rays,
            **_channels(values.shape[1]),
            **LAUNCH.options,
        )
        return grad_sigma, grad_values, None


def _grid(n_rays: int) -> tuple[int]:
    return (-(-n_rays // LAUNCH["RAYS"]),)


def _channels(channels: int) -> dict[str, int]:
    return {"CHANNELS": channels, "CHANNELS_PADDED": 1 << max(channels - 1, 0).bit_length()}
