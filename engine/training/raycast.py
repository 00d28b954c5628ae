"""Renders procedural objects by closed-form ray casting: exact silhouettes, antialiased by supersampling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .objects import CHECKER, SPOTS, STRIPES_X, STRIPES_Z, TWO_TONE, Objects
from .shapes import MISS, hit_distance, local_normal

LIGHT = (0.35, -0.55, 0.76)
"""Towards the light, fixed to the object: from above, in front and a little to the right."""
AMBIENT = 0.68


def trace(objects: Objects, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Colour [N, R, 3] and hit [N, R] bool of rays [N, R, 3] (world; directions need not be unit)."""
    # a GPU tests every part of every ray in one fused kernel; a CPU is faster testing only rays that come near
    t, part = (nearest if origins.is_cuda else nearest_culled)(objects, origins, directions)
    hit = t < MISS / 2
    solid, taper, pattern, frequency = (
        table.gather(1, part) for table in (objects.solid, objects.taper, objects.pattern, objects.frequency)
    )
    rows = part.unsqueeze(-1)
    centre = objects.centre.gather(1, rows.expand(-1, -1, 3))
    size = objects.size.gather(1, rows.expand(-1, -1, 3)).clamp_min(1e-6)
    rotation = objects.rotation.flatten(2).gather(1, rows.expand(-1, -1, 9)).unflatten(-1, (3, 3))
    colours = objects.colour.flatten(2).gather(1, rows.expand(-1, -1, 6)).unflatten(-1, (2, 3))

    points = origins + t.clamp_max(100.0).unsqueeze(-1) * directions
    local = (rotation.transpose(-1, -2) @ (points - centre).unsqueeze(-1)).squeeze(-1) / size
    normal = (rotation @ (local_normal(local, solid, taper) / size).unsqueeze(-1)).squeeze(-1)
    normal = normal / normal.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    light = torch.tensor(LIGHT, device=points.device)
    shade = AMBIENT + (1 - AMBIENT) * (0.5 + 0.5 * (normal * light).sum(-1, keepdim=True))
    mix = _pattern(local, pattern, frequency).unsqueeze(-1)
    return (colours[..., 0, :] * (1 - mix) + colours[..., 1, :] * mix) * shade, hit


