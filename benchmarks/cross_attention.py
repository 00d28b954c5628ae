"""Decoupled cross-attention at the UNet's levels: ten frames in two groups, 77 text and 16 or 257 image tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kernels.attention import _xformers_attention
from ..kernels.cross_attention import decoupled_cross_attention, decoupled_cross_attention_reference
from .harness import OURS, Case

FRAMES, GROUPS, TEXT, SIZE = 10, 2, 77, 64
LEVELS = [(1024, 5), (256, 10), (64, 20), (16, 20)]
"""Tokens of a frame and heads."""
IMAGE_SCALE = 0.7


def cases() -> Iterator[Case]:
    for tokens, heads in LEVELS:
        yield _case(tokens, heads, 16)
    yield _case(*LEVELS[0], 257)  # a picture that no resampler has shortened


def _case(tokens: int, heads: int, image: int) -> Case:
    q = torch.randn(FRAMES, tokens, heads, SIZE, device="cuda", dtype=torch.float16)
    k_text, v_text = torch.randn(2, GROUPS, TEXT, heads, SIZE, device="cuda", dtype=torch.float16)
    k_image, v_image = torch.randn(2, GROUPS, image, heads, SIZE, device="cuda", dtype=torch.float16)
    inputs = (q, k_text, v_text, k_image, v_image, IMAGE_SCALE)

    def twice(backend: SDPBackend) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return decoupled_cross_attention(*inputs, backend="torch")

        return run

    def xformers() -> Tensor:
        attend, rows = _xformers_attention(), q.view(GROUPS, -1, heads, SIZE)
        out = attend(rows, k_text, v_text) + IMAGE_SCALE * attend(rows, k_image, v_image)
        return out.view(FRAMES, tokens, heads * SIZE)

    compiled = torch.compile(decoupled_cross_attention_reference, dynamic=False)
    return Case(
        kernel="cross_attention",
        name=f"{FRAMES} x {tokens} tokens, {heads} heads, {TEXT} + {image} keys",
        contenders={
            OURS: lambda: decoupled_cross_attention(*inputs),
            "SDPA twice": lambda: decoupled_cross_attention(*inputs, backend="torch"),
            "SDPA flash twice": twice(SDPBackend.FLASH_ATTENTION),
            "SDPA cuDNN twice": twice(SDPBackend.CUDNN_ATTENTION),
            "SDPA efficient twice": twice(SDPBackend.EFFICIENT_ATTENTION),
            "xformers twice": xformers,
            "torch.compile": lambda: compiled(*inputs),
        },
        reference=lambda: decoupled_cross_attention_reference(
            q.float(), k_text.float(), v_text.float(), k_image.float(), v_image.float(), IMAGE_SCALE
        ),
        tolerance=2e-3,
        work=float(2 * q.nbytes + 2 * k_text.nbytes + 2 * k_image.nbytes),
        unit="TB/s",
    )
