"""The field and its background against the released code and against autograd."""

from __future__ import annotations

import doctest
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nerf_references import (
    BACKGROUND_NAMES,
    FIELD,
    FIELD_NAMES,
    GRID_NAME,
    recorded,
    recorded_background,
    recorded_field,
    relative_error,
    slow_hash_encode,
)
from torch import Tensor, nn

from imagedream_rt.engine.config import FieldConfig, HashGridConfig
from imagedream_rt.engine.errors import InputError, MissingDependency
from imagedream_rt.engine.nerf import encoding
from imagedream_rt.engine.nerf import field as field_module
from imagedream_rt.engine.nerf.background import Background
from imagedream_rt.engine.nerf.field import Field
from imagedream_rt.kernels.hash_grid import grid_levels
from imagedream_rt.kernels.radiance_field import normalise

SMALL = FieldConfig(grid=HashGridConfig(levels=3, log2_table=6, base_resolution=2, growth=1.5), hidden=8)


def small_field(config: FieldConfig = SMALL, **options: Any) -> Field:
    field = Field(config, generator=torch.Generator().manual_seed(5), **options).double()
    with torch.no_grad():
        field.grid.table.mul_(1e4)
    return field


def points(n: int = 30) -> Tensor:
    return torch.rand(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(6)) * 2 - 1


def test_recorded_forward() -> None:
    fixture = recorded()
    out = recorded_field()(fixture["geometry_fwd.points"])
    assert relative_error(out.sigma, fixture["geometry_fwd.density"]) < 1e-6
    assert relative_error(out.normal, fixture["geometry_fwd.normal"]) < 1e-6


def test_recorded_gradients_through_density_and_normal() -> None:
    fixture = recorded()
    field = recorded_field()
    out = field(fixture["geometry_fwd.points"])
    loss = (out.normal * fixture["geometry_fwd.w_normal"]).sum()
    # The recorded loss weighs the density by a tenth.
    (loss + 0.1 * (out.sigma * fixture["geometry_fwd.w_density"][:, 0]).sum()).backward()
    named = dict(field.named_parameters())
    for name in (GRID_NAME, "density_network.layers.0.weight", "density_network.layers.2.weight"):
        parameter = named[FIELD_NAMES[f"geometry.{name}"]]
        assert relative_error(parameter.grad, fixture[f"geometry_fwd.grad.{name}"]) < 1e-5, name


