"""Cameras against the released get_camera, normalize_camera and random_multiview, and by hand."""

import doctest
import json
import math
import random
from pathlib import Path

import pytest
import torch

from imagedream_rt.engine import cameras as module
from imagedream_rt.engine.cameras import (
    CameraDraws,
    Cameras,
    cameras_from_draws,
    official_views,
    orbit_cameras,
    sample_cameras,
)
from imagedream_rt.engine.config import CameraRange
from imagedream_rt.engine.errors import InputError

RECORDED = json.loads((Path(__file__).parent / "fixtures" / "cameras.json").read_text())
BOUND = 1e-6


def worst(got: torch.Tensor, want: object) -> float:
    return float((got.double() - torch.tensor(want, dtype=torch.float64)).abs().max())


def identity(case: dict) -> str:
    return "-".join(str(case[k]) for k in ("elevation", "azimuth_start", "extra_view"))


def lights(cameras: Cameras) -> torch.Tensor:
    assert cameras.light_positions is not None
    return cameras.light_positions


@pytest.mark.parametrize("case", RECORDED["get_camera"], ids=identity)
def test_official_views(case):
    views = official_views(case["elevation"], [case["azimuth_start"] + 90 * k for k in range(4)])
    assert worst(views, case["camera"][:4]) <= BOUND


def test_embedding_normalises_translations_and_leaves_its_input_alone():
    c2w = torch.tensor(RECORDED["normalize_camera"]["in"])
    before = c2w.clone()
    assert worst(Cameras(c2w, torch.ones(3)).embedding(), RECORDED["normalize_camera"]["out"]) <= BOUND
    assert torch.equal(c2w, before)
    at_origin = Cameras(torch.zeros(1, 4, 4), torch.ones(1)).embedding()
    assert at_origin.tolist() == RECORDED["normalize_camera"]["zero_in_gives"]


@pytest.mark.parametrize("case", RECORDED["random_multiview_collate"], ids=lambda c: f"seed{c['seed']}")
def test_training_cameras_from_the_released_random_numbers(case):
    """The released collate draws in this order; from the same numbers come its cameras, lights and rays."""
    groups = case["batch"] // 4
    torch.manual_seed(case["seed"])
    random.seed(case["seed"])
    branch = random.random()
    elevation, azimuth, fovy, distance, _zoom = (torch.rand(groups) for _ in range(5))
    for perturbation in (torch.rand, torch.randn, torch.randn):  # camera, centre, up: all configured to zero
        perturbation(groups, 3)
    light_distance, light_normal = torch.rand(groups), torch.randn(groups, 3)
    override = case["override"]
    camera_range = CameraRange(
        elevation_deg=tuple(override.get("elevation_range", (0.0, 5.0))),
        fovy_deg=tuple(override.get("fovy_range", (45.0, 50.0))),
        relative_distance=tuple(override.get("camera_distance_range", (0.6, 0.75))),
    )
    draws = CameraDraws(branch, elevation, azimuth, fovy, distance, light_distance, light_normal)
    cameras = cameras_from_draws(camera_range, draws)
    assert len(cameras) == case["batch"]
    assert worst(cameras.c2w, case["c2w"]) <= BOUND
    assert worst(torch.rad2deg(cameras.fovy_rad), case["fovy"]) <= 1e-5
    assert worst(lights(cameras), case["light_positions"]) <= BOUND
    rays = cameras.rays(case["height"])
    assert worst(rays.directions, case["rays_d"]) <= BOUND
    assert worst(rays.origins[:, 0, 0], case["rays_o"]) <= BOUND
    assert torch.equal(rays.origins, rays.origins[:, :1, :1].expand_as(rays.origins))


@pytest.mark.parametrize("case", RECORDED["explicit_views"], ids=lambda c: f"azimuth{c['azimuth_deg']}")
def test_orbit_cameras_are_threestudio_views_ninety_degrees_on(case):
    cameras = orbit_cameras(
        [case["azimuth_deg"] + 90], case["elevation_deg"], case["fovy_deg"], case["distance"]
    )
    assert worst(cameras.c2w[0], case["c2w"]) <= BOUND
    rays = cameras.rays(case["H"])
    assert worst(rays.directions[0], case["rays_d"]) <= BOUND
    assert worst(rays.origins[0, 3, 5], case["rays_o"]) <= BOUND


