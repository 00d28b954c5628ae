"""Loading: official checkpoints of every controller, the UNet alone, and files that hold something else."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CONTROLLERS, State, assert_same_model, load, official_state, refused, tiny
from safetensors.torch import save_file

from imagedream_rt.engine import official_layout
from imagedream_rt.engine.model import Controller
from imagedream_rt.engine.random_model import ByteTokenizer
from imagedream_rt.engine.weights import inspect, load_model, load_unet


@pytest.fixture(autouse=True)
def _no_clip_vocabulary_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Official checkpoints take CLIP's tokenizer, whose package has no wheel for every Python version."""
    monkeypatch.setattr(official_layout, "ClipTokenizer", ByteTokenizer)


@pytest.fixture(scope="module")
def state() -> State:
    return official_state(tiny("pixel"))


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_official_checkpoint_round_trip(controller: Controller, suffix: str, tmp_path: Path) -> None:
    tensors = official_state(tiny(controller))
    path = tmp_path / f"sd-v2.1-base-4view{'-local' if controller == 'local' else ''}.{suffix}"
    if suffix == "pt":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    model = load(path)
    assert_same_model(tiny(controller), model)
    assert model.card.controller == controller
    assert model.card.layout == f"official-{suffix}"
    assert model.card.family == ("mvdream" if controller == "none" else "imagedream")
    assert model.card.picture_px == 256
    assert len(model.card.sha256) == 64
    assert model.frames == (5 if controller == "pixel" else 4)
    assert not model.unet.training
    assert not any(parameter.requires_grad for parameter in model.unet.parameters())
    assert model.alphas_cumprod.shape == (1000,)


def test_nested_state_dict_and_half_precision_are_accepted(state: State, tmp_path: Path) -> None:
    path = tmp_path / "nested.pt"
    torch.save({"state_dict": {name: tensor.half() for name, tensor in state.items()}, "epoch": 3}, path)
    model = load(path)
    assert model.dtype == torch.float32
    name = "time_embed.0.weight"
    torch.testing.assert_close(
        model.unet.state_dict()[name], tiny("pixel").unet.state_dict()[name].half().float(), rtol=0, atol=0
    )


