"""From seeds to objects: the kinds, each a function that places parts. Front is -y, up is +z, right is +x.

Sizes are in arbitrary units (objects are normalised afterwards). Whatever the front hides follows from what it
shows (the tail has the colour of the ears, patterns go all the way round), so that one picture decides the object.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .builder import Builder
from .objects import (
    COLOURS,
    PARTS,
    RADIUS,
    SPOTS,
    STRIPES_X,
    STRIPES_Z,
    TWO_TONE,
    Draws,
    Objects,
)
from .shapes import BOX, ELLIPSOID, FRUSTUM


def robot(b: Builder) -> None:
    u = b.draws
    w, h = u.uniform(0.28, 0.42), u.uniform(0.32, 0.48)
    head = u.uniform(0.18, 0.28)
    b.body(BOX, (0, 0, 0), (w, 0.24, h))
    b.add(BOX, (0, -0.25, 0.05), (0.5 * w, 0.03, 0.35 * h), b.accent)
    top = h + head + 0.04
    b.add(BOX, (0, 0, top), (1.15 * head, head, head), b.second)
    b.eyes(0.5 * head, -head, top + 0.05, 0.33 * head)
    b.add(BOX, (0, -head, top - 0.5 * head), (0.5 * head, 0.03, 0.1 * head), b.dark)
    b.add(FRUSTUM, (0, 0, top + head + 0.1), (0.03, 0.03, 0.12), b.dark)
    b.add(ELLIPSOID, (0, 0, top + head + 0.24), (0.07, 0.07, 0.07), b.accent)
    b.pair(
        BOX,
        (w + 0.1, 0, u.uniform(-0.05, 0.1)),
        (0.08, 0.1, u.uniform(0.25, 0.38)),
        b.second,
        (0, u.uniform(-20, 0), 0),
    )
    leg = u.uniform(0.15, 0.3)
    b.pair(BOX, (0.5 * w, 0, -h - leg), (0.11, 0.13, leg), b.main)


def creature(b: Builder) -> None:
    u = b.draws
    length, girth = u.uniform(0.38, 0.55), u.uniform(0.22, 0.32)
    leg = u.uniform(0.14, 0.3)
    head = u.uniform(0.2, 0.28)
    head_z, head_y = girth + u.uniform(0.05, 0.22), -length - 0.3 * head
    b.body(ELLIPSOID, (0, 0, 0), (girth, length, girth))
    b.add(ELLIPSOID, (0, head_y, head_z), (head, head, head), b.main)
    b.add(
        ELLIPSOID,
        (0, head_y - 0.85 * head, head_z - 0.25 * head),
        (0.5 * head, 0.45 * head, 0.36 * head),
        b.second,
    )
    b.eyes(0.42 * head, head_y - 0.82 * head, head_z + 0.3 * head, 0.2 * head)
    ear = u.uniform(0.5, 1.1) * head
    b.pair(
        FRUSTUM,
        (0.55 * head, head_y, head_z + 0.8 * head + 0.4 * ear),
        (0.28 * head, 0.15 * head, ear * 0.6),
        b.accent,
        (0, 14, 0),
        taper=0.1,
    )
    for y in (-0.6, 0.6):
        b.pair(FRUSTUM, (0.6 * girth, y * length, -girth - 0.6 * leg), (0.09, 0.09, leg), b.second)
    b.add(
        ELLIPSOID,
        (0, length + 0.12, 0.1),
        (0.07, u.uniform(0.15, 0.28), 0.07),
        b.accent,
        tilt_deg=(u.uniform(10, 60), 0, 0),
    )
    b.add(
        ELLIPSOID,
        (0, head_y - 1.25 * head, head_z - 0.15 * head),
        (0.13 * head, 0.1 * head, 0.1 * head),
        b.dark,
    )


def house(b: Builder) -> None:
    u = b.draws
    w, d, h = u.uniform(0.34, 0.5), u.uniform(0.34, 0.5), u.uniform(0.25, 0.42)
    b.body(BOX, (0, 0, 0), (w, d, h))
    roof = u.uniform(0.2, 0.34)
    pointed = u.flag(0.5)
    b.add(FRUSTUM, (0, 0, h + roof), (1.5 * w, 1.5 * d, roof), b.accent, taper=0.0, where=pointed)
    b.add(BOX, (0, 0, h), (0.78 * w, 1.1 * d, 0.78 * w), b.accent, tilt_deg=(0, 45, 0), where=~pointed)
    b.add(BOX, (0, -d, -0.35 * h), (0.2 * w, 0.04, 0.62 * h), b.second)
    b.add(ELLIPSOID, (0.12 * w, -d - 0.05, -0.35 * h), (0.03, 0.03, 0.03), b.dark)
    b.pair(BOX, (0.6 * w, -d, 0.15 * h), (0.2 * w, 0.03, 0.26 * h), b.glass)
    b.add(BOX, (w, 0, 0.1 * h), (0.03, 0.4 * d, 0.28 * h), b.glass)
    b.add(BOX, (-w, 0, 0.1 * h), (0.03, 0.4 * d, 0.28 * h), b.glass)
    b.add(BOX, (0, d, 0.1 * h), (0.45 * w, 0.03, 0.28 * h), b.glass)
    b.add(BOX, (0.5 * w, 0.3 * d, h + roof), (0.09, 0.09, 0.9 * roof), b.second, where=u.flag(0.7))
    b.add(BOX, (0, -d - 0.1, -h), (0.35 * w, 0.14, 0.06), b.rgb(0.6, 0.6, 0.6))


def car(b: Builder) -> None:
    u = b.draws
    w, length, h = u.uniform(0.24, 0.32), u.uniform(0.52, 0.66), u.uniform(0.11, 0.17)
    b.body(BOX, (0, 0, 0), (w, length, h))
    cabin = u.uniform(0.24, 0.36)
    shift, tall = u.uniform(-0.02, 0.2), u.uniform(0.1, 0.17)
    b.add(BOX, (0, shift, h + tall), (0.86 * w, cabin, tall), b.glass)
    b.add(BOX, (0, shift, h + 2 * tall), (0.9 * w, 0.95 * cabin, 0.05), b.second)
    r = u.uniform(0.12, 0.16)
    for y in (-0.62, 0.62):
        b.pair(FRUSTUM, (w, y * length, -h), (r, r, 0.07), b.dark, (0, 90, 0))
    b.pair(ELLIPSOID, (0.65 * w, -length, 0.15 * h), (0.07, 0.04, 0.06), b.rgb(1.0, 0.95, 0.6))
    b.pair(BOX, (0.7 * w, length, 0.2 * h), (0.06, 0.02, 0.05), b.rgb(0.85, 0.08, 0.08))
    b.add(BOX, (0, -length, -0.4 * h), (0.5 * w, 0.03, 0.25 * h), b.dark)
    b.add(BOX, (0, length + 0.02, h + 0.1), (w, 0.05, 0.03), b.accent, where=u.flag(0.5))


def mushroom(b: Builder) -> None:
    u = b.draws
    stem, r = u.uniform(0.25, 0.42), u.uniform(0.14, 0.22)
    cap, flat = u.uniform(0.36, 0.52), u.uniform(0.5, 0.85)
    b.add(FRUSTUM, (0, 0, 0), (r * 1.2, r * 1.2, stem), b.white, taper=0.75)
    b.add(
        ELLIPSOID,
        (0, 0, stem),
        (cap, cap, cap * flat),
        b.main,
        second=b.second,
        pattern=SPOTS,
        frequency=u.uniform(2, 3.5),
    )
    b.add(BOX, (0, -1.08 * r, -0.5 * stem), (0.5 * r, 0.05, 0.42 * stem), b.accent)
    b.pair(ELLIPSOID, (0.5 * r, -r, 0.3 * stem), (0.22 * r, 0.06, 0.28 * r), b.glass)
    b.add(ELLIPSOID, (0, 0, -stem), (2.0 * r, 2.0 * r, 0.06), b.rgb(0.3, 0.55, 0.2))
    b.pair(ELLIPSOID, (1.5 * r, -0.6 * r, -stem + 0.06), (0.09, 0.09, 0.12), b.accent)


def tree(b: Builder) -> None:
    u = b.draws
    trunk, r = u.uniform(0.2, 0.38), u.uniform(0.09, 0.14)
    wide = u.uniform(0.3, 0.45)
    conifer = u.flag(0.5)
    b.add(FRUSTUM, (0, 0, 0), (r, r, trunk), b.rgb(0.45, 0.3, 0.18), taper=0.8)
    for k in range(3):
        shrink, z = 1 - 0.24 * k, trunk + 0.15 + 0.27 * k
        b.add(
            FRUSTUM,
            (0, 0, z),
            (wide * shrink * 1.2, wide * shrink * 1.2, 0.24),
            b.main,
            second=b.second,
            pattern=TWO_TONE,
            taper=0.15,
            where=conifer,
        )
    b.body(ELLIPSOID, (0, 0, trunk + 0.75 * wide), (wide, wide, 0.85 * wide), where=~conifer)
    b.pair(
        ELLIPSOID,
        (0.6 * wide, 0, trunk + 0.5 * wide),
        (0.6 * wide, 0.6 * wide, 0.5 * wide),
        b.main,
        where=~conifer,
    )
    b.pair(ELLIPSOID, (0.4 * wide, -0.75 * wide, trunk + 0.5 * wide), (0.09, 0.09, 0.09), b.accent)
    b.add(BOX, (0, -r, -0.3 * trunk), (0.5 * r, 0.04, 0.4 * trunk), b.dark)
    b.add(ELLIPSOID, (0, 0, -trunk), (2.6 * r, 2.6 * r, 0.06), b.rgb(0.3, 0.55, 0.2))


def snowman(b: Builder) -> None:
    u = b.draws
    r1, r2, r3 = u.uniform(0.34, 0.42), u.uniform(0.24, 0.31), u.uniform(0.17, 0.23)
    z2 = 0.85 * (r1 + r2)
    z3 = z2 + 0.85 * (r2 + r3)
    snow = torch.where(u.flag(0.6).unsqueeze(-1), b.white, b.main)
    b.add(ELLIPSOID, (0, 0, 0), (r1, r1, r1), snow)
    b.add(ELLIPSOID, (0, 0, z2), (r2, r2, r2), snow)
    b.add(ELLIPSOID, (0, 0, z3), (r3, r3, r3), snow)
    b.pair(ELLIPSOID, (0.4 * r3, -0.88 * r3, z3 + 0.25 * r3), (0.035, 0.03, 0.04), b.dark)
    b.add(
        FRUSTUM,
        (0, -r3 - 0.1, z3),
        (0.05, 0.05, 0.14),
        b.rgb(0.95, 0.5, 0.1),
        taper=0.05,
        tilt_deg=(90, 0, 0),
    )
    for k in (-0.35, 0.25):
        b.add(ELLIPSOID, (0, -0.95 * r2, z2 + k * r2), (0.04, 0.03, 0.04), b.dark)
    b.add(FRUSTUM, (0, 0, z3 - 0.82 * r3), (1.0 * r3, 1.0 * r3, 0.06), b.accent)
    b.add(FRUSTUM, (0, 0, z3 + 0.72 * r3), (1.25 * r3, 1.25 * r3, 0.03), b.second)
    b.add(FRUSTUM, (0, 0, z3 + 1.3 * r3), (0.75 * r3, 0.75 * r3, 0.65 * r3), b.second)
    b.pair(
        FRUSTUM,
        (r2 + 0.12, 0, z2 + 0.08),
        (0.03, 0.03, 0.2),
        b.rgb(0.4, 0.26, 0.15),
        (0, u.uniform(50, 75), 0),
    )


def boat(b: Builder) -> None:
    u = b.draws
    length, w = u.uniform(0.45, 0.6), u.uniform(0.2, 0.28)
    b.body(ELLIPSOID, (0, 0, 0), (w, length, 0.2))
    b.add(BOX, (0, 0, 0.1), (0.75 * w, 0.7 * length, 0.1), b.rgb(0.6, 0.42, 0.25))
    b.add(BOX, (0, 0.3 * length, 0.3), (0.55 * w, 0.25 * length, 0.14), b.white)
    b.add(BOX, (0, 0.3 * length - 0.25 * length, 0.33), (0.4 * w, 0.02, 0.06), b.glass)
    mast = u.uniform(0.35, 0.5)
    b.add(FRUSTUM, (0, -0.15 * length, mast), (0.03, 0.03, mast), b.rgb(0.4, 0.26, 0.15))
    b.add(
        BOX,
        (0, -0.17 * length, 1.2 * mast),
        (u.uniform(0.2, 0.32), 0.02, 0.45 * mast),
        b.second,
        second=b.main,
        pattern=STRIPES_Z,
        frequency=2.0,
    )
    b.add(BOX, (0.1, -0.15 * length, 2 * mast), (0.1, 0.015, 0.06), b.accent)
    b.add(FRUSTUM, (0, 0.5 * length, 0.5), (0.07, 0.07, 0.14), b.accent)
    b.add(ELLIPSOID, (0, -length, 0.08), (0.06, 0.08, 0.06), b.accent)


def bird(b: Builder) -> None:
    u = b.draws
    r = u.uniform(0.28, 0.38)
    head = u.uniform(0.17, 0.24)
    z, y = r + 0.5 * head, -0.5 * r
    b.body(ELLIPSOID, (0, 0, 0), (r, 1.25 * r, r))
    b.add(ELLIPSOID, (0, y, z), (head, head, head), b.second)
    b.eyes(0.5 * head, y - 0.75 * head, z + 0.25 * head, 0.22 * head)
    b.add(
        FRUSTUM,
        (0, y - head - 0.09, z - 0.05),
        (0.08, 0.06, 0.13),
        b.rgb(0.97, 0.62, 0.1),
        taper=0.1,
        tilt_deg=(90, 0, 0),
    )
    b.pair(ELLIPSOID, (0.95 * r, 0.1 * r, 0.05), (0.08, 0.75 * r, 0.5 * r), b.accent, (0, 12, 0))
    b.add(
        ELLIPSOID,
        (0, 1.35 * r, 0.15),
        (0.55 * r, 0.4 * r, 0.07),
        b.accent,
        tilt_deg=(u.uniform(15, 40), 0, 0),
    )
    b.pair(FRUSTUM, (0.4 * r, 0, -r - 0.08), (0.035, 0.035, 0.12), b.rgb(0.97, 0.62, 0.1))
    b.pair(ELLIPSOID, (0.4 * r, -0.06, -r - 0.2), (0.09, 0.14, 0.03), b.rgb(0.97, 0.62, 0.1))
    b.add(FRUSTUM, (0, y, z + head), (0.08, 0.08, 0.1), b.accent, taper=0.1, where=u.flag(0.5))


def rocket(b: Builder) -> None:
    u = b.draws
    r, h = u.uniform(0.17, 0.25), u.uniform(0.4, 0.55)
    b.add(
        FRUSTUM,
        (0, 0, 0),
        (r, r, h),
        b.main,
        second=b.second,
        pattern=torch.where(b.pattern == STRIPES_X, STRIPES_Z, b.pattern),
        frequency=b.frequency,
    )
    nose = u.uniform(0.14, 0.24)
    b.add(FRUSTUM, (0, 0, h + nose), (r, r, nose), b.accent, taper=0.05)
    b.add(ELLIPSOID, (0, -0.92 * r, 0.45 * h), (0.5 * r, 0.06, 0.5 * r), b.glass)
    b.add(BOX, (0, -0.95 * r, -0.35 * h), (0.35 * r, 0.05, 0.3 * h), b.second)
    fin = u.uniform(0.16, 0.26)
    b.pair(BOX, (r + 0.4 * fin, 0, -0.75 * h), (0.6 * fin, 0.035, 0.8 * fin), b.accent, (0, 18, 0))
    for y in (-1, 1):
        b.add(
            BOX,
            (0, y * (r + 0.4 * fin), -0.75 * h),
            (0.035, 0.6 * fin, 0.8 * fin),
            b.accent,
            tilt_deg=(18 * y, 0, 0),
        )
    b.add(FRUSTUM, (0, 0, -h - 0.06), (0.8 * r, 0.8 * r, 0.08), b.dark, taper=0.7)
    b.add(ELLIPSOID, (0, 0, -h - 0.2), (0.5 * r, 0.5 * r, 0.16), b.rgb(1.0, 0.6, 0.15), where=u.flag(0.5))


KINDS: dict[str, Callable[[Builder], None]] = {
    f.__name__: f for f in (robot, creature, house, car, mushroom, tree, snowman, boat, bird, rocket)
}
"""Order is part of what a seed means: append, never insert."""


def make_objects(seeds: Tensor) -> Objects:
    """The objects of these seeds ([N] int64), on the seeds' device."""
    draws = Draws(seeds)
    kind = draws.integer(len(KINDS))
    n, device = len(seeds), seeds.device
    colour_name = torch.zeros(n, dtype=torch.long, device=device)
    parts: dict[str, Tensor] = {}
    for index, build in enumerate(KINDS.values()):
        rows = (kind == index).nonzero().squeeze(1)
        if len(rows) == 0:
            continue
        builder = Builder(seeds[rows], stream=index + 1)
        build(builder)
        colour_name[rows] = builder.main_name
        for name, value in builder.finish(PARTS).items():
            if name not in parts:
                parts[name] = torch.zeros((n, *value.shape[1:]), dtype=value.dtype, device=device)
            parts[name][rows] = value
    return _normalised(Objects(seed=seeds, kind=kind, colour_name=colour_name, **parts))


def _normalised(objects: Objects) -> Objects:
    points = objects.surface_points(48, torch.Generator().manual_seed(0))
    used = (objects.size[..., 0] > 0)[..., None, None]
    low = torch.where(used, points, 9.0).flatten(1, 2).amin(1)
    high = torch.where(used, points, -9.0).flatten(1, 2).amax(1)
    middle = (0.5 * (low + high))[:, None, :]
    distance = torch.where(used[..., 0], (points - middle[:, :, None]).norm(dim=-1), 0.0)
    factor = (RADIUS / distance.flatten(1).amax(1))[:, None, None]
    objects.centre = (objects.centre - middle) * factor
    objects.size = objects.size * factor
    return objects


def caption(objects: Objects, index: int) -> str:
    """What the object is, in words: "a red house"."""
    return f"a {COLOURS[int(objects.colour_name[index])]} {list(KINDS)[int(objects.kind[index])]}"
