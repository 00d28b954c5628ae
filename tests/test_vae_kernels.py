"""The VAE on kernels: diffusers' names, diffusers' numbers, and their gradient by the picture."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from operators import Operators
from torch import Tensor

from imagedream_rt.engine.blueprint import fill
from imagedream_rt.engine.layers import Convolution, fast_memory_format, use_kernels
from imagedream_rt.engine.random_model import random_layout
from imagedream_rt.engine.vae import LatentCodec
from imagedream_rt.engine.vae_blocks import AttentionBlock, Downsample, ResidualBlock, mirrored

TINY: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "scaling_factor": 0.5,
}


@pytest.fixture
def theirs() -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL.from_config(TINY).eval().requires_grad_(False)
    for parameter in vae.parameters():  # norms that do something
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return vae


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


def encoded_with_gradient(codec: LatentCodec, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation side by side, and the gradient of a fixed sum of them by the pictures."""
    pictures = pictures.detach().requires_grad_()
    moments = torch.cat(codec.moments(pictures), dim=1)
    cotangent = randn(*moments.shape, seed=2).to(moments)
    (gradient,) = torch.autograd.grad(moments, pictures, cotangent)
    return moments.detach(), gradient


def test_names_parameters_and_numbers_are_those_of_diffusers(theirs: AutoencoderKL) -> None:
    ours = LatentCodec(copy.deepcopy(theirs), 0.5)
    kinds = [type(module) for module in ours.modules()]
    # Two in each block, the shortcuts, the first, the last and the one beside the latents of both halves, and the
    # upsampling's; that of a downsampling adds its bias there.
    counts = {ResidualBlock: 10, AttentionBlock: 2, Downsample: 1, Convolution: 4 + 20 + 2 + 2 + 1}
    assert {kind: kinds.count(kind) for kind in counts} == counts
    expected, found = theirs.state_dict(), ours.vae.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    pictures = randn(2, 3, 8, 8).requires_grad_()
    posterior = theirs.encode(pictures).latent_dist
    wanted = torch.cat((posterior.mean, posterior.std), dim=1)
    (gradient,) = torch.autograd.grad(wanted, pictures, randn(*wanted.shape, seed=2))
    moments, own_gradient = encoded_with_gradient(ours, pictures)
    assert relative_error(moments, wanted.detach()) <= 1e-6
    assert relative_error(own_gradient, gradient) <= 1e-6
    latents = randn(2, 4, 4, 4)
    assert relative_error(ours.decode(latents), theirs.decode(latents / 0.5).sample) <= 1e-6


def test_blocks_of_another_activation_stay_diffusers_own() -> None:
    codec = LatentCodec.from_config({**TINY, "act_fn": "relu"})
    assert not any(isinstance(module, ResidualBlock) for module in codec.modules())
    assert codec.decode(randn(1, 4, 2, 2)).shape == (1, 3, 4, 4)


def test_everything_on_kernels_gives_the_same(theirs: AutoencoderKL, kernel_device: torch.device) -> None:
    plain = LatentCodec(theirs, 0.5).to(kernel_device)
    forced = copy.deepcopy(plain)
    forced.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    use_kernels(plain, "torch")
    use_kernels(forced, "triton")
    pictures, latents = randn(2, 3, 4, 4).to(kernel_device), randn(1, 4, 2, 2).to(kernel_device)
    pictures = pictures.contiguous(memory_format=torch.channels_last)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        with Operators() as ran:
            moments, gradient = encoded_with_gradient(forced, pictures)
        wanted, wanted_gradient = encoded_with_gradient(plain, pictures)
        decoded = forced.decode(latents)
        wanted_decoded = plain.decode(latents)
    # Four blocks of two norms, one before the attention, one at the end; each forward and backward. Biases of the
    # first and the last convolution, of the four blocks, of the downsampling.
    assert ran.ours == {
        "group_norm": 10,
        "group_norm_gradient": 10,
        "bias_residual": 7,
        "wide_attention": 1,
        "wide_attention_gradient": 1,
    }
    assert relative_error(moments, wanted) <= 1e-5
    assert relative_error(gradient, wanted_gradient) <= 1e-5
    assert relative_error(decoded, wanted_decoded) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_in_half_precision_go_through_a_mirrored_copy(
    theirs: AutoencoderKL, kernel_device: torch.device, untuned: None, dtype: torch.dtype
) -> None:
    plain = LatentCodec(theirs, 0.5).to(kernel_device, dtype)
    forced = copy.deepcopy(plain)
    exact = copy.deepcopy(plain).double()
    if dtype == torch.float16:  # with whose first convolution the interpreter gets along
        forced.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    use_kernels(plain, "torch")
    use_kernels(forced, "triton")
    pictures = randn(2, 3, 4, 6).to(kernel_device, dtype)
    for change in (0.0, 0.25):  # and what is derived from weights that are written to is derived again
        for codec in (plain, forced, exact):
            with torch.no_grad():
                codec.vae.encoder.conv_in.weight.add_(change)
        with Operators() as ran:
            results = encoded_with_gradient(forced, pictures)
        # There and back, of pictures and moments, with their gradients.
        assert ran.others["flip"] >= 4
        assert ran.ours["picture_convolution_gradient"] == (dtype == torch.float16)
        assert ran.others["constant_pad_nd"] == 0
        truth = encoded_with_gradient(exact, pictures.double())
        for value, one, other in zip(results, encoded_with_gradient(plain, pictures), truth, strict=True):
            assert relative_error(value, other) <= 1.5 * relative_error(one, other) + torch.finfo(dtype).eps
    with torch.no_grad(), Operators() as ran:
        forced.moments(pictures)
    assert ran.others["flip"] == 0  # replays of graphs may not see that weights were written to


