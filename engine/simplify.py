"""A triangle mesh made small and clean: loose parts dropped, faces merged down to a budget, pinched edges
opened."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SMALLEST_PART = 0.01
"""Of the faces of the largest part; the released exporter's value."""


def drop_small_parts(vertices: Floats, faces: Ints) -> tuple[Floats, Ints, int]:
    """The mesh without connected parts of less than 1 % of the largest one's faces, and how many were
    dropped."""
    edges = faces[:, [0, 1, 1, 2]].reshape(-1, 2)
    links = coo_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(len(vertices),) * 2)
    _, part = connected_components(links, directed=False)
    sizes = np.bincount(part[faces[:, 0]])
    keep = sizes >= SMALLEST_PART * sizes.max()
    dropped = int(((sizes > 0) & ~keep).sum())
    return *compact(vertices, faces[keep[part[faces[:, 0]]]]), dropped


def decimate(vertices: Floats, faces: Ints, budget: int) -> tuple[Floats, Ints]:
    """At most ``budget`` faces by quadric edge collapse; a closed surface stays closed."""
    target = budget
    while True:
        small_vertices, small_faces = _collapse(vertices, faces, target)
        small_vertices, small_faces = open_pinched_edges(small_vertices, small_faces)
        excess = len(small_faces) - budget
        if excess <= 0 or target <= excess + 4:
            return small_vertices, small_faces
        target -= excess  # opening an edge costs two faces


def _collapse(vertices: Floats, faces: Ints, target: int) -> tuple[Floats, Ints]:
    if len(faces) <= target:
        return vertices, faces
    import fast_simplification

    small_vertices, small_faces = fast_simplification.simplify(vertices, faces, target_count=target)
    return compact(np.asarray(small_vertices, np.float64), np.asarray(small_faces, np.int64))


def open_pinched_edges(vertices: Floats, faces: Ints) -> tuple[Floats, Ints]:
    """The mesh with two faces at each edge where collapses have left four: thin handles closed up to a line.

    Pairs of the same face back to back are removed. Two neighbouring faces of any other such edge get an
    edge of their own: it is split in the middle, and the new vertex moves a little off the old edge.
    """
    for _ in range(10):
        faces = _without_doubled_faces(faces)
        # Half-edge h runs from half[h, 0] to half[h, 1] in face h // 3 and lies opposite that
        # face's corner tip[h].
        half = faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)
        tip = faces[:, [2, 0, 1]].reshape(-1)
        _, edge, counts = np.unique(np.sort(half, 1), axis=0, return_inverse=True, return_counts=True)
        crowded = np.flatnonzero(counts > 2)
        if not len(crowded):
            break
        order = np.argsort(edge, kind="stable")
        starts = np.cumsum(counts) - counts
        touched: set[int] = set()
        new_vertices, new_faces = [], []
        for index in crowded:
            pair = _neighbours(vertices, half, tip, order[starts[index] : starts[index] + counts[index]])
            if pair is None or touched & {pair[0] // 3, pair[1] // 3}:
                continue
            touched |= {pair[0] // 3, pair[1] // 3}
            middle = vertices[half[pair[0]]].mean(0)
            new_vertices.append(0.9 * middle + 0.1 * vertices[tip[list(pair)]].mean(0))
            new = len(vertices) + len(new_vertices) - 1
            for h in pair:
                new_faces += [(half[h, 0], new, tip[h]), (new, half[h, 1], tip[h])]
        if not new_faces:
            break
        faces = np.concatenate([np.delete(faces, sorted(touched), axis=0), np.array(new_faces)])
        vertices = np.concatenate([vertices, np.array(new_vertices)])
    return compact(vertices, faces)


def _neighbours(vertices: Floats, half: Ints, tip: Ints, around: Ints) -> tuple[int, int] | None:
    """Of the half-edges ``around`` one edge, two of opposite directions whose faces enclose the smallest
    angle."""
    low, high = np.sort(half[around[0]])
    axis = vertices[high] - vertices[low]
    axis = axis / max(float(np.linalg.norm(axis)), 1e-30)
    spoke = vertices[tip[around]] - vertices[low]
    spoke = spoke - (spoke @ axis)[:, None] * axis
    across = np.cross(axis, spoke[0])
    angle = np.arctan2(spoke @ across, spoke @ spoke[0])
    best: tuple[float, int, int] | None = None
    for i, h in enumerate(around):
        for j, other in enumerate(around[:i]):
            if half[h, 0] == half[other, 0]:
                continue
            gap = abs(angle[i] - angle[j])
            gap = min(gap, 2 * np.pi - gap)
            if best is None or gap < best[0]:
                best = (gap, int(h), int(other))
    return None if best is None else best[1:]


def _without_doubled_faces(faces: Ints) -> Ints:
    """Faces without area in the indices dropped, and those that occur in both windings as often cancelled."""
    faces = faces[(faces != np.roll(faces, 1, axis=1)).all(1)]
    least = faces.argmin(1)[:, None]
    rolled = np.take_along_axis(faces, (least + np.arange(3)) % 3, axis=1)
    sign = np.where(rolled[:, 1] < rolled[:, 2], 1, -1)
    _, group = np.unique(np.sort(faces, 1), axis=0, return_inverse=True)
    surplus = np.bincount(group, weights=sign)[group]
    candidates = np.flatnonzero(surplus * sign > 0)
    _, firsts = np.unique(group[candidates], return_index=True)
    return faces[np.sort(candidates[firsts])]


def compact(vertices: Floats, faces: Ints) -> tuple[Floats, Ints]:
    """The same mesh without the vertices that no face uses."""
    used, renumbered = np.unique(faces, return_inverse=True)
    return vertices[used], renumbered.reshape(-1, 3)


def is_closed(faces: Ints) -> bool:
    """Whether each edge has exactly two faces, which run along it in opposite directions."""
    half = faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)
    forward = half[:, 0] < half[:, 1]
    _, edge, counts = np.unique(np.sort(half, 1), axis=0, return_inverse=True, return_counts=True)
    return bool((counts == 2).all() and (np.bincount(edge, weights=forward) == 1).all())
