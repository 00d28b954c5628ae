"""Checkpoints for tests, made out of small random models by the inverse of the renaming under test."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from imagedream_rt.engine.errors import InputError
from imagedream_rt.engine.model import Controller, MultiViewModel
from imagedream_rt.engine.official_layout import SCHEDULE_BUFFERS
from imagedream_rt.engine.official_names import official_clip_name, official_vae_name
from imagedream_rt.engine.text import TextEncoder
from imagedream_rt.engine.tokenizer import END, START, FolderTokenizer
from imagedream_rt.engine.weights import load_model

State = dict[str, torch.Tensor]
CONTROLLERS: tuple[Controller, ...] = ("pixel", "local", "local-linear", "global", "none")


@functools.cache
def tiny(controller: Controller) -> MultiViewModel:
    """A small random model, made once for all tests: not to be changed."""
    return load_model("random:tiny", device="cpu", controller=controller)


def load(path: Path, **settings: Any) -> MultiViewModel:
    return load_model(path, device="cpu", **settings)


def refused(action: Callable[[], Any]) -> str:
    """The message, of one line, of the InputError that the action must raise."""
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


def official_state(model: MultiViewModel) -> dict[str, torch.Tensor]:
    """The model as the official code would save it, with everything in it that loading leaves out."""
    mvdream = model.card.controller == "none"
    vae_prefix, clip_prefix = (
        ("first_stage_model.", "cond_stage_model.model.") if mvdream else ("vae_model.", "clip_model.model.")
    )
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in model.unet.state_dict().items()}

    vae_name = official_vae_name(vae_prefix, len(model.vae.vae.config["block_out_channels"]))
    for name, tensor in model.vae.vae.state_dict().items():
        attention_map = re.search(r"attentions\.0\.to_.*weight$", name)
        state[vae_name(name)] = tensor[:, :, None, None] if attention_map else tensor

    text = model.text.model
    state |= tower(text.state_dict(), clip_prefix)
    layers = text.config.num_hidden_layers
    width = text.config.hidden_size
    state |= copied_block(state, f"{clip_prefix}transformer.resblocks.", layers - 1, layers)
    state[f"{clip_prefix}text_projection"] = torch.randn(width, 48)
    state[f"{clip_prefix}logit_scale"] = torch.tensor(4.6)
    if model.vision is not None:
        prefix = f"{clip_prefix}visual."
        state |= tower(model.vision.model.state_dict(), prefix)
        if f"{prefix}proj" not in state:
            layers = model.vision.model.config.num_hidden_layers
            state |= copied_block(state, f"{prefix}transformer.resblocks.", layers - 2, layers - 1)
            state |= {f"{prefix}ln_post.{kind}": torch.randn(80) for kind in ("weight", "bias")}
            state[f"{prefix}proj"] = torch.randn(80, 48)
    return state | {name: torch.zeros(1000) for name in SCHEDULE_BUFFERS}


def tower(ours: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """One CLIP tower under open_clip's names: query, key and value in one tensor, the projection
    transposed."""
    official_name = official_clip_name(prefix)
    state: dict[str, torch.Tensor] = {}
    for name, tensor in ours.items():
        official = official_name(name)
        whole, bracket, letter = official.partition("[")
        if not bracket:
            state[official] = tensor.T.contiguous() if official.endswith("visual.proj") else tensor
        elif letter == "q]":
            thirds = [ours[name.replace(".q_proj.", f".{other}_proj.")] for other in "qkv"]
            state[whole] = torch.cat(thirds)
    return state


def copied_block(
    state: dict[str, torch.Tensor], prefix: str, source: int, target: int
) -> dict[str, torch.Tensor]:
    """Another transformer block, of the shapes of an existing one."""
    begins = f"{prefix}{source}."
    return {
        f"{prefix}{target}.{name.removeprefix(begins)}": torch.randn_like(tensor)
        for name, tensor in state.items()
        if name.startswith(begins)
    }


def write_tokenizer(folder: Path) -> Path:
    """A byte-level ``tokenizer.json`` with CLIP's control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*alphabet, START, END])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def with_folder_tokenizer(model: MultiViewModel, folder: Path) -> MultiViewModel:
    """The model with a vocabulary that can be saved."""
    text = TextEncoder(model.text.model, FolderTokenizer(write_tokenizer(folder)))
    return replace(model, text=text)


def assert_same_model(one: MultiViewModel, other: MultiViewModel) -> None:
    """Equal networks: the same names with the same numbers."""
    assert one.unet.config == other.unet.config
    assert (one.vision is None) == (other.vision is None)
    pairs = [(one.unet, other.unet), (one.vae, other.vae), (one.text, other.text)]
    if one.vision is not None and other.vision is not None:
        pairs.append((one.vision, other.vision))
    for mine, theirs in pairs:
        expected, found = mine.state_dict(), theirs.state_dict()
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)
