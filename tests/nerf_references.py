"""What the renderer's tests are held to: recorded tensors of the released code, and a slow hash grid."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from imagedream_rt.engine.config import FieldConfig, HashGridConfig, RenderConfig
from imagedream_rt.engine.nerf.background import Background
from imagedream_rt.engine.nerf.field import Field
from imagedream_rt.kernels.hash_grid import GridLevel

FIELD = FieldConfig(grid=HashGridConfig(levels=5, log2_table=12, base_resolution=8))
RENDER = RenderConfig(samples_per_ray=96)

GRID_NAME = "encoding.encoding.encoding.params"
FIELD_NAMES = {
    f"geometry.{GRID_NAME}": "grid.table",
    "geometry.density_network.layers.0.weight": "density_mlp.inner",
    "geometry.density_network.layers.2.weight": "density_mlp.outer",
    "geometry.feature_network.layers.0.weight": "feature_mlp.inner",
    "geometry.feature_network.layers.2.weight": "feature_mlp.outer",
}
BACKGROUND_NAMES = {f"background.network.layers.{2 * index}.weight": f"weights.{index}" for index in range(3)}


@cache
def recorded() -> dict[str, Tensor]:
    """Inputs and results of the released fusion code and its libraries, float32 on a CPU."""
    return load_file(Path(__file__).parent / "fixtures" / "nerf.safetensors")


def recorded_field() -> Field:
    field = Field(FIELD)
    state = field.state_dict()
    field.load_state_dict({own: recorded()[name].view_as(state[own]) for name, own in FIELD_NAMES.items()})
    return field


def recorded_background() -> Background:
    background = Background()
    background.load_state_dict({own: recorded()[name] for name, own in BACKGROUND_NAMES.items()})
    return background


def relative_error(got: Tensor, wanted: Tensor) -> float:
    wanted = wanted.reshape(got.shape)
    return float((got.detach() - wanted).norm() / wanted.norm())


def slow_hash_encode(x: Tensor, table: Tensor, levels: tuple[GridLevel, ...]) -> Tensor:
    """Eight weighted look-ups per level, in operations that autograd differentiates twice and also by x."""
    features = []
    for level in levels:
        position = x * level.scale + 0.5
        cell = position.detach().floor()
        fraction = position - cell
        total = torch.zeros(len(x), table.shape[1], dtype=x.dtype)
        for number in range(8):
            offset = torch.tensor([number & 1, number >> 1 & 1, number >> 2])
            vertex = cell.long() + offset
            if level.hashed:
                mixed = vertex * torch.tensor([1, 2654435761, 805459861])
                index = (mixed[:, 0] ^ mixed[:, 1] ^ mixed[:, 2]) % level.entries
            else:
                strides = torch.tensor([1, level.resolution, level.resolution**2])
                index = (vertex * strides).sum(1) % level.entries
            weight = torch.where(offset.bool(), fraction, 1 - fraction).prod(1)
            total = total + weight[:, None] * table[level.offset + index]
        features.append(total)
    return torch.cat(features, dim=1)
