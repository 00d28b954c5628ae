"""What chance decides in a step, and its one row of numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from imagedream_rt.engine.config import DRAFT, OFFICIAL
from imagedream_rt.engine.draws import draw_background, draw_shading, draw_step, pack, row_width, unpack
from imagedream_rt.engine.random_streams import RandomStreams

CPU = torch.device("cpu")


def test_shading_as_released():
    """Albedo until step 5000; then albedo 1/4, textureless 3/8, shaded 3/8, ambient = 1 - diffuse."""
    streams = RandomStreams(0, CPU)
    early = {draw_shading(OFFICIAL, step, streams) for step in range(4900, 5000)}
    assert {(shading.ambient, shading.diffuse, shading.textureless) for shading in early} == {
        (1.0, 0.0, False)
    }
    late = [draw_shading(OFFICIAL, 5000, streams) for _ in range(4000)]
    kinds = Counter(
        "albedo" if s.ambient == 1.0 else "textureless" if s.textureless else "shaded" for s in late
    )
    assert kinds["albedo"] / 4000 == pytest.approx(0.25, abs=0.03)
    assert kinds["textureless"] / 4000 == pytest.approx(0.375, abs=0.03)
    assert all(s.ambient + s.diffuse == pytest.approx(1.0) for s in late)
    assert sum(s.diffuse for s in late if s.ambient != 1.0) / 3000 == pytest.approx(0.5, abs=0.03)


def test_background_is_random_half_of_the_time():
    streams = RandomStreams(0, CPU)
    drawn = [draw_background(OFFICIAL, streams) for _ in range(2000)]
    colours = [colour for colour in drawn if colour is not None]
    assert len(colours) / 2000 == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(torch.stack(colours).mean(0), torch.full((3,), 0.5), atol=0.03, rtol=0)


def test_grey_backgrounds_take_the_draws_of_coloured_ones():
    config = replace(OFFICIAL, background_colours="grey")
    streams, others = RandomStreams(0, CPU), RandomStreams(0, CPU)
    for _ in range(20):
        grey, colour = draw_background(config, streams), draw_background(OFFICIAL, others)
        assert (grey is None) == (colour is None)
        if grey is not None and colour is not None:
            assert grey.tolist() == [colour[0].item()] * 3


@pytest.mark.parametrize("step", [0, 7000, 12_000])
def test_a_row_holds_all_that_was_drawn(step: int):
    streams = RandomStreams(step, CPU)
    for _ in range(8):
        draws = draw_step(OFFICIAL, step, streams)
        views = len(draws.cameras)
        assert views == OFFICIAL.stage_at(step).views
        row = pack(draws, 12.5)
        assert row.shape == (row_width(views),)
        found = unpack(row, views)
        assert torch.equal(found.c2w, draws.cameras.c2w)
        assert torch.equal(found.fovy_rad, draws.cameras.fovy_rad)
        assert torch.equal(found.light_positions, draws.cameras.light_positions)
        assert torch.equal(found.cameras.embedding(), draws.cameras.embedding())
        assert found.replaced.item() == (draws.background is not None)
        assert torch.equal(found.colour, torch.zeros(3) if draws.background is None else draws.background)
        assert found.ambient.item() == pytest.approx(draws.shading.ambient)
        assert found.diffuse.item() == pytest.approx(draws.shading.diffuse)
        assert found.textureless.item() == draws.shading.textureless
        assert (found.t.item(), found.lambda_orient.item()) == (draws.t, 12.5)


def test_writing_the_row_changes_what_was_unpacked():
    streams = RandomStreams(0, CPU)
    row = pack(draw_step(DRAFT, 0, streams), 0.0)
    found = unpack(row, 4)
    following = draw_step(DRAFT, 1, streams)
    row.copy_(pack(following, 0.0))
    assert torch.equal(found.c2w, following.cameras.c2w)


def test_every_step_takes_the_same_number_of_draws():
    one, other = RandomStreams(3, CPU), RandomStreams(3, CPU)
    for step in (0, 1, 2):
        draw_step(OFFICIAL, step, one)
    for step in (4997, 4998, 4999):
        draw_step(OFFICIAL, step, other)
    assert all(torch.equal(one.state()[name], other.state()[name]) for name in one.state())
