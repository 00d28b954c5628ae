"""The bits of an occupancy grid, and of the blocks above it."""

from __future__ import annotations

import doctest

import pytest
import torch
from ahead import compile_ahead

from imagedream_rt.kernels import occupancy_bits as module
from imagedream_rt.kernels.occupancy_bits import EDGE, pack_occupancy, word_count


@pytest.mark.parametrize("resolution", [1, 3, 4, 7, 32])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_kernel_against_reference(resolution: int, share: float, kernel_device: torch.device) -> None:
    occupied = torch.rand(resolution, resolution, resolution) < share
    got = pack_occupancy(occupied.to(kernel_device), backend="triton")
    assert got.resolution == resolution
    assert torch.equal(got.words.cpu(), pack_occupancy(occupied, backend="torch").words)


def test_one_cell_sets_two_bits() -> None:
    occupied = torch.zeros(9, 9, 9, dtype=torch.bool)
    occupied[8, 3, 5] = True
    cell, block = (8 * 9 + 3) * 9 + 5, (2 * 3 + 0) * 3 + 1
    words = pack_occupancy(occupied).words
    assert EDGE == 4
    assert words.nonzero().squeeze(1).tolist() == [cell // 32, word_count(9) + block // 32]
    assert words[cell // 32] == 1 << cell % 32
    assert words[word_count(9)] == 1 << block


def test_the_sign_is_a_bit_too() -> None:
    occupied = torch.zeros(4, 4, 4, dtype=torch.bool)
    occupied.view(-1)[31] = True
    assert pack_occupancy(occupied).words.tolist() == [-(2**31), 0, 1]


def test_strided(kernel_device: torch.device) -> None:
    occupied = (torch.rand(8, 8, 8) < 0.5).to(kernel_device)
    transposed = pack_occupancy(occupied.permute(2, 0, 1), backend="triton")
    assert torch.equal(transposed.words, pack_occupancy(occupied.permute(2, 0, 1).contiguous()).words)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"must be bool \[G, G, G\]"):
        pack_occupancy(torch.zeros(4, 4, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="must be bool"):
        pack_occupancy(torch.zeros(4, 4, 4))


@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_ahead_of_time(arch: int) -> None:
    arguments = {"p_occupied": "*i1", "p_words": "*i32", "n_words": "i32", "grid": "i32", "blocks": "i32"}
    builds = [{"EDGE": 1, "WORDS": 32}, {"EDGE": EDGE, "WORDS": 32 // EDGE}]
    compile_ahead("occupancy_bits", "_pack_kernel", arguments, builds, arch)


def test_examples() -> None:
    assert doctest.testmod(module).failed == 0
