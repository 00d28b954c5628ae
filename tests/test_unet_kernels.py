"""The UNet on kernels: the same numbers as in plain PyTorch, no copies between layers, stacked projections."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from graphs import captured
from operators import Operators
from torch import Tensor
from torch.nn import functional

from imagedream_rt.engine import blocks, unet
from imagedream_rt.engine.blueprint import fill
from imagedream_rt.engine.graphed import GraphedStep
from imagedream_rt.engine.layers import fast_memory_format, use_kernels
from imagedream_rt.engine.random_model import random_layout
from imagedream_rt.engine.unet import MultiViewUNet, UNetConfig
from imagedream_rt.kernels._triton import KernelBackend

KERNELS = {
    "add_layer_norm",
    "bias_residual",
    "cross_attention",
    "geglu",
    "group_norm",
    "layer_norm",
    "multi_view_attention",
}
SMALL = UNetConfig(
    model_channels=32,
    channel_mult=(1,),
    num_res_blocks=1,
    transformer_levels=(0,),
    context_dim=32,
    head_dim=32,
    resampler_width=32,
)


def inputs(
    config: UNetConfig, *, groups: int = 1, frames: int = 2, px: int = 2, tokens: int = 5, device: str = "cpu"
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    return {
        "latents": randn(groups, frames, config.in_channels, px, px),
        "timesteps": torch.arange(groups, device=device) * 300 + 7,
        "context": randn(groups, tokens, config.context_dim),
        "camera": randn(groups, frames, config.camera_dim),
        "image_tokens": randn(groups, config.image_tokens, config.context_dim),
    }


def random_unet(config: UNetConfig = SMALL) -> MultiViewUNet:
    torch.manual_seed(0)
    return MultiViewUNet(config).eval().requires_grad_(False)


def relative_error(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


@pytest.fixture
def few_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a second for the program of each group; 32 of them would take minutes."""
    monkeypatch.setattr(blocks, "GROUPS", 2)
    monkeypatch.setattr(unet, "GROUPS", 2)


def plain_and_forced(device: torch.device, dtype: torch.dtype) -> tuple[MultiViewUNet, MultiViewUNet]:
    """The network in plain PyTorch and float32, and on kernels alone in ``dtype``."""
    plain = random_unet().to(device)
    forced = copy.deepcopy(plain).to(dtype)
    fast_memory_format(forced)
    use_kernels(plain, "torch")
    use_kernels(forced, "triton")
    if dtype == torch.float32:  # which the attention leaves to PyTorch
        forced.use_attention_backend("auto")
    return plain, forced


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_kernel_gives_the_networks_numbers(
    kernel_device: torch.device, few_groups: None, dtype: torch.dtype
) -> None:
    plain, forced = plain_and_forced(kernel_device, dtype)
    given = inputs(SMALL, device=kernel_device.type)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        with Operators() as ran:
            found = forced(**given)
        wanted = plain(**given)
    assert set(ran.ours) == KERNELS - ({"multi_view_attention"} if dtype == torch.float32 else set())
    assert ran.ours["group_norm"] == 15
    assert relative_error(found, wanted) <= (1e-5 if dtype == torch.float32 else 5 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradients_through_the_kernels(
    kernel_device: torch.device, few_groups: None, dtype: torch.dtype
) -> None:
    plain, forced = plain_and_forced(kernel_device, dtype)
    given = inputs(SMALL, device=kernel_device.type)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for network in (plain, forced):
            network.requires_grad_(True)
            network(**given).square().mean().backward()
    wanted = dict(plain.named_parameters())
    for name, parameter in forced.named_parameters():
        if name.startswith("image_embed."):  # the tokens were given
            continue
        truth = wanted[name].grad
        assert parameter.grad is not None, name
        assert truth is not None, name
        assert relative_error(parameter.grad, truth) <= (1e-4 if dtype == torch.float32 else 3e-2), name


@pytest.mark.slow
def test_compiled_training_through_the_kernels(kernel_device: torch.device, few_groups: None) -> None:
    """Under autocast and without a break: each kernel stays one call, and its gradient another."""
    plain, forced = (random_unet().to(kernel_device).requires_grad_(True) for _ in range(2))
    use_kernels(plain, "torch")
    use_kernels(forced, "triton")
    compiled = torch.compile(forced, backend="aot_eager", fullgraph=True)
    given = inputs(SMALL, device=kernel_device.type)
    losses = []
    for network, run in ((plain, plain), (forced, compiled)):
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-2)
        for _ in range(2):
            # Triton's interpreter has no bfloat16.
            with torch.autocast(kernel_device.type, torch.float16):
                loss = (run(**given) - given["latents"]).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[1] < 0.9 * losses[0]
    assert losses[2:] == pytest.approx(losses[:2], rel=5e-3)


