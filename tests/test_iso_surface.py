from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import trimesh
from torch import Tensor

from imagedream_rt.engine.cameras import orbit_cameras
from imagedream_rt.engine.errors import FusionError
from imagedream_rt.engine.iso_surface import (
    Volume,
    box_of_object,
    choose_threshold,
    greatest_on_rays,
    level_set,
    sample_volume,
)
from imagedream_rt.engine.simplify import is_closed

CPU = torch.device("cpu")


def cone(points: Tensor) -> Tensor:
    """Density 10 at (0.1, 0, 0), falling to 0 at distance 1: its level sets are balls."""
    return 10 * (1 - (points - torch.tensor([0.1, 0.0, 0.0], device=points.device)).norm(dim=-1)).clamp(min=0)


def scene(density=cone, resolution: int = 40, half: float = 1.0, device: torch.device = CPU) -> Volume:
    corner = np.full(3, half)
    return sample_volume(density, -corner, corner, resolution, device)


def test_the_volume_holds_the_density_at_its_nodes() -> None:
    volume = sample_volume(cone, np.array([-0.5, -1.0, 0.0]), np.array([0.5, 1.0, 0.33]), 20, CPU)
    assert volume.spacing == pytest.approx(0.1)
    assert list(volume.values.shape) == [11, 21, 5]
    assert volume.lower == pytest.approx((-0.5, -1.0, -0.035))  # 0.4 for 0.33, centred
    assert volume.upper == pytest.approx((0.5, 1.0, 0.365))
    node = torch.tensor([volume.lower]) + 0.1 * torch.tensor([[7.0, 12.0, 3.0]])
    assert volume.values[7, 12, 3] == pytest.approx(float(cone(node)), abs=1e-4)


def test_a_density_that_is_not_finite_stops() -> None:
    with pytest.raises(FusionError, match="not finite"):
        scene(lambda points: torch.where(points[:, 0] > 0.9, torch.nan, 1.0))


def test_the_greatest_density_on_a_ray_is_that_of_its_nearest_point() -> None:
    cameras = orbit_cameras([0.0, 50.0], [0.0, 40.0], 70.0, 2.5)
    origins, directions = cameras.rays(24)
    nearest = origins - (origins * directions).sum(-1, keepdim=True) * directions
    greatest = greatest_on_rays(scene(lambda points: 10 - 4 * points.norm(dim=-1)), cameras, 24)
    through = nearest.norm(dim=-1) < 0.9
    assert through.sum() > 100
    torch.testing.assert_close(greatest[through], (10 - 4 * nearest.norm(dim=-1))[through], atol=0.12, rtol=0)
    corner_rays = greatest[0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corner_rays == 0).all()  # miss the box


def test_the_threshold_by_hand() -> None:
    greatest = torch.tensor([[[0.0, 1.0, 2.0], [3.0, 8.0, 9.0]]])
    opaque = torch.tensor([[[False, False, True], [False, True, True]]])
    # At most 2: three hits and one extra of 3 + 1. Between 3 and 8: two hits of 3.
    threshold, iou = choose_threshold(greatest, opaque)
    assert iou == pytest.approx(3 / 4)
    assert 1 < threshold <= 2
    assert threshold == pytest.approx(2**0.5, rel=0.03)  # the middle in ratio


@pytest.mark.parametrize("level", [2.0, 5.0, 8.0])
def test_the_threshold_is_found_again_from_its_silhouettes(level: float) -> None:
    cameras = orbit_cameras([0.0, 90.0, 200.0], [0.0, 20.0, 40.0], 50.0, 2.5)
    origins, directions = cameras.rays(64)
    to_centre = torch.tensor([0.1, 0.0, 0.0]) - origins
    apart = (to_centre - (to_centre * directions).sum(-1, keepdim=True) * directions).norm(dim=-1)
    threshold, iou = choose_threshold(greatest_on_rays(scene(), cameras, 64), apart < 1 - level / 10)
    assert threshold == pytest.approx(level, abs=0.35)
    assert iou > 0.95


