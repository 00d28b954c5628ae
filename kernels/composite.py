"""Volume rendering of packed, lit samples: weights from densities, shading, and sums along rays.

w_i = T_i (1 - exp(-sigma_i d_i)) with T_i = exp(-sum_{j < i} sigma_j d_j) over the samples before i on the
same ray (Max 1995; Mildenhall et al. 2020, equation 3), d_i the sample's length. A ray o + t d with midpoints m_i
and colours c_i, shaded at o + m_i d as in ``shade`` from albedo and unit normal n_i, sees

    colour sum w_i c_i,   normal sum w_i n_i,   opacity O = sum w_i,   depth D = sum w_i m_i,
    z-variance sum w_i (m_i - D)^2,   facing away sum w_i max(n_i.d, 0)^2.

The last, whose weights count as constants, is for the orientation loss (Verbin et al. 2022, equation 11).

Backward, with G_i the gradient by w_i, of whatever comes from it (D's part in the z-variance included):
d sigma_i = d_i (G_i T_{i+1} - sum_{j > i} G_j w_j).

In plain PyTorch a sum along a ray is the difference of one running sum over all samples, taken in float64 so
that it does not lose digits with the number of rays. The kernels walk along each ray, in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from ._composite_kernels import backward_kernel, forward_kernel
from ._triton import KernelBackend, use_triton
from ._tuning import Launch
from .samples import Samples, midpoints
from .shade import ALBEDO, Shading, shade

LAUNCH = Launch.of(RAYS=4, CHUNK=8, warps=1)


@dataclass(frozen=True)
class Composite:
    """What R rays see, without any background."""

    weights: Tensor
    """[N] of the samples, without gradient."""
    colour: Tensor
    """[R, 3]: sum of weight times shaded colour."""
    normal: Tensor | None
    """[R, 3]: sum of weight times normal, where there are normals."""
    opacity: Tensor
    """[R]: sum of the weights."""
    depth: Tensor
    """[R]: sum of weight times midpoint; not divided by the opacity."""
    z_variance: Tensor
    """[R]: sum of weight times (midpoint - depth)^2."""
    facing_away: Tensor | None
    """[R]: sum of weight times max(normal . direction, 0)^2, where there are normals; no gradient by the weights."""


def composite(
    sigma: Tensor,
    albedo: Tensor,
    normal: Tensor | None,
    samples: Samples,
    origins: Tensor,
    directions: Tensor,
    light_positions: Tensor | None = None,
    shading: Shading = ALBEDO,
    *,
    backend: KernelBackend = "auto",
) -> Composite:
    """Render R rays from the density sigma [N], albedo [N, 3] and unit normal [N, 3] (or None) of their samples;
    differentiable in all three.

    sigma >= 0 is per scene unit; origins, unit directions and light positions [R, 3], for which there is no gradient,
    are the rays'. Normals and lights are only needed for a diffuse part. Rays without samples get zeros. Samples in
    buffers of a fixed capacity leave the rows behind them out: weights and gradients there are undefined, and the host
    waits for nothing where the kernels run. They need float32; plain PyTorch takes over for anything else. Raises
    ``ValueError`` for shapes that do not fit, and when normals or lights are needed and missing.

    >>> one, start, end = torch.tensor([1]), torch.tensor([2.0]), torch.tensor([3.0])
    >>> samples = Samples(one, start, end, packed_info=torch.tensor([[0, 0], [0, 1]]))
    >>> rays = torch.zeros(2, 3), torch.tensor([[0.0, 0.0, 1.0]]).expand(2, 3)
    >>> composite(torch.tensor([100.0]), torch.tensor([[0.5, 0.0, 1.0]]), None, samples, *rays).colour
    tensor([[0.0000, 0.0000, 0.0000],
            [0.5000, 0.0000, 1.0000]])
    """
    _check(sigma, albedo, normal, samples, (origins, directions, light_positions), shading)
    rays = (origins, directions, light_positions if shading.needs_normals else None)
    if use_triton(backend, sigma, albedo, normal, *rays, dtypes=(torch.float32,)):
        light = (_on_device(x, sigma) for x in (shading.ambient, shading.diffuse, shading.textureless))
        return Composite(*_Composite.apply(sigma, albedo, normal, samples, *rays, *light))
    exact = samples.trim()
    n = len(exact)
    given = (sigma[:n], albedo[:n], None if normal is None else normal[:n])
    seen = composite_reference(*given, exact, *rays, shading)
    return replace(seen, weights=pad(seen.weights, (0, len(samples) - n)))


def _check(
    sigma: Tensor,
    albedo: Tensor,
    normal: Tensor | None,
    samples: Samples,
    rays: tuple[Tensor | None, ...],
    shading: Shading,
) -> None:
    check_density(sigma, samples)
    wanted = {"albedo": (albedo, len(samples)), "normal": (normal, len(samples))}
    wanted |= {
        name: (tensor, len(samples.packed_info))
        for name, tensor in zip(("origins", "directions", "light_positions"), rays, strict=True)
    }
    for name, (tensor, rows) in wanted.items():
        if tensor is not None and tensor.shape != (rows, 3):
            raise ValueError(f"{name} {tuple(tensor.shape)} must be [{rows}, 3]")
    if shading.needs_normals and (normal is None or rays[-1] is None):
        raise ValueError("diffuse shading needs normals and light positions")


def check_density(sigma: Tensor, samples: Samples) -> None:
    if sigma.shape != samples.t_starts.shape:
        raise ValueError(f"sigma has shape {tuple(sigma.shape)}; there are {len(samples)} samples")


def _on_device(value: float | Tensor, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else like.new_full((1,), float(value))


class Sums(NamedTuple):
    """As the results of :class:`Composite`, with values [R, C] of any kind."""

    weights: Tensor
    values: Tensor
    opacity: Tensor
    depth: Tensor
    z_variance: Tensor


def sum_along_rays(sigma: Tensor, values: Tensor, samples: Samples) -> Sums:
    """Volume rendering of any values [N, C], in plain PyTorch; differentiable in them and in sigma [N].

    For samples in arrays of exactly their number.
    """
    weights = render_weights(sigma, samples)
    middle = (samples.t_starts + samples.t_ends) / 2
    ones = torch.ones_like(middle)
    sums = accumulate(weights, torch.cat((torch.stack((ones, middle), dim=1), values), dim=1), samples)
    depth = sums[:, 1]
    spread = (middle - depth.index_select(0, samples.ray_indices)) ** 2
    z_variance = accumulate(weights, spread[:, None], samples)[:, 0]
    return Sums(weights, sums[:, 2:], sums[:, 0], depth, z_variance)


def composite_reference(
    sigma: Tensor,
    albedo: Tensor,
    normal: Tensor | None,
    samples: Samples,
    origins: Tensor,
    directions: Tensor,
    light_positions: Tensor | None = None,
    shading: Shading = ALBEDO,
    *,
    render: Callable[[Tensor, Tensor, Samples], Sums] = sum_along_rays,
) -> Composite:
    """:func:`composite` in plain PyTorch, for samples in arrays of exactly their number; ``render`` sums up."""
    points = midpoints(origins, directions, samples, backend="torch")
    lights = None if light_positions is None else light_positions.index_select(0, samples.ray_indices)
    colour = shade(albedo, normal, points, lights, shading)
    sums = render(sigma, colour if normal is None else torch.cat((colour, normal), dim=1), samples)
    weights, normal_sum, facing_away = sums.weights.detach(), None, None
    if normal is not None:
        along = (normal * directions.index_select(0, samples.ray_indices)).sum(-1, keepdim=True)
        normal_sum = sums.values[:, 3:]
        facing_away = accumulate(weights, along.clamp(min=0.0).square(), samples)[:, 0]
    return Composite(
        weights, sums.values[:, :3], normal_sum, sums.opacity, sums.depth, sums.z_variance, facing_away
    )


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


class _Composite(torch.autograd.Function):
    """The results in :class:`Composite`'s order."""

    @staticmethod
    def forward(
        ctx: Any,
        sigma: Tensor,
        albedo: Tensor,
        normal: Tensor | None,
        samples: Samples,
        *rays: Tensor | None,
    ) -> Any:
        """``rays``: origins, directions, lights or None; ambient, diffuse, textureless [1]."""
        n_rays = len(samples.packed_info)
        intervals = (samples.t_starts, samples.t_ends, samples.packed_info)
        given = [
            None if tensor is None else tensor.contiguous() for tensor in (albedo, normal, *intervals, *rays)
        ]
        weights = sigma.new_empty(len(samples))
        passed = torch.empty_like(weights)
        colour = sigma.new_empty(n_rays, 3)
        normal_sum = None if normal is None else torch.empty_like(colour)
        opacity, depth, z_variance = (sigma.new_empty(n_rays) for _ in range(3))
        facing_away = None if normal is None else torch.empty_like(opacity)
        results = (weights, colour, normal_sum, opacity, depth, z_variance, facing_away)
        forward_kernel[_grid(n_rays)](
            sigma.contiguous(), *given, weights, passed, *results[1:], n_rays, **LAUNCH.options
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(weights)
        ctx.save_for_backward(*given, weights, passed, opacity, depth)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _weights: None, *grads: Tensor | None) -> Any:
        albedo, normal, _, _, packed_info, _, _, lights, *_ = ctx.saved_tensors
        by_colour, by_normal_sum, _, _, _, by_facing_away = grads
        learns_normal = by_normal_sum is not None or by_facing_away is not None
        learns_normal |= by_colour is not None and lights is not None
        grad_sigma = albedo.new_empty(len(albedo))
        grad_albedo = torch.empty_like(albedo) if ctx.needs_input_grad[1] and by_colour is not None else None
        grad_normal = torch.empty_like(normal) if ctx.needs_input_grad[2] and learns_normal else None
        n_rays = len(packed_info)
        backward_kernel[_grid(n_rays)](
            *ctx.saved_tensors,
            *(None if grad is None else grad.contiguous() for grad in grads),
            *(grad_sigma, grad_albedo, grad_normal, n_rays),
            **LAUNCH.options,
        )
        return grad_sigma, grad_albedo, grad_normal, *(None for _ in range(7))


def _grid(n_rays: int) -> tuple[int]:
    return (-(-n_rays // LAUNCH["RAYS"]),)
