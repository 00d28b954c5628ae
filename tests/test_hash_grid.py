"""The hash encoding against tiny-cuda-nn's recorded values and against autograd."""

from __future__ import annotations

import doctest

import pytest
import torch
from nerf_references import FIELD, recorded, relative_error, slow_hash_encode

from imagedream_rt.engine.config import HashGridConfig
from imagedream_rt.kernels import hash_grid
from imagedream_rt.kernels.hash_grid import grid_levels, hash_encode, hash_encode_jacobian


def levels_of(config: HashGridConfig):
    return grid_levels(config.levels, config.log2_table, config.base_resolution, config.growth)


# A dense level, a dense one with entries to spare (3^3 = 27 of 32), a hashed one.
LEVELS = grid_levels(3, 6, 2, 1.5)


def random_table(features: int, *, seed: int = 0) -> torch.Tensor:
    rows = LEVELS[-1].offset + LEVELS[-1].entries
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, features, dtype=torch.float64, generator=generator)


def points(n: int) -> torch.Tensor:
    x = torch.rand(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    # The cube's corners: the upper one looks beyond the last vertex.
    x[0], x[-1] = 0.0, 1.0
    return x


def test_levels_kinds() -> None:
    assert [level.hashed for level in LEVELS] == [False, False, True]
    assert [level.entries for level in LEVELS] == [8, 32, 64]


def test_official_layout() -> None:
    levels = levels_of(HashGridConfig())
    assert [level.resolution for level in levels] == [
        *(16, 24, 34, 49, 71, 102, 148, 213),
        *(308, 446, 646, 934, 1352, 1956, 2831, 4096),
    ]
    assert [level.hashed for level in levels] == [False] * 5 + [True] * 11
    assert [level.offset for level in levels[:6]] == [0, 4096, 17920, 57224, 174880, 532792]
    assert 2 * (levels[-1].offset + levels[-1].entries) == 12_599_920
    assert levels[-1].scale == 4094.99853515625


def test_recorded_values() -> None:
    fixture = recorded()
    levels = levels_of(FIELD.grid)
    table = fixture["hashgrid_small.params"].view(-1, 2)
    got = hash_encode(fixture["hashgrid_small.x"], table, levels)
    assert relative_error(got, fixture["hashgrid_small.out"]) < 1e-6
    assert (got - fixture["hashgrid_small.out"]).abs().max() < 5e-6


def test_constant_table_is_constant_with_no_slope() -> None:
    value, jacobian = hash_encode_jacobian(points(50), torch.full_like(random_table(2), 3.0), LEVELS)
    torch.testing.assert_close(value, torch.full_like(value, 3.0))
    assert jacobian.abs().max() == 0


def test_linear_table_has_the_slope_of_its_line() -> None:
    # One dense level of 8^3 vertices; the vertex (i, j, k) holds i, j and k.
    levels = grid_levels(1, 9, 8, 1.0)
    index = torch.arange(512)
    table = torch.stack((index % 8, index // 8 % 8, index // 64), dim=1).double()
    x = 0.9 * points(20) + 0.01
    value, jacobian = hash_encode_jacobian(x, table, levels)
    torch.testing.assert_close(value, 7 * x + 0.5)
    torch.testing.assert_close(jacobian, 7 * torch.eye(3, dtype=torch.float64).expand(20, 3, 3))


@pytest.mark.parametrize("features", [1, 2, 3], ids="F={}".format)
@pytest.mark.parametrize("n", [1, 7, 64], ids="N={}".format)
def test_first_and_second_order_against_autograd(features: int, n: int) -> None:
    table = random_table(features).requires_grad_()
    x = points(n).requires_grad_()
    slow = slow_hash_encode(x, table, LEVELS)
    slow_jacobian = torch.stack(
        [torch.autograd.grad(slow[:, k].sum(), x, create_graph=True)[0] for k in range(slow.shape[1])], dim=1
    )
    value, jacobian = hash_encode_jacobian(x.detach(), table, LEVELS)
    torch.testing.assert_close(value, slow)
    torch.testing.assert_close(jacobian, slow_jacobian)
    torch.testing.assert_close(hash_encode(x.detach(), table, LEVELS), slow)

    generator = torch.Generator().manual_seed(2)
    by_value = torch.randn(value.shape, dtype=torch.float64, generator=generator)
    by_jacobian = torch.randn(jacobian.shape, dtype=torch.float64, generator=generator)

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, table, retain_graph=True)[0]

    # Nonlinear in the Jacobian, as a normal is.
    wanted = gradient((slow * by_value).sum() + (slow_jacobian * by_jacobian).tanh().sum())
    got = gradient((value * by_value).sum() + (jacobian * by_jacobian).tanh().sum())
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(
        gradient((jacobian * by_jacobian).sum()), gradient((slow_jacobian * by_jacobian).sum())
    )
    alone = hash_encode(x.detach(), table, LEVELS)
    torch.testing.assert_close(gradient((alone * by_value).sum()), gradient((slow * by_value).sum()))


def test_gradcheck() -> None:
    table = random_table(2).requires_grad_()
    x = points(5)
    assert torch.autograd.gradcheck(lambda t: hash_encode_jacobian(x, t, LEVELS), table)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    table = random_table(2).requires_grad_()

    def everything() -> tuple[torch.Tensor, ...]:
        value, jacobian = hash_encode_jacobian(points(23), table, LEVELS)
        (gradient,) = torch.autograd.grad(value.square().sum() + jacobian.square().sum(), table)
        return value, jacobian, gradient

    whole = everything()
    monkeypatch.setattr(hash_grid, "BLOCK", 5)
    for got, wanted in zip(everything(), whole, strict=True):
        torch.testing.assert_close(got, wanted)


def test_no_points() -> None:
    table = random_table(2).requires_grad_()
    value, jacobian = hash_encode_jacobian(torch.zeros(0, 3, dtype=torch.float64), table, LEVELS)
    assert value.shape == (0, 6)
    assert jacobian.shape == (0, 6, 3)
    (value.sum() + jacobian.sum()).backward()
    assert table.grad is not None
    assert table.grad.abs().max() == 0


def test_points_outside_the_cube_do_not_fail() -> None:
    x = torch.tensor([[-3.0, 0.5, 1e6], [2.0, -1e6, 0.0]], dtype=torch.float64)
    assert hash_encode(x, random_table(2), LEVELS).isfinite().all()


def test_errors() -> None:
    x, table = points(4), random_table(2)
    with pytest.raises(ValueError, match=r"x has shape \(4, 2\)"):
        hash_encode(x[:, :2], table, LEVELS)
    with pytest.raises(ValueError, match=r"need \[104, features\]"):
        hash_encode(x, table[:-1], LEVELS)
    with pytest.raises(ValueError, match="must agree"):
        hash_encode(x.float(), table, LEVELS)
    with pytest.raises(ValueError, match="use hash_encode_jacobian"):
        hash_encode(x.requires_grad_(), table, LEVELS)
    with pytest.raises(ValueError, match="levels=0"):
        grid_levels(0, 19, 16, 1.4)


def test_examples() -> None:
    assert doctest.testmod(hash_grid).failed == 0


@pytest.mark.gpu
def test_cuda_agrees() -> None:
    table = random_table(2).float()
    x = points(1000).float()

    def everything(device: str) -> list[torch.Tensor]:
        own = table.to(device).requires_grad_()
        value, jacobian = hash_encode_jacobian(x.to(device), own, LEVELS)
        (gradient,) = torch.autograd.grad(value.square().sum() + jacobian.square().sum(), own)
        return [value, jacobian, gradient]

    for got, wanted in zip(everything("cuda"), everything("cpu"), strict=True):
        assert relative_error(got.cpu(), wanted.detach()) < 1e-5
