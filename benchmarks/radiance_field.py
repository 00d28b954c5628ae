"""The official radiance field: density alone, everything with normals, and the gradients of everything.

Points are samples of camera rays that enter a ball, in their order along the rays: those that the renderer keeps in
the last stage, and for the density those that marching finds before anything is dropped. Bytes count each gather or
addition at a corner by itself, however many of them a cache answers: eight corners of each of 16 levels per point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.config import OFFICIAL
from ..kernels.hash_grid import grid_levels, hash_encode, hash_encode_jacobian
from ..kernels.prune import prune
from ..kernels.radiance_field import (
    FieldValues,
    Pullback,
    evaluate,
    evaluate_density,
    radiance_density,
    radiance_density_reference,
    radiance_field,
    radiance_field_reference,
)
from ..kernels.ray_march import march
from ..kernels.samples import midpoints
from .ball import ALPHA_LEAST, STEP, TRANSMITTANCE_STOP, balls, density
from .harness import OURS, Case, Contender, Result
from .hash_grid import all_levels, formula

CONFIG = OFFICIAL.field
GRID = CONFIG.grid
LEVELS = grid_levels(GRID.levels, GRID.log2_table, GRID.base_resolution, GRID.growth)
WIDTH = GRID.levels * GRID.features
BLOB: dict[str, Any] = {"blob_strength": CONFIG.blob_strength, "blob_radius": CONFIG.blob_radius}
OURS_HALF = "ours, half-precision table"
OWN_KERNELS = "hash-grid kernels + PyTorch"


def cases() -> Iterator[Case]:
    met, kept = _along_rays()
    yield _density(met)
    yield _whole(kept)
    yield _backward(kept)


def _along_rays() -> tuple[Tensor, Tensor]:
    """What marching finds in the last stage of the official schedule, and what is kept of it."""
    *_, ball = balls()
    rays = (ball.origins, ball.directions)
    met = march(*rays, ball.occupied, STEP, ball.near)
    points = midpoints(*rays, met)
    return points, midpoints(*rays, prune(density(points), met, TRANSMITTANCE_STOP, ALPHA_LEAST))


def _parameters(*, trained: bool = False) -> list[Any]:
    """Table, levels, and the two perceptrons."""
    rows, hidden = LEVELS[-1].offset + LEVELS[-1].entries, CONFIG.hidden

    def made(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, device="cuda") * shape[1] ** -0.5, requires_grad=trained)

    nets = [(made(hidden, WIDTH), made(outputs, hidden)) for outputs in (1, 3)]
    return [made(rows, GRID.features), LEVELS, *nets]


def _encoded(x: Tensor, with_pullback: bool, *, table: Tensor) -> tuple[Tensor, Pullback | None]:
    """Features by the hash grid's own kernels; the rest is left to PyTorch."""
    if not with_pullback:
        return hash_encode(x, table, LEVELS), None
    return _pulled_back(*hash_encode_jacobian(x, table, LEVELS))


def _fused(x: Tensor, with_pullback: bool, *, table: Tensor) -> tuple[Tensor, Pullback | None]:
    """Features of all levels at once, for ``torch.compile``, which takes minutes over the reference's levels."""
    found = formula(x, table, all_levels(x.device), with_pullback)
    return _pulled_back(*found) if with_pullback else (found, None)


def _pulled_back(features: Tensor, jacobian: Tensor) -> tuple[Tensor, Pullback]:
    return features, lambda grad: (jacobian * grad[:, :, None]).sum(1)


def _bytes(points: Tensor, passes: int, per_point: int) -> float:
    """``passes`` times over the eight corners of each level in float32, and what is read and written per point."""
    return len(points) * (passes * 8.0 * WIDTH * 4 + per_point)


def _density(points: Tensor) -> Case:
    table, levels, net, _ = _parameters()
    given = (points, table, levels, net)
    return Case(
        kernel="radiance_field",
        name=f"density, {len(points):,} samples of rays",
        contenders={
            OURS: partial(radiance_density, *given, **BLOB),
            OURS_HALF: partial(radiance_density, *given, **BLOB, lookup=torch.float16),
            OWN_KERNELS: partial(evaluate_density, points, partial(_encoded, table=table), net, **BLOB),
            "PyTorch": partial(radiance_density_reference, *given, **BLOB),
            "torch.compile": partial(
                torch.compile(evaluate_density, dynamic=False),
                points,
                partial(_fused, table=table),
                net,
                **BLOB,
            ),
        },
        reference=partial(radiance_density_reference, *given, **BLOB),
        tolerance=1e-2,
        work=_bytes(points, 1, 12 + 4),
        unit="TB/s",
    )


def _forwards(points: Tensor, given: Sequence[Any]) -> dict[str, Callable[[], FieldValues]]:
    return {
        OURS: partial(radiance_field, points, *given, **BLOB),
        OURS_HALF: partial(radiance_field, points, *given, **BLOB, lookup=torch.float16),
        OWN_KERNELS: partial(evaluate, points, partial(_encoded, table=given[0]), *given[2:], **BLOB),
        "PyTorch": partial(radiance_field_reference, points, *given, **BLOB),
        "torch.compile": partial(
            torch.compile(evaluate, dynamic=False),
            points,
            partial(_fused, table=given[0]),
            *given[2:],
            **BLOB,
        ),
    }


def _tensors(forward: Callable[[], FieldValues]) -> tuple[Tensor, ...]:
    return tuple(value for value in forward() if value is not None)


def _whole(points: Tensor) -> Case:
    forwards = _forwards(points, _parameters())

    contenders: dict[str, Contender] = {
        name: partial(_tensors, forward) for name, forward in forwards.items()
    }
    return Case(
        kernel="radiance_field",
        name=f"density, albedo and normal, {len(points):,} samples of rays",
        contenders=contenders,
        reference=contenders["PyTorch"],
        # A sample on the kink of a ReLU may have another normal.
        tolerance=0.1,
        work=_bytes(points, 1, 12 + 28),
        unit="TB/s",
    )


def _backward(points: Tensor) -> Case:
    """Gradients of all parameters: a retained graph is run backwards, outside CUDA graphs."""
    given = _parameters(trained=True)
    parameters = [given[0], *given[2], *given[3]]
    grads = [torch.randn(len(points), *size, device="cuda") for size in ((), (3,), (3,))]

    def backwards(forward: Callable[[], FieldValues]) -> Contender:
        @cache
        def values() -> Sequence[Tensor]:
            with torch.enable_grad():
                return _tensors(forward)

        def run() -> Result:
            return torch.autograd.grad(values(), parameters, grads, retain_graph=True)

        return run

    contenders = {name: backwards(forward) for name, forward in _forwards(points, given).items()}
    return Case(
        kernel="radiance_field",
        name=f"gradients through all three, {len(points):,} samples of rays",
        contenders=contenders,
        reference=contenders["PyTorch"],
        tolerance=0.1,
        work=_bytes(points, 2, 12 + 28 + 28 + 4),
        unit="TB/s",
        graph=False,
    )