def test_loaded_weights_are_copies(state: State, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    model = load(path)
    before = model.unet.state_dict()["out.2.bias"].clone()
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(model.unet.state_dict()["out.2.bias"], before)
    assert before.any()


def test_loaded_text_encoder_runs(state: State, tmp_path: Path) -> None:
    """The buffers that no file holds (positions) are made."""
    save_file(state, tmp_path / "model.safetensors")
    model = load(tmp_path / "model.safetensors")
    torch.testing.assert_close(model.text(["a hat"]), tiny("pixel").text(["a hat"]), rtol=0, atol=0)
    vision, reference = model.vision, tiny("pixel").vision
    assert vision is not None
    assert reference is not None
    pixels = torch.randn(1, 3, 56, 56)
    torch.testing.assert_close(vision.hidden(pixels), reference.hidden(pixels), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype(state: State, tmp_path: Path, dtype: torch.dtype) -> None:
    save_file(state, tmp_path / "model.safetensors")
    model = load(tmp_path / "model.safetensors", dtype=dtype)
    for network in (model.unet, model.vae, model.text, model.vision):
        assert network is not None
        assert {parameter.dtype for parameter in network.parameters()} == {dtype}


def test_weights_beyond_half_precision_name_the_remedy(state: State, tmp_path: Path) -> None:
    state = {**state, "model.diffusion_model.out.0.weight": torch.full((64,), 1e6)}
    save_file(state, tmp_path / "model.safetensors")
    message = refused(lambda: load(tmp_path / "model.safetensors", dtype=torch.float16))
    assert "model.diffusion_model.out.0.weight" in message
    assert "bfloat16" in message
    load(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "controller"),
    [
        ("sd-v2.1-base-4view-ipmv.pt", "pixel"),
        ("sd-v2.1-base-4view-ipmv-local.pt", "local"),
        ("localised.pt", "pixel"),
        ("LOCAL.pt", "local"),
    ],
)
def test_controller_is_guessed_from_the_last_name(
    state: State, tmp_path: Path, name: str, controller: Controller
) -> None:
    (tmp_path / "usr-local").mkdir()
    path = tmp_path / "usr-local" / name
    torch.save(state, path)
    card = inspect(path).card
    assert card.controller == controller
    assert name in card.controller_reason
    other: Controller = "pixel" if controller == "local" else "local"
    card = inspect(path, other).card
    assert (card.controller, card.controller_reason) == (other, "given by the caller")


@pytest.mark.parametrize("given", ["pixel", "local-linear", "global", "shiny"])
def test_contradicting_controller(tmp_path: Path, given: Any) -> None:
    path = tmp_path / "mvdream.pt"
    torch.save(official_state(tiny("none")), path)
    assert repr(given) in refused(lambda: load(path, controller=given))


def bare(state: State) -> State:
    prefix = "model.diffusion_model."
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def test_load_unet_takes_every_form(state: State, tmp_path: Path) -> None:
    pt, safe, folder = tmp_path / "unet.pt", tmp_path / "all.safetensors", tmp_path / "released"
    torch.save(bare(state), pt)
    save_file(state, safe)
    folder.mkdir()
    torch.save(state, folder / "sd-v2.1-base-4view-ipmv.pt")
    expected = tiny("pixel").unet.state_dict()
    for source in (state, bare(state), {"state_dict": state}, pt, str(pt), safe, folder):
        unet = load_unet(source)
        assert unet.config == tiny("pixel").unet.config
        found = unet.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert not unet.training
        assert not any(parameter.requires_grad for parameter in unet.parameters())
    mine = {name: tensor.clone() for name, tensor in bare(state).items()}
    unet = load_unet(mine)
    mine["out.2.bias"].fill_(7)
    assert not torch.equal(unet.state_dict()["out.2.bias"], mine["out.2.bias"])


FAULTS = ("input_blocks.0.0.weight", "out.2.weight", "camera_embed.0.weight", "image_embed.latents")


@pytest.mark.parametrize("missing", [*FAULTS, "input_blocks.1.0.out_layers.3.weight", "time_embed.2.bias"])
@pytest.mark.parametrize("wrong", [*FAULTS, "middle_block.1.transformer_blocks.0.attn2.to_k.weight"])
def test_load_unet_lists_all_faults_at_once(state: State, missing: str, wrong: str) -> None:
    tensors = bare(state)
    del tensors[missing]
    if wrong in tensors:
        tensors[wrong] = torch.zeros(3, 5)
    tensors["bogus.weight"] = torch.zeros(1)
    tensors["out.0.bias"] = torch.zeros(64, dtype=torch.int64)
    message = refused(lambda: load_unet(tensors))
    expected = {missing, wrong, "bogus.weight", "out.0.bias: int64"}
    assert {words for words in expected if words not in message} == set()
    faults = 4 if wrong != missing else 3
    assert sum(int(count) for count in re.findall(r"tensors \((\d+)\)", message)) == faults


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(state: State, tmp_path: Path, value: float) -> None:
    broken = {name: tensor.clone() for name, tensor in state.items()}
    broken["model.diffusion_model.out.2.bias"][1] = value
    assert "model.diffusion_model.out.2.bias" in refused(lambda: load_unet(broken))
    assert "out.2.bias" in refused(lambda: load_unet(bare(broken)))
    broken = {name: tensor.clone() for name, tensor in state.items()}
    broken["vae_model.decoder.up.2.block.0.norm1.weight"][3] = value
    broken["vae_model.encoder.conv_in.bias"][0] = value
    torch.save(broken, tmp_path / "model.pt")
    message = refused(lambda: load(tmp_path / "model.pt"))
    assert "the vae (2 tensors)" in message
    assert "vae_model.decoder.up.2.block.0.norm1.weight" in message
    assert "vae_model.encoder.conv_in.bias" in message


def test_load_unet_refuses_what_is_no_unet(tmp_path: Path) -> None:
    message = refused(lambda: load_unet({"weight": torch.zeros(3)}))
    assert message.startswith("the given state dict: ")
    assert "multi-view UNet" in message
    assert "no tensors" in refused(lambda: load_unet({}))
    assert "not a tensor" in refused(lambda: load_unet({"weight": [1.0]}))  # type: ignore[dict-item]
    assert "no such file" in refused(lambda: load_unet(tmp_path / "absent.pt"))
    assert "head_dim" in refused(lambda: load_unet(bare(official_state(tiny("none"))), head_dim=48))


def test_no_such_model(tmp_path: Path) -> None:
    for name in (
        "",
        "builtin:mega",
        "random:huge",
        str(tmp_path / "none.pt"),
        "no\0such",
        "x" * 5000,
        "models/a.pt",
    ):
        message = refused(lambda name=name: load_model(name, device="cpu"))
        assert name in message or name == ""


def test_missing_embedded_model_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("imagedream_rt.engine.open_model.BUILTIN", {"builtin:nano": tmp_path})
    assert "reinstall" in refused(lambda: load_model("builtin:nano"))


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("vae_model.", "no VAE (tensors vae_model.*)"),
        ("clip_model.model.visual.", "no image encoder (tensors clip_model.model.visual.*)"),
        ("clip_model.", "no text encoder (tensors clip_model.model.*)"),
        ("model.diffusion_model.image_embed.", "image_embed.proj_in.weight"),
    ],
)
def test_checkpoint_without_a_whole_network(state: State, tmp_path: Path, gone: str, words: str) -> None:
    torch.save({n: t for n, t in state.items() if not n.startswith(gone)}, tmp_path / "model.pt")
    assert words in refused(lambda: load(tmp_path / "model.pt"))


