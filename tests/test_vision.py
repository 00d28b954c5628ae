"""The image encoder against the released code's numbers, its naming and its input, and by hand."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from imagedream_rt.engine.clip_layout import clip_names_for, clip_vision_config, clip_vision_from_official
from imagedream_rt.engine.errors import InputError
from imagedream_rt.engine.vision import VisionEncoder

FIXTURES = Path(__file__).parent / "fixtures"
BOUND = 1e-5
"""Greatest relative L2 error against the released code in float32."""

NARROW = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.double()).norm() / want.double().norm())


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(FIXTURES / "clip_tiny.safetensors")


@pytest.fixture(scope="module")
def official(recorded: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[2:]: tensor for name, tensor in recorded.items() if name.startswith("w.")}


@pytest.fixture(scope="module")
def encoder(official: dict[str, Tensor]) -> VisionEncoder:
    return load(official, projection=True)


def load(official: dict[str, Tensor], projection: bool) -> VisionEncoder:
    state = clip_vision_from_official(official)
    if not projection:
        del state["visual_projection.weight"]
    encoder = VisionEncoder.from_config(clip_vision_config(state), projection=projection)
    encoder.model.load_state_dict(clip_names_for(encoder.model, state))
    return encoder.eval()


def test_hidden_states_equal_the_released_code(encoder: VisionEncoder, recorded: dict[str, Tensor]) -> None:
    assert error(encoder.hidden(recorded["in.image"]), recorded["out.local_hidden"]) <= BOUND


def test_pooled_feature_equals_the_released_code(encoder: VisionEncoder, recorded: dict[str, Tensor]) -> None:
    pooled = encoder.pooled(recorded["in.image"])
    assert error(pooled, recorded["out.global_image_feature_normalised"]) <= BOUND
    torch.testing.assert_close(pooled.norm(dim=-1), torch.ones(2))


def test_hidden_never_runs_the_last_block(official: dict[str, Tensor], recorded: dict[str, Tensor]) -> None:
    poisoned = {
        name: torch.full_like(tensor, torch.nan) if "resblocks.3." in name or "ln_post" in name else tensor
        for name, tensor in official.items()
    }
    encoder = load(poisoned, projection=True)
    assert error(encoder.hidden(recorded["in.image"]), recorded["out.local_hidden"]) <= BOUND
    assert encoder.pooled(recorded["in.image"]).isnan().all()


def test_without_a_projection_hidden_works_and_pooled_says_why_not(
    official: dict[str, Tensor], recorded: dict[str, Tensor]
) -> None:
    encoder = load(official, projection=False)
    assert error(encoder.hidden(recorded["in.image"]), recorded["out.local_hidden"]) <= BOUND
    with pytest.raises(InputError, match="visual projection"):
        encoder.pooled(recorded["in.image"])


def test_configuration_is_read_off_the_shapes(official: dict[str, Tensor]) -> None:
    config = clip_vision_config(clip_vision_from_official(official))
    assert config == {
        "image_size": 56,
        "patch_size": 14,
        "projection_dim": 96,
        "hidden_size": 160,
        "intermediate_size": 640,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    }


def test_sizes_that_do_not_fit_are_named(official: dict[str, Tensor]) -> None:
    state = clip_vision_from_official(official)
    with pytest.raises(InputError, match="head width 64"):
        clip_vision_config(state, head_dim=64)
    positions = "vision_model.embeddings.position_embedding.weight"
    with pytest.raises(InputError, match="16 positions"):
        clip_vision_config({**state, positions: torch.zeros(16, 160)})
    del state[positions]
    with pytest.raises(InputError, match="position_embedding"):
        clip_vision_config(state)


def test_renaming_is_pure_and_splits_query_key_value(official: dict[str, Tensor]) -> None:
    before = {name: (id(tensor), tensor.shape) for name, tensor in official.items()}
    renamed = clip_vision_from_official(official)
    assert {name: (id(tensor), tensor.shape) for name, tensor in official.items()} == before
    packed = official["visual.transformer.resblocks.2.attn.in_proj_weight"]
    for part, letter in enumerate("qkv"):
        weight = renamed[f"vision_model.encoder.layers.2.self_attn.{letter}_proj.weight"]
        assert torch.equal(weight, packed[part * 160 : part * 160 + 160]), letter
    assert torch.equal(renamed["visual_projection.weight"], official["visual.proj"].T)
    assert renamed["vision_model.pre_layrnorm.bias"] is official["visual.ln_pre.bias"]
    assert not any("text" in name or "logit" in name for name in renamed)


@pytest.mark.parametrize("projection", [True, False])
@pytest.mark.parametrize(
    "saved_as",
    [lambda name: name, lambda name: name.removeprefix("vision_model.")],
    ids=["transformers 4", "transformers 5"],
)
def test_names_of_either_transformers_generation_load(
    official: dict[str, Tensor], projection: bool, saved_as: Callable[[str], str]
) -> None:
    state = {saved_as(name): tensor for name, tensor in clip_vision_from_official(official).items()}
    if not projection:
        del state["visual_projection.weight"]
    state[saved_as("vision_model.embeddings.position_ids")] = torch.arange(17)[None]
    model = VisionEncoder.from_config(clip_vision_config(state), projection=projection).model
    assert clip_names_for(model, state).keys() == model.state_dict().keys()


def test_a_saved_dtype_does_not_split_the_model() -> None:
    for key in ("torch_dtype", "dtype"):
        encoder = VisionEncoder.from_config({**NARROW, key: "float16"}, projection=True)
        assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


def test_inputs_are_cast_to_the_networks_dtype() -> None:
    encoder = VisionEncoder.from_config({**NARROW, "image_size": 28, "patch_size": 14}, projection=True)
    encoder.to(torch.bfloat16)
    assert encoder.image_px == 28
    assert encoder.hidden(torch.zeros(1, 3, 28, 28)).dtype == torch.bfloat16
    assert encoder.pooled(torch.zeros(1, 3, 28, 28)).dtype == torch.bfloat16


def test_preprocessing_equals_the_released_code() -> None:
    fixture = load_file(FIXTURES / "encoder_inputs.safetensors")
    encoder = VisionEncoder.from_config({**NARROW, "image_size": 224, "patch_size": 56}, projection=False)
    pixels = encoder.preprocess(fixture["composite_u8"].permute(2, 0, 1)[None])
    assert pixels.dtype == torch.float32
    assert float((pixels[0] - fixture["clip_input"]).abs().max()) <= 1e-6


@pytest.mark.parametrize(
    ("height", "width", "top", "left"),
    [(56, 56, 0, 0), (61, 56, 2, 0), (63, 56, 4, 0), (56, 59, 0, 2)],
    ids=["as it is", "2.5 rounds to even", "3.5 rounds to even", "1.5 rounds to even"],
)
def test_a_picture_of_the_right_short_side_is_only_cut(
    encoder: VisionEncoder, height: int, width: int, top: int, left: int
) -> None:
    pictures = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    got = encoder.preprocess(pictures) * STD + MEAN
    want = pictures[..., top : top + 56, left : left + 56] / 255
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def test_the_long_side_is_truncated_before_the_cut(encoder: VisionEncoder) -> None:
    """100 x 31 pixels to a short side of 56: the long one becomes int(180.6) = 180, cut from row 62."""
    ramp = torch.linspace(0, 255, 100).byte()[:, None].expand(1, 3, 100, 31)
    level = (encoder.preprocess(ramp) * STD + MEAN)[0, 0, :, 28] * 255
    rows = (torch.arange(62, 118) + 0.5) * 100 / 180 - 0.5
    torch.testing.assert_close(level, rows * 255 / 99, atol=1.5, rtol=0)


def test_preprocessing_rejects_other_pictures(encoder: VisionEncoder) -> None:
    with pytest.raises(InputError, match=r"uint8 \[N, 3, H, W\]"):
        encoder.preprocess(torch.zeros(1, 4, 8, 8, dtype=torch.uint8))
