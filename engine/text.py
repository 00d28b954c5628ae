"""CLIP's text tower: prompts to the context that the UNet attends to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .clip_layout import without_dtype
from .errors import InputError
from .tokenizer import Tokenizer, clean_text

if TYPE_CHECKING:
    from transformers import CLIPTextModel


class TextEncoder(nn.Module):
    """transformers' ``CLIPTextModel`` with its tokenizer."""

    def __init__(self, model: CLIPTextModel, tokenizer: Tokenizer) -> None:
        """Raises :class:`~.errors.InputError` when the tokenizer's ids do not fit the model's vocabulary."""
        super().__init__()
        vocabulary = int(model.config.vocab_size)
        if tokenizer.size > vocabulary:
            raise InputError(
                f"the tokenizer knows {tokenizer.size} tokens, the text encoder {vocabulary}; give the "
                "tokenizer that belongs to this model"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.length = int(model.config.max_position_embeddings)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tokenizer: Tokenizer) -> TextEncoder:
        """An encoder with fresh weights; ``config``: arguments of ``CLIPTextConfig`` (a ``config.json``)."""
        from transformers import CLIPTextConfig, CLIPTextModel

        return cls(CLIPTextModel(CLIPTextConfig(**without_dtype(config))), tokenizer)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Ids, int64 [N, 77], as open_clip makes them: start, text, end, then padding.

        A prompt that is too long is cut, and its last id is still the end of text.
        """
        rows = []
        for prompt in prompts:
            ids = self.tokenizer.encode(clean_text(prompt))[: self.length - 2]
            ids = [self.tokenizer.bos_id, *ids, self.tokenizer.eos_id]
            rows.append(ids + [self.tokenizer.pad_id] * (self.length - len(ids)))
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, self.length)

    def context(self, ids: Tensor) -> Tensor:
        """Context [N, 77, D] of ids [N, 77]: causal attention without padding mask, final LayerNorm."""
        device = next(self.model.parameters()).device
        return self.model(input_ids=ids.to(device)).last_hidden_state

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Context [N, 77, D] of prompts."""
        return self.context(self.tokenize(prompts))
