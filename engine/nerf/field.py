"""The radiance field: a hash grid and two bias-free perceptrons, with analytic normals.

density = softplus(net(h(x)) + strength (1 - |x| / radius)), albedo = sigmoid(net(h(x))), both nets one
hidden ReLU layer over the hash features h of x; normal = normalize(-d density / d x). Source: ImageDream's
released fusion configuration (threestudio's implicit volume with a "magic3d" density bias), after Lin et
al. 2022, "Magic3D".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...kernels.perceptron import perceptron, perceptron_slope
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

    def forward(self, x: Tensor) -> Tensor:
        """x [N, inputs] -> [N, outputs]."""
        return perceptron(x, self.inner, self.outer)

    def with_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of one output: y [N, 1] and dy/dx [N, inputs]."""
        return perceptron_slope(x, self.inner, self.outer)


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
        self.density_mlp = Perceptron(self.grid.width, config.hidden, 1, generator)
        self.feature_mlp = Perceptron(self.grid.width, config.hidden, 3, generator)

    def density(self, points: Tensor, count: Tensor | None = None) -> Tensor:
        """Density [N] at points [N, 3].

        With ``count`` (int32 [1], here and below) only so many first rows are points of a buffer of N: the
        others get no gradient and their results mean nothing.
        """
        with torch.autocast(points.device.type, enabled=False):
            return self._density(points, self.density_mlp(self.grid(_unit(points))))

    def albedo(self, points: Tensor) -> Tensor:
        """Albedo [N, 3] in [0, 1] at points [N, 3]."""
        with torch.autocast(points.device.type, enabled=False):
            return torch.sigmoid(self.feature_mlp(self.grid(_unit(points))))

    def forward(self, points: Tensor, with_normal: bool = True, count: Tensor | None = None) -> FieldOutput:
        """Everything at points [N, 3], with one look-up.

        The normal too is differentiable, in the parameters of the grid and of the density.
        """
        with torch.autocast(points.device.type, enabled=False):
            if not with_normal:
                features = self.grid(_unit(points))
                sigma = self._density(points, self.density_mlp(features))
                return FieldOutput(sigma, torch.sigmoid(self.feature_mlp(features)), None)
            features, pullback = self.grid.with_pullback(_unit(points))
            raw, feature_slope = self.density_mlp.with_slope(features)
            # The unit cube is half as wide as the box: d unit / d point = 1 / 2.
            slope = 0.5 * pullback(feature_slope) + self._blob_slope(points)
            # Softplus scales the slope by a positive number, which the direction does not see.
            return FieldOutput(
                self._density(points, raw), torch.sigmoid(self.feature_mlp(features)), normalise(-slope)
            )

    def _density(self, points: Tensor, raw: Tensor) -> Tensor:
        blob = self.config.blob_strength * (1.0 - length(points)[:, 0] / self.config.blob_radius)
        return nn.functional.softplus(raw[:, 0] + blob)

    def _blob_slope(self, points: Tensor) -> Tensor:
        return normalise(points) * (-self.config.blob_strength / self.config.blob_radius)


def length(vectors: Tensor) -> Tensor:
    """[N, 3] -> [N, 1]. Sums columns: a reduction along rows of three runs ten times slower."""
    x, y, z = vectors.unbind(1)
    return (x * x + y * y + z * z).sqrt()[:, None]


def normalise(vectors: Tensor) -> Tensor:
    """Unit vectors [N, 3] of vectors [N, 3]; zero, with zero gradient, for the zero vector."""
    x, y, z = vectors.unbind(1)
    return vectors * (x * x + y * y + z * z).clamp_min(1e-24).rsqrt()[:, None]


def _unit(points: Tensor) -> Tensor:
    return (points + 1.0) / 2.0


def linear_weight(outputs: int, inputs: int, generator: torch.Generator | None) -> Tensor:
    """[outputs, inputs], drawn as ``nn.Linear`` draws its weight."""
    bound = inputs**-0.5
    return torch.empty(outputs, inputs).uniform_(-bound, bound, generator=generator)
