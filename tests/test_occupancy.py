"""The occupancy grid against nerfacc's recorded updates and against hand-made ones."""

from __future__ import annotations

import pytest
import torch
from nerf_references import RENDER, recorded, recorded_field
from torch import Tensor

from imagedream_rt.engine.config import RenderConfig
from imagedream_rt.engine.nerf.occupancy import DECAY, OccupancyGrid

STEP = RENDER.step_size
TINY = RenderConfig(samples_per_ray=96, occupancy_resolution=4)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def ball(points: Tensor) -> Tensor:
    return 10.0 * (points.norm(dim=1) < 0.5)


def test_recorded_full_update() -> None:
    fixture = recorded()
    occupancy = OccupancyGrid(RENDER)
    with torch.no_grad():
        occupancy.update_cells(torch.arange(32**3), recorded_field().density(fixture["occ.step0.x"]))
    torch.testing.assert_close(occupancy.values, fixture["occ.step0.occs_after"], rtol=1e-5, atol=1e-7)
    assert torch.equal(occupancy.occupied, fixture["occ.step0.binaries_after"][0])


def test_recorded_partial_update() -> None:
    fixture = recorded()
    field, occupancy = recorded_field(), OccupancyGrid(RENDER)
    cells, wanted = fixture["occ.step256.indices"], fixture["occ.step256.occs_after"]
    with torch.no_grad():
        # So was the recorded field before this update.
        field.density_mlp.inner.mul_(0.9)
        field.density_mlp.outer.mul_(0.9)
        occupancy.values.copy_(fixture["occ.step0.occs_after"])
        occupancy.update_cells(cells, field.density(fixture["occ.step256.x"]))
    looks = torch.bincount(cells, minlength=32**3)
    torch.testing.assert_close(occupancy.values[looks < 2], wanted[looks < 2], rtol=1e-5, atol=1e-7)
    # Of several looks the recorded update kept the last, this one keeps the greatest.
    assert (occupancy.values[looks > 1] >= wanted[looks > 1] - 1e-6).all()
    differing = occupancy.occupied.view(-1) != fixture["occ.step256.binaries_after"].view(-1)
    # The greater values also move the threshold, a little.
    threshold = occupancy.alpha_threshold
    near_threshold = (occupancy.values / threshold - 1).abs() < 0.02
    assert ((looks > 1) | near_threshold)[differing].all()
    assert differing.sum() < 30


def test_several_looks_at_one_cell_keep_the_greatest_in_any_order() -> None:
    cells, density = torch.tensor([5, 7, 5, 5]), torch.tensor([1.0, 2.0, 3.0, 0.5])
    grids = [OccupancyGrid(TINY), OccupancyGrid(TINY)]
    for grid, order in zip(grids, ([0, 1, 2, 3], [2, 0, 3, 1]), strict=True):
        grid.update_cells(cells[order], density[order])
        torch.testing.assert_close(grid.values[[5, 7, 6]], STEP * torch.tensor([3.0, 2.0, 0.0]))
    assert torch.equal(grids[0].values, grids[1].values)


def test_decay_only_of_cells_looked_at() -> None:
    grid = OccupancyGrid(TINY)
    grid.values.fill_(1.0)
    grid.update_cells(torch.tensor([3, 3]), torch.zeros(2))
    assert grid.values[3] == pytest.approx(DECAY)
    assert grid.values[4] == 1.0


def test_threshold_is_the_smaller_of_mean_and_a_hundredth() -> None:
    grid = OccupancyGrid(TINY)
    grid.update_cells(torch.tensor([0, 1]), torch.tensor([0.0064, 0.001]) / STEP)
    assert grid.alpha_threshold.item() == pytest.approx(0.0074 / 64)
    assert grid.occupied.nonzero().tolist() == [[0, 0, 0], [0, 0, 1]]
    grid.update_cells(torch.tensor([63]), torch.tensor([100.0]) / STEP)
    assert grid.alpha_threshold.item() == pytest.approx(0.01)
    assert grid.occupied.nonzero().tolist() == [[3, 3, 3]]


