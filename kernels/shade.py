"""Diffuse shading by one point light: colour = albedo (ambient + diffuse max(n.l, 0)), l the direction to the light.

Source: DreamFusion (Poole et al. 2022, section 3.1); the released ``diffuse_with_point_light_material``. The
compositing kernel shades the samples it walks over in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Shading:
    """How much light there is; ``textureless`` takes albedo as 1."""

    ambient: float | Tensor = 1.0
    diffuse: float | Tensor = 0.0
    textureless: bool | Tensor = False
    """Tensors [1] (``textureless`` 0 or 1) leave the choice to the device."""

    @property
    def needs_normals(self) -> bool:
        return isinstance(self.diffuse, Tensor) or self.diffuse != 0.0


ALBEDO = Shading()
"""The plain albedo: what evaluation and the first steps of the fusion show."""


def shade(
    albedo: Tensor, normals: Tensor | None, points: Tensor, light_positions: Tensor | None, shading: Shading
) -> Tensor:
    """Colours [N, 3] of points [N, 3], each with its albedo, unit normal and light position [N, 3].

    Normals and lights are only needed for a diffuse part. Textureless colours carry an exactly zero
    gradient to the albedo, so that an optimiser treats its parameters alike on all steps. Raises
    ``ValueError`` when normals or lights are needed and missing.
    """
    if not shading.needs_normals:
        light = shading.ambient
    elif normals is None or light_positions is None:
        raise ValueError("diffuse shading needs normals and light positions")
    else:
        towards = nn.functional.normalize(light_positions - points, dim=-1)
        facing = (normals * towards).sum(-1, keepdim=True).clamp(min=0.0)
        light = facing * shading.diffuse + shading.ambient
    if isinstance(shading.textureless, Tensor) or shading.textureless:
        albedo = albedo * (1.0 - shading.textureless) + shading.textureless
    return albedo * light
