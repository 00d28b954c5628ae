from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
import trimesh
from analytic_field import (
    BALL_CENTRE,
    BALL_RADIUS,
    BLUE,
    BOX_HALF,
    GREEN,
    GREY,
    RED,
    UNSEEN,
    YELLOW,
    AnalyticField,
)

from imagedream_rt.engine.bake import unwrap, visible_points
from imagedream_rt.engine.errors import Cancelled, FusionError, InputError
from imagedream_rt.engine.mesh import MeshResult, extract_mesh, to_gltf
from imagedream_rt.engine.raster import cover

SETTINGS: dict[str, Any] = {"faces": 3000, "texture_px": 256, "resolution": 64}


@pytest.fixture(scope="module")
def result() -> MeshResult:
    return extract_mesh(AnalyticField(speck=True, hollow=True), **SETTINGS)


def world_points(mesh: trimesh.Trimesh) -> torch.Tensor:
    x, y, z = mesh.vertices.T
    return torch.tensor(np.stack([x, -z, y], 1), dtype=torch.float32)


def texture_of(mesh: trimesh.Trimesh) -> np.ndarray:
    """uint8 [H, W, 3]."""
    return np.asarray(cast(Any, mesh.visual).material.baseColorTexture)


def colours_where(mesh: trimesh.Trimesh, side: tuple[float, float, float]) -> np.ndarray:
    """Texture at the middles of the triangles of the box (not the ball) that face ``side``."""
    middles = mesh.vertices[mesh.faces].mean(1)
    chosen = (mesh.face_normals @ np.array(side) > 0.99) & (middles[:, 1] < 0.9 * BOX_HALF[2])
    assert chosen.sum() > 5
    texture = texture_of(mesh)
    uv = cast(Any, mesh.visual).uv[mesh.faces[chosen]].mean(1)
    size = len(texture)
    return texture[((1 - uv[:, 1]) * size).astype(int), (uv[:, 0] * size).astype(int)] / 255


def test_the_report_is_that_of_the_object(result: MeshResult) -> None:
    report, mesh = result.report, result.mesh
    assert report.watertight
    assert report.components_removed == 1  # the speck; the hollow is filled, not counted
    assert 0.8 * SETTINGS["faces"] < report.faces <= SETTINGS["faces"]
    assert report.faces == len(mesh.faces)
    assert report.silhouette_iou > 0.95
    assert 0 < report.threshold < 80
    assert report.texture_px == 256
    np.testing.assert_allclose(report.bounds[0], [-BOX_HALF[0], -BOX_HALF[2], -BOX_HALF[1]], atol=0.02)
    np.testing.assert_allclose(
        report.bounds[1], [BOX_HALF[0], BALL_CENTRE[2] + BALL_RADIUS, BOX_HALF[1]], atol=0.02
    )


def test_the_mesh_lies_on_the_surface_and_is_closed_but_for_seams(result: MeshResult) -> None:
    mesh = result.mesh
    distance = AnalyticField().distance(world_points(mesh))
    assert distance.abs().max() < 0.03
    joined = trimesh.Trimesh(mesh.vertices, mesh.faces)  # merges by position
    assert joined.is_watertight
    assert joined.is_winding_consistent
    assert len(joined.vertices) == result.report.vertices < len(mesh.vertices)
    grid = torch.meshgrid(*[torch.linspace(-0.7, 0.7, 147)] * 3, indexing="ij")
    inside = AnalyticField().density(torch.stack(grid, -1).reshape(-1, 3)) >= result.report.threshold
    assert joined.volume == pytest.approx(float(inside.sum()) * (1.4 / 146) ** 3, rel=0.03)
    # Smooth across seams, and outwards.
    np.testing.assert_allclose(np.linalg.norm(mesh.vertex_normals, axis=1), 1.0, atol=1e-6)
    first: dict[tuple[float, ...], np.ndarray] = {}
    for position, normal in zip(map(tuple, mesh.vertices), mesh.vertex_normals, strict=True):
        np.testing.assert_allclose(first.setdefault(position, normal), normal, atol=1e-6)
    ahead = AnalyticField().distance(
        world_points(trimesh.Trimesh(mesh.vertices + 0.05 * mesh.vertex_normals, mesh.faces, process=False))
    )
    assert (ahead > distance).float().mean() > 0.99


@pytest.mark.parametrize(
    ("side", "colour"),
    [
        ((0, 0, 1), RED),  # the front
        ((0, 0, -1), GREEN),
        ((-1, 0, 0), BLUE),
        ((1, 0, 0), YELLOW),
        ((0, -1, 0), GREY),
    ],
)
def test_each_side_has_its_colour_in_gltf_axes(result: MeshResult, side, colour) -> None:
    found = colours_where(result.mesh, side)
    assert np.median(np.abs(found - colour).max(1)) <= 0.5 / 255 + 1e-9
    assert np.mean(np.abs(found - colour).max(1) < 0.01) > 0.9


