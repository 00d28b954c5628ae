"""Marching against nerfacc's recorded traversal and against hand-counted rays."""

from __future__ import annotations

import doctest
import math
from collections.abc import Sequence

import pytest
import torch
from ahead import compile_ahead
from graphs import captured
from nerf_references import RENDER, recorded
from ragged import assert_same_samples, moved, poisoned_memory
from torch import Tensor
from torch.nn.functional import normalize

from imagedream_rt.engine.cameras import orbit_cameras
from imagedream_rt.engine.config import OFFICIAL
from imagedream_rt.kernels import ray_march
from imagedream_rt.kernels._triton import KernelBackend
from imagedream_rt.kernels.ray_march import march
from imagedream_rt.kernels.samples import Samples, pack

FULL = torch.ones(4, 4, 4, dtype=torch.bool)


def along(axis: int, start: Sequence[float], sign: float = 1.0) -> tuple[Tensor, Tensor]:
    direction = torch.zeros(1, 3)
    direction[0, axis] = sign
    return torch.tensor([start]), direction


def lattice(samples: Samples, near: Tensor, step: float) -> set[tuple[int, int]]:
    samples = moved(samples, "cpu")
    place = ((samples.t_starts - near[samples.ray_indices]) / step).round().long()
    return set(zip(samples.ray_indices.tolist(), place.tolist(), strict=True))


def assert_same_march(
    got: Samples, wanted: Samples, origins: Tensor, directions: Tensor, near: Tensor, step: float, grid: int
) -> None:
    """The same samples, but for a few whose midpoint lies within rounding of a cell border."""
    differing = lattice(got, near, step) ^ lattice(wanted, near, step)
    assert len(differing) <= 2 + 1e-4 * len(wanted)
    for ray, place in differing:
        middle = near[ray] + (place + 0.5) * step
        cell = (origins[ray] + middle * directions[ray] + 1) * (grid / 2)
        assert (cell - cell.round()).abs().min() < 1e-4
    if not differing:
        torch.testing.assert_close(got.t_starts.cpu(), wanted.t_starts.cpu(), rtol=0, atol=1e-6)
        torch.testing.assert_close(got.t_ends.cpu(), wanted.t_ends.cpu(), rtol=0, atol=1e-6)
        assert torch.equal(got.packed_info.cpu().long(), wanted.packed_info.cpu().long())


@pytest.mark.parametrize("case", ["train_ambient", "train_diffuse"])
def test_recorded_traversal(case: str) -> None:
    fixture = recorded()
    near = fixture[f"{case}.near_planes"]
    origins, directions = fixture["batch.rays_o"].view(-1, 3), fixture["batch.rays_d"].view(-1, 3)
    occupied = fixture["train.occ_binaries"][0]
    got = march(origins, directions, occupied, RENDER.step_size, near)
    t_starts = fixture[f"{case}.march.t_starts"]
    wanted = pack(fixture[f"{case}.march.ray_indices"], t_starts, t_starts + RENDER.step_size, len(near))
    assert_same_march(got, wanted, origins, directions, near, RENDER.step_size, 32)


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
    got = march(*along(axis, start, sign), FULL, 0.5)
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