def test_mirrored_encoders_share_what_they_can(theirs: AutoencoderKL) -> None:
    encoder = LatentCodec(theirs, 0.5).vae.encoder
    twin = mirrored(encoder, *encoder.parameters())
    pictures = randn(1, 3, 8, 4)
    with torch.no_grad():
        assert relative_error(twin(pictures.flip(2, 3)).flip(2, 3), encoder(pictures)) <= 1e-6
    assert not any(isinstance(module, Downsample) for module in twin.modules())
    own = {id(parameter) for parameter in encoder.parameters()}
    assert all((id(parameter) in own) == (parameter.shape[2:] != (3, 3)) for parameter in twin.parameters())


def test_training_reaches_every_parameter(theirs: AutoencoderKL, kernel_device: torch.device) -> None:
    plain = LatentCodec(theirs, 0.5).to(kernel_device).requires_grad_(True)
    forced = copy.deepcopy(plain)
    use_kernels(plain, "torch")
    use_kernels(forced, "triton")
    latents = randn(1, 4, 2, 2).to(kernel_device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for codec in (plain, forced):
            codec.decode(latents).square().sum().backward()
    wanted = dict(plain.vae.decoder.named_parameters())
    for name, parameter in forced.vae.decoder.named_parameters():
        truth = wanted[name].grad
        assert parameter.grad is not None, name
        assert truth is not None, name
        # The softmax does not see the bias of the keys: its gradient is rounding.
        floor = 1e-6 if name.endswith("to_k.bias") else 0.0
        assert (parameter.grad - truth).norm() <= 1e-4 * truth.norm() + floor, name


def test_channels_last_maps_flow_without_copies(theirs: AutoencoderKL, kernel_device: torch.device) -> None:
    codec = LatentCodec(theirs, 0.5).to(kernel_device)
    codec.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    use_kernels(codec, "triton")
    pictures = randn(1, 3, 4, 4).to(kernel_device).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), Operators() as ran:
        codec.moments(pictures)
    assert ran.rearranging() == {}


def full_codec(dtype: torch.dtype) -> LatentCodec:
    part = random_layout("full", "pixel").parts["vae"]
    fill(part, torch.device("cuda"), dtype, "random:full")
    return part.wrapper


@pytest.mark.gpu
@pytest.mark.usefixtures("untuned")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_full_size_in_half_precision_is_as_good_as_without_kernels(dtype: torch.dtype) -> None:
    """Encoding four pictures, its gradient, and decoding: against float32, and against plain PyTorch's own error."""
    pictures, latents = randn(4, 3, 256, 256).clamp(-1, 1).cuda(), randn(4, 4, 32, 32).cuda()

    def results(codec: LatentCodec, backend: Any) -> tuple[Tensor, ...]:
        use_kernels(codec, backend)
        with torch.no_grad():
            decoded = codec.decode(latents)
        return *encoded_with_gradient(codec, pictures), decoded

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        wanted = results(full_codec(torch.float32), "torch")
        half = full_codec(dtype)
        fast_memory_format(half)
        plain, found = results(half, "torch"), results(half, "triton")
    for number, truth in enumerate(wanted):
        bound = 1.5 * relative_error(plain[number], truth) + torch.finfo(dtype).eps
        assert relative_error(found[number], truth) <= bound
