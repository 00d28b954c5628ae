"""fp8: kernels that write e4m3, products of it, and a UNet made of them."""

from __future__ import annotations

import copy
import doctest
from collections.abc import Callable

import pytest
import torch
from ahead import compile_ahead
from graphs import captured
from interpreter import round_to_e4m3_as_gpus_do
from operators import Operators
from rounding import randn, relative_error
from torch import Tensor, nn

from imagedream_rt.engine import fp8
from imagedream_rt.engine.blocks import TransformerBlock
from imagedream_rt.engine.blueprint import fill
from imagedream_rt.engine.errors import InputError
from imagedream_rt.engine.fp8 import Fp8GatedLinear, Fp8LayerNorm, Fp8Linear, use_fp8
from imagedream_rt.engine.layers import use_kernels
from imagedream_rt.engine.random_model import random_layout
from imagedream_rt.engine.unet import MultiViewUNet
from imagedream_rt.kernels import fp8 as module
from imagedream_rt.kernels import geglu, layer_norm
from imagedream_rt.kernels.fp8 import (
    E4M3,
    LARGEST,
    add_layer_norm_e4m3,
    geglu_e4m3,
    layer_norm_e4m3,
    linear_e4m3,
    linear_e4m3_reference,
    to_e4m3,
)
from imagedream_rt.kernels.geglu import geglu_reference
from imagedream_rt.kernels.layer_norm import layer_norm_reference

SHAPES = [(7,), (3, 5, 37), (2, 640), (1, 1280)]
REAL_SHAPES = [(10, 1024, 320), (10, 256, 640), (10, 64, 1280), (10, 16, 1280)]
HALF_AND_SINGLE = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = 0.0265
"""Relative error of rounding to three mantissa bits, over many numbers."""

pytestmark = pytest.mark.usefixtures("untuned")


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.importorskip("triton")
        round_to_e4m3_as_gpus_do(monkeypatch)


def assert_rounded(found: Tensor, exact: Tensor) -> None:
    """Each is the nearest number of e4m3; what lies half-way may go either way, by float32's own rounding."""
    assert found.dtype == E4M3
    assert found.is_contiguous()
    exact = exact.double().clamp(-LARGEST, LARGEST)
    step = torch.exp2(exact.abs().clamp_min(2.0**-6).log2().floor() - 3)
    off = (found.double() - exact).abs() / step
    assert off.max() <= 0.501
    assert off.max() >= 0.4 or off.numel() < 100


