"""The official VAE's tensors under diffusers' names, and the configuration that their shapes imply.

The released checkpoints keep the VAE under latent-diffusion's names. diffusers' ``AutoencoderKL`` has the
same tensors under others, counts the decoder's levels from the other end and holds the middle attention's 1x1
convolutions as linear maps.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from .errors import InputError

SCALING_FACTOR = 0.18215
"""Released configuration: latents given to the UNet are the posterior sample times this."""

_RENAMES = (
    (r"^(encoder|decoder)\.mid\.attn_1\.norm\.", r"\1.mid_block.attentions.0.group_norm."),
    (r"^(encoder|decoder)\.mid\.attn_1\.([qkv])\.", r"\1.mid_block.attentions.0.to_\2."),
    (r"^(encoder|decoder)\.mid\.attn_1\.proj_out\.", r"\1.mid_block.attentions.0.to_out.0."),
    (r"^(encoder|decoder)\.mid\.block_1\.", r"\1.mid_block.resnets.0."),
    (r"^(encoder|decoder)\.mid\.block_2\.", r"\1.mid_block.resnets.1."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.up\.(\d+)\.block\.", r"decoder.up_blocks.\1.resnets."),
    (r"^decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)
_ATTENTION_MAP = re.compile(r"\.mid_block\.attentions\.0\.to_(q|k|v|out\.0)\.weight$")


def vae_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Latent-diffusion's VAE tensors (names without ``vae_model.``) under the names of ``AutoencoderKL``.

    Pure: neither the mapping nor the tensors in it are changed; attention weights come back as 2-D views. A
    name that is not the VAE's is handed on as it is, for the strict load to report.
    """
    levels = _count(r"^decoder\.up\.(\d+)\.", state)
    renamed: dict[str, Tensor] = {}
    for official, tensor in state.items():
        name = official
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        if up := re.match(r"^decoder\.up_blocks\.(\d+)\.(.*)$", name):
            name = f"decoder.up_blocks.{levels - 1 - int(up[1])}.{up[2]}"
        if _ATTENTION_MAP.search(name) and tensor.ndim == 4:
            tensor = tensor.flatten(1)
        renamed[name] = tensor
    return renamed


def vae_config(
    state: Mapping[str, Tensor], *, norm_groups: int = 32, scaling_factor: float = SCALING_FACTOR
) -> dict[str, Any]:
    """Arguments of ``diffusers.AutoencoderKL`` for tensors under its names.

    The groups of the normalisations and the scaling factor are the two things that no shape tells; the
    defaults are the released ones. Raises :class:`~.errors.InputError` when a tensor that fixes a size is
    missing.
    """
    levels = _count(r"^encoder\.down_blocks\.(\d+)\.", state)
    if not levels:
        raise InputError(
            "the VAE has no tensor encoder.down_blocks.*; it cannot be told how many levels it has"
        )
    widths = [_size(state, f"encoder.down_blocks.{i}.resnets.0.conv2.weight", 0) for i in range(levels)]
    return {
        "in_channels": _size(state, "encoder.conv_in.weight", 1),
        "out_channels": _size(state, "decoder.conv_out.weight", 0),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": widths,
        "layers_per_block": _count(r"^encoder\.down_blocks\.0\.resnets\.(\d+)\.", state),
        "latent_channels": _size(state, "decoder.conv_in.weight", 1),
        "norm_num_groups": norm_groups,
        "scaling_factor": scaling_factor,
    }


def _count(pattern: str, names: Iterable[str]) -> int:
    """One more than the greatest number that the pattern's group finds; 0 when it finds none."""
    return 1 + max((int(found[1]) for name in names if (found := re.match(pattern, name))), default=-1)


def _size(state: Mapping[str, Tensor], name: str, dimension: int) -> int:
    tensor = state.get(name)
    if tensor is None or tensor.ndim <= dimension:
        raise InputError(f"the VAE's tensor {name} is missing or has no dimension {dimension}")
    return tensor.shape[dimension]
