"""The likely sizes of a UNet whose tensors are faulty, by majority, so that one error can list all its
faults.

:func:`~.unet_config.infer_unet_config` reads each size off one tensor. If just that one is missing or
misshapen, the sizes are wrong or unknown; here every tensor that shows a size has a vote.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .adaptors import RESAMPLER_HEAD_DIM
from .unet_config import UNetConfig


def likely_unet_config(tensors: Mapping[str, Tensor], head_dim: int) -> UNetConfig:
    """A configuration that most tensors fit, the released sizes where none tells.

    Raises :class:`~.errors.InputError` if the sizes found make no UNet.
    """
    released = UNetConfig()

    def vote(default: int, *sources: tuple[str, int]) -> int:
        """The most frequent size among the dimensions of the tensors that match; the earlier source if
        equal."""
        sizes = [
            tensor.shape[dimension]
            for pattern, dimension in sources
            for name, tensor in tensors.items()
            if re.fullmatch(pattern, name) and tensor.ndim > dimension
        ]
        return Counter(sizes).most_common(1)[0][0] if sizes else default

    base = vote(
        released.model_channels,
        (r"input_blocks\.0\.0\.bias", 0),
        (r"input_blocks\.0\.0\.weight", 0),
        (r"time_embed\.0\.weight", 1),
    )
    widths: list[int] = []
    blocks: list[int] = []
    transformers: set[int] = set()
    starts_level = True
    for number in range(1, _count(r"input_blocks\.(\d+)\.", tensors)):
        if any(name.startswith(f"input_blocks.{number}.0.op.") for name in tensors):
            starts_level = True
            continue
        if starts_level:
            widths.append(0)
            blocks.append(0)
            starts_level = False
        block = rf"input_blocks\.{number}\.0\."
        widths[-1] = vote(base, (block + r"(in_layers\.2|emb_layers\.1|out_layers\.[03])\.(bias|weight)", 0))
        blocks[-1] += 1
        if any(name.startswith(f"input_blocks.{number}.1.") for name in tensors):
            transformers.add(len(widths) - 1)
    return UNetConfig(
        in_channels=vote(released.in_channels, (r"input_blocks\.0\.0\.weight", 1)),
        out_channels=vote(released.out_channels, (r"out\.2\.bias", 0), (r"out\.2\.weight", 0)),
        model_channels=base,
        channel_mult=tuple(width // max(base, 1) for width in widths),
        num_res_blocks=max(blocks, default=released.num_res_blocks),
        transformer_levels=tuple(sorted(transformers)),
        context_dim=vote(released.context_dim, (r".*\.attn2\.to_[kv](_ip)?\.weight", 1)),
        head_dim=head_dim,
        camera_dim=vote(released.camera_dim, (r"camera_embed\.0\.weight", 1)),
        **_likely_adaptor(tensors, vote),
    )


def _likely_adaptor(tensors: Mapping[str, Tensor], vote: Any) -> dict[str, Any]:
    if not any(name.startswith("image_embed.") or "_ip." in name for name in tensors):
        return {"image_adaptor": "none"}
    released = UNetConfig()
    if any(name.startswith(("image_embed.proj.", "image_embed.norm.")) for name in tensors):
        width = vote(released.context_dim, (r"image_embed\.norm\.(bias|weight)", 0))
        rows = vote(width, (r"image_embed\.proj\.(bias|weight)", 0))
        image_dim = vote(released.image_dim, (r"image_embed\.proj\.weight", 1))
        if rows == width:
            return {"image_adaptor": "linear", "image_dim": image_dim}
        return {"image_adaptor": "global", "image_dim": image_dim, "image_tokens": rows // max(width, 1)}
    block = r"image_embed\.layers\.\d+\."
    inner = vote(768, (block + r"0\.to_q\.weight", 0), (block + r"0\.to_out\.weight", 1))
    return {
        "image_adaptor": "resampler",
        "image_dim": vote(released.image_dim, (r"image_embed\.proj_in\.weight", 1)),
        "image_tokens": vote(released.image_tokens, (r"image_embed\.latents", 1)),
        "resampler_width": vote(released.resampler_width, (block + r"0\.norm[12]\.(bias|weight)", 0)),
        "resampler_depth": _count(r"image_embed\.layers\.(\d+)\.", tensors) or released.resampler_depth,
        "resampler_heads": inner // RESAMPLER_HEAD_DIM,
    }


def _count(pattern: str, names: Mapping[str, Tensor]) -> int:
    """One more than the greatest number that the pattern's group finds; 0 when it finds none."""
    return 1 + max((int(found[1]) for name in names if (found := re.match(pattern, name))), default=-1)
