"""The radiance field: plain PyTorch against autograd applied twice, and the kernels against plain PyTorch."""

from __future__ import annotations

import doctest
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from ahead import compile_ahead
from graphs import captured
from nerf_references import relative_error, slow_hash_encode
from torch import Tensor, nn

from imagedream_rt.engine.config import HashGridConfig
from imagedream_rt.kernels import _field_launch
from imagedream_rt.kernels import radiance_field as module
from imagedream_rt.kernels._tuning import Launch
from imagedream_rt.kernels.hash_grid import GridLevel, grid_levels
from imagedream_rt.kernels.radiance_field import FieldValues, radiance_density, radiance_field

# Two dense levels and a hashed one.
LEVELS = grid_levels(3, 6, 2, 1.5)
BLOB: dict[str, Any] = {"blob_strength": 3.0, "blob_radius": 0.7}


def parameters(
    hidden: int = 8,
    levels: Sequence[GridLevel] = LEVELS,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Table, inner and outer matrix of the density, then of the colour."""
    generator = torch.Generator().manual_seed(hidden)
    rows, width = levels[-1].offset + levels[-1].entries, 2 * len(levels)
    shapes = ((rows, 2), (hidden, width), (1, hidden), (hidden, width), (3, hidden))
    scales = (1.0, width**-0.5, hidden**-0.5, width**-0.5, hidden**-0.5)
    return [
        (2.0 * scale * torch.randn(shape, generator=generator, dtype=torch.float64))
        .to(device, dtype)
        .requires_grad_()
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def points(n: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """In the box, at its corners, and one a little outside."""
    x = torch.rand(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) * 2 - 1
    x[:1], x[1:2], x[2:3] = -1.0, 1.0, torch.tensor([1.2, 0.3, -0.4])
    return x.to(device, dtype)


def field(x: Tensor, weights: Sequence[Tensor], levels: Any = LEVELS, **options: Any) -> FieldValues:
    table, inner, outer, colour_inner, colour_outer = weights
    return radiance_field(x, table, levels, (inner, outer), (colour_inner, colour_outer), **BLOB, **options)


def density(x: Tensor, weights: Sequence[Tensor], levels: Any = LEVELS, **options: Any) -> Tensor:
    return radiance_density(x, weights[0], levels, (weights[1], weights[2]), **BLOB, **options)


def with_gradients(values: FieldValues, weights: Sequence[Tensor], used: str = "san") -> list[Tensor]:
    """The results, then the gradients of a loss of those named in ``used`` that is not linear in them."""
    loss = values.sigma.new_zeros(())
    for letter, value in zip("san", values, strict=True):
        if value is not None and letter in used:
            generator = torch.Generator().manual_seed(ord(letter))
            weight = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
            loss = loss + (value * weight).sum() + (value * weight).square().sum()
    given = [value.detach() for value in tensors(values)]
    found = torch.autograd.grad(loss, list(weights), allow_unused=True)
    return [*given, *(torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True))]


def tensors(values: FieldValues) -> list[Tensor]:
    return [value for value in values if value is not None]


def agree(got: Sequence[Tensor], wanted: Sequence[Tensor], bound: float = 2e-4) -> None:
    for number, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert a.shape == b.shape
        assert (a.cpu().double() - b.cpu().double()).norm() <= bound * b.cpu().double().norm(), number


def twice_differentiated(x: Tensor, weights: Sequence[Tensor]) -> FieldValues:
    """The formula with a normal by autograd with ``create_graph``."""
    table, inner, outer, colour_inner, colour_outer = weights
    x = x.detach().requires_grad_()
    features = slow_hash_encode((x + 1) / 2, table, LEVELS)
    raw = torch.relu(features @ inner.t()) @ outer.t()
    sigma = nn.functional.softplus(raw[:, 0] + 3.0 * (1 - x.norm(dim=1) / 0.7))
    (slope,) = torch.autograd.grad(sigma.sum(), x, create_graph=True)
    colour = torch.sigmoid(torch.relu(features @ colour_inner.t()) @ colour_outer.t())
    return FieldValues(sigma, colour, nn.functional.normalize(-slope, dim=1))


def test_reference_equals_autograd_applied_twice() -> None:
    x, weights = points(40, torch.float64), parameters(dtype=torch.float64)
    # Behind the last vertex the two differ: autograd does not see the clamp of the cell.
    x = x.clamp(-1.0, 1.0)
    got = with_gradients(field(x, weights), weights)
    agree(got, with_gradients(twice_differentiated(x, weights), weights), 1e-9)


def test_gradcheck() -> None:
    x = points(5, torch.float64)
    weights = parameters(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *w: tuple(field(x, w)), tuple(weights))


def test_normal_is_the_direction_of_the_falling_density() -> None:
    """The analytic normal against finite differences of the density alone."""
    x, weights = 0.8 * points(20, torch.float64), parameters(dtype=torch.float64)
    steps = 1e-6 * torch.eye(3, dtype=torch.float64)
    slope = torch.stack([density(x + step, weights) - density(x - step, weights) for step in steps], dim=1)
    normal = field(x, weights).normal
    torch.testing.assert_close(normal, -nn.functional.normalize(slope, dim=1), rtol=1e-4, atol=1e-4)


def test_a_field_by_hand() -> None:
    """One dense level of 2^3 vertices whose first feature is the x of the unit cube, seen by one hidden unit."""
    levels = grid_levels(1, 9, 2, 1.0)
    table = torch.zeros(8, 2, dtype=torch.float64)
    table[1::2, 0] = 1.0
    one = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    x = torch.tensor([[-0.5, 0.0, 0.0]], dtype=torch.float64)
    outer = torch.tensor([[6.0]], dtype=torch.float64)
    colours = torch.tensor([[0.0], [1.0], [-1.0]], dtype=torch.float64)
    sigma, albedo, normal = radiance_field(
        x, table, levels, (one, outer), (one, colours), blob_strength=1.0, blob_radius=0.5
    )
    # Scale 1: position 0.25 + 0.5 lies at 0.75 of the cell. raw = 6 * 0.75 + 1 - 0.5 / 0.5.
    torch.testing.assert_close(sigma, nn.functional.softplus(torch.tensor([4.5], dtype=torch.float64)))
    torch.testing.assert_close(albedo, torch.sigmoid(torch.tensor([[0.0, 0.75, -0.75]], dtype=torch.float64)))
    # The field rises by 6 / 2 along x, the blob by 1 / 0.5 towards the middle.
    torch.testing.assert_close(normal, torch.tensor([[-1.0, 0.0, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_centre_of_an_empty_field(backend: str, kernel_device: torch.device) -> None:
    """No slope: a normal of zero, and finite gradients."""
    weights = parameters(device=kernel_device)
    weights[0] = torch.zeros_like(weights[0]).requires_grad_()
    values = field(torch.zeros(1, 3, device=kernel_device), weights, backend=backend)
    assert values.normal is not None
    assert values.normal.tolist() == [[0.0, 0.0, 0.0]]
    assert values.albedo.tolist() == [[0.5, 0.5, 0.5]]
    torch.testing.assert_close(values.sigma.cpu(), nn.functional.softplus(torch.tensor([3.0])))
    assert all(tensor.isfinite().all() for tensor in with_gradients(values, weights))


@pytest.mark.parametrize(
    ("levels", "hidden", "n"),
    [(LEVELS, 8, 1), (LEVELS, 20, 70), (grid_levels(9, 6, 2, 1.3), 64, 33)],
    ids=["one point", "odd", "many levels"],
)
def test_kernels_equal_reference(levels: Any, hidden: int, n: int, kernel_device: torch.device) -> None:
    x, weights = points(n, device=kernel_device), parameters(hidden, levels, device=kernel_device)
    got = with_gradients(field(x, weights, levels, backend="triton"), weights)
    agree(got, with_gradients(field(x, weights, levels, backend="torch"), weights))
    agree([density(x, [w.detach() for w in weights], levels, backend="triton")], got[:1], 1e-5)


@pytest.mark.parametrize("used", ["s", "a", "n", "sa", "an", "sn"])
def test_losses_of_some_results(used: str, kernel_device: torch.device) -> None:
    x, weights = points(40, device=kernel_device), parameters(device=kernel_device)
    normals = "n" in used
    got, wanted = (
        with_gradients(field(x, weights, with_normal=normals, backend=backend), weights, used)
        for backend in ("triton", "torch")
    )
    assert len(got) == 8 if normals else len(got) == 7
    agree(got, wanted)


@pytest.mark.parametrize("valid", [300, 130, 5])
def test_a_part_after_another(
    valid: int, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three parts, the last with fewer points, some beyond the count."""
    monkeypatch.setattr(_field_launch, "PART", 128)
    x, weights = points(300, device=kernel_device), parameters(device=kernel_device)
    number = torch.tensor([valid], dtype=torch.int32, device=kernel_device)
    values = field(x, weights, count=number, backend="triton")
    first = FieldValues(*(value[:valid] for value in tensors(values)))
    wanted = with_gradients(field(x[:valid], weights, backend="torch"), weights)
    agree(with_gradients(first, weights), wanted)


@pytest.mark.usefixtures("deterministic")
def test_sums_in_whole_numbers_equal_reference(kernel_device: torch.device) -> None:
    x, weights = points(70, device=kernel_device), parameters(20, device=kernel_device)
    got = with_gradients(field(x, weights, backend="triton"), weights)
    torch.use_deterministic_algorithms(False)
    agree(got, with_gradients(field(x, weights, backend="torch"), weights))


def test_sums_in_whole_numbers_have_no_order(
    kernel_device: torch.device, request: pytest.FixtureRequest
) -> None:
    x, weights = points(384, device=kernel_device), parameters(device=kernel_device)

    def table_gradient(x: Tensor) -> Tensor:
        values = field(x, weights, backend="triton")
        return torch.autograd.grad(values.sigma.square().sum(), weights[0])[0]

    assert not torch.equal(table_gradient(x), table_gradient(x.flip(0)))
    request.getfixturevalue("deterministic")
    assert torch.equal(table_gradient(x), table_gradient(x.flip(0)))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("count", [0, 37, 90], ids="count={}".format)
def test_counted_points(backend: str, count: int, kernel_device: torch.device) -> None:
    x, weights = points(60, device=kernel_device), parameters(device=kernel_device)
    valid = min(count, 60)
    wanted = with_gradients(field(x[:valid], weights, backend="torch"), weights)
    x[valid:] = torch.nan
    number = torch.tensor([count], dtype=torch.int32, device=kernel_device)
    values = field(x, weights, count=number, backend=backend)
    alone = density(x, [w.detach() for w in weights], count=number, backend=backend)
    torch.testing.assert_close(alone[:valid], wanted[0], rtol=1e-4, atol=1e-5)
    # What comes back for the rows behind the last valid one may be anything.
    generator = torch.Generator().manual_seed(0)
    upstream = [torch.randn(value.shape, generator=generator).to(kernel_device) for value in tensors(values)]
    expected = torch.autograd.grad(
        tensors(field(x[:valid], weights, backend="torch")), weights, [grad[:valid] for grad in upstream]
    )
    for grad in upstream:
        grad[valid:] = torch.nan
    got = torch.autograd.grad(tensors(values), weights, upstream)
    agree([value[:valid] for value in tensors(values)], wanted[:3])
    agree(got, expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_points(backend: str, kernel_device: torch.device) -> None:
    x, weights = points(0, device=kernel_device), parameters(device=kernel_device)
    got = with_gradients(field(x, weights, backend=backend), weights)
    assert [tuple(tensor.shape) for tensor in got[:3]] == [(0,), (0, 3), (0, 3)]
    assert all(not tensor.any() for tensor in got[3:])
    assert density(x, [w.detach() for w in weights], backend=backend).shape == (0,)


def test_half_precision_look_ups(kernel_device: torch.device) -> None:
    x, weights = points(40, device=kernel_device), parameters(device=kernel_device)
    got = with_gradients(field(x, weights, backend="triton", lookup=torch.float16), weights)
    rounded = [weights[0].detach().half().float().requires_grad_(), *weights[1:]]
    agree(got, with_gradients(field(x, rounded, backend="torch"), rounded))
    assert all(tensor.dtype == torch.float32 for tensor in got)


def test_strided_inputs(kernel_device: torch.device) -> None:
    x, weights = points(40, device=kernel_device), parameters(device=kernel_device)
    wide = torch.full((40, 6), torch.nan, device=kernel_device)
    wide[:, ::2] = x
    turned = [w.detach().t().contiguous().t().requires_grad_() for w in weights]
    got = with_gradients(field(wide[:, ::2], turned, backend="triton"), turned)
    agree(got, with_gradients(field(x, weights, backend="torch"), weights))


def test_density_learns_too() -> None:
    x, weights = points(40, torch.float64), parameters(dtype=torch.float64)
    got = torch.autograd.grad(density(x, weights).sum(), weights[:3])
    wanted = torch.autograd.grad(field(x, weights, with_normal=False).sigma.sum(), weights[:3])
    agree(got, wanted, 1e-9)


def test_errors() -> None:
    x, weights = points(4), parameters()
    with pytest.raises(ValueError, match=r"points have shape \(4, 2\)"):
        field(x[:, :2], weights)
    with pytest.raises(ValueError, match=r"need \[104, features\]"):
        field(x, [weights[0][1:], *weights[1:]])
    with pytest.raises(
        ValueError, match=r"colour has matrices \(8, 6\) and \(1, 8\);.*\(8, 6\) and \(3, 8\)"
    ):
        field(x, [*weights[:4], weights[2]])
    with pytest.raises(ValueError, match=r"density has matrices \(8, 4\)"):
        density(x, [weights[0], weights[1][:, :4], weights[2]])
    with pytest.raises(ValueError, match="detach them"):
        field(x.requires_grad_(), weights)
    x = x.detach()
    with pytest.raises(ValueError, match=r"count is torch\.int64 \(1,\); it must be int32"):
        field(x, weights, count=torch.tensor([2]))
    with pytest.raises(ValueError, match=r"at most 128 hidden units"):
        field(x, parameters(200), backend="triton")
    with pytest.raises(ValueError, match="use radiance_field"):
        density(x, weights, backend="triton")


def test_examples() -> None:
    assert doctest.testmod(module).failed == 0


CONSTANTS = {"LEVELS": 16, "WIDTH_IN": 32, "H": 64, "HIDDEN": 64}
NAMES = ("p_points", "p_table", "p_levels", "p_inner", "p_outer", "p_colour_inner", "p_colour_outer")


def built(names: Sequence[str], table: str) -> dict[str, str]:
    return {
        name: {"p_levels": "*i32", "p_count": "*i32", "p_table": table}.get(name, "*fp32") for name in names
    }


def built_for(launches: Sequence[Launch]) -> dict[str, Any]:
    """The launches' constants, warps and stages, as ``compile_ahead`` takes them."""
    return {
        "constants": [dict(launch.constants) for launch in launches],
        "warps": [launch.warps for launch in launches],
        "stages": [launch.stages for launch in launches],
    }


FORWARD_SIZES = (True, 16, 64, 4, True)


@pytest.mark.parametrize("arch", [80, 90], ids="sm{}".format)
@pytest.mark.parametrize("whole", [False, True], ids=["density", "whole"])
def test_forward_kernel_builds_ahead_of_time(arch: int, whole: bool) -> None:
    names = (
        *NAMES[: 7 if whole else 5],
        "p_count",
        "p_sigma",
        *(("p_albedo", "p_normal", "p_inverse") * whole),
    )
    arguments = {**built(names, "*fp16"), "n": "i32", "strength": "fp32", "radius": "fp32"}
    absent = {} if whole else dict.fromkeys((*NAMES[5:], "p_albedo", "p_normal", "p_inverse"))
    first, *_, last = _field_launch._forward_candidates(*FORWARD_SIZES)
    given = built_for((first, last))
    given["constants"] = [{**CONSTANTS, **absent, **constants} for constants in given["constants"]]
    compile_ahead("_field_kernels", "forward_kernel", arguments, arch=arch, **given)


@pytest.mark.parametrize(("arch", "whole"), [(80, False), (90, False), (90, True)])
def test_backward_kernel_builds_ahead_of_time(arch: int, whole: bool) -> None:
    names = (*NAMES[3:], "p_value", "p_slope", "p_count", "p_sigma", "p_albedo")
    grads = ("sigma", "albedo", "inner", "outer", "colour_inner", "colour_outer")
    arguments = built((*names, *(f"p_grad_{name}" for name in grads)), "*fp32") | {"n": "i32", "row": "i32"}
    if whole:
        arguments |= dict.fromkeys([f"p_grad_{name}" for name in grads[2:]], "*i64")
    given = built_for((_field_launch.BACKWARD, _field_launch.BACKWARD))
    sizes = {"WIDTH_IN": 32, "WIDTH": 32}
    given["constants"] = [
        {**sizes, "H": hidden, "HIDDEN": hidden, **constants}
        for constants, hidden in zip(given["constants"], (64, 128), strict=True)
    ]
    compile_ahead("_field_kernels", "backward_kernel", arguments, arch=arch, **given)


@pytest.mark.parametrize("arch", [80, 90], ids="sm{}".format)
def test_prepare_kernel_builds_ahead_of_time(arch: int) -> None:
    names = ("p_points", "p_normal", "p_grad_normal", "p_inverse", "p_unit", "p_along")
    arguments = {**dict.fromkeys(names, "*fp32"), "n": "i32", "row": "i32"}
    compile_ahead("_field_kernels", "prepare_kernel", arguments, [{"BLOCK": _field_launch.PREPARED}], arch)


OFFICIAL = HashGridConfig()
OFFICIAL_LEVELS = grid_levels(OFFICIAL.levels, OFFICIAL.log2_table, OFFICIAL.base_resolution, OFFICIAL.growth)


@pytest.mark.gpu
@pytest.mark.parametrize("lookup", [None, torch.float16], ids=str)
def test_official_field_on_the_gpu(lookup: torch.dtype | None) -> None:
    """Against float64, no worse than a few times plain PyTorch in float32."""
    weights = parameters(64, OFFICIAL_LEVELS, device="cuda")
    if lookup is not None:
        weights[0] = weights[0].detach().to(lookup).float().requires_grad_()
    x = points(200_003, device="cuda")
    got = with_gradients(field(x, weights, OFFICIAL_LEVELS, lookup=lookup), weights)
    exact = [w.detach().double().requires_grad_() for w in weights]
    wanted = with_gradients(field(x.double(), exact, OFFICIAL_LEVELS), exact)
    plain = with_gradients(field(x, weights, OFFICIAL_LEVELS, backend="torch"), weights)
    for a, b, c in zip(got, plain, wanted, strict=True):
        assert relative_error(a.double(), c) <= 4 * relative_error(b.double(), c) + 1e-4


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
def test_the_official_field_s_gradients_repeat_exactly() -> None:
    weights, x = parameters(64, OFFICIAL_LEVELS, device="cuda"), points(200_003, device="cuda")
    one, other = (with_gradients(field(x, weights, OFFICIAL_LEVELS), weights) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.gpu
def test_captured_in_a_graph() -> None:
    weights = parameters(64, OFFICIAL_LEVELS, device="cuda")
    x = points(4099, device="cuda")
    count = torch.tensor([4099], dtype=torch.int32, device="cuda")

    def everything() -> list[Tensor]:
        values = tensors(field(x, weights, OFFICIAL_LEVELS, count=count))
        return [*values, *torch.autograd.grad(values, weights, [value.detach() for value in values])]

    replay, got = captured(everything)
    for valid in (4099, 300):
        count.fill_(valid)
        x.uniform_(-1.0, 1.0)
        replay()
        wanted = everything()
        assert all(torch.equal(a[:valid], b[:valid]) for a, b in zip(got[:3], wanted[:3], strict=True))
        agree(got[3:], wanted[3:], 1e-4)


@pytest.mark.gpu
def test_every_launch_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = parameters(64, OFFICIAL_LEVELS, device="cuda")
    x = points(20_011, device="cuda")
    wanted = with_gradients(field(x, weights, OFFICIAL_LEVELS), weights)
    for launch in _field_launch.FORWARD.candidates(*FORWARD_SIZES):
        monkeypatch.setattr(_field_launch.FORWARD, "choose", lambda *_, one=launch: one)
        # The order of sums decides whether a hidden unit next to zero is active, and that a sample's normal.
        agree(with_gradients(field(x, weights, OFFICIAL_LEVELS), weights), wanted, 1e-2)