def rays_into_the_box(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """From around and within the box, most of them towards its middle."""
    origins = torch.randn(count, 3, generator=generator)
    return origins, normalize(torch.randn(count, 3, generator=generator) - origins, dim=1)


@pytest.mark.parametrize(
    ("grid", "share", "step", "rays"),
    [
        (5, 0.3, 0.08, 40),
        (16, 0.02, 0.06, 33),  # mostly empty blocks
        (3, 1.0, 0.9, 20),  # steps longer than a cell
        (2, 0.5, 0.011, 8),  # more steps in a cell than are written at once
    ],
)
@pytest.mark.parametrize("with_near", [True, False])
def test_kernel_against_reference(
    grid: int, share: float, step: float, rays: int, with_near: bool, kernel_device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(grid)
    occupied = torch.rand(grid, grid, grid, generator=generator) < share
    origins, directions = rays_into_the_box(rays, generator)
    near = torch.rand(rays, generator=generator) * step if with_near else None
    wanted = march(origins, directions, occupied, step, near, backend="torch")
    assert len(wanted) > 15
    with poisoned_memory():
        got = march(
            origins.to(kernel_device),
            directions.to(kernel_device),
            occupied.to(kernel_device),
            step,
            None if near is None else near.to(kernel_device),
            backend="triton",
        )
    near = torch.zeros(rays) if near is None else near
    assert_same_march(got, wanted, origins, directions, near, step, grid)
    assert got.ray_indices.dtype == torch.int32


def test_kernel_on_rays_along_axes_and_in_faces(kernel_device: torch.device) -> None:
    directions = torch.cat((torch.eye(3), -torch.eye(3), torch.eye(3), torch.eye(3)))
    origins = -3 * directions
    origins[:6] += 0.1
    origins[6:9][directions[6:9] == 0] = -1.0  # in an edge of the box
    origins[9:] += 2.5  # beside the box
    origins[1] = 0.25  # from within
    wanted = march(origins, directions, FULL, 0.1, backend="torch")
    rays = (origins.to(kernel_device), directions.to(kernel_device), FULL.to(kernel_device))
    got = march(rays[0], rays[1], rays[2], 0.1, backend="triton")
    assert_same_samples(moved(got, "cpu"), wanted)
    assert (wanted.packed_info[:6, 1] > 0).all()
    assert not wanted.packed_info[9:, 1].any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("capacity", [2000, 150, 3])
def test_fixed_capacity(backend: KernelBackend, capacity: int, kernel_device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    occupied = (torch.rand(6, 6, 6, generator=generator) < 0.5).to(kernel_device)
    rays = [part.to(kernel_device) for part in rays_into_the_box(30, generator)]
    every = march(rays[0], rays[1], occupied, 0.1, backend=backend)
    with poisoned_memory():
        got = march(rays[0], rays[1], occupied, 0.1, capacity=capacity, backend=backend)
    assert_same_samples(got, every.within(capacity))
    assert 150 < len(every) < 2000


def test_kernel_on_strided_and_missing_rays(kernel_device: torch.device) -> None:
    origins, directions = rays_into_the_box(10, torch.Generator().manual_seed(2))
    both = torch.stack((origins, directions), dim=-1).to(kernel_device)
    occupied = (torch.rand(4, 4, 4) < 0.5).to(kernel_device).permute(2, 1, 0)
    assert_same_samples(
        march(both[..., 0], both[..., 1], occupied, 0.2, backend="triton"),
        march(both[..., 0], both[..., 1], occupied, 0.2, backend="torch"),
    )
    none = march(both[:0, :, 0], both[:0, :, 1], occupied, 0.2, backend="triton")
    assert none.packed_info.shape == (0, 2)
    empty = march(both[..., 0], both[..., 1], torch.zeros_like(occupied), 0.2, backend="triton")
    assert not empty.packed_info.any()
    assert len(empty) == 0


def test_many_rays_are_looked_at_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    origins, directions = rays_into_the_box(50, torch.Generator().manual_seed(2))
    whole = march(origins, directions, FULL, 0.1)
    monkeypatch.setattr(ray_march, "LATTICE_POINTS", 300)
    assert_same_samples(march(origins, directions, FULL, 0.1), whole)


def test_errors(kernel_device: torch.device) -> None:
    origins, directions = along(0, (-3.0, 0.0, 0.0))
    with pytest.raises(ValueError, match=r"both must be \[R, 3\]"):
        march(origins[0], directions[0], FULL, 0.5)
    with pytest.raises(ValueError, match="must be bool"):
        march(origins, directions, FULL.float(), 0.5)
    with pytest.raises(ValueError, match="must be positive"):
        march(origins, directions, FULL, 0.0)
    with pytest.raises(ValueError, match="near is"):
        march(origins, directions, FULL, 0.5, torch.zeros(2))
    many = origins.to(kernel_device).expand(2**20, 3)
    with pytest.raises(ValueError, match="1048576 rays of up to 3467 samples are too many"):
        march(many, many, FULL.to(kernel_device), 1e-3, backend="triton")


def test_examples() -> None:
    assert doctest.testmod(ray_march).failed == 0


@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_ahead_of_time(arch: int) -> None:
    rays = dict.fromkeys(("p_origins", "p_directions", "p_near"), "*fp32")
    rays |= dict.fromkeys(("p_words", "p_counts"), "*i32") | dict.fromkeys(("grid", "n_rays"), "i32")
    rays |= {"p_spans": "*fp32", "step": "fp32"}
    count = {**rays, "cell_words": "i32", "points": "i32", "p_sums": "*i32", "n_sums": "i32"}
    launch = ray_march.COUNT
    compile_ahead("ray_march", "_count_kernel", count, [dict(launch.constants)], arch, warps=launch.warps)
    integers = ("p_begins", "p_totals", "p_ray_indices", "p_packed_info")
    write = rays | dict.fromkeys(integers, "*i32") | dict.fromkeys(("p_t_starts", "p_t_ends"), "*fp32")
    launch = ray_march.WRITE
    compile_ahead("ray_march", "_write_kernel", write, [dict(launch.constants)], arch, warps=launch.warps)


def official_rays(views: int, resolution: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rays at a ball of occupied cells, on the GPU."""
    azimuths = [360 * view / views for view in range(views)]
    rays = orbit_cameras(azimuths, 5.0, 47.5, 1.5).to(torch.device("cuda")).rays(resolution)
    centre = (torch.arange(32, device="cuda") + 0.5) / 16 - 1
    ball = torch.stack(torch.meshgrid(centre, centre, centre, indexing="ij")).norm(dim=0) < 0.55
    return rays.origins.reshape(-1, 3), rays.directions.reshape(-1, 3), ball


@pytest.mark.gpu
@pytest.mark.parametrize(("views", "resolution"), [(8, 64), (4, 256)])
def test_official_rays(views: int, resolution: int) -> None:
    origins, directions, ball = official_rays(views, resolution)
    step = OFFICIAL.render.step_size
    near = torch.rand(len(origins), device="cuda") * step
    got = march(origins, directions, ball, step, near)
    wanted = march(origins, directions, ball, step, near, backend="torch")
    difference = (got.packed_info[:, 1] - wanted.packed_info[:, 1]).abs()
    # Midpoints within rounding of a cell border.
    assert difference.max() <= 3
    assert difference.sum() <= 1e-4 * len(wanted)
    same = difference.cumsum(0) == 0
    rows = int(wanted.packed_info[same, 1].sum())
    assert rows > 0
    torch.testing.assert_close(got.t_starts[:rows], wanted.t_starts[:rows], rtol=0, atol=1e-6)


@pytest.mark.gpu
def test_captured_in_a_graph() -> None:
    origins, directions, ball = official_rays(4, 64)
    step, capacity = OFFICIAL.render.step_size, 2**21
    still = torch.zeros_like(ball)
    replay, got = captured(lambda: march(origins, directions, still, step, capacity=capacity))
    for occupied in (ball, ball & (torch.rand(32, 32, 32, device="cuda") < 0.1)):
        still.copy_(occupied)
        replay()
        assert_same_samples(got.trim(), march(origins, directions, occupied, step))