def test_channels_last_maps_flow_without_copies() -> None:
    """From the first convolution to the last no layer rearranges memory."""
    network = random_unet(UNetConfig(**{**vars(SMALL), "channel_mult": (1, 2), "transformer_levels": (0, 1)}))
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    given = inputs(network.config, groups=2, frames=3, px=4)
    given["timesteps"] = given["timesteps"].float()
    with Operators() as ran:
        network(**given)
    assert ran.rearranging() == {}
    with Operators() as ran:
        kept = network(**given, keep=2)
    assert ran.rearranging() == {"clone": 1}  # the tokens of the frames that go on
    assert kept.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 4)], ids=str)
def test_doubling_folds_into_a_transposed_convolution(size: tuple[int, int]) -> None:
    x, weight = torch.randn(2, 3, *size, dtype=torch.float64), torch.randn(5, 3, 3, 3, dtype=torch.float64)
    wanted = functional.conv2d(functional.interpolate(x, scale_factor=2.0), weight, padding=1)
    folded = blocks.folded_doubling(weight)
    torch.testing.assert_close(functional.conv_transpose2d(x, folded, stride=2, padding=1), wanted)


class Upsampled:
    """An upsampling in float16 on kernels, that folds maps of any size; counts foldings."""

    def __init__(self, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.manual_seed(0)
        self.foldings = 0
        monkeypatch.setattr(blocks.Upsample, "LEAST_PIXELS", 4)
        self.layer = blocks.Upsample(16).to(device, torch.float16, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.layer.requires_grad_(False)
        use_kernels(self.layer, "triton")
        fold = self.layer.folded.compute

        def counted(weight: Tensor) -> Tensor:
            self.foldings += 1
            return fold(weight)

        self.layer.folded.compute = counted
        self.x = torch.randn(2, 16, 2, 1, device=device).half().contiguous(memory_format=torch.channels_last)

    def error(self) -> float:
        """Against the same weights in float32, doubled and convolved."""
        conv = self.layer.conv
        assert conv.bias is not None
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            doubled = functional.interpolate(self.x.float(), scale_factor=2.0)
            wanted = functional.conv2d(doubled, conv.weight.float(), conv.bias.float(), padding=1)
        found = self.layer(self.x)
        assert found.dtype == torch.float16
        assert found.is_contiguous(memory_format=torch.channels_last)
        return relative_error(found, wanted)


@pytest.fixture
def upsampled(kernel_device: torch.device, untuned: None, monkeypatch: pytest.MonkeyPatch) -> Upsampled:
    return Upsampled(kernel_device, monkeypatch)


def test_folded_weights_are_kept_until_the_weights_change(upsampled: Upsampled) -> None:
    layer = upsampled.layer
    with torch.inference_mode():  # what is kept serves others, too
        assert upsampled.error() <= 1e-3
    x = upsampled.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).float().square().sum(), x)
    assert gradient.isfinite().all()
    assert upsampled.foldings == 1
    layer.conv.weight.mul_(-2.0)
    assert upsampled.error() <= 1e-3
    other = {name: torch.randn_like(value) for name, value in layer.state_dict().items()}
    for assign in (False, True):
        layer.load_state_dict({name: value + assign for name, value in other.items()}, assign=assign)
        layer.requires_grad_(False)
        assert upsampled.error() <= 1e-3
    assert upsampled.foldings == 4
    layer.float().conv.weight.add_(1.0)
    layer.half()  # perhaps where they were before
    assert upsampled.error() <= 1e-3
    assert list(layer.state_dict()) == ["conv.weight", "conv.bias"]


def test_a_graphs_key_sees_what_is_written_to_folded_weights() -> None:
    network = random_unet(UNetConfig(**{**vars(SMALL), "channel_mult": (1, 2), "transformer_levels": (0, 1)}))
    before = network.weights_seen
    assert before == network.weights_seen
    network.load_state_dict(network.state_dict())
    assert before[0] == network.weights_seen[0]
    assert before[1:] != network.weights_seen[1:]


def test_a_copy_folds_its_own_weights(upsampled: Upsampled) -> None:
    assert upsampled.error() <= 1e-3
    upsampled.layer = copy.deepcopy(upsampled.layer)
    upsampled.layer.conv.weight.add_(1.0)
    assert upsampled.error() <= 1e-3


