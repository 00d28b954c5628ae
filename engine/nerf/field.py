"""The radiance field: a hash grid and two bias-free perceptrons, with analytic normals.

density = softplus(net(h(x)) + strength (1 - |x| / radius)), albedo = sigmoid(net(h(x))), both nets one
hidden ReLU layer over the hash features h of x; normal = normalize(-d density / d x). Source: ImageDream's
released fusion configuration (threestudio's implicit volume with a "magic3d" density bias), after Lin et
al. 2022, "Magic3D".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.lit_density import lit_density
from ...kernels.radiance_field import (
    Pullback,
    Weights,
    evaluate,
    evaluate_density,
    radiance_density,
    radiance_field,
)
from ...kernels.samples import Samples, midpoints
from ..config import FieldConfig
from .encoding import EncodingName, hash_grid


@dataclass(frozen=True)
class FieldOutput:
    """The field at N points."""

    sigma: Tensor
    """[N] density, per scene unit, not negative."""
    albedo: Tensor
    """[N, 3] in [0, 1]."""
    normal: Tensor | None
    """[N, 3] unit vectors pointing out of the matter; zero where the density has no slope."""


class Perceptron(nn.Module):
    """W_outer relu(W_inner x), no biases; weights as ``nn.Linear`` draws them."""

    def __init__(
        self, inputs: int, hidden: int, outputs: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.inner = nn.Parameter(linear_weight(hidden, inputs, generator))
        self.outer = nn.Parameter(linear_weight(outputs, hidden, generator))

    @property
    def weights(self) -> Weights:
        return self.inner, self.outer


class Field(nn.Module):
    """Density, albedo and normal at points of the box [-1, 1]^3, in float32 also under autocast.

    >>> from imagedream_rt.engine.config import FieldConfig, HashGridConfig
    >>> field = Field(FieldConfig(HashGridConfig(levels=2, log2_table=10, base_resolution=4)))
    >>> field(torch.zeros(5, 3)).normal.shape, field.density(torch.zeros(5, 3)).round().tolist()
    (torch.Size([5, 3]), [10.0, 10.0, 10.0, 10.0, 10.0])
    """

    def __init__(
        self,
        config: FieldConfig,
        *,
        encoding: EncodingName = "torch",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.grid = hash_grid(encoding, config.grid, generator)
        self._fused = encoding == "torch"
        self.density_mlp = Perceptron(self.grid.width, config.hidden, 1, generator)
        self.feature_mlp = Perceptron(self.grid.width, config.hidden, 3, generator)

    def density(self, points: Tensor, count: Tensor | None = None) -> Tensor:
        """Density [N] at points [N, 3].

        With ``count`` (int32 [1], here and below) only so many first rows are points of a buffer of N: the
        others get no gradient and their results mean nothing.
        """
        weights, options = self.density_mlp.weights, {**self._blob, "count": count}
        with torch.autocast(points.device.type, enabled=False):
            if self._fused:
                return radiance_density(points, self.grid.table, self.grid.levels, weights, **options)
            return evaluate_density(points, self._encode, weights, **options)

    def lit_density(
        self, origins: Tensor, directions: Tensor, samples: Samples, transmittance_stop: float
    ) -> Tensor:
        """Density [N] at the midpoints of samples on rays [R, 3]; behind where so little light is left, it may
        be zero instead. Without gradient."""
        weights = self.density_mlp.weights
        rays = (origins, directions, samples, transmittance_stop)
        with torch.no_grad(), torch.autocast(origins.device.type, enabled=False):
            if self._fused:
                return lit_density(*rays, self.grid.table, self.grid.levels, weights, **self._blob)
            return self.density(midpoints(origins, directions, samples), samples.count)

    def albedo(self, points: Tensor) -> Tensor:
        """Albedo [N, 3] in [0, 1] at points [N, 3]."""
        return self(points, with_normal=False).albedo

    def forward(self, points: Tensor, with_normal: bool = True, count: Tensor | None = None) -> FieldOutput:
        """Everything at points [N, 3], with one look-up.

        The normal too is differentiable, in the parameters of the grid and of the density.
        """
        weights = self.density_mlp.weights, self.feature_mlp.weights
        options = {**self._blob, "with_normal": with_normal, "count": count}
        with torch.autocast(points.device.type, enabled=False):
            if self._fused:
                values = radiance_field(points, self.grid.table, self.grid.levels, *weights, **options)
            else:
                values = evaluate(points, self._encode, *weights, **options)
        return FieldOutput(*values)

    @property
    def _blob(self) -> dict[str, Any]:
        return {"blob_strength": self.config.blob_strength, "blob_radius": self.config.blob_radius}

    def _encode(self, x: Tensor, with_pullback: bool) -> tuple[Tensor, Pullback | None]:
        return self.grid.with_pullback(x) if with_pullback else (self.grid(x), None)


def linear_weight(outputs: int, inputs: int, generator: torch.Generator | None) -> Tensor:
    """[outputs, inputs], drawn as ``nn.Linear`` draws its weight."""
    bound = inputs**-0.5
    return torch.empty(outputs, inputs).uniform_(-bound, bound, generator=generator)
