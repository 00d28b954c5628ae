"""Compositing against nerfacc's recorded results, hand-computed rays and autograd."""

from __future__ import annotations

import doctest
import math
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from ahead import compile_ahead
from graphs import captured
from nerf_references import recorded, relative_error
from ragged import COUNTS, moved, padded, poisoned_memory, ragged
from torch import Tensor
from torch.nn.functional import normalize

from imagedream_rt.kernels import composite as module
from imagedream_rt.kernels._triton import KernelBackend
from imagedream_rt.kernels.composite import composite, render_weights, sum_along_rays
from imagedream_rt.kernels.samples import Samples, midpoints, pack
from imagedream_rt.kernels.shade import ALBEDO, Shading, shade


def recorded_samples() -> Samples:
    fixture = recorded()
    return pack(
        fixture["composite.ray_indices"], fixture["composite.t_starts"], fixture["composite.t_ends"], n_rays=7
    )


def plain_weights(sigma: Tensor, samples: Samples) -> Tensor:
    """Ray by ray, in operations that autograd knows."""
    parts = []
    for first, count in samples.packed_info.tolist():
        rows = slice(first, first + count)
        depth = sigma[rows] * (samples.t_ends - samples.t_starts)[rows]
        before = torch.cat((depth.new_zeros(1), depth.cumsum(0)))[:count]
        parts.append(torch.exp(-before) * (1 - torch.exp(-depth)))
    return torch.cat(parts)


def test_recorded_forward() -> None:
    fixture = recorded()
    got = sum_along_rays(fixture["composite.sigmas"], fixture["composite.rgb"], recorded_samples())
    for name, value in (
        ("weights", got.weights),
        ("opacity", got.opacity),
        ("color", got.values),
        ("depth", got.depth),
        ("z_variance", got.z_variance),
    ):
        assert relative_error(value, fixture[f"composite.{name}"]) < 1e-6, name


def test_recorded_gradients() -> None:
    fixture = recorded()
    sigma, rgb = (fixture[f"composite.{name}"].clone().requires_grad_() for name in ("sigmas", "rgb"))
    got = sum_along_rays(sigma, rgb, recorded_samples())
    # The recorded loss: a weighted sum of the colours and the sparsity loss.
    loss = (got.values * fixture["composite.G"]).sum() + (got.opacity.square() + 0.01).sqrt().mean()
    loss.backward()
    assert relative_error(sigma.grad, fixture["composite.grad_sigmas"]) < 1e-6
    assert relative_error(rgb.grad, fixture["composite.grad_rgb"]) < 1e-6


def test_two_samples_by_hand() -> None:
    samples = pack(torch.tensor([0, 0]), torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0]), 1)
    got = sum_along_rays(torch.tensor([math.log(2.0), math.log(4.0)]), torch.tensor([[1.0], [10.0]]), samples)
    # Half the light stops at the first, three quarters of the rest at the second.
    torch.testing.assert_close(got.weights, torch.tensor([0.5, 0.375]))
    torch.testing.assert_close(got.opacity, torch.tensor([0.875]))
    torch.testing.assert_close(got.values, torch.tensor([[4.25]]))
    depth = 0.5 * 1.5 + 0.375 * 3.5
    torch.testing.assert_close(got.depth, torch.tensor([depth]))
    z_variance = 0.5 * (1.5 - depth) ** 2 + 0.375 * (3.5 - depth) ** 2
    torch.testing.assert_close(got.z_variance, torch.tensor([z_variance]))


FEW = [0, 3, 1, 0, 8, 2, 0]


def test_gradients_against_autograd() -> None:
    samples = ragged(FEW, dtype=torch.float64)
    sigma = torch.rand(len(samples), dtype=torch.float64).mul(3).requires_grad_()
    cotangent = torch.randn_like(sigma)
    got, wanted = render_weights(sigma, samples), plain_weights(sigma, samples)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(got, sigma, cotangent), torch.autograd.grad(wanted, sigma, cotangent)
    )


def test_gradcheck_of_everything() -> None:
    samples = ragged(FEW, dtype=torch.float64)
    sigma = torch.rand(len(samples), dtype=torch.float64).mul(3).requires_grad_()
    values = torch.rand(len(samples), 2, dtype=torch.float64).requires_grad_()

    assert torch.autograd.gradcheck(lambda *given: sum_along_rays(*given, samples), (sigma, values))


def test_late_rays_are_as_exact_as_early_ones() -> None:
    # Sums along a ray are differences of one running sum, here 5e7 in the end: float32 would keep no digit.
    one = ragged([50])
    sigma = torch.rand(50) * 2
    alone = render_weights(sigma, one)
    n = 2000
    many = pack(torch.arange(n).repeat_interleave(50), one.t_starts.repeat(n), one.t_ends.repeat(n), n_rays=n)
    dense = torch.cat((sigma.repeat(n - 1) * 1000, sigma))
    got = render_weights(dense, many)[-50:]
    torch.testing.assert_close(got, alone, rtol=1e-6, atol=1e-7)


