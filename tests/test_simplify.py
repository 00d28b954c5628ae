from __future__ import annotations

from typing import Any

import numpy as np
import trimesh
from numpy.typing import NDArray
from scipy import ndimage

from imagedream_rt.engine.simplify import compact, decimate, drop_small_parts, is_closed, open_pinched_edges

TETRAHEDRON = np.array([[0, 2, 1], [0, 1, 3], [1, 2, 3], [2, 0, 3]])


def noisy_ball() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """A ball so rough that it has handles and loose parts all over."""
    from skimage import measure

    rng = np.random.default_rng(0)
    noise = ndimage.gaussian_filter(rng.standard_normal((60, 60, 60)), 1.5)
    grid = np.linspace(-1, 1, 60)
    radius = np.sqrt(sum(axis**2 for axis in np.meshgrid(grid, grid, grid)))
    vertices, faces, _, _ = measure.marching_cubes(np.pad(0.7 - radius + 0.15 * noise / noise.std(), 1), 0.0)
    return vertices.astype(float), faces.astype(np.int64)


def test_closed_needs_two_faces_at_each_edge_in_opposite_directions() -> None:
    assert is_closed(TETRAHEDRON)
    assert not is_closed(TETRAHEDRON[:3])
    turned = TETRAHEDRON.copy()
    turned[0] = turned[0, ::-1]
    assert not is_closed(turned)


def test_compact_drops_unused_vertices_only() -> None:
    vertices, faces = compact(np.arange(12.0).reshape(4, 3), np.array([[3, 1, 0]]))
    np.testing.assert_array_equal(vertices[faces[0]], [[9, 10, 11], [3, 4, 5], [0, 1, 2]])
    assert len(vertices) == 3


def test_two_bodies_that_share_an_edge_come_apart_there() -> None:
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, -1, 0], [0, 0, -1]], float)
    mirrored = np.array([0, 1, 4, 5])  # shares the edge 0-1; mirrored twice, so the winding stays
    faces = np.concatenate([TETRAHEDRON, mirrored[TETRAHEDRON]])
    assert not is_closed(faces)
    opened_vertices, opened = open_pinched_edges(vertices, faces)
    assert is_closed(opened)
    assert len(opened) == len(faces) + 2
    mesh = trimesh.Trimesh(opened_vertices, opened, process=False)
    assert abs(mesh.volume - 2 / 6) < 0.04
    mesh.merge_vertices()
    assert len(mesh.vertices) == 7  # the new vertex coincides with no other


def test_faces_back_to_back_are_removed() -> None:
    vertices = np.concatenate([np.eye(4, 3), [[2.0, 2.0, 2.0]]])
    flap = np.array([[1, 2, 4], [2, 1, 4]])
    opened_vertices, opened = open_pinched_edges(vertices, np.concatenate([TETRAHEDRON, flap]))
    assert is_closed(opened)
    assert len(opened) == 4
    assert len(opened_vertices) == 4


def test_decimation_keeps_a_rough_surface_closed_and_within_budget() -> None:
    vertices, faces = noisy_ball()
    assert is_closed(faces)
    vertices, faces, dropped = drop_small_parts(vertices, faces)
    assert dropped > 0
    whole = abs(trimesh.Trimesh(vertices, faces, process=False).volume)
    for budget in (4000, 1000):
        small_vertices, small_faces = decimate(vertices, faces, budget)
        assert is_closed(small_faces)
        assert 0.9 * budget < len(small_faces) <= budget
        assert abs(abs(trimesh.Trimesh(small_vertices, small_faces, process=False).volume) / whole - 1) < 0.05
    untouched_vertices, untouched = decimate(vertices, faces, len(faces))
    assert len(untouched) == len(faces)
    assert len(untouched_vertices) == len(vertices)


def test_parts_below_one_percent_of_the_largest_go() -> None:
    large = trimesh.creation.icosphere(subdivisions=3)  # 1280 faces
    small = trimesh.creation.icosphere(subdivisions=0)  # 20 faces, 1.6 %
    speck = trimesh.creation.box()  # 12 faces, 0.9 %
    parts = [part.apply_translation([4.0 * k, 0, 0]) for k, part in enumerate((speck, small, large, speck))]
    joined: Any = trimesh.util.concatenate(parts)
    _, faces, dropped = drop_small_parts(np.asarray(joined.vertices), np.asarray(joined.faces))
    assert len(faces) == 1300
    assert dropped == 2
