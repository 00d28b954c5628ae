"""Our names of the VAE's and CLIP's tensors -> those of the official checkpoints, for error messages.

The other direction is :mod:`.vae_layout` and :mod:`.clip_layout`. Where one official tensor holds three of
ours (``in_proj``), the part follows in brackets: ``...attn.in_proj_weight[q]``.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_VAE = (
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d+)\.resnets\.", r".up.\1.block."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)
_CLIP = (
    (r"^(text_model|vision_model)\.", ""),
    (r"^encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.self_attn\.([qkv])_proj\.(weight|bias)$", r".attn.in_proj_\2[\1]"),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"^embeddings\.token_embedding\.", "token_embedding."),
    (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^final_layer_norm\.", "ln_final."),
    (r"^embeddings\.class_embedding$", "class_embedding"),
    (r"^embeddings\.patch_embedding\.", "conv1."),
    (r"^pre_layrnorm\.", "ln_pre."),
    (r"^post_layernorm\.", "ln_post."),
    (r"^visual_projection\.weight$", "proj"),
)


def official_vae_name(prefix: str, levels: int) -> Callable[[str], str]:
    """The renaming for a VAE of that many levels, as ``AutoencoderKL`` counts the decoder's backwards."""

    def rename(name: str) -> str:
        name = _substituted(name, _VAE)
        if up := re.match(r"decoder\.up\.(\d+)\.(.*)$", name):
            name = f"decoder.up.{levels - 1 - int(up[1])}.{up[2]}"
        return prefix + name

    return rename


def official_clip_name(prefix: str) -> Callable[[str], str]:
    """The renaming for either tower of CLIP; the image tower's prefix ends in ``visual.``."""
    return lambda name: prefix + _substituted(name, _CLIP)


def _substituted(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in pairs:
        name = re.sub(pattern, replacement, name)
    return name
