"""The official CLIP towers' tensors under transformers' names, and the configuration that their shapes imply.

The released checkpoints hold one open_clip ViT-H-14. Its attention keeps query, key and value in one
``in_proj_weight``; transformers keeps three maps. Names here are those of transformers 4 (``text_model.``,
``vision_model.``); transformers 5 drops the prefix of some classes, which :func:`clip_names_for` mends by
looking at the module itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .errors import InputError

_BLOCK_RENAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TEXT_RENAMES = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_VISION_RENAMES = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
_TEXT_UNUSED = ("text_projection", "logit_scale", "attn_mask")
"""What the text tower has for contrastive training alone."""


def clip_text_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's text tower (names without ``clip_model.model.``) under the names of ``CLIPTextModel``.

    The last block is left out: the released code feeds the UNet the output of all blocks but the last,
    through the final LayerNorm. Tensors of the image tower are passed over. Pure: nothing given is changed;
    query, key and value are views. A name that is not the tower's is handed on for the strict load to report.
    """
    blocks = _count_blocks(state, "transformer.resblocks.")
    last = f"transformer.resblocks.{blocks - 1}."
    kept = {
        name: tensor
        for name, tensor in state.items()
        if not name.startswith(("visual.", last)) and name not in _TEXT_UNUSED
    }
    return {f"text_model.{name}": tensor for name, tensor in _renamed(kept, _TEXT_RENAMES).items()}


def clip_vision_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's image tower (names ``visual.*``) under the names of ``CLIPVisionModelWithProjection``.

    All blocks are kept: the pooled feature of the global controller needs the last one. ``visual.proj``
    becomes ``visual_projection.weight``, transposed; leave that out for a ``CLIPVisionModel``. Pure, as for
    the text.
    """
    tower = {name.removeprefix("visual."): t for name, t in state.items() if name.startswith("visual.")}
    projection = tower.pop("proj", None)
    renamed = {f"vision_model.{name}": t for name, t in _renamed(tower, _VISION_RENAMES).items()}
    if projection is not None:
        renamed["visual_projection.weight"] = projection.transpose(0, -1)
    return renamed


def clip_text_config(state: Mapping[str, Tensor], *, head_dim: int = 64) -> dict[str, Any]:
    """Arguments of ``CLIPTextConfig`` for tensors under transformers' names, with or without the prefix.

    No shape tells the width of a head; 64 is the released one. Raises :class:`~.errors.InputError` when a
    tensor that fixes a size is missing.
    """
    bare = _without_prefix(state)
    vocabulary, width = _shape(bare, "embeddings.token_embedding.weight", 2)
    return {
        "vocab_size": vocabulary,
        "max_position_embeddings": _shape(bare, "embeddings.position_embedding.weight", 2)[0],
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 0,
        **_tower_config(bare, width, head_dim),
    }


def clip_vision_config(state: Mapping[str, Tensor], *, head_dim: int = 80) -> dict[str, Any]:
    """Arguments of ``CLIPVisionConfig`` for tensors under transformers' names, with or without the prefix.

    Head width: 80 in the released model. Raises as :func:`clip_text_config`.
    """
    bare = _without_prefix(state)
    width, _, patch, _ = _shape(bare, "embeddings.patch_embedding.weight", 4)
    positions = _shape(bare, "embeddings.position_embedding.weight", 2)[0]
    side = math.isqrt(max(positions - 1, 0))
    if side * side != positions - 1:
        raise InputError(f"CLIP's image tower has {positions} positions; they must be a square plus one")
    projection = bare.get("visual_projection.weight")
    return {
        "image_size": side * patch,
        "patch_size": patch,
        "projection_dim": width if projection is None else projection.shape[0],
        **_tower_config(bare, width, head_dim),
    }


def clip_names_for(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names that this transformers version gives the module's own.

    Adds or drops ``text_model.`` or ``vision_model.``, and leaves out the ``position_ids`` of old files.
    """
    expected = module.state_dict().keys()
    prefix = next((name[: name.index(".") + 1] for name in expected if _PREFIX.match(name)), "")
    return {
        name if name.startswith(_HEADS) else prefix + name: tensor
        for name, tensor in _without_prefix(state).items()
        if name != "embeddings.position_ids"
    }


def without_dtype(config: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` without its dtype: transformers would build parts of a model in it, and parts not."""
    return {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}


_PREFIX = re.compile(r"^(text_model|vision_model)\.")
_HEADS = ("visual_projection.", "text_projection.")


def _without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_PREFIX.sub("", name): tensor for name, tensor in state.items()}


def _count_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    """One more than the greatest number right after the prefix; 0 when there is none."""
    numbers = [name.removeprefix(prefix).split(".", 1)[0] for name in state if name.startswith(prefix)]
    return 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)


def _renamed(state: Mapping[str, Tensor], outer: Mapping[str, str]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block = re.match(r"^transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)$", name)
        if block is None:
            renamed[outer.get(name, name)] = tensor
            continue
        home, part, kind = f"encoder.layers.{block[1]}", block[2], block[3]
        if part == "attn.in_proj":
            for letter, third in zip("qkv", tensor.chunk(3), strict=False):
                renamed[f"{home}.self_attn.{letter}_proj.{kind}"] = third
        else:
            renamed[f"{home}.{_BLOCK_RENAMES.get(part, part)}.{kind}"] = tensor
    return renamed


def _tower_config(bare: Mapping[str, Tensor], width: int, head_dim: int) -> dict[str, Any]:
    if width % head_dim:
        raise InputError(f"a CLIP tower is {width} wide, which is no multiple of the head width {head_dim}")
    return {
        "hidden_size": width,
        "intermediate_size": _shape(bare, "encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": _count_blocks(bare, "encoder.layers."),
        "num_attention_heads": width // head_dim,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    }


def _shape(bare: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    tensor = bare.get(name)
    if tensor is None or tensor.ndim != dimensions:
        raise InputError(f"CLIP's tensor {name} is missing or has not {dimensions} dimensions")
    return tuple(tensor.shape)