def assert_norms_are_rounded(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    # Sums in eighths, so that they need no rounding; a few results beyond the range, and many below 2^-6.
    x, delta = ((8 * randn(*shape, seed=seed)).round().div(8).to(device, dtype) for seed in (1, 2))
    weight = (200 * randn(shape[-1], seed=3) ** 5).to(device, torch.float32)
    bias = randn(shape[-1], seed=4).to(device, torch.float32)
    exact = (weight.double(), bias.double())
    found = layer_norm_e4m3(x, weight, bias, backend="triton")
    assert_rounded(found, layer_norm_reference(x.double(), *exact))
    total, found = add_layer_norm_e4m3(x, delta, weight, bias, backend="triton")
    assert torch.equal(total, x + delta)
    assert_rounded(found, layer_norm_reference(x.double() + delta.double(), *exact))


def assert_gates_are_rounded(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x = (6 * randn(*shape[:-1], 2 * shape[-1], seed=5)).to(device, dtype)
    assert_rounded(geglu_e4m3(x, backend="triton"), geglu_reference(x.double()))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_round_to_the_nearest(
    shape: tuple[int, ...], dtype: torch.dtype, kernel_device: torch.device
) -> None:
    assert_norms_are_rounded(shape, dtype, kernel_device)
    assert_gates_are_rounded(shape, dtype, kernel_device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", REAL_SHAPES, ids=str)
def test_kernels_round_to_the_nearest_at_real_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_norms_are_rounded(shape, dtype, torch.device("cuda"))
    assert_gates_are_rounded((*shape[:-1], 4 * shape[-1]), dtype, torch.device("cuda"))


def test_every_launch_rounds_to_the_nearest(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = (
        layer_norm._FORWARD,
        layer_norm._candidates(5, 320, torch.float16, True),
        assert_norms_are_rounded,
    )
    gates = (geglu._FORWARD, geglu._candidates(5, 320, torch.float16), assert_gates_are_rounded)
    for kernel, launches, check in (tuned, gates):
        for launch in launches:
            monkeypatch.setattr(kernel, "choose", lambda *_, launch=launch: launch)
            check((5, 320), torch.float16, kernel_device)


def test_plain_results_round_to_the_nearest() -> None:
    x = 4 * randn(6, 50, seed=1, dtype=torch.float32)
    weight, bias = 30 * randn(50, seed=2, dtype=torch.float32), randn(50, seed=3, dtype=torch.float32)
    exact = layer_norm_reference(x.double(), weight.double(), bias.double())
    assert_rounded(layer_norm_e4m3(x, weight, bias, backend="torch"), exact)
    assert_rounded(add_layer_norm_e4m3(x / 2, x / 2, weight, bias, backend="torch")[1], exact)
    assert_rounded(geglu_e4m3(x, backend="torch"), geglu_reference(x.double()))


def test_strided_input(kernel_device: torch.device) -> None:
    wide = randn(3, 4, 20, seed=1, dtype=torch.float32).to(kernel_device)
    ones = torch.ones(10, device=kernel_device)
    for x in (wide[:, ::2, 3:13], wide[..., ::2]):
        exact = x.double()
        assert_rounded(
            layer_norm_e4m3(x, ones, ones, backend="triton"), layer_norm_reference(exact, ones, ones)
        )
        assert_rounded(geglu_e4m3(x, backend="triton"), geglu_reference(exact))


def test_range_and_rounding_by_hand(kernel_device: torch.device) -> None:
    # Steps of 1/8 in [1, 2), of 2^-9 below 2^-6, ties to even; beyond 448 there is nothing.
    values = [1.06, 1.07, -1.1875, 17.0, 449.0, -1e6, 2.0**-9, 2.0**-11, 0.0, 464.0]
    wanted = [1.0, 1.125, -1.25, 16.0, 448.0, -448.0, 2.0**-9, 0.0, 0.0, 448.0]
    assert to_e4m3(torch.tensor(values)).tolist() == wanted
    # A gate of 32 is itself.
    projected = torch.cat((torch.tensor(values) / 32, torch.full((10,), 32.0))).to(kernel_device)
    assert geglu_e4m3(projected, backend="triton").tolist() == wanted
    assert to_e4m3(torch.tensor(float("nan"))).isnan()


def test_nothing_in_nothing_out(kernel_device: torch.device) -> None:
    for shape in ((0, 8), (3, 0)):
        x, weight = torch.zeros(shape, device=kernel_device), torch.ones(shape[1], device=kernel_device)
        assert layer_norm_e4m3(x, weight, weight, backend="triton").shape == shape
        total, normed = add_layer_norm_e4m3(x, x, weight, weight, backend="triton")
        assert (total.shape, total.dtype, normed.shape, normed.dtype) == (shape, x.dtype, shape, E4M3)
        assert geglu_e4m3(x, backend="triton").shape == (shape[0], shape[1] // 2)


def test_kernels_build_ahead_of_time() -> None:
    """For Hopper alone: Ampere has no such numbers."""
    launch = layer_norm._candidates(640, 1280, torch.float16, True)[0]
    types = {**dict.fromkeys(("x", "delta", "total"), "*fp16"), "out": "*fp8e4nv", "eps": "fp32"}
    types |= {
        "weight": "*fp32",
        "bias": "*fp32",
        **dict.fromkeys(("rows", "x_stride", "delta_stride"), "i32"),
    }
    constants = {"ADD": 1, "CHANNELS": 1280, **dict(launch.constants)}
    built = compile_ahead("layer_norm", "_forward_kernel", types, [constants], 90, warps=launch.warps)
    launch = geglu._candidates(640, 5120, torch.float16)[0]
    types = {"projected": "*fp16", "out": "*fp8e4nv", "rows": "i32", "stride": "i32"}
    constants = {"CHANNELS": 5120, **dict(launch.constants)}
    built += compile_ahead("geglu", "_forward_kernel", types, [constants], 90, warps=launch.warps)
    assert all("cvt.rn.satfinite.e4m3x2.f32" in ptx for ptx in built)


def product(
    tokens: int, k: int, n: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, weight = (to_e4m3(9 * randn(rows, k, seed=rows)).to(device) for rows in (tokens, n))
    scale_x, scale_weight = torch.tensor(0.5, device=device), torch.tensor(0.01, device=device)
    return x, weight, scale_x, scale_weight, randn(n, seed=3).to(device, dtype)


def test_product_is_that_of_the_numbers() -> None:
    x, weight, scale_x, scale_weight, bias = product(24, 48, 16)
    exact = 0.005 * (x.double() @ weight.double().T)
    for backend in ("auto", "torch"):
        found = linear_e4m3(x.view(2, 3, 4, 48), weight, scale_x, scale_weight, bias, torch.float32, backend)
        assert found.shape == (2, 3, 4, 16)
        torch.testing.assert_close(found.view(24, 16), (exact + bias.double()).float())
    found = linear_e4m3(x, weight, scale_x, scale_weight, None, torch.float16)
    torch.testing.assert_close(found, exact.half())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(10240, 320, 960), (2560, 640, 5120), (640, 5120, 1280), (7, 32, 16)], ids=str
)
def test_tensor_cores_multiply_the_same(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    if reason := module.fp8_obstacle(torch.device("cuda")):
        pytest.skip(reason)
    x, weight, scale_x, scale_weight, bias = product(*shape, "cuda", dtype)
    for added in (bias, None):
        found = linear_e4m3(x, weight, scale_x, scale_weight, added, dtype)
        wanted = linear_e4m3_reference(x, weight, scale_x, scale_weight, added, torch.float32)
        assert found.dtype == dtype
        # Fast accumulation keeps about 14 bits of a sum: far more than the factors have.
        assert relative_error(found, wanted) <= ROUNDING / 4 + torch.finfo(dtype).eps


def test_product_refuses_what_does_not_fit() -> None:
    x, weight, one, scale, _ = product(4, 32, 16)
    with pytest.raises(
        ValueError, match=r"x must be \[..., K\] and weight \[N, K\], got \[4, 16\] and \[16, 32\]"
    ):
        linear_e4m3(x[:, :16], weight, one, scale, None, torch.float32)
    with pytest.raises(ValueError, match=r"must be in torch\.float8_e4m3fn, got torch\.float32"):
        linear_e4m3(x.float(), weight, one, scale, None, torch.float32)


def test_kernels_refuse_what_the_others_refuse(kernel_device: torch.device) -> None:
    x, ones = torch.zeros(2, 4, device=kernel_device), torch.ones(4, device=kernel_device)
    with pytest.raises(ValueError, match=r"weight and bias \[C\]"):
        layer_norm_e4m3(x, ones[:3], ones)
    with pytest.raises(ValueError, match="delta must have the shape and dtype of x"):
        add_layer_norm_e4m3(x, x[:1], ones, ones)
    with pytest.raises(ValueError, match=r"projected must be \[..., 2C\], got \[2, 3\]"):
        geglu_e4m3(x[:, :3])


def random_norm(channels: int) -> nn.LayerNorm:
    norm = nn.LayerNorm(channels).requires_grad_(False)
    norm.weight.copy_(2 * randn(channels, seed=1))
    norm.bias.copy_(randn(channels, seed=2) / 4)
    return norm


def test_no_row_overflows_the_norm_and_the_worst_fills_it() -> None:
    """One large number among small ones makes the largest output that a norm has."""
    norm = random_norm(64)
    own = Fp8LayerNorm(norm)
    assert own.after_sum(torch.ones(64), torch.ones(64))[0].tolist() == [2.0] * 64
    rows = torch.cat((1e4 * torch.eye(64), -1e4 * torch.eye(64)))
    exact = norm(rows) * own.scales
    assert exact.abs().max() <= LARGEST
    assert (exact.view(2, 64, 64).abs().amax(0).diagonal() >= 0.95 * LARGEST).all()
    assert_rounded(own(rows), exact)
    assert_rounded(own.after_sum(rows / 2, rows / 2)[1], exact)


def test_no_row_overflows_the_gate() -> None:
    """The worst for an output is the row of its own weights."""
    norm, linear = random_norm(64), nn.Linear(64, 2 * 32).requires_grad_(False)
    linear.weight[32:] = linear.weight[:32]  # so that one row is the worst for value and gate
    own_norm = Fp8LayerNorm(norm)
    own = Fp8GatedLinear(linear, norm, own_norm.scales)
    rows = linear.weight[:32] * norm.weight
    rows = rows - rows.mean(1, keepdim=True)
    exact = geglu_reference(linear(norm(1e3 * rows))) * own.scales
    worst = exact.abs().diagonal()
    assert worst.max() <= LARGEST
    assert worst.median() >= 0.5 * LARGEST
    assert relative_error(own(own_norm(1e3 * rows)), exact) <= 2.5 * ROUNDING


def test_a_norm_and_the_layer_behind_it_lose_two_roundings() -> None:
    """However different channels are in size: each has a scale of its own."""
    norm, linear = random_norm(256), nn.Linear(256, 64).requires_grad_(False)
    norm.weight[::2] *= 1e3
    linear.weight[:, ::2] /= 1e3
    norm.bias[::2] *= 1e3
    x = randn(128, 256, seed=5, dtype=torch.float32)
    own = Fp8LayerNorm(norm)
    behind = Fp8Linear(linear.weight, linear.bias, own.scales, torch.float32)
    assert behind.weight.float().abs().max() == LARGEST
    error = relative_error(behind(own(x)), linear(norm(x)))
    assert 0.5 * ROUNDING <= error <= 2 * ROUNDING


def test_channels_that_are_always_zero_cost_the_others_nothing() -> None:
    norm, linear = random_norm(64), nn.Linear(64, 2 * 32).requires_grad_(False)
    norm.weight[3] = norm.bias[3] = 0.0
    for row in (5, 32 + 7):  # a value and a gate
        linear.weight[row] = linear.bias[row] = 0.0
    own = Fp8LayerNorm(norm)
    gated = Fp8GatedLinear(linear, norm, own.scales)
    x = randn(50, 64, seed=1, dtype=torch.float32)
    found = gated(own(x)).float() / gated.scales
    assert not found[:, [5, 7]].any()
    assert relative_error(found, geglu_reference(linear(norm(x)))) <= 3.5 * ROUNDING


def random_unet(size: str = "tiny", device: str = "cpu", dtype: torch.dtype = torch.float32) -> MultiViewUNet:
    part = random_layout(size, "pixel").parts["unet"]
    fill(part, torch.device(device), dtype, f"random:{size}")
    network: MultiViewUNet = part.wrapper
    return network.requires_grad_(False)


def inputs(network: MultiViewUNet, *, groups: int = 2, frames: int = 3, px: int = 4) -> dict[str, Tensor]:
    config, parameter = network.config, next(network.parameters())

    def make(*shape: int) -> Tensor:
        return randn(*shape, seed=len(shape)).to(parameter)

    return {
        "latents": make(groups, frames, config.in_channels, px, px),
        "timesteps": torch.arange(groups, device=parameter.device) * 300 + 7,
        "context": make(groups, 9, config.context_dim),
        "camera": make(groups, frames, config.camera_dim),
        "image_tokens": make(groups, config.image_tokens, config.context_dim),
    }


def test_the_network_changes_by_roundings() -> None:
    network = random_unet()
    given = inputs(network)
    wanted = network(**given)
    parameters = {id(parameter) for parameter in network.parameters()}
    use_fp8(network, emulate=True)
    found = network(**given)
    assert ROUNDING <= relative_error(found, wanted) <= 3 * ROUNDING
    layers = [module for module in network.modules() if isinstance(module, Fp8Linear)]
    assert len(layers) == 4 * sum(isinstance(module, TransformerBlock) for module in network.modules())
    assert {id(parameter) for parameter in network.parameters()} < parameters
    before = network.state_dict()
    use_fp8(network, emulate=True)  # once is enough
    assert [tensor.data_ptr() for tensor in network.state_dict().values()] == [
        tensor.data_ptr() for tensor in before.values()
    ]
    assert torch.equal(copy.deepcopy(network)(**given), found)


def test_prompt_key_values_stay_exact() -> None:
    network = random_unet()
    given = inputs(network)
    wanted = network.prompt_key_values(given["context"], given["image_tokens"])
    use_fp8(network, emulate=True)
    found = network.prompt_key_values(given["context"], given["image_tokens"])
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=0.0)


def test_the_networks_kernels_agree_with_the_emulation(kernel_device: torch.device) -> None:
    network = random_unet(device=kernel_device.type)
    given = inputs(network, groups=1, frames=2, px=2)
    use_fp8(network, emulate=True)
    wanted = network(**given)
    for layer in network.modules():
        if isinstance(layer, Fp8LayerNorm | Fp8GatedLinear):  # the other kernels are compared elsewhere
            layer.backend = "triton"
    with Operators() as ran:
        found = network(**given)
    there = sum(isinstance(layer, TransformerBlock) for layer in network.modules())
    # On a GPU the layers that this test leaves alone run on kernels of their own.
    in_e4m3 = {name: count for name, count in ran.ours.items() if name.endswith("_e4m3")}
    assert in_e4m3 == {"layer_norm_e4m3": there, "add_layer_norm_e4m3": 2 * there, "geglu_e4m3": there}
    # A number between two of e4m3 may be rounded either way.
    assert relative_error(found, wanted) <= ROUNDING / 4


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    network = random_unet()
    parameters = [*network.parameters()]
    with pytest.raises(InputError, match="fp8 cannot run here: no CUDA device; choose another precision"):
        use_fp8(network)
    parameters[-1].requires_grad_(True)
    with pytest.raises(InputError, match=r"frozen network; call unet.requires_grad_\(False\)"):
        use_fp8(network, emulate=True)
    parameters[-1].requires_grad_(False)
    monkeypatch.setattr(fp8, "fp8_obstacle", lambda device: None)
    with pytest.raises(InputError, match=r"loaded in float16 or bfloat16, and these are in torch\.float32"):
        use_fp8(network)

    def no_product(*_: object) -> Tensor:
        raise RuntimeError("not compiled for this")

    monkeypatch.setattr(fp8, "linear_e4m3", no_product)
    with pytest.raises(InputError, match="has no fp8 products here: not compiled for this"):
        use_fp8(network.half())
    assert all(one is other for one, other in zip(network.parameters(), parameters, strict=True))


def test_old_devices_are_told_what_fp8_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "obstacle", lambda device: None)
    for capability, reason in {
        (8, 0): "compute capability 8.0, fp8 needs 8.9",
        (8, 9): None,
        (9, 0): None,
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert module.fp8_obstacle(torch.device("cuda")) == reason


@pytest.fixture(scope="module")
def full_size() -> tuple[MultiViewUNet, MultiViewUNet]:
    """``random:full`` in float16 as it is loaded, and with fp8."""
    if reason := module.fp8_obstacle(torch.device("cuda")):
        pytest.skip(reason)
    half = random_unet("full", "cuda", torch.float16).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    quantised = copy.deepcopy(half)
    use_fp8(quantised)
    return half, quantised


@pytest.mark.gpu
def test_the_full_size_changes_by_roundings(full_size: tuple[MultiViewUNet, MultiViewUNet]) -> None:
    half, quantised = full_size
    given = inputs(half, frames=5, px=32)
    with torch.inference_mode():
        wanted = half(**given)
        with Operators() as ran:
            found = quantised(**given)
        assert relative_error(found, wanted) <= 3 * ROUNDING
        assert (ran.others["_scaled_mm"], ran.ours["geglu_e4m3"]) == (64, 16)
        emulated = copy.deepcopy(quantised)
        use_kernels(emulated, "torch")
        # Sums of other orders, and so a neighbour in e4m3 here and there, in each of 16 blocks.
        assert relative_error(found, emulated(**given)) <= 1.5 * ROUNDING


@pytest.mark.gpu
def test_the_full_size_in_a_cuda_graph(full_size: tuple[MultiViewUNet, MultiViewUNet]) -> None:
    network = full_size[1]
    given = inputs(network, frames=5, px=32)
    with torch.inference_mode():
        replay, out = captured(lambda: network(**given))
        given["latents"].neg_()
        replay()
        torch.testing.assert_close(out, network(**given), rtol=0.0, atol=0.0)


@pytest.mark.gpu
def test_a_compiled_block(full_size: tuple[MultiViewUNet, MultiViewUNet]) -> None:
    block = next(m for m in full_size[1].modules() if isinstance(m, TransformerBlock))
    x = randn(2, 1024, 320, seed=1).cuda().half()
    with torch.inference_mode():
        feed: Callable[[Tensor], Tensor] = torch.compile(
            lambda x: x + block.ff(block.norm3(x)), fullgraph=True
        )
        torch.testing.assert_close(feed(x), x + block.ff(block.norm3(x)), rtol=1e-3, atol=1e-2)


def test_docstring_examples() -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
