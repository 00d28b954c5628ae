"""Each network of a model laid out on the meta device beside its tensors.

Tensors that no forward pass reads are left out here, by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .blueprint import Part, compare, same_name
from .clip_layout import clip_names_for
from .errors import InputError
from .text import TextEncoder
from .tokenizer import Tokenizer
from .unet import MultiViewUNet
from .unet_config import UNetConfig, infer_unet_config
from .unet_sizes import likely_unet_config
from .vae import LatentCodec
from .vision import VisionEncoder

RELEASED_VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}
RELEASED_TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 0,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}
RELEASED_VISION: dict[str, Any] = {
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 1024,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}


def best_of(build: Callable[[Any], Part], first: Callable[[], Any], second: Callable[[], Any]) -> Part:
    """The part for the configuration ``first()``, or ``second()`` if that explains the tensors better.

    A tensor that is missing or misshapen can mislead the inference of sizes; with a second opinion the user
    is still told exactly what is at fault. Raises what ``first`` raises if the second is implausible too.
    """
    part, faults = None, None
    try:
        part = build(first())
        if not (faults := compare(part)):
            return part
    except InputError as error:
        reason = error
    try:
        other = build(second())
    except InputError:
        other = None
    if other is not None:
        found = compare(other)
        mostly = 2 * (len(found.missing) + len(found.wrong)) < len(other.network.state_dict())
        if mostly and (faults is None or len(found) <= len(faults)):
            return other
    if part is None:
        raise reason
    return part


def unet_part(
    config: UNetConfig, tensors: Mapping[str, Tensor], file_name: Callable[[str], str] = same_name
) -> Part:
    """Raises :class:`InputError` for sizes of which no UNet can be made."""
    unet = _on_meta(lambda: MultiViewUNet(config), "UNet")
    return Part("unet", unet, unet, tensors, file_name)


def unet_by_tensors(
    tensors: Mapping[str, Tensor], head_dim: int, file_name: Callable[[str], str] = same_name
) -> Part:
    """The UNet whose sizes the tensors tell."""
    return best_of(
        lambda config: unet_part(config, tensors, file_name),
        lambda: infer_unet_config(tensors, head_dim),
        lambda: likely_unet_config(tensors, head_dim),
    )


def vae_part(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], file_name: Callable[[str], str] = same_name
) -> Part:
    """Raises :class:`InputError` for a configuration that diffusers refuses."""
    codec = _on_meta(lambda: LatentCodec.from_config(config), "VAE")
    return Part("vae", codec, codec.vae, tensors, file_name)


def text_part(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    file_name: Callable[[str], str] = same_name,
) -> Part:
    """Raises :class:`InputError` for a configuration that transformers refuses."""
    text = _on_meta(lambda: TextEncoder.from_config(config, tokenizer), "text encoder")
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in ("text_projection.weight", "logit_scale")
    }
    return Part("text", text, text.model, clip_names_for(text.model, kept), file_name)


def vision_part(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    file_name: Callable[[str], str] = same_name,
    *,
    pooled: bool,
) -> Part:
    """``pooled``: with the last block, its LayerNorm and the projection, which only the global controller
    reads.

    Raises :class:`InputError` for a configuration that transformers refuses.
    """
    vision = _on_meta(lambda: VisionEncoder.from_config(config, projection=pooled), "image encoder")
    named = clip_names_for(vision.model, tensors)
    if not pooled:
        tower = getattr(vision.model, "vision_model", vision.model)
        last = len(tower.encoder.layers) - 1
        tower.encoder.layers[last] = nn.Identity()
        tower.post_layernorm = nn.Identity()
        unread = re.compile(
            rf"(vision_model\.)?(encoder\.layers\.{last}\.|post_layernorm\.)|visual_projection\."
        )
        named = {name: tensor for name, tensor in named.items() if not unread.match(name)}
    return Part("vision", vision, vision.model, named, file_name)


def widths_disagree(parts: Mapping[str, Part]) -> list[str]:
    """Where two networks could not work together: a sentence each."""
    unet, vae = parts["unet"].network.config, parts["vae"].network.config
    text = parts["text"].network.config
    pairs = [
        (
            f"the UNet takes text {unet.context_dim} wide",
            unet.context_dim,
            "the text encoder",
            text.hidden_size,
        ),
        (
            f"the UNet takes {unet.in_channels} latent channels",
            unet.in_channels,
            "the VAE",
            vae["latent_channels"],
        ),
    ]
    if "vision" in parts:
        vision = parts["vision"].network.config
        width = vision.projection_dim if unet.image_adaptor == "global" else vision.hidden_size
        pairs.append(
            (
                f"the UNet takes image features {unet.image_dim} wide",
                unet.image_dim,
                "the image encoder",
                width,
            )
        )
    return [
        f"{wanted}, but {giver} gives {given}" for wanted, needed, giver, given in pairs if needed != given
    ]


def _on_meta(build: Callable[[], Any], what: str) -> Any:
    try:
        with torch.device("meta"):
            return build()
    except InputError:
        raise
    # The configuration comes from a file, and the libraries check theirs in many ways and with many
    # exceptions.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"the configuration of the {what} is refused: {reason[0]}") from error
