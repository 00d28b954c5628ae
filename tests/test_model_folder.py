"""Model folders in diffusers' format: written, read back, as the port writes them, and with every kind of
fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CONTROLLERS, assert_same_model, load, refused, tiny, with_folder_tokenizer
from safetensors.torch import load_file, save_file

from imagedream_rt.engine.model import Controller
from imagedream_rt.engine.network_parts import vae_part
from imagedream_rt.engine.weights import load_model, load_unet, save_model_folder


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_model_folder_round_trip(controller: Controller, tmp_path: Path) -> None:
    model = with_folder_tokenizer(tiny(controller), tmp_path / "words")
    save_model_folder(model, tmp_path / "model")
    again = load(tmp_path / "model", dtype=torch.float16)
    assert_same_model(
        load_model("random:tiny", device="cpu", dtype=torch.float16, controller=controller), again
    )
    assert again.card.controller == controller
    assert again.card.controller_reason == "recorded in model_index.json"
    assert (again.card.layout, again.card.family) == ("diffusers", model.card.family)
    assert (again.card.picture_px, again.latent_px) == (64, 8)
    assert torch.equal(again.text.tokenize(["a hat"]), model.text.tokenize(["a hat"]))
    save_model_folder(again, tmp_path / "model")
    assert_same_model(again, load(tmp_path / "model", dtype=torch.float16))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "words"]
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert len({path.stat().st_mode for path in files}) == 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model_folder(with_folder_tokenizer(tiny("pixel"), tmp_path / "words"), tmp_path / "model")
    return tmp_path / "model"


def test_port_folder_without_our_records(folder: Path) -> None:
    """The port's configuration, its file names, and the CLIP names of transformers 5."""
    config = json.loads((folder / "unet" / "config.json").read_text())
    kept = ("image_size", "in_channels", "model_channels", "num_head_channels", "context_dim", "ip_dim")
    (folder / "unet" / "config.json").write_text(json.dumps({key: config[key] for key in kept}))
    index = json.loads((folder / "model_index.json").read_text())
    del index["imagedream_rt"]
    (folder / "model_index.json").write_text(json.dumps(index))
    file = folder / "text_encoder" / "model.safetensors"
    names = {name.removeprefix("text_model."): tensor for name, tensor in load_file(file).items()}
    names["embeddings.position_ids"] = torch.arange(77)[None]
    torch.save(names, folder / "text_encoder" / "pytorch_model.bin")
    file.unlink()
    model = load(folder, dtype=torch.float16)
    assert_same_model(load_model("random:tiny", device="cpu", dtype=torch.float16), model)
    assert model.card.controller == "pixel"
    assert "guessed" in model.card.controller_reason
    assert model.card.picture_px == 64
    renamed = folder.with_name("imagedream-local-diffusers")
    folder.rename(renamed)
    assert load(renamed).card.controller == "local"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("unet/config.json", "config.json"),
        ("unet/diffusion_pytorch_model.safetensors", "unet: has no weights file"),
        ("vae/config.json", "vae/config.json"),
        ("text_encoder/model.safetensors", "text_encoder: has no weights file"),
        ("image_encoder/config.json", "image_encoder/config.json"),
        ("tokenizer/tokenizer.json", "tokenizer"),
    ],
)
def test_incomplete_folder(folder: Path, path: str, words: str) -> None:
    (folder / path).unlink()
    assert words in refused(lambda: load(folder))


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        ("unet", "channel_mult", "wide"),
        ("unet", "model_channels", -3),
        ("unet", "resampler_depth", 5),
        ("unet", "image_adaptor", 7),
        ("vae", "block_out_channels", [32, 32]),
        ("vae", "layers_per_block", "many"),
        ("text_encoder", "hidden_size", 96),
        ("text_encoder", "hidden_act", "nonsense"),
        ("image_encoder", "num_attention_heads", 7),
        ("image_encoder", "patch_size", 28),
    ],
)
def test_folder_with_a_wrong_configuration(folder: Path, path: str, key: str, value: Any) -> None:
    file = folder / path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    assert str(folder) in refused(lambda: load(folder))


@pytest.mark.parametrize(
    "record",
    [
        {"controller": "global"},
        {"picture_px": 63},
        {"picture_px": "64"},
        {"family": 3},
        {"controller": [1]},
        [],
    ],
)
def test_folder_with_a_wrong_record(folder: Path, record: Any) -> None:
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"imagedream_rt": record}))
    assert "model_index.json" in refused(lambda: load(folder))


def test_networks_that_do_not_fit_together(folder: Path) -> None:
    config = json.loads((folder / "vae" / "config.json").read_text()) | {"latent_channels": 3}
    vae = vae_part(config, {}).network
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    tensors = {name: torch.zeros(tensor.shape) for name, tensor in vae.state_dict().items()}
    save_file(tensors, folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert "latent channels, but the VAE gives 3" in refused(lambda: load(folder))


def test_saving_leaves_other_things_alone(tmp_path: Path) -> None:
    model = with_folder_tokenizer(tiny("none"), tmp_path / "words")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "other files" in refused(lambda: save_model_folder(model, tmp_path / "mine"))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "file").write_text("x")
    assert "not a folder" in refused(lambda: save_model_folder(model, tmp_path / "file"))
    assert "cannot be written" in refused(lambda: save_model_folder(model, tmp_path / "file" / "model"))
    assert "ByteTokenizer" in refused(lambda: save_model_folder(tiny("none"), tmp_path / "no"))
    broken = load_model("random:tiny", device="cpu", controller="none")
    broken.unet.state_dict()["out.2.bias"][0] = float("nan")
    assert "out.2.bias" in refused(
        lambda: save_model_folder(with_folder_tokenizer(broken, tmp_path / "words"), tmp_path / "no")
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine", "words"]


def test_load_unet_from_a_folder(folder: Path) -> None:
    expected = tiny("pixel").unet.state_dict()
    for path in (folder, folder / "unet"):
        for name, tensor in load_unet(path).state_dict().items():
            torch.testing.assert_close(tensor, expected[name].half().float(), rtol=0, atol=0)
