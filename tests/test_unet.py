"""The multi-view UNet: parity with the released code, names, inference of sizes, inputs, dtypes, training."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from imagedream_rt.engine.errors import InputError, MissingDependency
from imagedream_rt.engine.unet import MultiViewUNet, UNetConfig, infer_unet_config, timestep_embedding

FIXTURES = Path(__file__).parent / "fixtures"
# Relative L2. Summation order moves it to about 1e-6; a GroupNorm epsilon of 1e-5 for 1e-6 moves it to 7e-6.
PARITY = 3e-6
MICRO = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    transformer_levels=(0, 1),
    context_dim=32,
    head_dim=32,
    resampler_width=32,
)


class Recorded(NamedTuple):
    """Weights, inputs and output of one run of the released code (float32, CPU)."""

    unet: MultiViewUNet
    inputs: dict[str, Tensor]
    output: Tensor


def load_recorded(name: str, frames: int) -> Recorded:
    """The released code takes flat batches, [B*F, ...]; here they are grouped, [B, F, ...]."""
    tensors = load_file(FIXTURES / f"{name}.safetensors")
    weights = {key[2:]: x.float() for key, x in tensors.items() if key.startswith("w.")}
    unet = MultiViewUNet(infer_unet_config(weights, head_dim=32))
    unet.load_state_dict(weights)
    timesteps = tensors["in.timesteps"].unflatten(0, (-1, frames))
    assert (timesteps == timesteps[:, :1]).all()
    inputs = {
        "latents": tensors["in.x"].unflatten(0, (-1, frames)),
        "timesteps": timesteps[:, 0],
        "context": tensors["in.context_group"],
        "camera": tensors["in.camera"].unflatten(0, (-1, frames)),
    }
    if "in.ip_group" in tensors:
        inputs |= {"image_hidden": tensors["in.ip_group"].float(), "image_latent": tensors["in.ip_img"]}
    return Recorded(unet.eval().requires_grad_(False), inputs, tensors["out.y"].unflatten(0, (-1, frames)))


@pytest.fixture(scope="module")
def pixel() -> Recorded:
    return load_recorded("unet_micro_pixel", frames=5)


@pytest.fixture(scope="module")
def text() -> Recorded:
    return load_recorded("unet_micro_text", frames=4)


def relative_error(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


def random_unet(config: UNetConfig, seed: int = 0) -> MultiViewUNet:
    torch.manual_seed(seed)
    return MultiViewUNet(config).eval().requires_grad_(False)


def random_inputs(config: UNetConfig, groups: int = 2, frames: int = 4, px: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    inputs = {
        "latents": randn(groups, frames, config.in_channels, px, px),
        "timesteps": torch.randint(0, 1000, (groups,), generator=generator),
        "context": randn(groups, 77, config.context_dim),
        "camera": randn(groups, frames, config.camera_dim),
    }
    if config.image_adaptor == "global":
        inputs["image_hidden"] = randn(groups, config.image_dim)
    elif config.with_image:
        inputs["image_hidden"] = randn(groups, 257, config.image_dim)
    return inputs


def test_parity_with_the_released_pixel_model(pixel: Recorded) -> None:
    assert pixel.unet.config == MICRO
    assert relative_error(pixel.unet(**pixel.inputs), pixel.output) <= PARITY


def test_parity_with_the_released_text_model(text: Recorded) -> None:
    assert text.unet.config.image_adaptor == "none"
    assert relative_error(text.unet(**text.inputs), text.output) <= PARITY


def test_parity_with_tokens_made_beforehand(pixel: Recorded) -> None:
    inputs = dict(pixel.inputs)
    tokens = pixel.unet.embed_image(inputs.pop("image_hidden"))
    assert relative_error(pixel.unet(**inputs, image_tokens=tokens), pixel.output) <= PARITY


def test_full_size_names_and_shapes_are_the_released_ones() -> None:
    with torch.device("meta"):
        tensors = MultiViewUNet(UNetConfig()).state_dict()
    layout = json.loads((FIXTURES / "unet_layout.json").read_text())
    assert {name: list(x.shape) for name, x in tensors.items()} == layout
    assert sum(x.numel() for x in tensors.values()) == 941_672_900


@pytest.mark.parametrize("config", [UNetConfig(), UNetConfig(image_adaptor="none")], ids=["pixel", "text"])
def test_full_size_runs_without_looking_at_values(config: UNetConfig) -> None:
    """Tensors on the meta device have no values, so a branch on data or a read-back would fail here."""
    with torch.device("meta"):
        unet = MultiViewUNet(config)
    inputs = {name: x.to("meta") for name, x in random_inputs(config, frames=5, px=32).items()}
    image_latent = torch.empty(2, 4, 32, 32, device="meta")
    assert unet(**inputs, image_latent=image_latent).shape == (2, 5, 4, 32, 32)


def test_image_latent_replaces_the_last_frame_of_a_copy(pixel: Recorded) -> None:
    inputs = dict(pixel.inputs)
    before = inputs["latents"].clone()
    base = pixel.unet(**inputs)
    assert torch.equal(inputs["latents"], before)

    inputs["latents"] = torch.cat((before[:, :-1], torch.full_like(before[:, -1:], 9.0)), dim=1)
    assert torch.equal(pixel.unet(**inputs), base)

    image_latent = inputs.pop("image_latent")
    inputs["latents"] = torch.cat((before[:, :-1], image_latent[:, None]), dim=1)
    assert torch.equal(pixel.unet(**inputs), base)


def test_without_picture_text_is_never_read_as_image_tokens(pixel: Recorded) -> None:
    inputs = dict(pixel.inputs)
    del inputs["image_hidden"], inputs["image_latent"]
    base = pixel.unet(**inputs)
    text_only = MultiViewUNet(replace(pixel.unet.config, image_adaptor="none"))
    text_only.load_state_dict(
        {
            name: x
            for name, x in pixel.unet.state_dict().items()
            if "_ip." not in name and "image_embed" not in name
        }
    )
    assert torch.equal(text_only(**inputs), base)


def test_image_scale_weighs_the_image_branch(pixel: Recorded) -> None:
    inputs = dict(pixel.inputs)
    text_only = pixel.unet(**{name: x for name, x in inputs.items() if name != "image_hidden"})
    unet = MultiViewUNet(pixel.unet.config)
    unet.load_state_dict(pixel.unet.state_dict())
    unet.requires_grad_(False).image_scale = 0.0
    assert torch.equal(unet(**inputs), text_only)

    # Half the branch is the branch with half its values.
    unet.image_scale = 0.5
    half = unet(**inputs)
    for name, parameter in unet.named_parameters():
        if name.endswith("to_v_ip.weight"):
            parameter.mul_(0.5)
    unet.image_scale = 1.0
    torch.testing.assert_close(half, unet(**inputs), rtol=1e-4, atol=1e-5)
    assert relative_error(half, text_only) > 1e-3


def test_no_camera_leaves_the_camera_term_out(pixel: Recorded) -> None:
    inputs = dict(pixel.inputs)
    zero_camera = pixel.unet(**{**inputs, "camera": torch.zeros_like(inputs["camera"])})
    del inputs["camera"]
    without = pixel.unet(**inputs)
    assert relative_error(zero_camera, without) > 1e-3

    unet = MultiViewUNet(pixel.unet.config)
    unet.load_state_dict(pixel.unet.state_dict())
    unet.requires_grad_(False)
    for parameter in unet.camera_embed[2].parameters():
        parameter.zero_()
    torch.testing.assert_close(unet(**pixel.inputs), without)


def test_groups_do_not_see_each_other(pixel: Recorded) -> None:
    together = pixel.unet(**pixel.inputs)
    for group in range(2):
        row = slice(group, group + 1)
        alone = pixel.unet(**{name: x[row] for name, x in pixel.inputs.items()})
        assert relative_error(alone, together[row]) <= 1e-5


def test_views_of_a_group_see_each_other(text: Recorded) -> None:
    changed = dict(text.inputs)
    changed["latents"] = changed["latents"].clone()
    changed["latents"][0, 2] += 1.0
    difference = (text.unet(**changed) - text.unet(**text.inputs)).abs().amax(dim=(2, 3, 4))
    assert (difference[0] > 1e-4).all()
    assert difference[1].max() <= 1e-5


def test_prompt_rows_for_each_frame(pixel: Recorded) -> None:
    inputs = dict(pixel.inputs)
    tokens = pixel.unet.embed_image(inputs.pop("image_hidden"))
    repeated = pixel.unet(
        **{**inputs, "context": inputs["context"][:, None].expand(-1, 5, -1, -1)},
        image_tokens=tokens[:, None].expand(-1, 5, -1, -1),
    )
    assert relative_error(repeated, pixel.output) <= PARITY
    own = inputs["context"][:, None].repeat(1, 5, 1, 1)
    own[0, 3] = own[1, 0]
    assert relative_error(pixel.unet(**{**inputs, "context": own}, image_tokens=tokens), pixel.output) > 1e-4


def test_timestep_embedding_by_hand() -> None:
    embedding = timestep_embedding(torch.tensor([0, 3]), 4)
    angles = torch.tensor([3.0, 3.0 * 10000**-0.5])
    expected = torch.cat((angles.cos(), angles.sin()))
    torch.testing.assert_close(embedding[0], torch.tensor([1.0, 1.0, 0.0, 0.0]))
    torch.testing.assert_close(embedding[1], expected)


SIZES = {
    "micro": MICRO,
    "text": replace(MICRO, image_adaptor="none"),
    "linear": replace(MICRO, image_adaptor="linear", image_dim=48),
    "global": replace(MICRO, image_adaptor="global", image_dim=40, image_tokens=4),
    "resampler": replace(
        MICRO, image_dim=48, image_tokens=7, resampler_width=64, resampler_depth=1, resampler_heads=2
    ),
    "three-levels": UNetConfig(
        model_channels=64,
        channel_mult=(1, 2, 3),
        num_res_blocks=2,
        transformer_levels=(1,),
        context_dim=40,
        head_dim=32,
        camera_dim=12,
        image_adaptor="none",
    ),
    "nine-channels": replace(
        MICRO, in_channels=9, out_channels=3, transformer_levels=(), image_adaptor="none"
    ),
}


@pytest.mark.parametrize("config", SIZES.values(), ids=SIZES)
def test_sizes_are_inferred_from_tensors_and_run(config: UNetConfig) -> None:
    unet = random_unet(config)
    inferred = infer_unet_config(unet.state_dict(), head_dim=config.head_dim)
    again = MultiViewUNet(inferred)
    again.load_state_dict(unet.state_dict())
    inputs = random_inputs(config, frames=3, px=12)
    out = unet(**inputs)
    assert out.shape == (2, 3, config.out_channels, 12, 12)
    assert torch.equal(again.requires_grad_(False)(**inputs), out)
    if config.with_image:
        del inputs["image_hidden"]
        assert relative_error(unet(**inputs), out) > 1e-5  # the picture matters


@pytest.mark.parametrize("config", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("known", [False, True], ids=["prompt", "keys and values"])
def test_kept_frames_are_those_of_the_whole(config: UNetConfig, known: bool) -> None:
    unet = random_unet(config)
    inputs = random_inputs(config, frames=5)
    inputs["image_latent"] = inputs["latents"][:, 1] + 1.0
    if known:
        tokens = unet.embed_image(inputs.pop("image_hidden")) if config.with_image else None
        inputs["key_values"] = unet.prompt_key_values(inputs["context"], tokens)  # type: ignore[assignment]
        inputs["context"] = None  # type: ignore[assignment]
    whole = unet(**inputs)
    seen: list[int] = []
    unet.out.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    for keep in (1, 4, 5):
        assert relative_error(unet(**inputs, keep=keep), whole[:, :keep]) <= 1e-6
    # Without a self-attention in the last block the others are dropped behind it.
    assert seen == ([2, 8, 10] if 0 in config.transformer_levels else [10, 10, 10])


def test_kept_frames_with_prompts_of_their_own(pixel: Recorded) -> None:
    inputs = dict(pixel.inputs)
    inputs["context"] = inputs["context"][:, None].repeat(1, 5, 1, 1) * torch.linspace(1, 2, 5)[:, None, None]
    whole = pixel.unet(**inputs)
    assert relative_error(pixel.unet(**inputs, keep=4), whole[:, :4]) <= 1e-6


def test_kept_frames_train_the_same(pixel: Recorded) -> None:
    unet = MultiViewUNet(pixel.unet.config)
    unet.load_state_dict(pixel.unet.state_dict())
    gradients = []
    for cut in (lambda: unet(**pixel.inputs)[:, :4], lambda: unet(**pixel.inputs, keep=4)):
        unet.zero_grad()
        cut().square().mean().backward()
        gradients.append({name: p.grad for name, p in unet.named_parameters()})
    wanted, found = gradients
    # Beside the largest, since a bias in front of a norm over its channel alone has none but rounding.
    largest = max(x.abs().max() for x in wanted.values() if x is not None)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-6 * largest.item(), msg=name)


@pytest.mark.parametrize("keep", [0, 6, -1])
def test_keeping_frames_that_are_not_there_is_refused(pixel: Recorded, keep: int) -> None:
    with pytest.raises(InputError, match=rf"keep is {keep}; .* 1\.\.5"):
        pixel.unet(**pixel.inputs, keep=keep)


def test_global_takes_a_pooled_feature_with_or_without_token_axis() -> None:
    config = SIZES["global"]
    unet = random_unet(config)
    pooled = random_inputs(config)["image_hidden"]
    tokens = unet.embed_image(pooled)
    assert tokens.shape == (2, 4, 32)
    assert torch.equal(unet.embed_image(pooled[:, None]), tokens)


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "prefix": ({"rename": "model.diffusion_model."}, "input_blocks.0.0.weight is missing"),
    "no camera": ({"drop": "camera_embed."}, "camera_embed.0.weight is missing"),
    "no adaptor": ({"drop": "image_embed."}, "no image_embed tensors"),
    "no branch": ({"drop": "_ip."}, "no to_k_ip tensors"),
    "no head": ({"drop": "out.2."}, "out.2.weight is missing"),
    "rank": ({"flatten": "out.2.weight"}, r"out.2.weight has shape \[1152\]"),
    "no blocks": ({"drop": "input_blocks.1."}, "residual blocks"),
    "uneven levels": ({"drop": "input_blocks.5."}, "residual blocks"),
}


@pytest.mark.parametrize(("how", "message"), BROKEN.values(), ids=BROKEN)
def test_tensors_of_something_else_are_refused(how: dict[str, str], message: str) -> None:
    config = replace(SIZES["resampler"], num_res_blocks=2) if "input_blocks.5." in how.values() else MICRO
    tensors = MultiViewUNet(config).state_dict()
    if "rename" in how:
        tensors = {how["rename"] + name: x for name, x in tensors.items()}
    if "drop" in how:
        tensors = {name: x for name, x in tensors.items() if how["drop"] not in name}
    if "flatten" in how:
        tensors = {**tensors, how["flatten"]: tensors[how["flatten"]].flatten()}
    with pytest.raises(InputError, match=message):
        infer_unet_config(tensors, head_dim=32)


def test_a_head_width_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="head_dim is 64"):
        infer_unet_config(MultiViewUNet(MICRO).state_dict(), head_dim=64)


@pytest.mark.parametrize(
    "settings",
    [
        {"model_channels": 48},
        {"num_res_blocks": 0},
        {"channel_mult": ()},
        {"channel_mult": (1, 0)},
        {"transformer_levels": (2,)},
        {"head_dim": 48},
        {"image_tokens": 0},
    ],
    ids=str,
)
def test_impossible_sizes_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        replace(MICRO, **settings)


BAD_INPUTS: dict[str, dict[str, Tensor]] = {
    "latents": {"latents": torch.zeros(10, 4, 8, 8)},
    "latents odd": {"latents": torch.zeros(2, 5, 4, 8, 9)},
    "latents channels": {"latents": torch.zeros(2, 5, 3, 8, 8)},
    "latents empty": {"latents": torch.zeros(2, 0, 4, 8, 8)},
    "timesteps": {"timesteps": torch.zeros(10, dtype=torch.long)},
    "context width": {"context": torch.zeros(2, 77, 64)},
    "context rows": {"context": torch.zeros(10, 77, 32)},
    "context frames": {"context": torch.zeros(2, 4, 77, 32)},
    "context empty": {"context": torch.zeros(2, 0, 32)},
    "camera": {"camera": torch.zeros(2, 5, 4, 4)},
    "image_latent": {"image_latent": torch.zeros(2, 1, 4, 8, 8)},
    "image_hidden width": {"image_hidden": torch.zeros(2, 257, 1024)},
    "image_hidden rank": {"image_hidden": torch.zeros(257, 1280)},
    "image_tokens rows": {"image_tokens": torch.zeros(3, 16, 32)},
}


@pytest.mark.parametrize(("name", "wrong"), BAD_INPUTS.items(), ids=BAD_INPUTS)
def test_wrong_shapes_are_one_clear_error(pixel: Recorded, name: str, wrong: dict[str, Tensor]) -> None:
    inputs = {**pixel.inputs, **wrong}
    if "image_tokens" in wrong:
        del inputs["image_hidden"]
    with pytest.raises(InputError, match=name.split()[0]) as error:
        pixel.unet(**inputs)
    assert str(list(next(iter(wrong.values())).shape)) in str(error.value)


def test_features_and_tokens_together_are_refused(pixel: Recorded) -> None:
    with pytest.raises(InputError, match="not both"):
        pixel.unet(**pixel.inputs, image_tokens=torch.zeros(2, 16, 32))


def test_a_picture_for_a_text_model_is_refused(text: Recorded) -> None:
    with pytest.raises(InputError, match="image_hidden"):
        text.unet(**text.inputs, image_hidden=torch.zeros(2, 257, 1280))
    with pytest.raises(InputError, match="image_tokens"):
        text.unet(**text.inputs, image_tokens=torch.zeros(2, 16, 32))


def test_attention_backend_is_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = random_unet(SIZES["text"])
    with pytest.raises(InputError, match="'flash'"):
        unet.use_attention_backend("flash")  # type: ignore[arg-type]
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(InputError, match="'triton' cannot run here: no CUDA device"):
        unet.use_attention_backend("triton")
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(MissingDependency, match="xformers"):
        unet.use_attention_backend("xformers")
    inputs = random_inputs(unet.config)
    base = unet(**inputs)  # a refused choice changes nothing
    unet.use_attention_backend("torch")
    assert torch.equal(unet(**inputs), base)

    monkeypatch.setattr("imagedream_rt.engine.unet.check_attention_backend", lambda backend: None)
    unet.use_attention_backend("xformers")
    with pytest.raises(ImportError, match="xformers"):  # the choice has reached the attentions
        unet(**inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_near_float32(pixel: Recorded, dtype: torch.dtype) -> None:
    unet = MultiViewUNet(pixel.unet.config)
    unet.load_state_dict(pixel.unet.state_dict())
    unet.requires_grad_(False).to(dtype)
    out = unet(**pixel.inputs)  # float32 inputs are cast
    assert out.dtype == torch.float32
    assert relative_error(out, pixel.output) <= 5 * torch.finfo(dtype).eps
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in pixel.inputs.items()}
    assert unet(**inputs).dtype == dtype


def test_compiles_to_one_graph(pixel: Recorded) -> None:
    compiled = torch.compile(pixel.unet, backend="eager", fullgraph=True)
    assert relative_error(compiled(**pixel.inputs), pixel.output) <= PARITY


@pytest.mark.parametrize("adaptor", ["micro", "linear", "global", "text"])
def test_every_parameter_is_trained_under_bfloat16_autocast(adaptor: str) -> None:
    config = SIZES[adaptor]
    unet = random_unet(config).train().requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = unet(**random_inputs(config)).square().mean()
    loss.backward()
    for name, parameter in unet.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_training_starts_from_zero_and_can_leave_it() -> None:
    unet = random_unet(SIZES["text"]).requires_grad_(True)
    unet.zero_residual_branches()
    inputs = random_inputs(unet.config)
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        out = unet(**inputs)
        loss = (out - inputs["latents"]).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(inputs["latents"].square().mean().item())
    assert losses[2] < losses[1] < losses[0]


def test_gradient_reaches_the_inputs(pixel: Recorded) -> None:
    inputs = {name: x.clone() for name, x in pixel.inputs.items()}
    wanted = ["latents", "context", "camera", "image_hidden", "image_latent"]
    for name in wanted:
        inputs[name].requires_grad_()
    pixel.unet(**inputs).square().sum().backward()
    for name in wanted:
        gradient = inputs[name].grad
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name
    latents_gradient = inputs["latents"].grad
    assert latents_gradient is not None
    assert latents_gradient[:, -1].abs().max() == 0  # the replaced frame


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_parity_on_the_gpu(pixel: Recorded, dtype: torch.dtype) -> None:
    unet = MultiViewUNet(pixel.unet.config)
    unet.load_state_dict(pixel.unet.state_dict())
    unet.requires_grad_(False).to("cuda", dtype)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        out = unet(**{name: x.cuda() for name, x in pixel.inputs.items()})
    bound = 1e-5 if dtype == torch.float32 else 5 * torch.finfo(dtype).eps
    assert relative_error(out.cpu(), pixel.output) <= bound