@pytest.mark.parametrize("why", ["trained", "float32", "small", "torch", "autocast"])
def test_what_is_not_folded(upsampled: Upsampled, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    layer = upsampled.layer
    if why == "trained":
        layer.requires_grad_(True)
    elif why == "float32":
        layer.float()
        upsampled.x = upsampled.x.float()
    elif why == "small":
        monkeypatch.setattr(blocks.Upsample, "LEAST_PIXELS", 5)
    elif why == "torch":
        use_kernels(layer, "torch")
    with torch.autocast(upsampled.x.device.type, torch.float16, enabled=why == "autocast"):
        layer(upsampled.x)
    assert upsampled.foldings == 0


@pytest.mark.gpu
def test_a_captured_network_folds_before_its_capture(upsampled: Upsampled) -> None:
    """What lies in a graph's memory must not be kept: so a capture without a call before it does not fold."""
    wanted = upsampled.layer(upsampled.x)
    replay, found = captured(lambda: upsampled.layer(upsampled.x))
    replay()
    torch.testing.assert_close(found, wanted)
    upsampled.layer.conv.weight.mul_(2.0)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        upsampled.layer(upsampled.x)
    assert upsampled.foldings == 1


@pytest.mark.parametrize("keep", [None, 1])
def test_a_feed_forwards_residual_sum_is_its_last_products(keep: int | None) -> None:
    network = random_unet().half()
    for name, parameter in network.named_parameters():
        if name.endswith(("proj_out.bias", "net.2.bias")):
            parameter.normal_()
    given = inputs(SMALL)
    with Operators() as ran:
        found = network(**given, keep=keep)
    assert ran.others["addmm_"] == 4
    network.requires_grad_(True)
    with torch.no_grad(), Operators() as ran:
        wanted = network(**given, keep=keep)
    assert "addmm_" not in ran.others
    assert relative_error(found, wanted) <= 5 * torch.finfo(torch.float16).eps
    network.requires_grad_(False)
    x = given["latents"].half().requires_grad_()
    (gradient,) = torch.autograd.grad(network(**{**given, "latents": x}).float().sum(), x)
    assert gradient.isfinite().all()
    for last in (m.proj_out for m in network.modules() if isinstance(m, blocks.MultiViewTransformer)):
        last.bias.zero_()  # what is kept of the old ones must not be used
        last.weight.zero_()
    seen = []
    for layer in network.modules():
        if isinstance(layer, blocks.MultiViewTransformer):
            layer.register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
    network(**given)
    assert len(seen) == 4
    assert all(torch.equal(before, after) for before, after in seen)


def test_stacked_projections_keep_their_released_names() -> None:
    network = random_unet()
    attention = next(m for m in network.modules() if isinstance(m, blocks.MultiViewSelfAttention))
    state = attention.state_dict()
    assert list(state) == ["to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias"]
    assert torch.equal(torch.cat([state[f"to_{part}.weight"] for part in "qkv"]), attention.to_qkv)
    # As everywhere in PyTorch, what a state dict holds is the parameter's own memory.
    state["to_k.weight"].fill_(7.0)
    assert (attention.to_qkv[32:64] == 7.0).all()
    assert (attention.to_qkv[:32] != 7.0).all()


def test_shifts_of_all_residual_blocks_keep_their_released_names() -> None:
    network = random_unet()
    names = [name for name, module in network.named_modules() if isinstance(module, blocks.ResBlock)]
    assert len(names) == 5
    state = network.state_dict()
    for kind, parameter in (("weight", network.to_shifts), ("bias", network.to_shifts_bias)):
        pieces = [state[f"{name}.emb_layers.1.{kind}"] for name in names]
        assert torch.equal(torch.cat(pieces), parameter)
        assert pieces[0].data_ptr() == parameter.data_ptr()
    assert not {"to_shifts", "to_shifts_bias"} & set(state)


def test_wrong_shifts_are_named_wherever_the_network_is() -> None:
    holder = torch.nn.ModuleDict({"unet": random_unet()})
    state = holder.state_dict()
    del state["unet.middle_block.0.emb_layers.1.bias"]
    state["unet.middle_block.2.emb_layers.1.weight"] = torch.zeros(32, 16)
    state["unet.middle_block.2.emb_layers.1.scale"] = torch.zeros(32)
    with pytest.raises(RuntimeError) as error:
        holder.load_state_dict(state)
    assert 'Missing key(s) in state_dict: "unet.middle_block.0.emb_layers.1.bias"' in str(error.value)
    assert 'Unexpected key(s) in state_dict: "unet.middle_block.2.emb_layers.1.scale"' in str(error.value)
    assert "unet.middle_block.2.emb_layers.1.weight has shape [32, 16], not [32, 128]" in str(error.value)
    assert "to_shifts" not in str(error.value)
    # What a caller has is the caller's.
    assert "unet.middle_block.0.emb_layers.1.weight" in state


@pytest.mark.parametrize("assign", [False, True])
def test_stacked_projections_load(assign: bool) -> None:
    network, other = random_unet(), MultiViewUNet(SMALL)
    given = inputs(SMALL)
    other.load_state_dict({name: x.clone() for name, x in network.state_dict().items()}, assign=assign)
    assert torch.equal(other(**given), network(**given))
    with torch.device("meta"):
        empty = MultiViewUNet(SMALL)
    empty.load_state_dict(network.state_dict(), assign=True)
    assert torch.equal(empty(**given), network(**given))


def test_wrong_projections_are_named() -> None:
    attention = blocks.MultiViewSelfAttention(32, 32)
    before = attention.to_qkv.detach().clone()
    state = {name: torch.zeros_like(x) for name, x in attention.state_dict().items()}
    del state["to_q.weight"]
    state["to_v.weight"] = torch.zeros(32, 16)
    with pytest.raises(RuntimeError) as error:
        attention.load_state_dict(state)
    assert 'Missing key(s) in state_dict: "to_q.weight"' in str(error.value)
    assert "to_v.weight has shape [32, 16], not [32, 32]" in str(error.value)
    assert "to_qkv" not in str(error.value)
    assert torch.equal(attention.to_qkv, before)
    state = attention.state_dict()
    state["to_qkv"] = torch.zeros(96, 32)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"to_qkv"'):
        attention.load_state_dict(state)


@pytest.fixture(scope="module")
def full_size() -> tuple[MultiViewUNet, MultiViewUNet]:
    """``random:full`` in float32 and plain PyTorch, and in float16 as it is loaded."""
    part = random_layout("full", "pixel").parts["unet"]
    fill(part, torch.device("cuda"), torch.float32, "random:full")
    plain: MultiViewUNet = part.wrapper
    half = copy.deepcopy(plain).half()
    fast_memory_format(half)
    use_kernels(plain, "torch")
    return plain, half


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [2, 4])
def test_the_full_size_in_half_precision_stays_near_float32(
    full_size: tuple[MultiViewUNet, MultiViewUNet], groups: int
) -> None:
    """In the shapes of the released schedule: five frames, with and without the prompt, of one group and of two."""
    plain, half = full_size
    given = inputs(plain.config, groups=groups, frames=5, px=32, tokens=77, device="cuda")
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        with Operators() as ran:
            found = half(**given)
        wanted = plain(**given)
    hopper = torch.cuda.get_device_capability()[0] == 9
    assert set(ran.ours) == KERNELS | ({"convolution"} if hopper else set())
    # Two in each residual block on maps of 16 x 16 and less, and three upsamplings; of two groups, the input of 1920
    # channels is too large.
    assert ran.ours["convolution"] == (2 * 17 + 3 - (groups == 4) if hopper else 0)
    assert relative_error(found, wanted) <= 2e-3


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_captured_training_step_learns_the_same(compiled: bool) -> None:
    """bfloat16 autocast, torch.compile and a CUDA graph, as the embedded model is trained."""
    config = UNetConfig(**{**vars(SMALL), "model_channels": 64, "head_dim": 64})
    given = inputs(config, groups=4, frames=5, px=8, tokens=77, device="cuda")
    losses: dict[KernelBackend, list[float]] = {}
    backends: tuple[KernelBackend, ...] = ("torch", "triton")
    for backend in backends:
        network = random_unet(config).cuda().requires_grad_(True)
        use_kernels(network, backend)
        run = torch.compile(network) if compiled and backend == "triton" else network
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-2)
        loss = torch.zeros((), device="cuda")

        def step(run: Any = run, optimizer: torch.optim.Optimizer = optimizer, loss: Tensor = loss) -> None:
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                error = (run(**given) - given["latents"]).float().square().mean()
            optimizer.zero_grad(set_to_none=True)
            error.backward()
            optimizer.step()
            loss.copy_(error.detach())

        graphed, losses[backend] = GraphedStep(step, torch.device("cuda")), []
        for _ in range(8):
            graphed()
            losses[backend].append(loss.item())
    assert losses["triton"][-1] < losses["triton"][0]
    torch.testing.assert_close(losses["triton"], losses["torch"], rtol=2e-2, atol=0.0)
