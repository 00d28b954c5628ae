"""The radiance field at points: hash grid, two perceptrons, density bias, activations and analytic normal.

With h = hash_encode((x + 1) / 2) and bias-free perceptrons of one hidden ReLU layer,

    raw    = w2 . relu(W1 h) + strength (1 - |x| / radius),   sigma  = softplus(raw)
    albedo = sigmoid(V2 relu(V1 h)),                          normal = -g / |g| with g = d raw / d x

and, J_f being the slope of feature f in the unit cube (half as wide as the box that x lies in),

    s = d raw / d h = W1^T (w2 * [W1 h > 0]),                 g = 1/2 sum_f s_f J_f - strength / radius x / |x|.

Source: ImageDream's released fusion configuration (threestudio's implicit volume with a "magic3d" density
bias), after Lin et al. 2022, "Magic3D".

The loss reaches the parameters through sigma, albedo and normal. A ReLU has no curvature, so the normal's
gradient dg acts through ds = 1/2 J dg and dJ_f = 1/2 s_f dg alone: W1 and w2 see a second input ds beside h,
and the table gets, at each corner of weight w_c, the sum of both orders in one addition,
w_c dh_f + 1/2 s_f (grad w_c . dg). There is no gradient by x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ._field_launch import Settings, launch_backward, launch_forward
from ._grid_lookup import MOST_NUMBERS, GridLevel
from ._triton import KernelBackend, use_triton
from .hash_grid import hash_encode, hash_encode_jacobian
from .perceptron import perceptron, perceptron_slope

MOST_HIDDEN = 128

Weights = tuple[Tensor, Tensor]
"""A perceptron's matrices: inner [H, I] and outer [O, H]."""

Pullback = Callable[[Tensor], Tensor]
"""Made for N points: takes a gradient by their features [N, I] to the gradient by the unit cube [N, 3]."""

Encode = Callable[[Tensor, bool], tuple[Tensor, Pullback | None]]
"""Features [N, I] of N points of the unit cube and, if asked for, their pullback."""


class FieldValues(NamedTuple):
    """What a field is at N points: density [N], albedo [N, 3] in [0, 1], unit normal [N, 3] or None."""

    sigma: Tensor
    albedo: Tensor
    normal: Tensor | None


def unit_cube(points: Tensor) -> Tensor:
    """Points of the box [-1, 1]^3 in the unit cube of the hash grid."""
    return (points + 1.0) / 2.0


def length(vectors: Tensor) -> Tensor:
    """[N, 3] -> [N, 1]. Sums columns: a reduction along rows of three runs ten times slower."""
    x, y, z = vectors.unbind(1)
    return (x * x + y * y + z * z).sqrt()[:, None]


def normalise(vectors: Tensor) -> Tensor:
    """Unit vectors [N, 3] of vectors [N, 3]; zero, with zero gradient, for the zero vector."""
    x, y, z = vectors.unbind(1)
    return vectors * (x * x + y * y + z * z).clamp_min(1e-24).rsqrt()[:, None]


def evaluate(
    points: Tensor,
    encode: Encode,
    density: Weights,
    colour: Weights,
    *,
    blob_strength: float,
    blob_radius: float,
    with_normal: bool = True,
    count: Tensor | None = None,
) -> FieldValues:
    """:func:`radiance_field` in plain PyTorch, over any encoding; as often differentiable as that is."""
    points, valid = _first(points, count)
    features, pullback = encode(unit_cube(points), with_normal)
    normal = None
    if pullback is None:
        raw = perceptron(features, *density)
    else:
        raw, feature_slope = perceptron_slope(features, *density)
        # The unit cube is half as wide as the box: d unit / d point = 1 / 2.
        slope = 0.5 * pullback(feature_slope) - normalise(points) * (blob_strength / blob_radius)
        # Softplus scales the slope by a positive number, which the direction does not see.
        normal = normalise(-slope)
    sigma = _activated(points, raw, blob_strength, blob_radius)
    albedo = torch.sigmoid(perceptron(features, *colour))
    if valid is None:
        return FieldValues(sigma, albedo, normal)
    rows = valid[:, None]
    return FieldValues(
        sigma.where(valid, 0.0), albedo.where(rows, 0.0), None if normal is None else normal.where(rows, 0.0)
    )


def evaluate_density(
    points: Tensor,
    encode: Encode,
    density: Weights,
    *,
    blob_strength: float,
    blob_radius: float,
    count: Tensor | None = None,
) -> Tensor:
    """:func:`radiance_density` in plain PyTorch, over any encoding."""
    points, valid = _first(points, count)
    features, _ = encode(unit_cube(points), False)
    sigma = _activated(points, perceptron(features, *density), blob_strength, blob_radius)
    return sigma if valid is None else sigma.where(valid, 0.0)


