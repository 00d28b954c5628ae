"""The embedded model's architecture: the full model's classes at a small size, 15 M parameters in all."""

from __future__ import annotations

import json
from pathlib import Path

from ..text import TextEncoder
from ..tokenizer import END, START, FolderTokenizer
from ..unet import MultiViewUNet, UNetConfig
from ..vae import LatentCodec
from ..vision import VisionEncoder
from .kinds import KINDS
from .objects import COLOURS

PICTURE_PX = 128
CONTEXT_DIM = 96
VISION_DIM = 128

UNET = UNetConfig(
    model_channels=96,
    channel_mult=(1, 1, 2),
    num_res_blocks=1,
    transformer_levels=(0, 1, 2),
    context_dim=CONTEXT_DIM,
    head_dim=32,
    image_adaptor="resampler",
    image_dim=VISION_DIM,
    image_tokens=16,
    resampler_width=CONTEXT_DIM,
    resampler_depth=2,
    resampler_heads=2,
)

VAE = {
    "block_out_channels": (16, 48, 96, 96),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": PICTURE_PX,
}

VISION = {
    "hidden_size": VISION_DIM,
    "intermediate_size": 2 * VISION_DIM,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": PICTURE_PX,
    "patch_size": 16,
    "hidden_act": "gelu",
}

TEXT = {
    "hidden_size": CONTEXT_DIM,
    "intermediate_size": 2 * CONTEXT_DIM,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
}

UNKNOWN = "<|unknown|>"


def vocabulary() -> list[str]:
    """The words that captions are made of; every other word of a prompt becomes one unknown token."""
    return [START, END, UNKNOWN, "a", "3d", "asset", ",", *COLOURS, *KINDS]


def write_tokenizer(folder: Path) -> None:
    """Writes ``tokenizer.json`` and its settings: one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: index for index, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": UNKNOWN}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def new_codec() -> LatentCodec:
    """A codec with fresh weights."""
    return LatentCodec.from_config(VAE)


def new_unet() -> MultiViewUNet:
    """A UNet with fresh weights, ready to be trained from scratch."""
    unet = MultiViewUNet(UNET)
    unet.zero_residual_branches()
    return unet


def new_text(tokenizer_folder: Path) -> TextEncoder:
    """A caption encoder with fresh weights, reading the vocabulary in ``tokenizer_folder``."""
    config = {
        **TEXT,
        "vocab_size": len(vocabulary()),
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    return TextEncoder.from_config(config, FolderTokenizer(tokenizer_folder))


def new_vision() -> VisionEncoder:
    """An image encoder with fresh weights."""
    return VisionEncoder.from_config(VISION, projection=False)
