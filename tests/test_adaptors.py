"""The image adaptors: formulas, token order, and what zeros become. Parity is in test_unet.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from imagedream_rt.engine.adaptors import (
    RESAMPLER_HEAD_DIM,
    GlobalProjector,
    LinearProjector,
    Resampler,
    ResamplerAttention,
)

MICRO = Path(__file__).parent / "fixtures" / "unet_micro_pixel.safetensors"


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def released_resampler() -> Resampler:
    """Weights that the released code drew, at a small size."""
    prefix = "w.image_embed."
    tensors = load_file(MICRO)
    weights = {name[len(prefix) :]: x.float() for name, x in tensors.items() if name.startswith(prefix)}
    resampler = Resampler(image_dim=1280, width=32, out_dim=32, tokens=16, depth=4, heads=12)
    resampler.load_state_dict(weights)
    return resampler.eval()


def test_attention_follows_its_formula() -> None:
    torch.manual_seed(0)
    layer = ResamplerAttention(width=24, heads=3).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    hidden, latents = randn(2, 7, 24, seed=1).double(), randn(2, 5, 24, seed=2).double()

    x = functional.layer_norm(hidden, (24,), layer.norm1.weight, layer.norm1.bias)
    y = functional.layer_norm(latents, (24,), layer.norm2.weight, layer.norm2.bias)
    q = y @ layer.to_q.weight.T
    keys_and_values = torch.cat((x, y), dim=1) @ layer.to_kv.weight.T
    k, v = keys_and_values[..., : 3 * RESAMPLER_HEAD_DIM], keys_and_values[..., 3 * RESAMPLER_HEAD_DIM :]
    heads = []
    for head in range(3):
        part = slice(head * RESAMPLER_HEAD_DIM, (head + 1) * RESAMPLER_HEAD_DIM)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / RESAMPLER_HEAD_DIM**0.5).softmax(-1)
        heads.append(weights @ v[..., part])
    expected = torch.cat(heads, dim=-1) @ layer.to_out.weight.T
    # The softmax itself runs in float32.
    torch.testing.assert_close(layer(hidden, latents), expected, rtol=1e-5, atol=1e-5)


def test_zeros_become_constant_tokens_that_are_not_zero(released_resampler: Resampler) -> None:
    with torch.no_grad():
        tokens = released_resampler(torch.zeros(2, 257, 1280))
        fewer = released_resampler(torch.zeros(1, 3, 1280))
    assert tokens.shape == (2, 16, 32)
    assert tokens[0].norm() > 1
    assert torch.equal(tokens[0], tokens[1])
    assert not torch.allclose(tokens[:1], fewer)  # the number of zero states weighs in the softmax


def test_rows_are_independent(released_resampler: Resampler) -> None:
    hidden = randn(3, 257, 1280, seed=3)
    with torch.no_grad():
        together = released_resampler(hidden)
        alone = torch.cat([released_resampler(row[None]) for row in hidden])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_resampler(released_resampler: Resampler, dtype: torch.dtype) -> None:
    hidden = randn(1, 257, 1280, seed=4)
    with torch.no_grad():
        truth = released_resampler(hidden)
        half = Resampler(1280, 32, 32, 16, 4, 12)
        half.load_state_dict(released_resampler.state_dict())
        tokens = half.to(dtype)(hidden.to(dtype))
    assert tokens.dtype == dtype
    error = (tokens.float() - truth).norm() / truth.norm()
    assert error < 4 * torch.finfo(dtype).eps


def test_float16_scores_do_not_overflow() -> None:
    """Raw products near 200,000 are beyond float16's 65,504; scaling both sides first keeps them in range."""
    layer = ResamplerAttention(width=32, heads=1).half()
    with torch.no_grad():
        for linear in (layer.to_q, layer.to_kv):
            linear.weight.fill_(0.0)
            linear.weight[:64, 0] = 10.0
    latents = torch.zeros(1, 2, 32).half()
    latents[..., 0] = 30.0  # 5.6 after the norm, so queries and keys are 64 entries of 56
    assert torch.isfinite(layer(latents, latents)).all()


def test_linear_projector_keeps_a_token_for_each_state() -> None:
    torch.manual_seed(0)
    projector = LinearProjector(image_dim=12, out_dim=8)
    hidden = randn(2, 257, 12, seed=5)
    tokens = projector(hidden)
    assert tokens.shape == (2, 257, 8)
    expected = functional.layer_norm(hidden[1, 100] @ projector.proj.weight.T + projector.proj.bias, (8,))
    torch.testing.assert_close(tokens[1, 100], expected)


@pytest.mark.parametrize("shape", [(2, 12), (2, 1, 12)], ids=str)
def test_global_projector_cuts_its_output_into_tokens(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    projector = GlobalProjector(image_dim=12, out_dim=8, tokens=4)
    pooled = randn(*shape, seed=6)
    tokens = projector(pooled)
    assert tokens.shape == (2, 4, 8)
    rows = slice(2 * 8, 3 * 8)  # token 2
    feature = pooled.reshape(2, 12)[1]
    expected = functional.layer_norm(
        feature @ projector.proj.weight[rows].T + projector.proj.bias[rows], (8,)
    )
    torch.testing.assert_close(tokens[1, 2], expected)
