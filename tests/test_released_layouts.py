"""The tensors of the released checkpoints, by name and shape, against our full-size networks on the meta
device."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import State, refused

from imagedream_rt.engine.blueprint import Layout, check
from imagedream_rt.engine.network_parts import (
    RELEASED_TEXT,
    RELEASED_VAE,
    RELEASED_VISION,
    text_part,
    unet_by_tensors,
    vae_part,
    vision_part,
)
from imagedream_rt.engine.official_layout import official_layout
from imagedream_rt.engine.random_model import ByteTokenizer
from imagedream_rt.engine.unet_config import UNetConfig

FIXTURES = Path(__file__).parent / "fixtures"


def released() -> dict[str, list[int]]:
    return json.loads(gzip.decompress((FIXTURES / "layout_official.json.gz").read_bytes()))


def on_meta(shapes: dict[str, list[int]]) -> State:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def global_keys(keys: dict[str, list[int]]) -> dict[str, list[int]]:
    prefix = "model.diffusion_model.image_embed."
    shapes = {"proj.weight": [4096, 1024], "proj.bias": [4096], "norm.weight": [1024], "norm.bias": [1024]}
    kept = {name: shape for name, shape in keys.items() if not name.startswith(prefix)}
    return kept | {prefix + name: shape for name, shape in shapes.items()}


def linear_keys(keys: dict[str, list[int]]) -> dict[str, list[int]]:
    prefix = "model.diffusion_model.image_embed.proj."
    return global_keys(keys) | {f"{prefix}weight": [1024, 1280], f"{prefix}bias": [1024]}


def mvdream_keys(keys: dict[str, list[int]]) -> dict[str, list[int]]:
    kept = {
        n: s for n, s in keys.items() if "visual." not in n and "_ip." not in n and "image_embed" not in n
    }
    assert len(kept) == 1244
    renames = {"vae_model.": "first_stage_model.", "clip_model.": "cond_stage_model."}
    return {
        next((new + n.removeprefix(old) for old, new in renames.items() if n.startswith(old)), n): s
        for n, s in kept.items()
    }


@pytest.mark.parametrize(
    ("change", "adaptor", "parameters"),
    [
        (lambda keys: keys, "resampler", 941_672_900),
        (global_keys, "global", 941_672_900 - 48_541_696 + 4096 * 1024 + 4096 + 2048),
        (linear_keys, "linear", 941_672_900 - 48_541_696 + 1024 * 1280 + 1024 + 2048),
        (mvdream_keys, "none", 941_672_900 - 48_541_696 - 25_559_040),
    ],
)
def test_released_official_key_set(change: Any, adaptor: str, parameters: int) -> None:
    layout = official_layout(on_meta(change(released())), ByteTokenizer())
    check("released", layout)
    config = layout.parts["unet"].network.config
    assert config.image_adaptor == adaptor
    if adaptor == "resampler":
        assert config == UNetConfig()
    counts = {name: sum(p.numel() for p in part.network.parameters()) for name, part in layout.parts.items()}
    assert counts["unet"] == parameters
    assert counts["vae"] == 83_653_863
    assert counts["text"] == 340_387_840
    assert ("vision" in counts) == (adaptor != "none")


def test_a_fault_in_the_released_checkpoint_is_named_exactly() -> None:
    """Also where the faulty tensors are those that sizes are read off."""
    keys = released()
    gone = [
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.input_blocks.4.0.out_layers.3.weight",
        "vae_model.encoder.conv_in.weight",
        "clip_model.model.token_embedding.weight",
        "clip_model.model.visual.transformer.resblocks.5.attn.in_proj_weight",
    ]
    for name in gone:
        del keys[name]
    wrong = {
        "model.diffusion_model.out.2.weight": [5, 320, 3, 3],
        "vae_model.decoder.mid.attn_1.q.weight": [256, 512, 1, 1],
        "clip_model.model.visual.conv1.weight": [1280, 4, 14, 14],
    }
    keys |= wrong
    keys["model.diffusion_model.label_emb.weight"] = [1]
    keys["surprise"] = [2]
    message = refused(lambda: check("released", official_layout(on_meta(keys), ByteTokenizer())))
    named = [
        "input_blocks.0.0.weight",
        "5.attn.in_proj_weight[q]",
        *gone[:4],
        *wrong,
        "label_emb.weight",
        "surprise",
    ]
    assert [name for name in named if name not in message] == []
    assert "missing tensors (7)" in message
    assert "extra tensors (2)" in message
    assert "wrongly shaped tensors (3)" in message
    assert "[5, 320, 3, 3], must be [4, 320, 3, 3]" in message


def test_long_lists_are_cut() -> None:
    keys = released()
    kept = {name: shape for name, shape in keys.items() if "output_blocks.1" not in name}
    message = refused(lambda: check("released", official_layout(on_meta(kept), ByteTokenizer())))
    missing = len(keys) - len(kept)
    assert f"missing tensors ({missing})" in message
    assert f"and {missing - 20} more" in message


def test_released_diffusers_key_set() -> None:
    keys = json.loads(gzip.decompress((FIXTURES / "layout_diffusers.json.gz").read_bytes()))
    parts = [
        unet_by_tensors(on_meta(keys["unet"]), 64),
        vae_part(RELEASED_VAE, on_meta(keys["vae"])),
        text_part(RELEASED_TEXT, on_meta(keys["text_encoder"]), ByteTokenizer()),
        vision_part(RELEASED_VISION, on_meta(keys["image_encoder"]), pooled=False),
    ]
    check("released", Layout({part.name: part for part in parts}))
    assert parts[0].network.config == UNetConfig()
