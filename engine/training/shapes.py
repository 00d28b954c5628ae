"""Ellipsoids, boxes and frustums: ray intersection, normals, containment and surface samples in closed form.

Every solid is a unit solid in its own frame (p_local = R^T (p - centre) / size): the sphere |p| = 1, the cube
|p_i| <= 1, and the frustum x^2 + y^2 <= r(z)^2 with |z| <= 1 and r falling linearly from 1 at z = -1 to ``taper``
at z = 1 (1 is a cylinder, 0 a cone).
"""

from __future__ import annotations

import torch
from torch import Tensor

ELLIPSOID, BOX, FRUSTUM = 0, 1, 2
MISS = 1e9
"""Ray parameter of a ray that hits nothing."""


def _frustum_radius(z: Tensor, taper: Tensor) -> Tensor:
    return 0.5 * (1 + taper) - 0.5 * (1 - taper) * z


def _nearest_valid(candidate: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid & (candidate > 0), candidate, torch.full_like(candidate, MISS))


def _hit_ellipsoid(o: Tensor, d: Tensor) -> Tensor:
    a, b, c = (d * d).sum(-1), (o * d).sum(-1), (o * o).sum(-1) - 1
    disc = b * b - a * c
    return _nearest_valid((-b - disc.clamp_min(0).sqrt()) / a, disc > 0)


def _hit_box(o: Tensor, d: Tensor) -> Tensor:
    safe = torch.where(d.abs() < 1e-9, torch.full_like(d, 1e-9), d)
    first, second = (-1 - o) / safe, (1 - o) / safe
    near = torch.minimum(first, second).amax(-1)
    far = torch.maximum(first, second).amin(-1)
    return _nearest_valid(near, near < far)


def _hit_frustum(o: Tensor, d: Tensor, taper: Tensor) -> Tensor:
    slope = -0.5 * (1 - taper)
    ox, oy, oz = o.unbind(-1)
    dx, dy, dz = d.unbind(-1)
    radius = _frustum_radius(oz, taper)
    a = dx * dx + dy * dy - (slope * dz) ** 2
    a = torch.where(a.abs() < 1e-9, torch.full_like(a, 1e-9), a)
    b = ox * dx + oy * dy - slope * dz * radius
    c = ox * ox + oy * oy - radius * radius
    disc = b * b - a * c
    root = disc.clamp_min(0).sqrt()
    best = torch.full_like(a, MISS)
    for t in ((-b - root) / a, (-b + root) / a):
        z = oz + t * dz
        best = torch.minimum(best, _nearest_valid(t, (disc > 0) & (z.abs() <= 1)))
    safe_dz = torch.where(dz.abs() < 1e-9, torch.full_like(dz, 1e-9), dz)
    for end, end_radius in ((-1.0, torch.ones_like(taper)), (1.0, taper)):
        t = (end - oz) / safe_dz
        inside = (ox + t * dx) ** 2 + (oy + t * dy) ** 2 <= end_radius**2
        best = torch.minimum(best, _nearest_valid(t, inside))
    return best


def hit_distance(o: Tensor, d: Tensor, kind: Tensor, taper: Tensor) -> Tensor:
    """Ray parameter of the first hit, or :data:`MISS`. ``o``, ``d`` [..., 3] local; ``kind``, ``taper`` [...]."""
    t = torch.where(kind == BOX, _hit_box(o, d), _hit_ellipsoid(o, d))
    return torch.where(kind == FRUSTUM, _hit_frustum(o, d, taper), t)


def local_normal(p: Tensor, kind: Tensor, taper: Tensor) -> Tensor:
    """Outward normal [..., 3] (not unit) at a surface point ``p`` [..., 3], in the solid's own frame."""
    largest = p.abs().amax(-1, keepdim=True)
    box = torch.where(p.abs() >= largest - 1e-4, p.sign(), torch.zeros_like(p))
    z = p[..., 2]
    radius = _frustum_radius(z, taper)
    side = torch.stack((p[..., 0], p[..., 1], 0.5 * (1 - taper) * radius), -1)
    cap = torch.stack((torch.zeros_like(z), torch.zeros_like(z), z.sign()), -1)
    on_cap = (z.abs() > 1 - 1e-4).unsqueeze(-1)
    frustum = torch.where(on_cap, cap, side)
    normal = torch.where((kind == BOX).unsqueeze(-1), box, p)
    return torch.where((kind == FRUSTUM).unsqueeze(-1), frustum, normal)


def contains(p: Tensor, kind: Tensor, taper: Tensor) -> Tensor:
    """Whether local points ``p`` [..., 3] lie strictly inside; [...] bool."""
    ellipsoid = (p * p).sum(-1) < 1
    box = p.abs().amax(-1) < 1
    z = p[..., 2]
    radius = _frustum_radius(z, taper)
    frustum = (p[..., 0] ** 2 + p[..., 1] ** 2 < radius**2) & (z.abs() < 1)
    return torch.where(kind == BOX, box, torch.where(kind == FRUSTUM, frustum, ellipsoid))


def surface_samples(kind: Tensor, taper: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` points on each solid's surface [..., count, 3], local; only roughly uniform (bounds and Chamfer).

    All solids share one set of draws, so that an object's samples do not depend on the batch it is in.
    """
    device = kind.device
    direction = torch.randn((count, 3), generator=generator).to(device)
    cube = 2 * torch.rand((count, 3), generator=generator).to(device) - 1
    angle, height, spread = torch.rand((3, count), generator=generator).to(device).unbind(0)

    ellipsoid = direction / direction.norm(dim=-1, keepdim=True)
    box = torch.where(cube.abs() >= cube.abs().amax(-1, keepdim=True), cube.sign(), cube)
    z = (3 * height - 1.5).clamp(-1, 1)  # a sixth of the points on each cap
    radius = _frustum_radius(z, taper.unsqueeze(-1)) * torch.where(z.abs() >= 1, spread.sqrt(), 1.0)
    angle = angle * (2 * torch.pi)
    frustum = torch.stack((radius * angle.cos(), radius * angle.sin(), z.expand_as(radius)), -1)
    which = kind[..., None, None]
    return torch.where(which == BOX, box, torch.where(which == FRUSTUM, frustum, ellipsoid))
