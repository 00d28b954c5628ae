"""The environment behind the object: a small perceptron of the viewing direction."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from .field import linear_weight

HIDDEN = 16


def spherical_harmonics(directions: Tensor) -> Tensor:
    """The nine real spherical harmonics of degree below three of unit directions [..., 3] -> [..., 9].

    Order and signs are those of tiny-cuda-nn's ``SphericalHarmonics`` of degree 3, with the normalising
    constants sqrt(1 / 4 pi), sqrt(3 / 4 pi), sqrt(15 / 4 pi), sqrt(5 / 16 pi) (Green 2003, appendix).

    >>> spherical_harmonics(torch.tensor([0.0, 0.0, 1.0]))[[0, 2]]
    tensor([0.2821, 0.4886])
    """
    x, y, z = directions.unbind(-1)
    zero, one = math.sqrt(1 / (4 * math.pi)), math.sqrt(3 / (4 * math.pi))
    mixed, axial = math.sqrt(15 / (4 * math.pi)), math.sqrt(5 / (16 * math.pi))
    return torch.stack(
        (
            torch.full_like(x, zero),
            -one * y,
            one * z,
            -one * x,
            mixed * x * y,
            -mixed * y * z,
            axial * (3 * z * z - 1),
            -mixed * x * z,
            mixed / 2 * (x * x - y * y),
        ),
        dim=-1,
    )


class Background(nn.Module):
    """sigmoid of a bias-free 9-16-16-3 ReLU perceptron of the direction's spherical harmonics, in float32."""

    def __init__(self, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        sizes = (9, HIDDEN, HIDDEN, 3)
        self.weights = nn.ParameterList(
            nn.Parameter(linear_weight(outputs, inputs, generator)) for inputs, outputs in pairwise(sizes)
        )

    def forward(self, directions: Tensor) -> Tensor:
        """Unit directions [..., 3] -> colour [..., 3] in [0, 1]."""
        with torch.autocast(directions.device.type, enabled=False):
            x = spherical_harmonics(directions)
            for weight in self.weights[:-1]:
                x = torch.relu(x @ weight.t())
            return torch.sigmoid(x @ self.weights[-1].t())
