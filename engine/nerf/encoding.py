"""The hash encoding as a module, by this package or by tiny-cuda-nn; both keep the same table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...kernels.hash_grid import grid_levels, hash_encode, hash_encode_jacobian
from .._optional import require
from ..config import HashGridConfig
from ..errors import InputError

EncodingName = Literal["torch", "tinycudann"]
"""``torch``: this package's own, by its Triton kernels on CUDA devices and plain PyTorch elsewhere."""

Pullback = Callable[[Tensor], Tensor]
"""Made for N points: takes a gradient by their features [N, L F] to the gradient by the points [N, 3]."""


class HashGrid(nn.Module):
    """The hash encoding with its table [P, features], drawn from U(-1e-4, 1e-4)."""

    def __init__(self, config: HashGridConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.levels = grid_levels(config.levels, config.log2_table, config.base_resolution, config.growth)
        self.width = config.levels * config.features
        rows = self.levels[-1].offset + self.levels[-1].entries
        table = torch.empty(rows, config.features).uniform_(-1e-4, 1e-4, generator=generator)
        self.table = nn.Parameter(table)

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, L F] of x [N, 3] in the unit cube; differentiable in the table."""
        return hash_encode(x, self.table, self.levels)

    def with_pullback(self, x: Tensor) -> tuple[Tensor, Pullback]:
        """The features, and what takes a gradient by them back to x; both differentiable in the table."""
        features, jacobian = hash_encode_jacobian(x, self.table, self.levels)
        # [L F, 3, N]: the contiguous memory behind the view, so that the sum below runs along it.
        slopes = jacobian.permute(1, 2, 0)
        return features, lambda grad: (grad.t()[:, None] * slopes).sum(0).t()


class TinyCudaHashGrid(HashGrid):
    """The same encoding computed by tiny-cuda-nn in float32; for CUDA tensors.

    Raises :class:`~..errors.MissingDependency` when tiny-cuda-nn is not installed or finds no GPU.
    """

    def __init__(self, config: HashGridConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(config, generator)
        tinycudann = require("tinycudann", None, "to encode points with tiny-cuda-nn")
        settings = {
            "otype": "HashGrid",
            "n_levels": config.levels,
            "n_features_per_level": config.features,
            "log2_hashmap_size": config.log2_table,
            "base_resolution": config.base_resolution,
            "per_level_scale": config.growth,
        }
        encoding: Any = tinycudann.Encoding(3, settings, dtype=torch.float32)
        if encoding.params.numel() != self.table.numel():
            raise InputError(
                f"this tiny-cuda-nn lays the hash grid out in {encoding.params.numel()} numbers,"
                f" this package in {self.table.numel()}: use the encoding 'torch'"
            )
        # Its own parameter gives way to a view of the table at each call: a state dict has one name for it.
        del encoding.params
        self.encoding = encoding

    def forward(self, x: Tensor) -> Tensor:
        if not len(x):
            return super().forward(x)
        self.encoding.params = self.table.view(-1)
        return self.encoding(x)

    def with_pullback(self, x: Tensor) -> tuple[Tensor, Pullback]:
        if not len(x):
            return super().with_pullback(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            features = self.forward(x)

        def pullback(grad: Tensor) -> Tensor:
            training = torch.is_grad_enabled()
            return torch.autograd.grad(features, x, grad, create_graph=training, retain_graph=True)[0]

        return features, pullback


def hash_grid(
    name: EncodingName, config: HashGridConfig, generator: torch.Generator | None = None
) -> HashGrid:
    """The hash grid computed by ``torch`` (this package) or ``tinycudann``.

    Raises :class:`~..errors.InputError` for another name.
    """
    if name == "torch":
        return HashGrid(config, generator)
    if name == "tinycudann":
        return TinyCudaHashGrid(config, generator)
    raise InputError(f"unknown encoding {name!r}; it must be 'torch' or 'tinycudann'")
