"""The latent codec against the released VAE's numbers, its naming and its input, and by hand."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from imagedream_rt.engine.errors import InputError
from imagedream_rt.engine.vae import LatentCodec
from imagedream_rt.engine.vae_layout import vae_config, vae_from_official

FIXTURES = Path(__file__).parent / "fixtures"
BOUND = 1e-5
"""Greatest relative L2 error against the released code in float32."""


def error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.double()).norm() / want.double().norm())


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(FIXTURES / "vae_tiny.safetensors")


@pytest.fixture(scope="module")
def official(recorded: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[2:]: tensor for name, tensor in recorded.items() if name.startswith("w.")}


@pytest.fixture(scope="module")
def codec(official: dict[str, Tensor]) -> LatentCodec:
    state = vae_from_official(official)
    codec = LatentCodec.from_config(vae_config(state))
    codec.vae.load_state_dict(state)
    return codec


@pytest.fixture(scope="module")
def small() -> LatentCodec:
    """Three levels, so 4x; random weights."""
    torch.manual_seed(0)
    return LatentCodec.from_config(
        {
            "block_out_channels": [8, 16, 16],
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
            "norm_num_groups": 4,
            "scaling_factor": 0.5,
        }
    )


def test_moments_equal_the_released_encoder(codec: LatentCodec, recorded: dict[str, Tensor]) -> None:
    mean, std = codec.moments(2 * recorded["in.image01"] - 1)
    assert error(mean, recorded["out.mean"]) <= BOUND
    assert error(std, (0.5 * recorded["out.logvar_clamped"]).exp()) <= BOUND


def test_latents_and_their_gradient_equal_the_released_code(
    codec: LatentCodec, recorded: dict[str, Tensor]
) -> None:
    image = recorded["in.image01"].clone().requires_grad_()
    latents = codec.encode(2 * image - 1, recorded["in.noise"])
    (gradient,) = torch.autograd.grad(latents, image, recorded["in.grad_out"])
    assert error(latents, recorded["out.latents_scaled"]) <= BOUND
    assert error(gradient, recorded["out.grad_image01"]) <= BOUND


def test_decoded_pictures_equal_the_released_decoder(codec: LatentCodec, recorded: dict[str, Tensor]) -> None:
    assert error(codec.decode(recorded["in.z_scaled"]), recorded["out.decoded"]) <= BOUND


def test_renaming_is_pure_and_counts_decoder_levels_from_the_other_end(official: dict[str, Tensor]) -> None:
    before = {name: (id(tensor), tensor.shape) for name, tensor in official.items()}
    renamed = vae_from_official(official)
    assert {name: (id(tensor), tensor.shape) for name, tensor in official.items()} == before
    assert len(renamed) == len(official)
    same = {
        "decoder.up_blocks.0.resnets.1.conv1.weight": "decoder.up.3.block.1.conv1.weight",
        "decoder.up_blocks.3.resnets.0.conv_shortcut.bias": "decoder.up.0.block.0.nin_shortcut.bias",
        "decoder.up_blocks.2.upsamplers.0.conv.weight": "decoder.up.1.upsample.conv.weight",
        "encoder.down_blocks.1.downsamplers.0.conv.bias": "encoder.down.1.downsample.conv.bias",
        "encoder.mid_block.resnets.1.norm2.weight": "encoder.mid.block_2.norm2.weight",
        "encoder.conv_norm_out.weight": "encoder.norm_out.weight",
    }
    for new, old in same.items():
        assert renamed[new] is official[old], new
    query = renamed["decoder.mid_block.attentions.0.to_q.weight"]
    assert torch.equal(query, official["decoder.mid.attn_1.q.weight"][:, :, 0, 0])


def test_a_name_that_is_not_the_vaes_is_left_for_the_strict_load(official: dict[str, Tensor]) -> None:
    stray = torch.zeros(1)
    assert (
        vae_from_official({**official, "loss.discriminator.0.weight": stray})["loss.discriminator.0.weight"]
        is stray
    )


@pytest.mark.parametrize(
    ("widths", "layers", "channels"),
    [([128, 256, 512, 512], 2, 4), ([16, 48, 96], 1, 4), ([32], 3, 8)],
    ids=["released", "three levels", "one level, eight latent channels"],
)
def test_configuration_is_read_off_the_shapes(widths: list[int], layers: int, channels: int) -> None:
    config = {
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": layers,
        "latent_channels": channels,
        "norm_num_groups": 16,
    }
    with torch.device("meta"):
        codec = LatentCodec.from_config(config)
    inferred = vae_config(codec.vae.state_dict(), norm_groups=16)
    assert {name: inferred[name] for name in config} == config
    assert (inferred["in_channels"], inferred["out_channels"], inferred["scaling_factor"]) == (3, 3, 0.18215)
    assert codec.downscale == 2 ** (len(widths) - 1)


def test_a_missing_tensor_is_named(official: dict[str, Tensor]) -> None:
    state = vae_from_official(official)
    del state["decoder.conv_in.weight"]
    with pytest.raises(InputError, match=r"decoder\.conv_in\.weight"):
        vae_config(state)
    with pytest.raises(InputError, match=r"encoder\.down_blocks"):
        vae_config({})


def test_log_variance_is_clamped_to_minus_30_and_20(small: LatentCodec) -> None:
    convolution = small.vae.quant_conv
    saved = {name: tensor.clone() for name, tensor in convolution.state_dict().items()}
    try:
        torch.nn.init.zeros_(convolution.weight)
        with torch.no_grad():
            convolution.bias.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0, -99.0, 99.0, 0.0, 2.0]))
        mean, std = small.moments(torch.zeros(1, 3, 8, 8))
    finally:
        convolution.load_state_dict(saved)
    assert mean[0, :, 0, 0].tolist() == [1, 2, 3, 4]
    want = torch.tensor([math.exp(-15), math.exp(10), 1.0, math.e])
    torch.testing.assert_close(std[0, :, 1, 1], want)


def test_sample_scales_mean_and_noise(small: LatentCodec) -> None:
    latents = small.sample(torch.tensor([2.0]), torch.tensor([3.0]), torch.tensor([-1.0]))
    assert latents.tolist() == [-0.5]


def test_inputs_are_cast_to_the_networks_dtype() -> None:
    codec = LatentCodec.from_config({"block_out_channels": [32]}).to(torch.bfloat16)
    mean, _ = codec.moments(torch.zeros(1, 3, 4, 4))
    assert mean.dtype == torch.bfloat16
    assert codec.decode(torch.zeros(1, 4, 4, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(1, 3, 8, 10), (1, 3, 9, 8), (3, 8, 8), (1, 4, 8, 8)])
def test_moments_reject_other_shapes(small: LatentCodec, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="multiples of 4"):
        small.moments(torch.zeros(shape))


def test_preprocessing_equals_the_released_code() -> None:
    recorded = load_file(FIXTURES / "encoder_inputs.safetensors")
    pixels = LatentCodec.preprocess(recorded["composite_u8"].permute(2, 0, 1)[None], 256)
    assert pixels.dtype == torch.float32
    assert float((pixels[0] - recorded["vae_input"]).abs().max()) <= 1e-6


def test_preprocessing_maps_black_and_white_to_the_ends() -> None:
    pictures = torch.zeros(2, 3, 6, 4, dtype=torch.uint8)
    pictures[1, 2] = 255
    pixels = LatentCodec.preprocess(pictures, 8)
    assert pixels.shape == (2, 3, 8, 8)
    assert pixels[0].eq(-1).all()
    assert pixels[1, 2].eq(1).all()


@pytest.mark.parametrize(
    "picture",
    [
        torch.zeros(1, 4, 4, 4, dtype=torch.uint8),
        torch.zeros(1, 3, 4, 4),
        torch.zeros(3, 4, 4, dtype=torch.uint8),
        torch.zeros(1, 3, 0, 4, dtype=torch.uint8),
    ],
    ids=["RGBA", "float", "grey", "empty"],
)
def test_preprocessing_rejects_other_pictures(picture: Tensor) -> None:
    with pytest.raises(InputError, match=r"uint8 \[N, 3, H, W\]"):
        LatentCodec.preprocess(picture, 8)
