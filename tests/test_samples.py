"""Packed samples: exact arrays, buffers of a fixed capacity, and who may write where in them."""

from __future__ import annotations

import doctest

import pytest
import torch
from ahead import compile_ahead
from ragged import COUNTS, assert_same_samples, moved, number, ragged
from torch import Tensor

from imagedream_rt.kernels import samples as module
from imagedream_rt.kernels.samples import Samples, allot, buffers, midpoints, pack

LIMITS = [
    (12, [5, 0, 2, 4]),
    (11, [5, 0, 2, 4]),
    (10, [4, 0, 2, 4]),
    (9, [3, 0, 2, 3]),
    (5, [1, 0, 1, 1]),
    (2, [0] * 4),
]


def packed(counts: list[int]) -> Samples:
    rays = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    starts = torch.cat([torch.arange(count, dtype=torch.float32) for count in counts])
    return pack(rays, starts, starts + 1, len(counts))


def test_keep() -> None:
    samples = packed([2, 0, 3])
    kept = samples.keep(torch.tensor([False, True, True, False, True]))
    assert kept.ray_indices.tolist() == [0, 2, 2]
    assert kept.t_starts.tolist() == [1.0, 0.0, 2.0]
    assert kept.packed_info.tolist() == [[0, 1], [1, 0], [1, 2]]


@pytest.mark.parametrize(("limit", "wanted"), LIMITS)
def test_nearest_drops_the_farthest(limit: int, wanted: list[int]) -> None:
    kept = packed([5, 0, 2, 4]).nearest(limit)
    assert kept.packed_info[:, 1].tolist() == wanted
    assert kept.t_starts.tolist() == [float(t) for count in wanted for t in range(count)]


def test_within_a_capacity_and_back() -> None:
    samples = packed([2, 0, 3])
    roomy = samples.within(7)
    assert len(roomy) == 7
    assert roomy.t_ends.tolist() == [1.0, 2.0, 1.0, 2.0, 3.0, 0.0, 0.0]
    assert (number(roomy.count), number(roomy.found)) == (5, 5)
    assert_same_samples(roomy.trim(), samples)
    assert_same_samples(samples.trim(), samples)
    tight = samples.within(4)
    assert tight.packed_info.tolist() == [[0, 2], [2, 0], [2, 2]]
    assert (number(tight.count), number(tight.found)) == (4, 5)
    with pytest.raises(ValueError, match="fixed capacity already"):
        tight.within(3)


def blocks_of(counts: Tensor, rays: int) -> Tensor:
    padding = torch.zeros(-len(counts) % rays, dtype=counts.dtype, device=counts.device)
    return torch.cat((counts, padding)).view(-1, rays).sum(1).to(torch.int32)


@pytest.mark.parametrize(("limit", "wanted"), LIMITS)
def test_allot_by_hand(limit: int, wanted: list[int], kernel_device: torch.device) -> None:
    counts = torch.tensor([5, 0, 2, 4], dtype=torch.int32, device=kernel_device)
    got = allot(counts, blocks_of(counts, 2), 2, limit)
    assert got.totals.tolist()[:2] == [sum(wanted), 11]
    assert counts.clamp(max=int(got.totals[2])).tolist() == wanted
    assert got.begins.tolist() == [0, wanted[0]]


@pytest.mark.parametrize("capacity", [None, 10_000, 40_000])
def test_allot_over_many_blocks(
    capacity: int | None, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ALLOTTED", 64)
    counts = torch.randint(50, (1001,), dtype=torch.int32, device=kernel_device)
    sums = blocks_of(counts, 4)
    got = allot(counts, sums, 4, capacity)
    wanted = packed(counts.tolist())
    if capacity is not None:
        wanted = wanted.nearest(capacity)
    assert got.begins.tolist() == wanted.packed_info[::4, 0].tolist()
    assert got.totals.tolist()[:2] == [len(wanted), int(counts.sum())]
    assert torch.equal(counts.cpu().clamp(max=int(got.totals[2])).long(), wanted.packed_info[:, 1])


def test_allot_nothing(kernel_device: torch.device) -> None:
    nothing = torch.zeros(0, dtype=torch.int32, device=kernel_device)
    got = allot(nothing, nothing, 4, None)
    assert got.totals.tolist()[:2] == [0, 0]
    assert len(buffers(got, 0, None)) == 0


def test_buffers_know_what_was_found(kernel_device: torch.device) -> None:
    counts = torch.tensor([5, 0, 2, 4], dtype=torch.int32, device=kernel_device)
    allotment = allot(counts, counts, 1, 9)
    fixed, exact = buffers(allotment, 4, 20), buffers(allotment, 4, None)
    assert (len(fixed), number(fixed.count), number(fixed.found)) == (20, 8, 11)
    assert (len(exact), exact.count) == (8, None)


@pytest.mark.parametrize("rows", [0, 100])
def test_midpoints(rows: int, kernel_device: torch.device) -> None:
    samples = ragged(COUNTS)
    n = len(samples)
    if rows:
        # Behind the samples buffers hold anything: no ray has this number.
        samples = samples.within(rows)
        samples.ray_indices[n:] = 10**9
    origins, directions = torch.randn(2, len(COUNTS), 3).unbind(0)
    # Strided, as one column of a wider table.
    strided = torch.stack((origins, directions), dim=-1).to(kernel_device)
    got = midpoints(strided[..., 0], strided[..., 1], moved(samples, kernel_device), backend="triton")
    wanted = midpoints(origins, directions, samples, backend="torch")
    assert got.shape == wanted.shape == (len(samples), 3)
    torch.testing.assert_close(got.cpu()[:n], wanted[:n], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_ahead_of_time(arch: int) -> None:
    pointers = dict.fromkeys(("p_counts", "p_sums", "p_begins", "p_totals"), "*i32")
    numbers = dict.fromkeys(("n_rays", "n_blocks", "capacity"), "i32")
    sizes = {"RAYS": 4, "BLOCKS": 2048, "BLOCK": 8192}
    compile_ahead("samples", "_allot_kernel", {**pointers, **numbers}, [sizes], arch, warps=16)
    pointers = dict.fromkeys(("p_origins", "p_directions", "p_t_starts", "p_t_ends", "p_points"), "*fp32")
    pointers |= {"p_ray_indices": "*i32", "p_count": "*i32", "n_samples": "i32"}
    builds = [{"BLOCK": module.POINTS}, {"BLOCK": module.POINTS, "p_count": None}]
    compile_ahead("samples", "_midpoint_kernel", pointers, builds, arch)


def test_examples() -> None:
    assert doctest.testmod(module).failed == 0