def test_checkpoint_of_something_else(state: State, tmp_path: Path) -> None:
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "other.pt")
    assert "layer.weight" in refused(lambda: load(tmp_path / "other.pt"))
    torch.save(bare(state), tmp_path / "unet.pt")
    assert "UNet alone" in refused(lambda: load(tmp_path / "unet.pt"))
    (tmp_path / "empty").mkdir()
    assert "no model in it" in refused(lambda: load(tmp_path / "empty"))


def test_folder_that_holds_released_files(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "sd-v2.1-base-4view-ipmv.pt")
    assert inspect(tmp_path).card.controller == "pixel"
    shutil.copy(tmp_path / "sd-v2.1-base-4view-ipmv.pt", tmp_path / "sd-v2.1-base-4view-ipmv-local.pt")
    assert inspect(tmp_path).card.controller == "pixel"
    assert inspect(tmp_path, "local").card.controller_reason == "given by the caller"
    shutil.copy(tmp_path / "sd-v2.1-base-4view-ipmv.pt", tmp_path / "third.pt")
    assert "third.pt" in refused(lambda: inspect(tmp_path))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"device": "gpu"}, "unknown device"),
        ({"device": "mps"}, "not supported"),
        ({"device": "cuda:99"}, "not there"),
        ({"device": "cpu", "dtype": torch.int8}, "int8"),
    ],
)
def test_device_and_dtype_are_checked_before_anything_is_read(settings: dict[str, Any], words: str) -> None:
    assert words in refused(lambda: load_model("absent.pt", **settings))


def test_inspect(state: State, tmp_path: Path) -> None:
    halves = {n: t.half() if n.startswith("vae_model.") else t for n, t in state.items()}
    save_file(halves, tmp_path / "model.safetensors")
    info = inspect(tmp_path / "model.safetensors")
    model = load(tmp_path / "model.safetensors")
    assert info.card == model.card
    assert (info.frames, info.latent_px) == (5, 32)
    parts = {part.name: part for part in info.parts}
    assert parts["vae"].dtypes == ("float16",)
    assert parts["unet"].dtypes == ("float32",)
    assert parts["unet"].parameters == sum(parameter.numel() for parameter in model.unet.parameters())
    assert list(parts) == ["unet", "vae", "text", "vision"]