def test_warm_up_looks_once_into_every_cell() -> None:
    seen = []
    grid = OccupancyGrid(RENDER)
    assert grid.update(0, lambda points: seen.append(points) or ball(points), generator())
    (points,) = seen
    cells = ((points + 1) * 16).floor().long()
    numbers = cells[:, 0] * 1024 + cells[:, 1] * 32 + cells[:, 2]
    assert torch.equal(numbers.sort().values, torch.arange(32**3))
    centres = (grid.occupied.nonzero() + 0.5) / 16 - 1
    # Half a cell's diagonal is 0.054.
    assert (centres.norm(dim=1) < 0.56).all()
    assert len(centres) > 1900


def test_later_looks_into_a_quarter_and_the_occupied_cells() -> None:
    seen: list[Tensor] = []
    grid = OccupancyGrid(RENDER)
    grid.occupied[10:13, 4, 5] = True
    grid.update(256, lambda points: seen.append(points) or ball(points), generator())
    assert len(seen[0]) == 8192 + 3
    cells = ((seen[0][-3:] + 1) * 16).floor().long()
    assert cells.tolist() == [[10, 4, 5], [11, 4, 5], [12, 4, 5]]
    grid.occupied.fill_(True)
    grid.update(272, lambda points: seen.append(points) or ball(points), generator())
    assert len(seen[1]) == 2 * 8192


def test_only_every_sixteenth_step() -> None:
    grid = OccupancyGrid(TINY)
    assert [step for step in range(40) if grid.update(step, ball, generator())] == [0, 16, 32]


def test_same_generator_same_grid_and_state_round_trip() -> None:
    grids = [OccupancyGrid(TINY) for _ in range(2)]
    for grid in grids:
        stream = generator()
        for step in range(240, 320, 16):
            grid.update(step, ball, stream)
    assert grids[0].values.abs().sum() > 0
    assert torch.equal(grids[0].values, grids[1].values)
    copy = OccupancyGrid(TINY)
    copy.load_state_dict(grids[0].state_dict())
    assert torch.equal(copy.occupied, grids[0].occupied)
    assert copy.mean == grids[0].mean


def test_nothing_anywhere() -> None:
    grid = OccupancyGrid(TINY)
    assert grid.update(0, lambda points: torch.zeros(len(points)), generator())
    assert not grid.occupied.any()


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.24, 0.6])
def test_refresh_of_known_size_looks_at_the_same_kinds_of_cells(fraction: float) -> None:
    occupancy = OccupancyGrid(RENDER)
    total = occupancy.values.numel()
    occupied = torch.rand(total, generator=generator()) < fraction
    occupancy.occupied.copy_(occupied.view_as(occupancy.occupied))
    seen: list[Tensor] = []

    def density(points: Tensor) -> Tensor:
        cell = ((points + 1.0) / 2.0 * 32).long()
        seen.append((cell[:, 0] * 32 + cell[:, 1]) * 32 + cell[:, 2])
        return torch.zeros(len(points))

    occupancy.refresh(density, generator(), all_cells=False)
    uniform, chosen = seen[0].chunk(2)
    assert len(seen[0]) == total // 2
    number = int(occupied.sum())
    if number > total // 4:
        assert occupied[chosen].all()
        assert len(chosen.unique()) > 0.3 * number
    else:
        assert torch.equal(chosen[:number], occupied.nonzero()[:, 0])
        assert torch.equal(chosen[number:], uniform[number:])
    assert len(uniform.unique()) > total // 8


def test_refresh_of_all_cells_is_the_warm_up_s_update() -> None:
    one, other = OccupancyGrid(TINY), OccupancyGrid(TINY)
    one.update(0, ball, generator())
    other.refresh(ball, generator(), all_cells=True)
    assert torch.equal(one.values, other.values)
    assert torch.equal(one.occupied, other.occupied)