def plain_field(field: Field, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Density, albedo and normal in operations that autograd differentiates twice."""
    config = field.config.grid
    levels = grid_levels(config.levels, config.log2_table, config.base_resolution, config.growth)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        features = slow_hash_encode((x + 1) / 2, field.grid.table, levels)

        def run(net: Any) -> Tensor:
            return torch.relu(features @ net.inner.t()) @ net.outer.t()

        sigma = nn.functional.softplus(run(field.density_mlp)[:, 0] + 10 * (1 - x.norm(dim=1) / 0.5))
        (slope,) = torch.autograd.grad(sigma.sum(), x, create_graph=True)
        return sigma, torch.sigmoid(run(field.feature_mlp)), nn.functional.normalize(-slope, dim=1)


def test_first_order_path_equals_autograd_through_create_graph() -> None:
    field, x = small_field(), points()
    parameters = tuple(field.parameters())
    weights = torch.randn(len(x), 7, dtype=torch.float64, generator=torch.Generator().manual_seed(7))

    def everything(sigma: Tensor, albedo: Tensor, normal: Tensor) -> tuple[Tensor, ...]:
        stacked = torch.cat((sigma[:, None], albedo, normal), dim=1)
        gradients = torch.autograd.grad((stacked * weights).square().sum(), parameters)
        return (stacked, *gradients)

    out = field(x)
    for got, wanted in zip(
        everything(out.sigma, out.albedo, out.normal), everything(*plain_field(field, x)), strict=True
    ):
        torch.testing.assert_close(got, wanted)


def test_gradcheck() -> None:
    field, x = small_field(), points(4)
    names = [name for name, _ in field.named_parameters()]

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        out = torch.func.functional_call(field, dict(zip(names, values, strict=True)), (x,))
        return out.sigma, out.albedo, out.normal

    parameters = tuple(parameter.detach().requires_grad_() for parameter in field.parameters())
    assert torch.autograd.gradcheck(run, parameters, fast_mode=True)


def test_paths_agree() -> None:
    field, x = small_field(), points()
    full, plain = field(x), field(x, with_normal=False)
    torch.testing.assert_close(full.sigma, plain.sigma)
    torch.testing.assert_close(full.sigma, field.density(x))
    torch.testing.assert_close(full.albedo, field.albedo(x))
    assert plain.normal is None


def test_a_new_field_is_the_blob() -> None:
    x = points().float()
    out = Field(FIELD)(x)
    blob = nn.functional.softplus(10 * (1 - x.norm(dim=1) / 0.5))
    torch.testing.assert_close(out.sigma, blob, rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(out.albedo, torch.full_like(out.albedo, 0.5), rtol=0, atol=0.01)
    outward = nn.functional.normalize(x, dim=1)
    assert ((out.normal * outward).sum(1) > 0.99).all()


def test_initial_weights() -> None:
    def fresh() -> Field:
        return Field(FIELD, generator=torch.Generator().manual_seed(8))

    field = fresh()
    table = field.grid.table
    assert 0.99e-4 < table.abs().max() <= 1e-4
    assert abs(table.mean()) < 2e-6
    # nn.Linear draws from U(-1 / sqrt(inputs), 1 / sqrt(inputs)).
    assert 0.95 * 10**-0.5 < field.density_mlp.inner.abs().max() <= 10**-0.5
    assert 0.9 * 64**-0.5 < field.feature_mlp.outer.abs().max() <= 64**-0.5
    for one, other in zip(field.parameters(), fresh().parameters(), strict=True):
        assert torch.equal(one, other)


def test_stays_float32_under_autocast() -> None:
    field, background, x = recorded_field(), recorded_background(), points().float()
    wanted, behind = field(x), background(normalise(x))
    with torch.autocast("cpu", torch.bfloat16):
        got = field(x)
        assert torch.equal(got.normal, wanted.normal)
        assert torch.equal(got.albedo, wanted.albedo)
        assert torch.equal(field.density(x), field.density(x).float())
        assert torch.equal(background(normalise(x)), behind)
    assert torch.equal(got.sigma, wanted.sigma)


def test_normal_at_the_centre_and_of_no_points() -> None:
    flat = small_field()
    with torch.no_grad():
        flat.grid.table.zero_()
    out = flat(torch.zeros(1, 3, dtype=torch.float64))
    assert out.normal.tolist() == [[0.0, 0.0, 0.0]]
    out.normal.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in flat.density_mlp.parameters())
    assert flat(torch.zeros(0, 3, dtype=torch.float64)).normal.shape == (0, 3)


class FakeTinyCudaEncoding(nn.Module):
    """Stands for ``tinycudann.Encoding``: a flat ``params``, twice differentiable, by x as well."""

    seen: Any = None

    def __init__(self, n_input_dims: int, encoding_config: dict[str, Any], dtype: torch.dtype) -> None:
        super().__init__()
        assert n_input_dims == 3
        assert dtype == torch.float32
        assert encoding_config["otype"] == "HashGrid"
        self.levels = grid_levels(
            encoding_config["n_levels"],
            encoding_config["log2_hashmap_size"],
            encoding_config["base_resolution"],
            encoding_config["per_level_scale"],
        )
        self.features = encoding_config["n_features_per_level"]
        rows = self.levels[-1].offset + self.levels[-1].entries
        self.params = nn.Parameter(torch.zeros(rows * self.features))

    def forward(self, x: Tensor) -> Tensor:
        return slow_hash_encode(x, self.params.view(-1, self.features), self.levels)


def fake_tinycudann(monkeypatch: pytest.MonkeyPatch, class_: type[nn.Module] = FakeTinyCudaEncoding) -> None:
    monkeypatch.setattr(encoding, "require", lambda *_: SimpleNamespace(Encoding=class_))


def test_tinycudann_backend_shares_state_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tinycudann(monkeypatch)
    own, other = small_field(), small_field(encoding="tinycudann")
    assert other.state_dict().keys() == own.state_dict().keys()
    other.load_state_dict(own.state_dict())
    x = points()

    def everything(field: Field) -> tuple[Tensor, ...]:
        out = field(x)
        loss = (out.normal[:, 0] + out.sigma + out.albedo[:, 1]).square().sum()
        return (field.density(x), out.normal, *torch.autograd.grad(loss, tuple(field.parameters())))

    for got, wanted in zip(everything(other), everything(own), strict=True):
        torch.testing.assert_close(got, wanted)
    with torch.no_grad():
        torch.testing.assert_close(other(x).normal, own(x).normal)
    assert other(x[:0]).normal.shape == (0, 3)


def test_tinycudann_with_another_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(FakeTinyCudaEncoding):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.params = nn.Parameter(torch.zeros(3))

    fake_tinycudann(monkeypatch, Other)
    with pytest.raises(InputError, match="use the encoding 'torch'"):
        small_field(encoding="tinycudann")


def test_unknown_or_missing_encoding() -> None:
    with pytest.raises(InputError, match="unknown encoding 'tcnn'"):
        Field(SMALL, encoding="tcnn")  # type: ignore[arg-type]
    if torch.cuda.is_available():
        pytest.skip("tiny-cuda-nn may be installed beside a GPU")
    with pytest.raises(MissingDependency, match="tinycudann"):
        Field(SMALL, encoding="tinycudann")


def test_recorded_background() -> None:
    fixture = recorded()
    got = recorded_background()(fixture["background.dirs"])
    assert relative_error(got, fixture["background.eval_color"]) < 1e-6


def test_background_weights() -> None:
    background = Background(generator=torch.Generator().manual_seed(9))
    assert set(background.state_dict()) == set(BACKGROUND_NAMES.values())
    assert 0.9 / 3 < background.weights[0].abs().max() <= 1 / 3
    assert background.weights[2].abs().max() <= 0.25


def test_examples() -> None:
    assert doctest.testmod(field_module).failed == 0


@pytest.mark.gpu
def test_cuda_agrees() -> None:
    x = points(5000).float()

    def everything(device: str) -> list[Tensor]:
        field = recorded_field().to(device)
        out = field(x.to(device))
        loss = out.normal.square().sum() + out.sigma.sum() + (out.normal * out.albedo).sum()
        return [out.sigma, out.normal, *torch.autograd.grad(loss, tuple(field.parameters()))]

    for got, wanted in zip(everything("cuda"), everything("cpu"), strict=True):
        # A few of the samples lie on a kink of a ReLU or on a cell border.
        assert relative_error(got.cpu(), wanted.detach()) < 1e-2
