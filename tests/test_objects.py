"""Procedural objects: what a seed means, how they are placed, and their closed-form geometry."""

import math

import pytest
import torch

from imagedream_rt.engine.cameras import orbit_cameras
from imagedream_rt.engine.training import raycast
from imagedream_rt.engine.training.kinds import KINDS, caption, make_objects
from imagedream_rt.engine.training.objects import PARTS, RADIUS, TEST_SEEDS, Draws
from imagedream_rt.engine.training.shapes import (
    BOX,
    ELLIPSOID,
    FRUSTUM,
    MISS,
    contains,
    hit_distance,
    surface_samples,
)


def test_a_seed_means_the_same_object_in_every_batch():
    many = make_objects(torch.arange(TEST_SEEDS, TEST_SEEDS + 64))
    few = make_objects(torch.tensor([TEST_SEEDS + 41, TEST_SEEDS + 3]))
    for name in ("kind", "solid", "centre", "size", "rotation", "colour", "pattern", "frequency"):
        assert torch.equal(getattr(many[[41, 3]], name), getattr(few, name)), name


def test_all_kinds_occur_fit_the_ball_and_keep_their_part_budget():
    objects = make_objects(torch.arange(400))
    assert objects.kind.bincount(minlength=len(KINDS)).min() > 10
    assert objects.size.shape == (400, PARTS, 3)
    points = objects.surface_points(64, torch.Generator().manual_seed(1)).norm(dim=-1)
    used = (objects.size[..., :1] > 0).expand_as(points)
    assert points[used].max() < RADIUS * 1.1  # the ball is fitted to other samples of the surface
    assert points[used].view(-1).max() > RADIUS * 0.9


def test_draws_are_uniform_and_streams_differ():
    a, b = Draws(torch.arange(20_000), stream=1), Draws(torch.arange(20_000), stream=2)
    first, second, other = a.uniform(), a.uniform(), b.uniform()
    for values in (first, second, other):
        assert values.min() >= 0
        assert values.max() < 1
        assert abs(values.mean().item() - 0.5) < 0.01
        assert abs(values.std().item() - math.sqrt(1 / 12)) < 0.01
    for pair in ((first, second), (first, other), (first[1:], first[:-1])):
        assert abs(torch.corrcoef(torch.stack(pair))[0, 1].item()) < 0.03


def test_captions_name_colour_and_kind():
    words = caption(make_objects(torch.tensor([5])), 0).split()
    assert words[0] == "a"
    assert words[-1] in KINDS


@pytest.mark.parametrize("kind", [ELLIPSOID, BOX, FRUSTUM])
@pytest.mark.parametrize("taper", [0.0, 0.4, 1.0])
def test_hits_lie_on_the_surface_and_nothing_lies_before_them(kind, taper):
    generator = torch.Generator().manual_seed(kind * 10 + int(taper * 10))
    target = 1.5 * (torch.rand(2000, 3, generator=generator) - 0.5)
    origin = 4 * torch.nn.functional.normalize(torch.randn(2000, 3, generator=generator), dim=-1)
    solid, tapers = torch.tensor(kind), torch.tensor(taper)
    direction = target - origin
    t = hit_distance(origin, direction, solid, tapers)
    hit = t < MISS / 2
    assert hit.sum() > 200
    march = torch.linspace(0, 2, 2001)[:, None, None]
    inside = contains(origin + march * direction, solid, tapers)
    assert (inside.any(0) ^ hit).float().mean() < 0.01  # rays that graze it may step over it
    entry = march[:, 0, 0][inside.float().argmax(0)]
    both = hit & inside.any(0)
    assert (entry - t)[both].abs().max() < 2e-3


@pytest.mark.parametrize("kind", [ELLIPSOID, BOX, FRUSTUM])
def test_surface_samples_lie_on_the_surface(kind):
    points = surface_samples(torch.tensor(kind), torch.tensor(0.5), 500, torch.Generator().manual_seed(0))
    solid, taper = torch.tensor(kind), torch.tensor(0.5)
    assert contains(points * 0.99, solid, taper).float().mean() > 0.97
    assert not contains(points * 1.01, solid, taper).any()


def test_visible_surface_is_outside_every_part():
    objects = make_objects(torch.tensor([TEST_SEEDS]))
    points = objects.visible_surface(1000)[0]
    assert 500 < len(points) <= 1000
    shrunk = objects[:]
    shrunk.size = shrunk.size * 0.99
    assert not shrunk.inside(points[None]).any()


def test_culled_casting_equals_testing_every_part():
    objects = make_objects(torch.arange(7, 10))
    cameras = orbit_cameras([20.0, 200.0], [0.0, 30.0], 47.0, 1.5)
    rays = cameras.rays(24)
    origins = rays.origins.reshape(1, -1, 3).expand(3, -1, 3)
    directions = rays.directions.reshape(1, -1, 3).expand(3, -1, 3)
    dense, culled = (
        raycast.nearest(objects, origins, directions),
        raycast.nearest_culled(objects, origins, directions),
    )
    assert (dense[0] < MISS / 2).any()
    assert torch.allclose(dense[0], culled[0], rtol=1e-4, atol=1e-5)
    same = dense[1] == culled[1]
    assert same[dense[0] < MISS / 2].float().mean() > 0.999  # parts that touch may tie


def test_front_is_where_the_eyes_are():
    """A robot's white eyes show from azimuth 0 and not from behind."""
    seeds = torch.arange(TEST_SEEDS, TEST_SEEDS + 60)
    objects = make_objects(seeds)
    robots = objects[(objects.kind == list(KINDS).index("robot")).nonzero().squeeze(1)[:3]]
    cameras = orbit_cameras([0.0, 180.0], 5.0, 47.0, 1.5)
    shape = (len(robots), 2)
    rgba = raycast.render(
        robots, cameras.c2w[None].expand(*shape, 4, 4), cameras.fovy_rad[None].expand(shape), 64
    )
    white = ((rgba[..., :3] > 0.62).all(-1) & (rgba[..., 3] > 0.9)).flatten(2).sum(-1)
    for index in range(len(robots)):
        if robots.colour_name[index] not in (8, 9):  # not itself white or grey
            assert white[index, 0] >= white[index, 1]
    assert (white[:, 0] > 0).any()


def test_prompt_window_centres_the_box_at_the_wanted_size():
    objects = make_objects(torch.tensor([TEST_SEEDS + 2, TEST_SEEDS + 9]))
    cameras = orbit_cameras([40.0], 20.0, 45.0, 1.9)
    c2w, fovy = cameras.c2w[None].expand(2, 1, 4, 4), cameras.fovy_rad[None].expand(2, 1)
    coarse = raycast.render(objects, c2w, fovy, 96, supersample=1)
    framed = (
        raycast.render(objects, c2w, fovy, 96, window=raycast.prompt_window(coarse, 0.8))[:, 0, ..., 3] > 0.5
    )
    for mask in framed:
        rows, columns = mask.any(1).nonzero().squeeze(1), mask.any(0).nonzero().squeeze(1)
        extent = [int(edge[-1] - edge[0]) + 1 for edge in (rows, columns)]
        assert max(extent) == pytest.approx(0.8 * 96, abs=3)
        for edge in (rows, columns):
            assert (edge[0] + edge[-1] + 1).item() / 2 == pytest.approx(48, abs=2)