def test_docstring_examples():
    assert doctest.testmod(module) == (0, 1)


def test_front_camera_by_hand():
    camera = orbit_cameras([0.0], 0.0, 90.0, 2.0)
    rays = camera.rays(2)
    assert camera.c2w[0, :3, 3].tolist() == [0.0, -2.0, 0.0]
    third = 1.0 / math.sqrt(1.5)
    top_left = [-0.5 * third, third, 0.5 * third]  # the picture's left is the world's -x, its top +z
    assert worst(rays.directions[0, 0, 0], top_left) <= BOUND
    assert worst(rays.directions[0, 1, 0], [top_left[0], top_left[1], -top_left[2]]) <= BOUND


@pytest.mark.parametrize("elevation", [-90.0, 90.0])
def test_poles_keep_an_orthonormal_frame(elevation):
    c2w = orbit_cameras([0.0, 130.0], elevation, 40.0, 1.5).c2w[:, :3, :3]
    assert worst(c2w @ c2w.transpose(1, 2), torch.eye(3).expand(2, 3, 3).tolist()) <= BOUND
    assert worst(torch.linalg.det(c2w), [1.0, 1.0]) <= BOUND


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (([], 0.0, 40.0, 1.0), "0 azimuths"),
        (([0.0, 90.0], [1.0], 40.0, 1.0), "2 azimuths and 1"),
        (([math.nan], 0.0, 40.0, 1.0), "finite"),
        (([0.0], 0.0, 180.0, 1.0), "field of view"),
        (([0.0], 0.0, 40.0, 0.0), "distance"),
    ],
)
def test_senseless_orbits_are_refused(arguments, names):
    with pytest.raises(InputError, match=names):
        orbit_cameras(*arguments)


def test_sampled_cameras_stay_in_range_and_share_per_group():
    camera_range = CameraRange(elevation_deg=(-5.0, 25.0), elevation_sampling="uniform")
    cameras = sample_cameras(camera_range, 500, torch.Generator().manual_seed(3))
    assert len(cameras) == 2000
    position = cameras.c2w[:, :3, 3].double()
    distance = position.norm(dim=-1)
    elevation = torch.rad2deg(torch.asin(position[:, 2] / distance))
    relative = distance * torch.tan(0.5 * cameras.fovy_rad.double())
    for value, low, high in (
        (elevation, -5.0, 25.0),
        (relative, 0.6, 0.75),
        (torch.rad2deg(cameras.fovy_rad.double()), 45.0, 50.0),
        (lights(cameras).double().norm(dim=-1), 0.8, 1.5),
    ):
        group = value.reshape(500, 4)
        slack = 1e-4 * (high - low)
        assert (group - group[:, :1]).abs().max() < slack
        assert low - slack <= value.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < value.max() <= high + slack
    azimuth = torch.rad2deg(torch.atan2(position[:, 0], -position[:, 1])).reshape(500, 4)
    turn = (azimuth[:, 1:] - azimuth[:, :1]) % 360.0
    assert worst(turn, [[90.0, 180.0, 270.0]] * 500) < 1e-3
    assert (azimuth % 90.0).std() > 20.0


def test_official_elevations_take_the_arcsine_branch_half_of_the_time():
    generator = torch.Generator().manual_seed(0)
    highest = []
    for _ in range(200):
        cameras = sample_cameras(CameraRange(), 64, generator)
        sine = cameras.c2w[:, 2, 3] / cameras.c2w[:, :3, 3].norm(dim=-1)
        highest.append(float(torch.rad2deg(torch.asin(sine)).max()))
    narrow = sum(value < 3.19 for value in highest)
    assert 75 <= narrow <= 125
    assert all(value < 3.19 or value > 4.2 for value in highest)


def test_same_seed_same_cameras_and_indexing_and_moving_keep_the_light():
    one, two = (sample_cameras(CameraRange(), 2, torch.Generator().manual_seed(9)) for _ in range(2))
    assert torch.equal(one.c2w, two.c2w)
    last = one[4:]
    assert len(last) == 4
    assert torch.equal(lights(last), lights(one)[4:])
    assert torch.equal(one[[7, 1]].fovy_rad, one.fovy_rad[[7, 1]])
    assert lights(one.to("meta")).device.type == "meta"
    assert orbit_cameras([0.0], 0.0, 40.0, 1.0)[:1].to("cpu").light_positions is None
