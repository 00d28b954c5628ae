"""Marching against nerfacc's recorded traversal and against hand-counted rays."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from nerf_references import RENDER, recorded
from torch import Tensor

from imagedream_rt.kernels import ray_march
from imagedream_rt.kernels.ray_march import march
from imagedream_rt.kernels.samples import Samples, pack

FULL = torch.ones(4, 4, 4, dtype=torch.bool)


def along(axis: int, start: tuple[float, float, float], sign: float = 1.0) -> tuple[Tensor, Tensor]:
    direction = torch.zeros(1, 3)
    direction[0, axis] = sign
    return torch.tensor([start]), direction


def lattice(samples: Samples, near: Tensor) -> set[tuple[int, int]]:
    place = ((samples.t_starts - near[samples.ray_indices]) / RENDER.step_size).round().long()
    return set(zip(samples.ray_indices.tolist(), place.tolist(), strict=True))


@pytest.mark.parametrize("case", ["train_ambient", "train_diffuse"])
def test_recorded_traversal(case: str) -> None:
    fixture = recorded()
    near = fixture[f"{case}.near_planes"]
    origins, directions = fixture["batch.rays_o"].view(-1, 3), fixture["batch.rays_d"].view(-1, 3)
    occupied = fixture["train.occ_binaries"][0]
    got = march(origins, directions, occupied, RENDER.step_size, near)
    t_starts = fixture[f"{case}.march.t_starts"]
    wanted = pack(fixture[f"{case}.march.ray_indices"], t_starts, t_starts + RENDER.step_size, len(near))
    differing = lattice(got, near) ^ lattice(wanted, near)
    # Only where the midpoint lies within rounding of a cell border.
    assert len(differing) <= 2
    for ray, place in differing:
        middle = near[ray] + (place + 0.5) * RENDER.step_size
        cell = (origins[ray] + middle * directions[ray] + 1) * 16
        assert (cell - cell.round()).abs().min() < 1e-4
    if not differing:
        torch.testing.assert_close(got.t_starts, wanted.t_starts, rtol=0, atol=1e-6)
        assert torch.equal(got.packed_info, wanted.packed_info)


def test_against_one_point_at_a_time() -> None:
    generator = torch.Generator().manual_seed(0)
    occupied = torch.rand(5, 5, 5, generator=generator) < 0.4
    origins = torch.randn(40, 3, generator=generator)
    directions = torch.nn.functional.normalize(torch.randn(40, 3, generator=generator), dim=1)
    near = torch.rand(40, generator=generator) * 0.07
    got = march(origins, directions, occupied, 0.07, near)
    wanted = []
    for ray in range(40):
        for k in range(100):
            point = origins[ray] + directions[ray] * (near[ray] + (k + 0.5) * 0.07)
            cell = ((point + 1) * 2.5).floor().long()
            if (cell >= 0).all() and (cell < 5).all() and occupied[tuple(cell.tolist())]:
                wanted.append((ray, k))
    place = ((got.t_starts - near[got.ray_indices]) / 0.07).round().long()
    assert list(zip(got.ray_indices.tolist(), place.tolist(), strict=True)) == wanted
    assert got.packed_info[:, 1].sum() == len(wanted)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_axis_parallel_ray(axis: int, sign: float) -> None:
    start = [0.1, 0.1, 0.1]
    start[axis] = -3.0 * sign
    got = march(*along(axis, tuple(start), sign), FULL, 0.5)
    assert got.t_starts.tolist() == [2.0, 2.5, 3.0, 3.5]
    assert got.t_ends.tolist() == [2.5, 3.0, 3.5, 4.0]
    assert got.packed_info.tolist() == [[0, 4]]


def test_ray_from_inside_the_box_starts_at_the_camera() -> None:
    assert march(*along(0, (0.25, 0.0, 0.0)), FULL, 0.5).t_starts.tolist() == [0.0]


def test_ray_in_a_face_of_the_box() -> None:
    got = march(*along(0, (-2.0, -1.0, -1.0)), FULL, 0.5)
    assert got.t_starts.isfinite().all()
    assert len(got) <= 4


def test_near_shifts_the_lattice() -> None:
    got = march(*along(0, (-3.0, 0.1, 0.1)), FULL, 0.5, torch.tensor([0.2]))
    torch.testing.assert_close(got.t_starts, torch.tensor([2.2, 2.7, 3.2, 3.7])[: len(got)])
    assert len(got) == 4


def test_longest_diagonal_is_covered() -> None:
    corner = 1 / math.sqrt(3)
    got = march(torch.full((1, 3), -1.5), torch.full((1, 3), corner), FULL, 0.01)
    assert abs(len(got) - 2 * math.sqrt(3) / 0.01) <= 1


def test_missing_rays_and_empty_grids() -> None:
    assert len(march(*along(0, (-3.0, 2.0, 0.0)), FULL, 0.5)) == 0
    empty = march(*along(0, (-3.0, 0.0, 0.0)), torch.zeros_like(FULL), 0.5)
    assert empty.packed_info.tolist() == [[0, 0]]
    none = march(torch.zeros(0, 3), torch.zeros(0, 3), FULL, 0.5)
    assert none.packed_info.shape == (0, 2)


def test_only_occupied_cells_in_x_y_z_order() -> None:
    occupied = torch.zeros_like(FULL)
    occupied[3, 0, 1] = True
    got = march(*along(0, (-3.0, -0.75, -0.25)), occupied, 0.25)
    assert got.t_starts.tolist() == [3.5, 3.75]


def test_errors() -> None:
    origins, directions = along(0, (-3.0, 0.0, 0.0))
    with pytest.raises(ValueError, match=r"both must be \[R, 3\]"):
        march(origins[0], directions[0], FULL, 0.5)
    with pytest.raises(ValueError, match="must be bool"):
        march(origins, directions, FULL.float(), 0.5)
    with pytest.raises(ValueError, match="must be positive"):
        march(origins, directions, FULL, 0.0)
    with pytest.raises(ValueError, match="near is"):
        march(origins, directions, FULL, 0.5, torch.zeros(2))


def test_examples() -> None:
    assert doctest.testmod(ray_march).failed == 0
