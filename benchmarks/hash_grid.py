"""The official field's hash encoding: features, features with their Jacobian, and the scatter back to the table.

Points are the samples of camera rays that enter a ball, in their order along the rays, or uniform in the cube.
Bytes count each gather or addition at a corner by itself, however many of them a cache answers: eight corners
of each level per point, beside the points and the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.config import HashGridConfig
from ..engine.nerf.encoding import HashGrid, hash_grid
from ..kernels._grid_lookup import PRIMES
from ..kernels.hash_grid import grid_levels, hash_encode, hash_encode_jacobian
from ..kernels.prune import prune
from ..kernels.radiance_field import unit_cube
from ..kernels.ray_march import march
from ..kernels.samples import midpoints
from .ball import ALPHA_LEAST, STEP, TRANSMITTANCE_STOP, balls, density
from .harness import OURS, Case, Contender, Result

CONFIG = HashGridConfig()
LEVELS = grid_levels(CONFIG.levels, CONFIG.log2_table, CONFIG.base_resolution, CONFIG.growth)
WIDTH = CONFIG.levels * CONFIG.features


def cases() -> Iterator[Case]:
    x = _along_rays()
    rays = f"{len(x):,} samples of rays"
    yield _forward(rays, x, torch.float32, jacobian=False)
    yield _forward(rays, x, torch.float32, jacobian=True)
    yield _forward(rays, x, torch.float16, jacobian=True)
    yield _backward(rays, x, jacobian=False)
    yield _backward(rays, x, jacobian=True)
    x = torch.rand(2**20, 3, device="cuda")
    yield _forward("2^20 points anywhere", x, torch.float32, jacobian=True)
    yield _backward("2^20 points anywhere", x, jacobian=True)


def _along_rays() -> Tensor:
    """Samples that the renderer keeps in the last stage of the official schedule."""
    *_, ball = balls()
    rays = (ball.origins, ball.directions)
    met = march(*rays, ball.occupied, STEP, ball.near)
    samples = prune(density(midpoints(*rays, met)), met, TRANSMITTANCE_STOP, ALPHA_LEAST)
    return unit_cube(midpoints(*rays, samples))


def _table(dtype: torch.dtype = torch.float32, *, trained: bool = False) -> nn.Parameter:
    rows = LEVELS[-1].offset + LEVELS[-1].entries
    return nn.Parameter(torch.randn(rows, CONFIG.features, device="cuda").to(dtype), requires_grad=trained)


def all_levels(device: torch.device) -> tuple[Tensor, ...]:
    """Scale, highest cell, multipliers of y and z, entries, offset, whether hashed: each [L, 1]."""
    columns = []
    for level in LEVELS:
        steps = PRIMES[1:] if level.hashed else (level.resolution, level.resolution**2)
        columns.append((level.resolution - 1, *steps, level.entries, level.offset, level.hashed))
    scale = torch.tensor([level.scale for level in LEVELS], device=device)[:, None]
    return scale, *(row[:, None] for row in torch.tensor(columns, device=device).t())


def formula(x: Tensor, table: Tensor, levels: tuple[Tensor, ...], jacobian: bool) -> Any:
    """The reference's formula over all levels at once, for ``torch.compile`` to fuse; differentiable."""
    scale, highest, by_y, by_z, entries, offset, hashed = levels
    position = x.t()[:, None] * scale + 0.5
    cell = position.floor()
    fraction = position - cell
    low = cell.long().clamp_min(0).minimum(highest)
    value: Any = 0.0
    slopes: list[Any] = [0.0, 0.0, 0.0]
    for corner in range(8):
        bits = (corner & 1, corner >> 1 & 1, corner >> 2)
        vx, vy, vz = low[0] + bits[0], (low[1] + bits[1]) * by_y, (low[2] + bits[2]) * by_z
        index = torch.where(hashed == 1, (vx ^ vy ^ vz) & (entries - 1), (vx + vy + vz) % entries)
        entry = table[offset + index].float()
        wx, wy, wz = (part if bit else 1.0 - part for part, bit in zip(fraction, bits, strict=True))
        value = value + (wx * wy * wz)[..., None] * entry
        if jacobian:
            for axis, others in enumerate((wy * wz, wx * wz, wx * wy)):
                step = scale if bits[axis] else -scale
                slopes[axis] = slopes[axis] + (step * others)[..., None] * entry
    if not jacobian:
        return value.permute(1, 0, 2).flatten(1)
    return value.permute(1, 0, 2).flatten(1), torch.stack(slopes, dim=-1).permute(1, 0, 2, 3).flatten(1, 2)


def _tinycudann(x: Tensor, table: nn.Parameter) -> Callable[[], Tensor]:
    @cache
    def grid() -> HashGrid:
        made = hash_grid("tinycudann", CONFIG).to(x.device)
        made.table = table
        return made

    return lambda: grid()(x)


def _forwards(x: Tensor, table: nn.Parameter, *, jacobian: bool) -> dict[str, Callable[[], Any]]:
    function: Callable[..., Any] = hash_encode_jacobian if jacobian else hash_encode
    compiled = torch.compile(formula, dynamic=False)
    found: dict[str, Callable[[], Any]] = {
        OURS: partial(function, x, table, LEVELS),
        "PyTorch": partial(function, x, table, LEVELS, backend="torch"),
        "torch.compile": partial(compiled, x, table, all_levels(x.device), jacobian),
    }
    if not jacobian:
        found["tinycudann"] = _tinycudann(x, table)
    return found


def _bytes(x: Tensor, number: int, *, jacobian: bool) -> float:
    """Of x, of eight corners by level at ``number`` bytes a feature, and of the results or their gradients."""
    return len(x) * (12.0 + 8 * WIDTH * number + 4 * WIDTH * (4 if jacobian else 1))


def _forward(name: str, x: Tensor, dtype: torch.dtype, *, jacobian: bool) -> Case:
    contenders = _forwards(x, _table(dtype), jacobian=jacobian)
    return Case(
        kernel="hash_grid",
        name=f"features{' and Jacobian' if jacobian else ''}, {name}, {str(dtype)[6:]} table",
        contenders=contenders,
        reference=contenders["PyTorch"],
        tolerance=1e-4,
        work=_bytes(x, dtype.itemsize, jacobian=jacobian),
        unit="TB/s",
    )


def _backward(name: str, x: Tensor, *, jacobian: bool) -> Case:
    """The table's gradient alone: a retained graph is run backwards, outside CUDA graphs."""
    table = _table(trained=True)
    forwards = _forwards(x, table, jacobian=jacobian)
    with torch.no_grad():
        example = forwards[OURS]()
        # Gradients in the results' own layout.
        grads = [torch.randn_like(part) for part in (example if jacobian else (example,))]
        del example

    def backwards(forward: Callable[[], Result]) -> Contender:
        @cache
        def results() -> Result:
            with torch.enable_grad():
                return forward()

        return lambda: torch.autograd.grad(results(), table, grads, retain_graph=True)[0]

    contenders = {name: backwards(forward) for name, forward in forwards.items()}
    return Case(
        kernel="hash_grid",
        name=f"backward of features{' and Jacobian' if jacobian else ''}, {name}",
        contenders=contenders,
        reference=contenders["PyTorch"],
        tolerance=1e-4,
        work=_bytes(x, 4, jacobian=jacobian),
        unit="TB/s",
        graph=False,
    )