def test_opaque_matter_keeps_weights_in_range() -> None:
    samples = ragged([20, 20])
    sigma = torch.full((40,), 1e6).requires_grad_()
    weights = render_weights(sigma, samples)
    weights.sum().backward()
    torch.testing.assert_close(weights[[0, 20]], torch.ones(2))
    assert sigma.grad is not None
    assert sigma.grad.isfinite().all()


def test_no_samples() -> None:
    samples = ragged([0, 0], dtype=torch.float64)
    sigma = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    got = sum_along_rays(sigma, torch.zeros(0, 3, dtype=torch.float64), samples)
    got.values.sum().backward()
    assert got.values.tolist() == [[0.0] * 3] * 2
    assert got.depth.tolist() == [0.0, 0.0]


RESULTS = ("colour", "normal", "opacity", "depth", "z_variance", "facing_away")
SHADED = Shading(0.3, 0.7)


class Scene(NamedTuple):
    """What :func:`composite` takes, and what it learns from: sigma, albedo, normal."""

    learnt: tuple[Tensor, ...]
    samples: Samples
    rays: tuple[Tensor, ...]

    def moved(self, device: torch.device) -> Scene:
        learnt, rays = (tuple(part.to(device) for part in parts) for parts in (self.learnt, self.rays))
        return Scene(learnt, moved(self.samples, device), rays)

    def within(self, rows: int) -> Scene:
        return Scene(tuple(padded(part, rows) for part in self.learnt), self.samples.within(rows), self.rays)


