"""The environment behind the object: a small perceptron of the viewing direction."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...kernels.background import SHAPES, background
from .field import linear_weight


class Background(nn.Module):
    """sigmoid of a bias-free 9-16-16-3 ReLU perceptron of the direction's spherical harmonics, in float32."""

    def __init__(self, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            nn.Parameter(linear_weight(outputs, inputs, generator)) for outputs, inputs in SHAPES
        )

    def forward(self, directions: Tensor) -> Tensor:
        """Unit directions [..., 3] -> colour [..., 3] in [0, 1]."""
        with torch.autocast(directions.device.type, enabled=False):
            return background(directions, tuple(self.weights))
