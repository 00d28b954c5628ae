"""The hash encoding against tiny-cuda-nn's recorded values and against autograd; its kernels against it."""

from __future__ import annotations

import doctest
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ahead import compile_ahead
from graphs import captured
from nerf_references import FIELD, recorded, relative_error, slow_hash_encode
from torch import Tensor

from imagedream_rt.engine.config import HashGridConfig
from imagedream_rt.kernels import _hash_grid_kernels, hash_grid
from imagedream_rt.kernels._triton import KernelBackend
from imagedream_rt.kernels._tuning import Launch
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


def test_plain_formula_twice_differentiable() -> None:
    """What the Jacobian and its gradient are held to above, itself against finite differences."""
    dense, hashed = grid_levels(2, 4, 2, 1.5)
    assert [dense.hashed, hashed.hashed] == [False, True]
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(24, 1, dtype=torch.float64, generator=generator).requires_grad_()
    # Away from the cells' borders, where the formula has a kink.
    x = torch.tensor([[0.1, 0.3, 0.6], [0.9, 0.2, 0.7]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, t: slow_hash_encode(x, t, (dense, hashed)), (x, table))
    assert torch.autograd.gradgradcheck(lambda x, t: slow_hash_encode(x, t, (dense, hashed)), (x, table))


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
    x = x.detach()
    with pytest.raises(ValueError, match="or the table be in half precision"):
        hash_encode(x.half(), table.half(), LEVELS)
    with pytest.raises(ValueError, match=r"lookup in torch\.float32; it may be torch\.float16"):
        hash_encode(x, table, LEVELS, lookup=torch.float32)
    with pytest.raises(
        ValueError, match=r"count is torch\.int64 \(1,\) on cpu; it must be int32 \[1\] on cpu"
    ):
        hash_encode(x, table, LEVELS, count=torch.tensor([2]))
    with pytest.raises(
        ValueError, match=r"\(104, 3\); backend 'triton' takes fewer than 2\^31 numbers and 1, 2"
    ):
        hash_encode(x.float(), random_table(3).float(), LEVELS, backend="triton")


def test_examples() -> None:
    assert doctest.testmod(hash_grid).failed == 0


def everything(
    x: Tensor, table: Tensor, cotangents: tuple[Tensor, Tensor], levels: Any = LEVELS, **options: Any
) -> list[Tensor]:
    """Value, Jacobian, the value alone, and the table's gradients through the first two and the last."""
    table = table.detach().requires_grad_()
    value, jacobian = hash_encode_jacobian(x, table, levels, **options)
    alone = hash_encode(x, table, levels, **options)
    (by_both,) = torch.autograd.grad((value, jacobian), table, cotangents)
    (by_alone,) = torch.autograd.grad(alone, table, cotangents[0])
    return [tensor.detach() for tensor in (value, jacobian, alone, by_both, by_alone)]


def agree(got: list[Tensor], wanted: list[Tensor], bound: float = 1e-5) -> None:
    for number, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert a.dtype == b.dtype
        assert relative_error(a, b) < bound, number


def case(
    n: int, features: int, device: torch.device, levels: Any = LEVELS
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Float32 points in, on and outside the cube, a table and cotangents of value and Jacobian."""
    x = points(n)
    x[1::7] *= 3.0
    generator = torch.Generator().manual_seed(3)
    width = len(levels) * features
    shapes = ((levels[-1].offset + levels[-1].entries, features), (n, width), (n, width, 3))
    table, *cotangents = (torch.randn(*shape, generator=generator).to(device) for shape in shapes)
    return x.float().to(device), table, (cotangents[0], cotangents[1])


@pytest.mark.parametrize(("n", "features"), [(1, 4), (67, 1), (130, 2), (20, 8)], ids=str)
def test_kernels_equal_reference(n: int, features: int, kernel_device: torch.device) -> None:
    given = case(n, features, kernel_device)
    agree(everything(*given, backend="triton"), everything(*given, backend="torch"))


@pytest.mark.parametrize(("run", "pairs", "features"), [(1, True, 2), (2, False, 2), (3, True, 1)], ids=str)
def test_neighbours_added_together(
    run: int, pairs: bool, features: int, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, table, cotangents = case(70, features, kernel_device)
    # A walk in small steps: several points in a cell, in each thread and across threads.
    x[20:] = x[20] + 0.002 * torch.arange(50, device=kernel_device)[:, None]
    launch = Launch.of(warps=1, POINTS=32, RUN=run)
    monkeypatch.setattr(_hash_grid_kernels, "_TUNED", SimpleNamespace(choose=lambda *_: launch))
    monkeypatch.setattr(_hash_grid_kernels, "adds_vectors", lambda _: pairs)
    agree(
        everything(x, table, cotangents, backend="triton"), everything(x, table, cotangents, backend="torch")
    )


@pytest.mark.parametrize("stored", [torch.float32, torch.float16], ids=str)
def test_half_precision_look_ups(stored: torch.dtype, kernel_device: torch.device) -> None:
    x, table, cotangents = case(60, 2, kernel_device)
    rounded = everything(x, table.half().float(), cotangents, backend="torch")
    lookup = torch.float16 if stored == torch.float32 else None
    for backend in ("torch", "triton"):
        got = everything(x, table.to(stored), cotangents, lookup=lookup, backend=backend)
        assert [tensor.dtype for tensor in got] == [torch.float32] * 3 + [stored] * 2
        agree(got[:3], rounded[:3])
        agree([tensor.float() for tensor in got[3:]], rounded[3:], 1e-5 if stored == torch.float32 else 1e-3)


def test_strided_points_and_cotangents(kernel_device: torch.device) -> None:
    x, table, (by_value, by_jacobian) = case(67, 2, kernel_device)
    wide = torch.full((67, 8), torch.nan, device=kernel_device)
    wide[:, 1:7:2] = x
    strided = (by_value.t().contiguous().t(), by_jacobian.permute(2, 0, 1).contiguous().permute(1, 2, 0))
    got = everything(wide[:, 1:7:2], table, strided, backend="triton")
    agree(got, everything(x, table, (by_value, by_jacobian), backend="torch"))


def test_slopes_along_vectors(kernel_device: torch.device) -> None:
    """Made and learnt from without the Jacobian that they are made of."""
    x, table, (by_value, by_jacobian) = case(67, 2, kernel_device)
    along = by_jacobian[:, 0].contiguous()
    value, slope = (torch.full((6, 80), torch.nan, device=kernel_device) for _ in range(2))
    _hash_grid_kernels.launch_encode(x, table, LEVELS, None, along, value, slope)
    wanted, jacobian = hash_encode_jacobian(x, table.requires_grad_(), LEVELS, backend="torch")
    slopes = (jacobian * along[:, None]).sum(2)
    agree([value[:, :67].t(), slope[:, :67].t()], [wanted.detach(), slopes.detach()])

    grads = by_value.t().contiguous(), by_jacobian[:, :, 1].t().contiguous()
    sums = _hash_grid_kernels.zero_sums(table.shape, kernel_device)
    _hash_grid_kernels.scatter(sums, x, LEVELS, None, along, *grads)
    gradient = torch.autograd.grad((wanted, slopes), table, [grad.t() for grad in grads])[0]
    agree([sums], [gradient])


def test_sums_in_whole_numbers(kernel_device: torch.device, request: pytest.FixtureRequest) -> None:
    """They equal the reference, and the order of the points does not matter."""
    x, table, (by_value, _) = case(300, 2, kernel_device)
    table.requires_grad_()

    def gradient(x: Tensor, by_value: Tensor, backend: KernelBackend = "triton") -> Tensor:
        return torch.autograd.grad(hash_encode(x, table, LEVELS, backend=backend), table, by_value)[0]

    wanted = gradient(x, by_value, "torch")
    assert not torch.equal(gradient(x, by_value), gradient(x.flip(0), by_value.flip(0)))
    request.getfixturevalue("deterministic")
    got = gradient(x, by_value)
    agree([got], [wanted])
    assert torch.equal(got, gradient(x.flip(0), by_value.flip(0)))


def test_gradient_through_the_jacobian_alone(kernel_device: torch.device) -> None:
    x, table, (_, by_jacobian) = case(67, 2, kernel_device)
    table.requires_grad_()
    # A sum's cotangent is one number without strides.
    for cotangent in (by_jacobian, torch.ones((), device=kernel_device).expand_as(by_jacobian)):
        got, wanted = (
            torch.autograd.grad(hash_encode_jacobian(x, table, LEVELS, backend=backend)[1], table, cotangent)
            for backend in ("triton", "torch")
        )
        agree([*got], [*wanted])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("count", [0, 131, 200], ids="count={}".format)
def test_counted_points(backend: str, count: int, kernel_device: torch.device) -> None:
    x, table, cotangents = case(150, 2, kernel_device)
    valid = min(count, 150)
    wanted = everything(x[:valid], table, (cotangents[0][:valid], cotangents[1][:valid]), backend="torch")
    x[valid:] = torch.nan
    for cotangent in cotangents:
        cotangent[valid:] = torch.nan
    number = torch.tensor([count], dtype=torch.int32, device=kernel_device)
    got = everything(x, table, cotangents, count=number, backend=backend)
    got[:3] = [tensor[:valid] for tensor in got[:3]]
    if count:
        agree(got, wanted)
    else:
        assert all(not tensor.any() for tensor in got[3:])


def test_kernels_with_no_points(kernel_device: torch.device) -> None:
    given = case(1, 2, kernel_device)
    got = everything(given[0][:0], given[1], (given[2][0][:0], given[2][1][:0]), backend="triton")
    assert [tuple(tensor.shape) for tensor in got[:3]] == [(0, 6), (0, 6, 3), (0, 6)]
    assert all(not tensor.any() for tensor in got[3:])


def test_kernels_round_positions_as_the_reference(kernel_device: torch.device) -> None:
    """Where x s lies below a power of two and x s + 1/2 behind it, a fused operation has another last bit."""
    (level,) = grid_levels(1, 12, 4096, 1.0)
    x = (2048.0 - torch.rand(1000, generator=torch.Generator().manual_seed(4)) / 2) / level.scale
    once = (x.double() * level.scale + 0.5).float()
    x = x[x * level.scale + 0.5 != once][:60].view(-1, 3)
    assert len(x) == 20
    given = (x.to(kernel_device), *case(20, 2, kernel_device, (level,))[1:], (level,))
    agree(everything(*given, backend="triton"), everything(*given, backend="torch"))


def test_kernels_train_a_table_through_its_normals(kernel_device: torch.device) -> None:
    """Second order: the gradient of a nonlinear loss of the slopes, against autograd in float64."""
    x, table, (by_value, by_jacobian) = case(50, 2, kernel_device)
    x = x.clamp(0.0, 1.0)
    exact = table.double().cpu().requires_grad_()
    place = x.double().cpu().requires_grad_()
    slow = slow_hash_encode(place, exact, LEVELS)
    slope = torch.autograd.grad(slow, place, by_value.double().cpu(), create_graph=True)[0]
    torch.nn.functional.normalize(slope, dim=1).mul(by_jacobian[:, 0].cpu()).sum().backward()

    table.requires_grad_()
    value, jacobian = hash_encode_jacobian(x, table, LEVELS, backend="triton")
    slope = (by_value[:, :, None] * jacobian).sum(1)
    torch.nn.functional.normalize(slope, dim=1).mul(by_jacobian[:, 0]).sum().backward()
    assert relative_error(value.cpu().double(), slow.detach()) < 1e-5
    assert table.grad is not None
    assert exact.grad is not None
    assert relative_error(table.grad.cpu().double(), exact.grad) < 1e-4


TENSORS = dict.fromkeys(("p_x", "p_along", "p_value", "p_slope"), "*fp32") | {
    "p_levels": "*i32",
    "p_count": "*i32",
}
SIZES = dict.fromkeys(("N", "stride_point", "stride_axis"), "i32")
CONSTANTS = {"LEVELS": 16, "F": 2, "POINTS": 128}


@pytest.mark.parametrize(("arch", "table", "along"), [(80, "*fp16", True), (90, "*fp32", False)], ids=str)
def test_encode_kernel_builds_ahead_of_time(arch: int, table: str, along: bool) -> None:
    arguments = {**TENSORS, **SIZES, "p_table": table, "row": "i32"}
    absent = {} if along else {"p_along": None}
    for name in absent:
        del arguments[name]
    compile_ahead("_hash_grid_kernels", "encode_kernel", arguments, [{**CONSTANTS, **absent}], arch)


@pytest.mark.parametrize(("arch", "sums"), [(80, "*fp32"), (90, "*fp32"), (90, "*i64")], ids=str)
def test_scatter_kernel_builds_ahead_of_time(arch: int, sums: str) -> None:
    sizes = ("regions", "value_row", "value_point", "slope_row", "slope_axis", "slope_point")
    arguments = {**TENSORS, **SIZES, **dict.fromkeys(sizes, "i32"), "p_grad": sums}
    constants = {**CONSTANTS, "RUN": 8, "PAIRS": arch >= 90 and sums == "*fp32"}
    compile_ahead("_hash_grid_kernels", "scatter_kernel", arguments, [constants], arch)


OFFICIAL = levels_of(HashGridConfig())


@pytest.mark.gpu
@pytest.mark.parametrize("lookup", [None, torch.float16], ids=str)
def test_official_field_on_the_gpu(lookup: torch.dtype | None) -> None:
    given = case(200_003, 2, torch.device("cuda"), OFFICIAL)
    got = everything(*given, OFFICIAL, lookup=lookup)
    agree(got, everything(*given, OFFICIAL, lookup=lookup, backend="torch"))


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu() -> None:
    x, table, cotangents = case(5000, 2, torch.device("cuda"))
    got = everything(x, table, cotangents)
    wanted = everything(x.cpu(), table.cpu(), (cotangents[0].cpu(), cotangents[1].cpu()))
    agree([tensor.cpu() for tensor in got], wanted)


@pytest.mark.gpu
def test_every_launch_adds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    given = case(2**20 - 100, 2, torch.device("cuda"))
    wanted = everything(*given, backend="torch")
    for launch in _hash_grid_kernels._candidates(2, True, True, 20):
        monkeypatch.setattr(_hash_grid_kernels, "_TUNED", SimpleNamespace(choose=lambda *_, one=launch: one))
        # A million float32 terms a row, in another order by every launch.
        agree(everything(*given), wanted, 3e-5)


@pytest.mark.gpu
def test_captured_in_a_graph() -> None:
    x, table, cotangents = case(4099, 2, torch.device("cuda"))
    count = torch.tensor([4099], dtype=torch.int32, device="cuda")
    replay, got = captured(lambda: everything(x, table, cotangents, count=count))
    for valid in (4099, 300, 0):
        count.fill_(valid)
        x.uniform_()
        replay()
        wanted = everything(x, table, cotangents, count=count, backend="torch")
        for number, (a, b) in enumerate(zip(got, wanted, strict=True)):
            end = valid if number < 3 else None
            torch.testing.assert_close(a[:end], b[:end], rtol=1e-4, atol=1e-3)
