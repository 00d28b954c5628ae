"""The official field's hash encoding: features, features with their Jacobian, and the scatter back to the table.

Points are the samples of camera rays that enter a ball, in their order along the rays, or uniform in the cube.
Bytes count each gather or addition of a corner by itself, however many of them a cache answers: eight corners
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
    along_rays, anywhere = _along_rays(), torch.rand(2**20, 3, device="cuda")
    for name, x in ((f"{len(along_rays):,} along rays", along_rays), ("2^20 anywhere", anywhere)):
        for dtype in (torch.float32, torch.float16):
            yield _forward(name, x, dtype, jacobian=False)
            yield _forward(name, x, dtype, jacobian=True)
        yield _backward(name, x, jacobian=False)
        yield _backward(name, x, jacobian=True)


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


def _tinycudann(x: Tensor, table: nn.Parameter) -> Callable[[], Tensor]:
    @cache
    def grid() -> HashGrid:
        made = hash_grid("tinycudann", CONFIG).to(x.device)
        made.table = table
        return made

    return lambda: grid()(x)


def _gathered(x: Tensor, number: int) -> float:
    """Bytes of x and of eight corners by level, ``number`` bytes a feature."""
    return len(x) * (12.0 + 8 * WIDTH * number)


def _forward(name: str, x: Tensor, dtype: torch.dtype, *, jacobian: bool) -> Case:
    function: Callable[..., Any] = hash_encode_jacobian if jacobian else hash_encode
    table = _table(dtype)
    plain = partial(function, x, table, LEVELS, backend="torch")
    contenders: dict[str, Contender] = {
        OURS: partial(function, x, table, LEVELS),
        "PyTorch": plain,
        "torch.compile": partial(torch.compile(function, dynamic=False), x, table, LEVELS, backend="torch"),
    }
    if not jacobian and dtype == torch.float32:
        contenders["tinycudann"] = _tinycudann(x, table)
    return Case(
        kernel="hash_grid",
        name=f"{'features and Jacobian' if jacobian else 'features'}, {name}, {str(dtype)[6:]} table",
        contenders=contenders,
        reference=plain,
        tolerance=1e-5,
        work=_gathered(x, table.element_size()) + len(x) * 4.0 * WIDTH * (4 if jacobian else 1),
        unit="TB/s",
    )


def _backward(name: str, x: Tensor, *, jacobian: bool) -> Case:
    """The table's gradient alone: a retained graph is run backwards, outside CUDA graphs."""
    function: Callable[..., Any] = hash_encode_jacobian if jacobian else hash_encode
    table = _table(trained=True)
    example = function(x, table.detach(), LEVELS)
    grads = [torch.randn_like(part) for part in (example if jacobian else (example,))]
    del example

    def backwards(forwards: Callable[[], Result]) -> Contender:
        @cache
        def results() -> Result:
            with torch.enable_grad():
                return forwards()

        return lambda: torch.autograd.grad(results(), table, grads, retain_graph=True)[0]

    plain = partial(function, x, table, LEVELS, backend="torch")
    compiled = partial(torch.compile(function, dynamic=False), x, table, LEVELS, backend="torch")
    contenders = {
        OURS: backwards(partial(function, x, table, LEVELS)),
        "PyTorch": backwards(plain),
        "torch.compile": backwards(compiled),
    }
    if not jacobian:
        contenders["tinycudann"] = backwards(_tinycudann(x, table))
    return Case(
        kernel="hash_grid",
        name=f"backward of {'features and Jacobian' if jacobian else 'features'}, {name}",
        contenders=contenders,
        reference=backwards(plain),
        tolerance=1e-4,
        work=_gathered(x, 4) + len(x) * 4.0 * WIDTH * (4 if jacobian else 1),
        unit="TB/s",
        graph=False,
    )