@pytest.mark.parametrize("greatest", [0.0, 5.0])
def test_an_empty_field_stops(greatest: float) -> None:
    with pytest.raises(FusionError, match="empty"):
        choose_threshold(torch.full((1, 2, 2), greatest), torch.full((1, 2, 2), greatest == 0.0))


def test_the_box_has_a_margin_and_no_specks() -> None:
    values = torch.zeros(81, 81, 81)
    values[24:57, 32:49, 36:45] = 1.0  # -0.4 to 0.4, -0.2 to 0.2, -0.1 to 0.1
    values[2, 2, 2] = 1.0
    volume = Volume(values, (-1.0, -1.0, -1.0), 0.025)
    lower, upper = box_of_object(volume, 0.5)
    # A tenth of the extent on each side, but at least a cube: 0.08, 0.04, 0.025 for 0.02.
    np.testing.assert_allclose(upper, [0.48, 0.24, 0.125], atol=1e-9)
    np.testing.assert_allclose(lower, -upper, atol=1e-9)
    values[2:4, 2:4, 2:4] = 1.0  # 8 nodes to 5049: no speck
    np.testing.assert_allclose(box_of_object(volume, 0.5)[0], [-1.0, -1.0, -1.0], atol=0.02)
    with pytest.raises(FusionError, match="below 2 everywhere"):
        box_of_object(volume, 2.0)


def test_the_level_set_of_a_cone_is_a_ball() -> None:
    vertices, faces = level_set(scene(), 5.0)
    assert is_closed(faces)
    radius = np.linalg.norm(vertices - [0.1, 0, 0], axis=1)
    assert np.abs(radius - 0.5).max() < 0.003
    assert trimesh.Trimesh(vertices, faces, process=False).volume == pytest.approx(
        4 / 3 * np.pi / 8, rel=0.01
    )


def test_a_jump_of_the_density_is_met_halfway_between_nodes() -> None:
    # From 0 to 1000 between nodes 0.05 apart: interpolating the values would end on the outer node.
    volume = scene(lambda points: 1000.0 * (points.abs().amax(-1) < 0.52))
    vertices, _ = level_set(volume, 5.0)
    assert np.abs(vertices).max() == pytest.approx(0.525, abs=1e-3)


def test_the_surface_is_closed_where_matter_leaves_the_grid() -> None:
    vertices, faces = level_set(scene(half=0.3), 5.0)
    assert is_closed(faces)
    assert np.abs(vertices).max() < 0.3 + 0.6 / 40


def test_enclosed_hollows_are_filled() -> None:
    volume = scene(lambda points: cone(points) * (points.norm(dim=-1) > 0.2))
    vertices, _ = level_set(volume, 5.0)
    assert np.linalg.norm(vertices, axis=1).min() > 0.3


def test_no_density_above_the_threshold_stops() -> None:
    with pytest.raises(FusionError, match=r"below 11 everywhere"):
        level_set(scene(), 11.0)


@pytest.mark.gpu
def test_warp_finds_the_surface_that_scikit_image_finds(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("warp")
    volume = scene()
    on_gpu = Volume(volume.values.cuda(), volume.lower, volume.spacing)
    with caplog.at_level(logging.WARNING):
        vertices, faces = level_set(on_gpu, 5.0)
    assert not caplog.records  # no fall back
    expected, expected_faces = level_set(volume, 5.0)
    assert is_closed(faces)
    assert len(faces) == len(expected_faces)
    np.testing.assert_allclose(np.sort(vertices, axis=0), np.sort(expected, axis=0), atol=1e-4)
    found, wanted = (
        trimesh.Trimesh(*mesh, process=False).volume
        for mesh in ((vertices, faces), (expected, expected_faces))
    )
    assert found == pytest.approx(wanted, rel=1e-4)
