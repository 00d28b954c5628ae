"""Cameras: where the views are taken from, their rays, and the 16 numbers that tell the UNet about each.

World: z up, right handed, the object's front looks to -y. Camera axes as in OpenGL: x right, y up, looking
along -z. Azimuth 0 stands in front of the object and 90 at +x, which is the released demo's convention;
threestudio's azimuth is ours minus 90.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .config import CameraRange
from .errors import InputError
from .model import VIEWS

Array = npt.NDArray[np.float64]


class Rays(NamedTuple):
    """One ray per pixel, through its centre."""

    origins: torch.Tensor
    """[V, H, W, 3], world units."""
    directions: torch.Tensor
    """[V, H, W, 3], unit length."""


@dataclass(frozen=True)
class Cameras:
    """V pinhole cameras with square pictures, all tensors float32 on one device."""

    c2w: torch.Tensor
    """[V, 4, 4] camera to world."""
    fovy_rad: torch.Tensor
    """[V] vertical field of view."""
    light_positions: torch.Tensor | None = None
    """[V, 3], for shaded renders."""

    def __len__(self) -> int:
        return self.c2w.shape[0]

    def __getitem__(self, index: slice | Sequence[int] | torch.Tensor) -> Cameras:
        """The chosen cameras, by slice, list of positions or index tensor."""
        rows = index if isinstance(index, slice | torch.Tensor) else list(index)
        light = None if self.light_positions is None else self.light_positions[rows]
        return Cameras(self.c2w[rows], self.fovy_rad[rows], light)

    def to(self, device: torch.device | str) -> Cameras:
        """The same cameras on another device."""
        light = None if self.light_positions is None else self.light_positions.to(device)
        return Cameras(self.c2w.to(device), self.fovy_rad.to(device), light)

    def rays(self, resolution: int) -> Rays:
        """Rays of pictures of ``resolution`` x ``resolution`` pixels, rows from top to bottom."""
        centre = torch.arange(resolution, device=self.c2w.device, dtype=self.c2w.dtype) + 0.5
        offset = centre - 0.5 * resolution
        y, x = torch.meshgrid(-offset, offset, indexing="ij")
        focal_px = 0.5 * resolution / torch.tan(0.5 * self.fovy_rad)
        plane = torch.stack([x, y], dim=-1) / focal_px[:, None, None, None]
        look = torch.cat([plane, -torch.ones_like(plane[..., :1])], dim=-1)
        # Not a matmul: TF32, where switched on, would bend the rays by up to a pixel.
        directions = (look[..., None, :] * self.c2w[:, None, None, :3, :3]).sum(-1)
        origins = self.c2w[:, None, None, :3, 3].expand_as(directions)
        return Rays(origins, torch.nn.functional.normalize(directions, dim=-1))

    def embedding(self) -> torch.Tensor:
        """[V, 16]: the matrices with their translation scaled to unit length, row by row.

        The released helper of this name scales in place; this one leaves ``c2w`` alone.
        """
        translation = self.c2w[:, :3, 3:]
        unit = translation / (translation.norm(dim=1, keepdim=True) + 1e-8)
        top = torch.cat([self.c2w[:, :3, :3], unit], dim=2)
        return torch.cat([top, self.c2w[:, 3:]], dim=1).flatten(1)


def orbit_cameras(
    azimuth_deg: Sequence[float], elevation_deg: float | Sequence[float], fovy_deg: float, distance: float
) -> Cameras:
    """Cameras on a sphere around the origin, looking at it, with z up in the picture.

    ``azimuth_deg`` has one value a view, ``elevation_deg`` one for all or one a view; ``distance`` in world
    units. Elevations of +-90 degrees are well defined: the azimuth then sets the roll. Raises
    :class:`InputError` for values that are not finite, a field of view outside (0, 180) or a distance that is
    not positive.

    >>> orbit_cameras([90.0], 0.0, 40.0, 2.0).c2w[0, 0, 3].item()  # at +x
    2.0
    """
    azimuths = [float(value) for value in azimuth_deg]
    elevations = (
        [float(elevation_deg)] * len(azimuths)
        if isinstance(elevation_deg, int | float)
        else [float(value) for value in elevation_deg]
    )
    if not azimuths or len(azimuths) != len(elevations):
        raise InputError(
            f"{len(azimuths)} azimuths and {len(elevations)} elevations; give one or more azimuths and "
            "either one elevation or as many"
        )
    if not all(math.isfinite(value) for value in (*azimuths, *elevations)):
        raise InputError(f"azimuths {azimuths} and elevations {elevations} must be finite degrees")
    if not 0.0 < fovy_deg < 180.0:
        raise InputError(f"field of view is {fovy_deg} degrees; it must lie between 0 and 180")
    if not (math.isfinite(distance) and distance > 0.0):
        raise InputError(f"camera distance is {distance}; it must be positive")
    c2w = _look_at_origin(np.array(azimuths), np.array(elevations), np.full(len(azimuths), distance))
    return Cameras(torch.from_numpy(c2w).float(), torch.full((len(azimuths),), math.radians(fovy_deg)))


def official_views(
    elevation_deg: float = 0.0, azimuth_deg: Sequence[float] = (0.0, 90.0, 180.0, 270.0)
) -> torch.Tensor:
    """[V, 16]: what the released ``get_camera`` gives the UNet for those views (without its zero frame)."""
    return orbit_cameras(azimuth_deg, elevation_deg, fovy_deg=45.0, distance=1.0).embedding()


@dataclass(frozen=True)
class CameraDraws:
    """The random numbers behind G groups of training cameras, all in [0, 1) but for ``light_normal``."""

    branch: float
    """Below 0.5 the elevations are uniform in angle; used by ``elevation_sampling="official"`` only."""
    elevation: torch.Tensor
    """[G]"""
    azimuth: torch.Tensor
    """[G]"""
    fovy: torch.Tensor
    """[G]"""
    distance: torch.Tensor
    """[G]"""
    light_distance: torch.Tensor
    """[G]"""
    light_normal: torch.Tensor
    """[G, 3], standard normal."""


def sample_cameras(camera_range: CameraRange, groups: int, generator: torch.Generator) -> Cameras:
    """Random training cameras with lights: ``groups`` groups of four views, 90 degrees apart within a group.

    ``generator`` is a CPU one; the cameras are on the CPU. Every call takes the same number of draws.
    """
    uniform = torch.rand(6, groups, generator=generator)
    normal = torch.randn(groups, 3, generator=generator)
    # The released code flips one coin a batch, not one a group.
    branch, elevation, azimuth, fovy, distance, light_distance = uniform
    draws = CameraDraws(float(branch[0]), elevation, azimuth, fovy, distance, light_distance, normal)
    return cameras_from_draws(camera_range, draws)


def cameras_from_draws(camera_range: CameraRange, draws: CameraDraws) -> Cameras:
    """The V = 4 G cameras that those random numbers stand for (released ``random_multiview``).

    One elevation, field of view, distance, light distance and light perturbation per group; four azimuths
    (u + k) / 4 * 360 - 180 in threestudio's convention; light = normalize(position + normal) * distance.
    """
    r = camera_range
    elevation, azimuth, fovy, distance, light_distance, light_normal = (
        tensor.double().numpy()
        for tensor in (
            draws.elevation,
            draws.azimuth,
            draws.fovy,
            draws.distance,
            draws.light_distance,
            draws.light_normal,
        )
    )
    low, high = r.elevation_deg
    if r.elevation_sampling == "official" and draws.branch >= 0.5:
        # Meant as uniform on the sphere; taking angles for probabilities, it reaches only asin(high / 90).
        p = _between((low + 90.0) / 180.0, (high + 90.0) / 180.0, elevation)
        elevation_deg = np.rad2deg(np.arcsin(2.0 * p - 1.0))
    else:
        elevation_deg = _between(low, high, elevation)
    azimuth_deg = (azimuth[:, None] + np.arange(VIEWS)) / VIEWS * 360.0 - 180.0 + 90.0
    fovy_rad = np.deg2rad(_between(*r.fovy_deg, fovy))
    distances = _between(*r.relative_distance, distance) / np.tan(0.5 * fovy_rad)
    c2w = _look_at_origin(azimuth_deg.ravel(), _each(elevation_deg), _each(distances))
    towards = c2w[:, :3, 3] + _each(r.light_perturbation * light_normal)
    towards /= np.linalg.norm(towards, axis=-1, keepdims=True).clip(min=1e-12)
    light = towards * _each(_between(*r.light_distance, light_distance))[:, None]
    return Cameras(*(torch.from_numpy(array).float() for array in (c2w, _each(fovy_rad), light)))


# In NumPy: a step of the fusion makes its cameras this way, and small calls of PyTorch take several times as long.


def _between(low: float, high: float, u: Array) -> Array:
    return low + (high - low) * u


def _each(group_values: Array) -> Array:
    """[G, ...] -> [4 G, ...]: the four views of a group share the value."""
    return group_values.repeat(VIEWS, axis=0)


def _look_at_origin(azimuth_deg: Array, elevation_deg: Array, distance: Array) -> Array:
    """[V, 4, 4] from three [V] arrays, in closed form: a cross product with z fails at the poles."""
    azimuth, elevation = np.deg2rad(azimuth_deg), np.deg2rad(elevation_deg)
    sin_a, cos_a, sin_e, cos_e = np.sin(azimuth), np.cos(azimuth), np.sin(elevation), np.cos(elevation)
    c2w = np.zeros((len(azimuth), 4, 4))
    right, up, back = (c2w[:, :3, column].T for column in range(3))
    right[0], right[1] = cos_a, sin_a
    up[0], up[1], up[2] = -sin_e * sin_a, sin_e * cos_a, cos_e
    back[0], back[1], back[2] = cos_e * sin_a, -cos_e * cos_a, sin_e
    c2w[:, :3, 3] = distance[:, None] * c2w[:, :3, 2]
    c2w[:, 3, 3] = 1.0
    return c2w
