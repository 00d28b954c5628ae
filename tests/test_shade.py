"""Shading against the released materials, and by hand."""

from __future__ import annotations

import pytest
import torch
from nerf_references import recorded

from imagedream_rt.kernels.shade import ALBEDO, Shading, shade


@pytest.mark.parametrize(
    ("case", "shading"),
    [
        ("albedo", ALBEDO),
        ("ambient_only", ALBEDO),
        ("textureless", Shading(0.7620353729081086, 0.23796462709189137, textureless=True)),
        ("diffuse", Shading(0.37709830511029807, 0.6229016948897019)),
    ],
)
def test_recorded_materials(case: str, shading: Shading) -> None:
    fixture = recorded()
    got = shade(
        torch.sigmoid(fixture["material.features"]),
        fixture["material.normals"],
        fixture["material.positions"],
        fixture["material.light_positions"],
        shading,
    )
    torch.testing.assert_close(got, fixture[f"material.{case}.color"], rtol=1e-6, atol=1e-7)


def test_shading_by_hand() -> None:
    albedo = torch.tensor([[0.5, 1.0, 0.0]]).expand(3, 3)
    # Facing the light, at 60 degrees to it, and away from it; the light is two units up.
    normals = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.75**0.5, 0.5], [0.0, 0.0, -1.0]])
    points, lights = torch.zeros(3, 3), torch.tensor([[0.0, 0.0, 2.0]]).expand(3, 3)
    got = shade(albedo, normals, points, lights, Shading(0.2, 0.6))
    torch.testing.assert_close(got, albedo * torch.tensor([[0.8], [0.5], [0.2]]))
    bare = shade(albedo, normals, points, lights, Shading(0.2, 0.6, textureless=True))
    torch.testing.assert_close(bare, torch.tensor([[0.8], [0.5], [0.2]]).expand(3, 3))


@pytest.mark.parametrize(
    ("ambient", "diffuse", "textureless"), [(1.0, 0.0, False), (0.3, 0.7, False), (0.3, 0.7, True)]
)
def test_shading_chosen_on_the_device_is_the_same(ambient: float, diffuse: float, textureless: bool) -> None:
    albedo, points, lights = torch.rand(9, 3), torch.rand(9, 3), torch.rand(9, 3) * 3
    normals = torch.nn.functional.normalize(torch.randn(9, 3), dim=-1)
    chosen = Shading(ambient, diffuse, textureless)
    numbers = Shading(*(torch.tensor([float(x)]) for x in (ambient, diffuse, textureless)))
    assert numbers.needs_normals
    torch.testing.assert_close(
        shade(albedo, normals, points, lights, numbers), shade(albedo, normals, points, lights, chosen)
    )


def test_textureless_gives_the_albedo_a_zero_gradient_not_none() -> None:
    albedo = torch.rand(4, 3, requires_grad=True)
    shade(albedo, None, torch.zeros(4, 3), None, Shading(0.3, 0.0, textureless=True)).sum().backward()
    assert albedo.grad is not None
    assert albedo.grad.abs().max() == 0


def test_diffuse_needs_normals_and_lights() -> None:
    with pytest.raises(ValueError, match="needs normals"):
        shade(torch.rand(4, 3), None, torch.zeros(4, 3), torch.zeros(4, 3), Shading(0.3, 0.7))