def scene(counts: list[int], dtype: torch.dtype = torch.float32, *, normals: bool = True) -> Scene:
    """The same whatever the dtype; half of the normals look away from the camera, half from the light."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    n, n_rays = sum(counts), len(counts)
    learnt = [random(n).mul(4) * random(n), random(n, 3)]
    vectors = [normalize(random(size, 3) * 2 - 1, dim=-1) for size in (n, n_rays)]
    if normals:
        # A normal of zero, and what the field does not say of its light.
        vectors[0][1::7] = 0.0
        learnt.append(vectors[0])
    rays = (random(n_rays, 3) * 2 - 1, vectors[1], random(n_rays, 3) * 4 - 2)
    return Scene(
        tuple(part.to(dtype) for part in learnt),
        ragged(counts, dtype=dtype),
        tuple(part.to(dtype) for part in rays),
    )


def everything(
    given: Scene, backend: KernelBackend, shading: Shading = SHADED, outputs: Sequence[str] = RESULTS
) -> dict[str, Tensor]:
    """Weights, results, and gradients for fixed random gradients by the results that ``outputs`` names."""
    learnt = {
        name: part.detach().requires_grad_()
        for name, part in zip(("sigma", "albedo", "normal"), given.learnt, strict=False)
    }
    normal = learnt.get("normal")
    parts = (learnt["sigma"], learnt["albedo"], normal, given.samples, *given.rays)
    seen = vars(composite(*parts, shading, backend=backend))
    assert not seen["weights"].requires_grad
    generator = torch.Generator().manual_seed(11)
    found = {name: seen[name] for name in RESULTS if seen[name] is not None}
    cotangents = {name: torch.randn(x.shape, generator=generator).to(x) for name, x in found.items()}
    loss = sum((found[name] * cotangents[name]).sum() for name in outputs if name in found)
    grads = torch.autograd.grad(loss, list(learnt.values()), allow_unused=True, materialize_grads=True)
    results = {name: x.detach() for name, x in {"weights": seen["weights"], **found}.items()}
    return results | {f"by {name}": grad for name, grad in zip(learnt, grads, strict=True)}


def on(device: torch.device, shading: Shading) -> Shading:
    """The same, for the device to read."""
    numbers = (shading.ambient, shading.diffuse, shading.textureless)
    return Shading(*(torch.tensor([float(x)], device=device) for x in numbers))


def check_kernel(
    counts: list[int],
    device: torch.device,
    shading: Shading = SHADED,
    outputs: Sequence[str] = RESULTS,
    *,
    normals: bool = True,
    chosen_there: bool = False,
    bound: float = 2e-6,
) -> None:
    wanted = everything(scene(counts, torch.float64, normals=normals), "torch", shading, outputs)
    shading = on(device, shading) if chosen_there else shading
    with poisoned_memory():
        got = everything(scene(counts, normals=normals).moved(device), "triton", shading, outputs)
    assert got.keys() == wanted.keys()
    for name, one in got.items():
        assert one.dtype == torch.float32
        error = (one.cpu().double() - wanted[name]).norm()
        assert error <= bound * wanted[name].norm(), (name, error / wanted[name].norm())
    if shading.textureless:
        assert not got["by albedo"].any()


@pytest.mark.parametrize("chosen_there", [False, True])
@pytest.mark.parametrize(
    "shading", [ALBEDO, SHADED, Shading(0.3, 0.7, textureless=True), Shading(0.4, 0.0, textureless=True)]
)
def test_kernel_against_reference(shading: Shading, chosen_there: bool, kernel_device: torch.device) -> None:
    check_kernel(COUNTS, kernel_device, shading, chosen_there=chosen_there)


def test_kernel_without_normals(kernel_device: torch.device) -> None:
    check_kernel(COUNTS, kernel_device, ALBEDO, normals=False)


@pytest.mark.parametrize("outputs", [*((name,) for name in RESULTS), ("colour", "opacity"), RESULTS[2:5]])
@pytest.mark.parametrize("shading", [ALBEDO, SHADED])
def test_kernel_where_only_some_results_have_gradients(
    shading: Shading, outputs: tuple[str, ...], kernel_device: torch.device
) -> None:
    check_kernel([2, 0, 19], kernel_device, shading, outputs)


@pytest.mark.parametrize("counts", [[], [0, 0], [1], [16], [17] * 9, [100]])
def test_kernel_on_odd_sizes(counts: list[int], kernel_device: torch.device) -> None:
    check_kernel(counts, kernel_device)


def test_kernel_in_buffers_of_a_fixed_capacity(kernel_device: torch.device) -> None:
    exact = scene(COUNTS)
    n, wanted = len(exact.samples), everything(exact, "torch")
    roomy = exact.within(99).moved(kernel_device)
    backends: tuple[KernelBackend, ...] = ("triton", "torch")
    for backend in backends:
        with poisoned_memory():
            got = everything(roomy, backend)
        for name, one in got.items():
            rows = slice(n) if name == "weights" or name.startswith("by") else slice(None)
            torch.testing.assert_close(one[rows].cpu(), wanted[name], rtol=1e-5, atol=1e-6, msg=name)


def test_kernel_takes_strides_and_integers_of_64_bits(kernel_device: torch.device) -> None:
    exact = scene(COUNTS)
    wanted = everything(exact, "torch")
    learnt, rays = (
        tuple(torch.stack((part, part), dim=-1)[..., 0] for part in parts)
        for parts in (exact.learnt, exact.rays)
    )
    got = everything(Scene(learnt, exact.samples, rays).moved(kernel_device), "triton")
    for name, one in got.items():
        torch.testing.assert_close(one.cpu(), wanted[name], rtol=1e-5, atol=1e-5, msg=name)


def test_half_precision_takes_plain_pytorch() -> None:
    given = scene([3, 2])
    with pytest.raises(ValueError, match=r"takes torch\.float32"):
        composite(*(part.half() for part in given.learnt), given.samples, *given.rays, backend="triton")


def test_kernel_keeps_the_digits_of_thin_and_of_opaque_matter(kernel_device: torch.device) -> None:
    def both(dtype: torch.dtype) -> Scene:
        given = scene([60, 60], dtype)
        sigma = torch.cat((torch.full((60,), 1e-6), torch.full((60,), 1e6))).to(dtype)
        return given._replace(learnt=(sigma, *given.learnt[1:]))

    wanted = everything(both(torch.float64), "torch")
    got = everything(both(torch.float32).moved(kernel_device), "triton")
    for rows in (slice(60), slice(60, 120)):
        assert relative_error(got["weights"][rows].cpu().double(), wanted["weights"][rows]) < 1e-6
    torch.testing.assert_close(got["z_variance"].cpu().double(), wanted["z_variance"], rtol=1e-5, atol=1e-10)
    assert got["by sigma"].isfinite().all()


def test_shaded_sums_are_those_of_shaded_colours() -> None:
    """And the weights under those who face away are constants."""
    given = scene(COUNTS, torch.float64)
    sigma, albedo, normal = (part.requires_grad_() for part in given.learnt)
    origins, directions, lights = given.rays
    rays = given.samples.ray_indices
    seen = composite(*given.learnt, given.samples, *given.rays, SHADED)
    points = midpoints(origins, directions, given.samples)
    colour = shade(albedo, normal, points, lights[rays], SHADED)
    sums = sum_along_rays(sigma, torch.cat((colour, normal), dim=1), given.samples)
    torch.testing.assert_close(seen.colour, sums.values[:, :3])
    torch.testing.assert_close(seen.normal, sums.values[:, 3:])
    torch.testing.assert_close(seen.weights, sums.weights)
    away = sums.weights.detach() * (normal * directions[rays]).sum(1).clamp(min=0.0).square()
    assert seen.facing_away is not None
    torch.testing.assert_close(seen.facing_away.sum(), away.sum())
    got, none = torch.autograd.grad(seen.facing_away.sum(), (normal, sigma), allow_unused=True)
    torch.testing.assert_close(got, torch.autograd.grad(away.sum(), normal)[0])
    assert none is None
    assert got.abs().sum() > 0


def test_errors() -> None:
    given = scene(FEW)
    sigma, albedo, normal = given.learnt
    origins, directions, lights = given.rays
    with pytest.raises(ValueError, match="there are 14 samples"):
        composite(torch.zeros(3), albedo, normal, given.samples, origins, directions)
    with pytest.raises(ValueError, match=r"normal \(3, 14\) must be \[14, 3\]"):
        composite(sigma, albedo, normal.t(), given.samples, origins, directions)
    with pytest.raises(ValueError, match=r"light_positions \(1, 3\) must be \[7, 3\]"):
        composite(sigma, albedo, normal, given.samples, origins, directions, lights[:1])
    for missing in ((None, lights), (normal, None)):
        with pytest.raises(ValueError, match="needs normals and light positions"):
            composite(sigma, albedo, missing[0], given.samples, origins, directions, missing[1], SHADED)


def test_examples() -> None:
    assert doctest.testmod(module).failed == 0


def test_without_gradient_of_albedo_and_normal(kernel_device: torch.device) -> None:
    given = scene(COUNTS).moved(kernel_device)
    given.learnt[0].requires_grad_()
    backends: tuple[KernelBackend, ...] = ("triton", "torch")
    grads = []
    for backend in backends:
        seen = composite(*given.learnt, given.samples, *given.rays, SHADED, backend=backend)
        grads += torch.autograd.grad(seen.colour.sum(), given.learnt[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_ahead_of_time(arch: int) -> None:
    inputs = ("p_albedo", "p_normal", "p_t_starts", "p_t_ends", "p_origins", "p_directions", "p_lights")
    inputs += ("p_ambient", "p_diffuse", "p_textureless", "p_weights", "p_passed", "p_opacity", "p_depth")
    common = dict.fromkeys(inputs, "*fp32") | {"p_packed_info": "*i32", "n_rays": "i32"}
    sizes = dict(module.LAUNCH.constants)
    bare = sizes | dict.fromkeys(("p_normal", "p_lights"))
    results = ("p_sigma", "p_colour", "p_normal_sum", "p_z_variance", "p_facing_away")
    builds = [sizes, bare | dict.fromkeys(("p_normal_sum", "p_facing_away"))]
    forward = common | dict.fromkeys(results, "*fp32")
    compile_ahead("_composite_kernels", "forward_kernel", forward, builds, arch, warps=module.LAUNCH.warps)
    grads = ("colour", "normal_sum", *RESULTS[2:], "sigma", "albedo", "normal")
    unused = ("normal_sum", "facing_away", "depth", "z_variance", "normal")
    builds = [sizes, bare | dict.fromkeys(f"p_grad_{name}" for name in unused)]
    backward = common | dict.fromkeys((f"p_grad_{name}" for name in grads), "*fp32")
    compile_ahead("_composite_kernels", "backward_kernel", backward, builds, arch, warps=module.LAUNCH.warps)


@pytest.mark.gpu
def test_many_rays() -> None:
    counts = torch.randint(300, (3000,)).mul(torch.rand(3000) < 0.5)
    check_kernel(counts.tolist(), torch.device("cuda"), bound=1e-5)


@pytest.mark.gpu
def test_captured_in_a_graph() -> None:
    given = scene(COUNTS * 20).within(3000).moved(torch.device("cuda"))
    n, shading = sum(COUNTS) * 20, on(torch.device("cuda"), SHADED)
    wanted = everything(given, "triton", shading)
    still = given._replace(learnt=tuple(torch.zeros_like(part).requires_grad_() for part in given.learnt))

    def step() -> list[Tensor]:
        seen = composite(*still.learnt, still.samples, *still.rays, shading, backend="triton")
        assert seen.facing_away is not None
        loss = (seen.colour.square().sum() + seen.opacity.sum()) / 2 + seen.facing_away.sum()
        return [
            seen.weights[:n],
            seen.colour,
            *(grad[:n] for grad in torch.autograd.grad(loss, still.learnt)),
        ]

    replay, got = captured(step)
    with torch.no_grad():
        for one, other in zip(still.learnt, given.learnt, strict=True):
            one.copy_(other)
    replay()
    torch.testing.assert_close(got[0], wanted["weights"][:n])
    torch.testing.assert_close(got[1], wanted["colour"])
    for one, other in zip(got[2:], step()[2:], strict=True):
        torch.testing.assert_close(one, other)
    assert got[2].abs().sum() > 0
