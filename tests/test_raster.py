from __future__ import annotations

import numpy as np
import torch
import trimesh

from imagedream_rt.engine.cameras import orbit_cameras
from imagedream_rt.engine.raster import cover, silhouettes


def test_a_triangle_by_hand() -> None:
    # Half of a 4 x 4 square, below a line just under its diagonal: centres with x < y, row by row.
    found = cover(np.array([[[0.0, 0.1], [0.0, 4.1], [4.0, 4.1]]]), 4, 4)
    assert found.row.tolist() == [1, 2, 2, 3, 3, 3]
    assert found.column.tolist() == [0, 0, 1, 0, 1, 2]
    # Corner 0 is at the top: its weight falls by 1/4 a row. Corner 2 is at the right.
    np.testing.assert_allclose(found.weights[:, 0], (4.1 - found.row - 0.5) / 4)
    np.testing.assert_allclose(found.weights[:, 2], (found.column + 0.5) / 4)


def test_two_halves_of_a_square_cover_each_pixel_once_in_any_winding() -> None:
    low, high = 0.5, 8.5  # edges and diagonal run through pixel centres
    a, b, c, d = (low, low), (high, low), (high, high), (low, high)
    for corners in ([[a, b, c], [a, c, d]], [[c, b, a], [d, c, a]], [[a, b, d], [b, c, d]]):
        found = cover(np.array(corners), 10, 10)
        counts = np.zeros((10, 10), int)
        np.add.at(counts, (found.row, found.column), 1)
        assert (counts[:8, :8] == 1).all()
        assert counts.sum() == 64


def test_random_triangles_match_the_definition() -> None:
    rng = np.random.default_rng(0)
    corners = rng.uniform(-5, 25, (50, 3, 2))
    corners[10] = corners[10, :1]  # a point
    corners[11, 2] = 2 * corners[11, 1] - corners[11, 0]  # a line
    found = cover(corners, 20, 16)
    y, x = np.mgrid[:16, :20] + 0.5
    for face, triangle in enumerate(corners):
        matrix = np.vstack([triangle.T, np.ones(3)])
        inside = np.zeros((16, 20), bool)
        if face not in (10, 11):
            weights = np.linalg.solve(matrix, np.stack([x, y, np.ones_like(x)]).reshape(3, -1))
            inside = (weights > 0).all(0).reshape(16, 20)
        mine = found.face == face
        got = np.zeros((16, 20), bool)
        got[found.row[mine], found.column[mine]] = True
        assert (got == inside).all(), face
        places = np.einsum("nk,kd->nd", found.weights[mine], triangle)
        centres = np.stack([found.column[mine], found.row[mine]], 1) + 0.5
        np.testing.assert_allclose(places, centres, atol=1e-6)


def test_silhouettes_are_the_pixels_whose_rays_hit() -> None:
    centre, radius = torch.tensor([0.3, -0.1, 0.2]), 0.4
    ball = trimesh.creation.icosphere(subdivisions=4, radius=radius)
    cameras = orbit_cameras([0.0, 70.0, 200.0], [0.0, 30.0, -20.0], 40.0, 2.0)
    masks = silhouettes(ball.vertices + centre.numpy(), ball.faces, cameras, 64)
    origins, directions = cameras.rays(64)
    to_centre = centre - origins
    nearest = to_centre - (to_centre * directions).sum(-1, keepdim=True) * directions
    hit = (nearest.norm(dim=-1) < radius).numpy()
    assert 0.2 < hit.mean() < 0.4
    assert (masks & hit).sum() / (masks | hit).sum() > 0.98


def test_what_lies_behind_the_camera_is_not_seen() -> None:
    ball = trimesh.creation.icosphere(subdivisions=2, radius=0.4)
    camera = orbit_cameras([0.0], 0.0, 40.0, 2.0)
    assert silhouettes(ball.vertices, ball.faces, camera, 32).any()
    assert not silhouettes(ball.vertices - np.array([0.0, 4.0, 0.0]), ball.faces, camera, 32).any()
