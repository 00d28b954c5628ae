"""CLIP's image tower: hidden states for local control, the pooled feature for global control."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from .clip_layout import without_dtype
from .errors import InputError
from .pixels import check_pictures, resize, unit

if TYPE_CHECKING:
    from transformers import CLIPVisionModel, CLIPVisionModelWithProjection

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class VisionEncoder(nn.Module):
    """transformers' CLIP image tower; ``image_px`` is the side of its square input (224 when released)."""

    def __init__(self, model: CLIPVisionModel | CLIPVisionModelWithProjection) -> None:
        super().__init__()
        self.model = model
        self.image_px = int(model.config.image_size)
        # transformers 4 blocks take two masks, transformers 5 blocks one; none of them applies to pictures.
        block = self._tower.encoder.layers[0]
        names = inspect.signature(block.forward).parameters
        self._no_masks = {name: None for name in names if name.endswith("attention_mask")}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, projection: bool) -> VisionEncoder:
        """An encoder with fresh weights; ``config``: arguments of ``CLIPVisionConfig``, or a ``config.json``.

        ``projection``: with the map that :meth:`pooled` needs (``visual_projection.weight``).
        """
        from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

        kind = CLIPVisionModelWithProjection if projection else CLIPVisionModel
        return cls(kind(CLIPVisionConfig(**without_dtype(config))))

    @property
    def _tower(self) -> Any:
        # In transformers 5 CLIPVisionModel is the tower itself; in 4, and with a projection, it holds one.
        return getattr(self.model, "vision_model", self.model)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def preprocess(self, rgb: Tensor) -> Tensor:
        """Pictures, uint8 [N, 3, H, W], as CLIP sees them: float32 [N, 3, px, px], normalised.

        As the released code: the short side to ``image_px`` by Pillow's bicubic filter (antialiased, 8-bit
        arithmetic), the centre cut out, CLIP's mean and deviation. Raises :class:`~.errors.InputError` for
        another dtype or shape.
        """
        check_pictures(rgb)
        px, sides = self.image_px, rgb.shape[2:]
        short = min(sides)
        height, width = (px if side == short else int(px * side / short) for side in sides)
        top, left = round((height - px) / 2), round((width - px) / 2)
        seen = resize(rgb, height, width, Image.Resampling.BICUBIC)
        seen = unit(seen[..., top : top + px, left : left + px])
        mean, std = (torch.tensor(x, device=rgb.device)[:, None, None] for x in (MEAN, STD))
        return seen.sub(mean).div(std)

    def hidden(self, pixels: Tensor) -> Tensor:
        """Tokens [N, T, D] that enter the last block, of pixels [N, 3, px, px]; T = (px / patch)^2 + 1.

        Paper section 3.2, "local": the penultimate hidden states of all tokens, neither normalised nor
        projected. The last block, whose output nobody reads, is not run.
        """
        tower = self._tower
        tokens = tower.pre_layrnorm(tower.embeddings(pixels.to(self.dtype)))
        for block in tower.encoder.layers[:-1]:
            tokens = block(tokens, **self._no_masks)
            if isinstance(tokens, tuple):
                tokens = tokens[0]
        return tokens

    def pooled(self, pixels: Tensor) -> Tensor:
        """CLIP's image embedding [N, D] of pixels [N, 3, px, px], L2-normalised (section 3.2, "global").

        Raises :class:`~.errors.InputError` when the checkpoint has no projection.
        """
        if not hasattr(self.model, "visual_projection"):
            raise InputError(
                "the image encoder has no visual projection, which the global controller needs; use a "
                "checkpoint whose CLIP has visual.proj (official) or visual_projection.weight (diffusers)"
            )
        return functional.normalize(self.model(pixels.to(self.dtype)).image_embeds, dim=-1)