def _first(points: Tensor, count: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The points, the origin behind the first ``count`` of them, and a mask [N] of those."""
    if count is None:
        return points, None
    valid = torch.arange(len(points), device=points.device) < count
    return points.where(valid[:, None], 0.0), valid


def _activated(points: Tensor, raw: Tensor, strength: float, radius: float) -> Tensor:
    return nn.functional.softplus(raw[:, 0] + strength * (1.0 - length(points)[:, 0] / radius))


def radiance_field_reference(
    points: Tensor,
    table: Tensor,
    levels: Sequence[GridLevel],
    density: Weights,
    colour: Weights,
    *,
    blob_strength: float = 10.0,
    blob_radius: float = 0.5,
    with_normal: bool = True,
    count: Tensor | None = None,
) -> FieldValues:
    """:func:`radiance_field` in plain PyTorch, in float32 or float64."""
    return evaluate(
        points,
        partial(_encode, table=table, levels=levels),
        density,
        colour,
        blob_strength=blob_strength,
        blob_radius=blob_radius,
        with_normal=with_normal,
        count=count,
    )


def radiance_density_reference(
    points: Tensor,
    table: Tensor,
    levels: Sequence[GridLevel],
    density: Weights,
    *,
    blob_strength: float = 10.0,
    blob_radius: float = 0.5,
    count: Tensor | None = None,
) -> Tensor:
    """:func:`radiance_density` in plain PyTorch, in float32 or float64."""
    return evaluate_density(
        points,
        partial(_encode, table=table, levels=levels),
        density,
        blob_strength=blob_strength,
        blob_radius=blob_radius,
        count=count,
    )


def _encode(
    x: Tensor, with_pullback: bool, *, table: Tensor, levels: Sequence[GridLevel]
) -> tuple[Tensor, Pullback | None]:
    if not with_pullback:
        return hash_encode(x, table, levels, backend="torch"), None
    features, jacobian = hash_encode_jacobian(x, table, levels, backend="torch")
    # [I, 3, N]: the contiguous memory behind the view, so that the sum below runs along it.
    slopes = jacobian.permute(1, 2, 0)
    return features, lambda grad: (grad.t()[:, None] * slopes).sum(0).t()


class _RadianceField(torch.autograd.Function):
    """points [N, 3], table [P, 2], four matrices -> sigma [N], albedo [N, 3], normal [N, 3] or None."""

    @staticmethod
    def forward(
        ctx: Any,
        points: Tensor,
        table: Tensor,
        inner: Tensor,
        outer: Tensor,
        colour_inner: Tensor,
        colour_outer: Tensor,
        count: Tensor | None,
        settings: Settings,
        with_normal: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        entries = table.to(settings.lookup)
        weights = (inner, outer, colour_inner, colour_outer)
        sigma, albedo = points.new_empty(len(points)), torch.empty_like(points)
        normal = torch.empty_like(points) if with_normal else None
        inverse = torch.empty_like(sigma) if with_normal and any(ctx.needs_input_grad) else None
        launch_forward(points, entries, weights, count, settings, (sigma, albedo, normal, inverse))
        ctx.save_for_backward(points, entries, *weights, count, sigma, albedo, normal, inverse)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return sigma, albedo, normal

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        grads = launch_backward(ctx.saved_tensors, upstream, ctx.settings)
        return None, *grads, None, None, None


def _check(
    points: Tensor, table: Tensor, levels: Sequence[GridLevel], nets: dict[str, Weights], count: Tensor | None
) -> None:
    if points.dim() != 2 or points.shape[1] != 3:
        raise ValueError(f"points have shape {tuple(points.shape)}; they must be [N, 3]")
    rows = levels[-1].offset + levels[-1].entries
    if table.dim() != 2 or table.shape[0] != rows:
        raise ValueError(f"table has shape {tuple(table.shape)}; these levels need [{rows}, features]")
    features = len(levels) * table.shape[1]
    for name, (inner, outer) in nets.items():
        wanted = (inner.shape[0], features), (1 if name == "density" else 3, inner.shape[0])
        if (tuple(inner.shape), tuple(outer.shape)) != wanted:
            raise ValueError(
                f"{name} has matrices {tuple(inner.shape)} and {tuple(outer.shape)}; for {features} features they"
                f" must be {wanted[0]} and {wanted[1]}"
            )
    if points.requires_grad and torch.is_grad_enabled():
        raise ValueError("points require a gradient, which is not provided: detach them")
    if count is not None and (count.shape != (1,) or count.dtype != torch.int32):
        raise ValueError(f"count is {count.dtype} {tuple(count.shape)}; it must be int32 [1]")


def _takes_kernel(backend: KernelBackend, points: Tensor, table: Tensor, *weights: Tensor) -> bool:
    known = table.shape[1] == 2 and table.numel() < MOST_NUMBERS and weights[0].shape[0] <= MOST_HIDDEN
    if backend == "triton" and not known:
        raise ValueError(
            f"backend 'triton' takes two features, fewer than 2^31 numbers in the table and at most {MOST_HIDDEN}"
            f" hidden units; the table is {tuple(table.shape)}, inner {tuple(weights[0].shape)}"
        )
    return use_triton(backend, points, table, *weights, dtypes=(torch.float32,)) and known


def _settings(
    table: Tensor, levels: Sequence[GridLevel], strength: float, radius: float, lookup: torch.dtype | None
) -> Settings:
    return Settings(tuple(levels), strength, radius, lookup or table.dtype)


def radiance_field(
    points: Tensor,
    table: Tensor,
    levels: Sequence[GridLevel],
    density: Weights,
    colour: Weights,
    *,
    blob_strength: float = 10.0,
    blob_radius: float = 0.5,
    with_normal: bool = True,
    lookup: torch.dtype | None = None,
    count: Tensor | None = None,
    backend: KernelBackend = "auto",
) -> FieldValues:
    """Density [N], albedo [N, 3] and, if asked for, unit normal [N, 3] at points [N, 3] of the box [-1, 1]^3.

    table [P, F] with ``levels`` from :func:`~.hash_grid.grid_levels`; ``density`` is inner [H, L F] and outer
    [1, H], ``colour`` [H, L F] and [3, H]. Differentiable once in the table and the matrices, through all three
    results. Density is per scene unit; a normal points out of the matter and is zero, with zero gradient, where
    the density has no slope.

    ``lookup`` (float16 or bfloat16) makes the kernel read a copy of the table rounded for this call, which
    halves the memory traffic; plain PyTorch reads the table as it is. With ``count``, int32 [1] on the same
    device, only the first ``count`` points are evaluated: rows behind them are undefined and their gradients
    ignored, and the host never waits for it. The kernels need float32, two features and at most 128 hidden units;
    anything else is computed by plain PyTorch. Their gradients are summed in any order: the last bits differ
    from run to run, but under :func:`torch.use_deterministic_algorithms`. Then they are summed in steps of 2^-44,
    and must stay within +-2^19.

    Raises ``ValueError`` for shapes that do not fit, and if the points require a gradient.

    >>> from imagedream_rt.kernels.hash_grid import grid_levels
    >>> levels = grid_levels(1, 9, 2, 1.0)
    >>> nets = [(torch.zeros(4, 2), torch.zeros(outputs, 4)) for outputs in (1, 3)]
    >>> values = radiance_field(torch.tensor([[0.5, 0.0, 0.0]]), torch.zeros(8, 2), levels, *nets)
    >>> values.albedo[0].tolist(), values.normal[0, 0].item()
    ([0.5, 0.5, 0.5], 1.0)
    """
    _check(points, table, levels, {"density": density, "colour": colour}, count)
    if _takes_kernel(backend, points, table, *density, *colour):
        settings = _settings(table, levels, blob_strength, blob_radius, lookup)
        weights = [matrix.contiguous() for matrix in (*density, *colour)]
        found = _RadianceField.apply(
            points.contiguous(), table.contiguous(), *weights, count, settings, with_normal
        )
        return FieldValues(*found)
    return radiance_field_reference(
        points,
        table,
        levels,
        density,
        colour,
        blob_strength=blob_strength,
        blob_radius=blob_radius,
        with_normal=with_normal,
        count=count,
    )


def radiance_density(
    points: Tensor,
    table: Tensor,
    levels: Sequence[GridLevel],
    density: Weights,
    *,
    blob_strength: float = 10.0,
    blob_radius: float = 0.5,
    lookup: torch.dtype | None = None,
    count: Tensor | None = None,
    backend: KernelBackend = "auto",
) -> Tensor:
    """The density [N] alone, without a gradient from the kernel; arguments as of :func:`radiance_field`.

    For occupancy and pruning. Where a gradient is needed plain PyTorch computes it.
    """
    _check(points, table, levels, {"density": density}, count)
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (table, *density))
    if learns and backend == "triton":
        raise ValueError("the density alone has no gradient by backend 'triton': use radiance_field")
    if not learns and _takes_kernel(backend, points, table, *density):
        settings = _settings(table, levels, blob_strength, blob_radius, lookup)
        sigma = points.new_empty(len(points))
        weights = (*(matrix.contiguous() for matrix in density), None, None)
        entries = table.to(settings.lookup).contiguous()
        launch_forward(points.contiguous(), entries, weights, count, settings, (sigma, None, None, None))
        return sigma
    return radiance_density_reference(
        points, table, levels, density, blob_strength=blob_strength, blob_radius=blob_radius, count=count
    )