def nearest(objects: Objects, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Ray parameter [N, R] of the first hit (MISS if none) and the part [N, R] that is hit."""
    inverse = objects.rotation.transpose(-1, -2) / objects.size.clamp_min(1e-6).unsqueeze(-1)
    o = origins.unsqueeze(1) - objects.centre.unsqueeze(2)
    d = directions.unsqueeze(1)
    # written out rather than as a matrix product, so that a compiler can fuse it into the reduction over parts
    m = inverse.unsqueeze(2)
    local_o = torch.stack([(m[..., i, :] * o).sum(-1) for i in range(3)], -1)
    local_d = torch.stack([(m[..., i, :] * d).sum(-1) for i in range(3)], -1)
    kind, taper = objects.solid.unsqueeze(2), objects.taper.unsqueeze(2)
    t = hit_distance(local_o, local_d, kind, taper)
    t = torch.where((objects.size[..., :1] > 0), t, torch.full_like(t, MISS))
    return t.min(1)


def nearest_culled(objects: Objects, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`nearest`, but each part is tested only by the rays that enter its bounding sphere."""
    n, rays = origins.shape[:2]
    best = torch.full((n, rays), MISS)
    part = torch.zeros((n, rays), dtype=torch.long)
    lengths = (directions * directions).sum(-1)
    for i in range(n):
        for p in (objects.size[i, :, 0] > 0).nonzero().squeeze(1).tolist():
            size, offset = objects.size[i, p], origins[i] - objects.centre[i, p]
            along = (offset * directions[i]).sum(-1)
            outside = (offset * offset).sum(-1) - (size * size).sum()
            near = (along * along > lengths[i] * outside).nonzero().squeeze(1)
            local_o = offset[near] @ objects.rotation[i, p] / size
            local_d = directions[i, near] @ objects.rotation[i, p] / size
            t = hit_distance(local_o, local_d, objects.solid[i, p], objects.taper[i, p])
            closer = t < best[i, near]
            best[i, near[closer]] = t[closer]
            part[i, near[closer]] = p
    return best, part


def _pattern(local: Tensor, pattern: Tensor, frequency: Tensor) -> Tensor:
    """How much of the second colour [N, R] at local points [N, R, 3]."""
    f = frequency.unsqueeze(-1)
    wave = torch.floor(local * f * 0.999 + 100)
    stripes_x, stripes_z = wave[..., 0] % 2, wave[..., 2] % 2
    checker = wave.sum(-1) % 2
    cell = (local * f) - torch.round(local * f)
    spots = ((cell * cell).sum(-1) < 0.09).float()
    two_tone = ((local[..., 2] + 1) * 0.5).clamp(0, 1)
    mix = torch.zeros_like(stripes_x)
    for index, value in (
        (STRIPES_X, stripes_x),
        (STRIPES_Z, stripes_z),
        (CHECKER, checker),
        (SPOTS, spots),
        (TWO_TONE, two_tone),
    ):
        mix = torch.where(pattern == index, value, mix)
    return mix


def render(
    objects: Objects,
    c2w: Tensor,
    fovy_rad: Tensor,
    resolution: int,
    *,
    window: Tensor | None = None,
    supersample: int = 2,
) -> Tensor:
    """Premultiplied RGBA [N, V, resolution, resolution, 4] in [0, 1] of each object from its V cameras.

    Args:
        c2w: [N, V, 4, 4], OpenGL camera axes, z up.
        fovy_rad: [N, V].
        window: [N, V, 3], (centre x, centre y, half side) of the part of the frame to show, in units of half the
            frame's height, y down; the whole frame, (0, 0, 1), when absent.
    """
    n, v = c2w.shape[:2]
    side = resolution * supersample
    device = c2w.device
    grid = (torch.arange(side, device=device) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    if window is None:
        window = torch.tensor([0.0, 0.0, 1.0], device=device).expand(n, v, 3)
    scale = torch.tan(0.5 * fovy_rad)[..., None, None]
    px = (window[..., 0, None, None] + window[..., 2, None, None] * x) * scale
    py = -(window[..., 1, None, None] + window[..., 2, None, None] * y) * scale
    directions = torch.stack((px, py, -torch.ones_like(px)), -1).flatten(2, 3)
    directions = torch.einsum("nvij,nvrj->nvri", c2w[..., :3, :3], directions)
    origins = c2w[:, :, None, :3, 3].expand_as(directions)
    colour, hit = trace(objects, origins.flatten(1, 2), directions.flatten(1, 2))
    rgba = torch.cat((colour, torch.ones_like(colour[..., :1])), -1) * hit.unsqueeze(-1)
    rgba = rgba.view(n * v, side, side, 4).permute(0, 3, 1, 2)
    rgba = torch.nn.functional.avg_pool2d(rgba, supersample)
    return rgba.permute(0, 2, 3, 1).unflatten(0, (n, v)).clamp(0, 1)


def prompt_window(rgba: Tensor, fraction: float) -> Tensor:
    """The window [N, V, 3] in which the box of alpha > 0 is centred with its longer side ``fraction`` of the frame.

    ``rgba`` is a (coarse) render of the whole frame, [N, V, H, W, 4].
    """
    side = rgba.shape[2]
    alpha = rgba[..., 3] > 0
    edges = torch.arange(side, device=rgba.device, dtype=torch.float32)

    def bounds(occupied: Tensor) -> tuple[Tensor, Tensor]:
        low = torch.where(occupied, edges, math.inf).amin(-1)
        high = torch.where(occupied, edges + 1, -math.inf).amax(-1)
        return low / side * 2 - 1, high / side * 2 - 1

    x0, x1 = bounds(alpha.any(2))
    y0, y1 = bounds(alpha.any(3))
    half = torch.maximum(x1 - x0, y1 - y0) * 0.5 / fraction
    return torch.stack((0.5 * (x0 + x1), 0.5 * (y0 + y1), half), -1)