@pytest.mark.parametrize(("peak", "softness"), [(15.0, 0.15), (500.0, 0.005)])
def test_soft_and_sharp_fields_match_their_renders_and_take_no_colour_from_outside(
    peak: float, softness: float
) -> None:
    field = AnalyticField(peak=peak, softness=softness)
    found = extract_mesh(field, **SETTINGS)
    assert found.report.silhouette_iou > 0.93
    assert found.report.watertight
    texture = texture_of(found.mesh) / 255
    assert (np.abs(texture - np.array(UNSEEN)).max(-1) > 0.3).all()
    assert (texture.max(-1) > 0.45).all()  # black, in gutters too, would shine through when minified


def test_the_material_shows_the_texture_as_it_is(result: MeshResult) -> None:
    material = cast(Any, result.mesh.visual).material
    assert material.baseColorTexture.size == (256, 256)
    assert material.baseColorTexture.mode == "RGB"
    assert (material.roughnessFactor, material.metallicFactor) == (1.0, 0.0)
    assert material.baseColorFactor is None


def test_the_same_field_gives_the_same_mesh(result: MeshResult) -> None:
    again = extract_mesh(AnalyticField(speck=True, hollow=True), **SETTINGS)
    assert again.report == result.report
    np.testing.assert_array_equal(again.mesh.vertices, result.mesh.vertices)
    np.testing.assert_array_equal(texture_of(again.mesh), texture_of(result.mesh))


def test_a_colour_is_looked_for_where_rays_end() -> None:
    # Matter of density 100 where x < 0. A vertex outside, one on its surface, one far off; normals along x.
    vertices = np.array([[0.02, 0.1, 0.0], [0.0, 0.2, 0.0], [0.9, 0.3, 0.0]])
    normals = np.tile([1.0, 0.0, 0.0], (3, 1))
    found = visible_points(
        lambda points: 100.0 * (points[:, 0] < 0), vertices, normals, reach=0.08, device=torch.device("cpu")
    )
    np.testing.assert_allclose(found[:, 1:], vertices[:, 1:], atol=1e-6)
    # Light ends at a mean depth of 1 / 100, if nearly all of it ends within reach.
    np.testing.assert_allclose(found[:2, 0], -0.01, atol=0.006)
    assert found[2, 0] == pytest.approx(0.9)


def test_charts_do_not_overlap_and_keep_a_gutter() -> None:
    ball = trimesh.creation.icosphere(subdivisions=3)
    cut = unwrap(np.asarray(ball.vertices), np.asarray(ball.faces), 256)
    np.testing.assert_array_equal(cut.source[cut.faces], ball.faces)
    found = cover((cut.uv * [256, -256] + [0, 256])[cut.faces], 256, 256)
    counts = np.zeros((256, 256), int)
    np.add.at(counts, (found.row, found.column), 1)
    assert counts.max() == 1
    assert counts.mean() > 0.4
    chart_of_vertex = trimesh.graph.connected_component_labels(
        trimesh.Trimesh(cut.uv[:, [0, 1, 1]], cut.faces, process=False).edges, node_count=len(cut.uv)
    )
    chart = np.full((256, 256), -1)
    chart[found.row, found.column] = chart_of_vertex[cut.faces[found.face, 0]]
    beside = np.stack([chart[:, :-1], chart[:, 1:]])
    assert not ((beside >= 0).all(0) & (beside[0] != beside[1])).any()


def test_axes() -> None:
    front, right, up = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(to_gltf(np.stack([front, right, up])), [[0, 0, 1], [1, 0, 0], [0, 1, 0]])


def test_a_field_without_a_surface_stops_with_a_reason() -> None:
    with pytest.raises(FusionError, match="empty: 0 pixels"):
        extract_mesh(AnalyticField(peak=0.0), **SETTINGS)
    with pytest.raises(FusionError, match="empty: 0 pixels"):
        extract_mesh(AnalyticField(peak=0.05), **SETTINGS)


@pytest.mark.parametrize(
    ("name", "value"), [("faces", 0), ("faces", -5), ("texture_px", 0), ("resolution", 4096)]
)
def test_settings_out_of_range_are_named(name: str, value: int) -> None:
    with pytest.raises(InputError, match=f"{name} is {value}"):
        extract_mesh(AnalyticField(), **{**SETTINGS, name: value})


def test_progress_is_told_and_cancel_is_asked() -> None:
    told: list[tuple[str, int, int]] = []
    with pytest.raises(Cancelled):
        extract_mesh(
            AnalyticField(),
            **SETTINGS,
            on_progress=lambda *news: told.append(news),
            cancel=lambda: len(told) == 3,
        )
    assert told == [("mesh", 0, 5), ("mesh", 1, 5), ("mesh", 2, 5)]
