"""Models with random weights."""

from __future__ import annotations

import pytest
import torch
from checkpoints import assert_same_model, tiny

from imagedream_rt.engine.random_model import random_layout
from imagedream_rt.engine.weights import inspect, load_model


def test_random_models_are_reproducible_and_run() -> None:
    assert_same_model(tiny("global"), load_model("random:tiny", device="cpu", controller="global"))
    model = tiny("pixel")
    assert model.vision is not None
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 5, 4, 8, 8, generator=generator)
    tokens = model.unet.embed_image(model.vision.hidden(torch.randn(1, 3, 56, 56, generator=generator)))
    eps = model.unet(
        noise,
        torch.tensor([500]),
        model.text(["x"]),
        torch.zeros(1, 5, 16),
        image_tokens=tokens,
        image_latent=noise[:, 0],
    )
    assert eps.shape == noise.shape
    assert 0.1 < eps.std() < 3
    assert 0.1 < model.vae.decode(noise[:, 0]).std() < 3


def test_full_random_model_has_the_released_sizes() -> None:
    layout = random_layout("full", "pixel")
    counts = {name: sum(p.numel() for p in part.network.parameters()) for name, part in layout.parts.items()}
    assert counts["unet"] == 941_672_900
    assert counts["vae"] == 83_653_863
    part = layout.parts["unet"]
    weight = part.tensors["output_blocks.0.0.in_layers.2.weight"]
    assert weight.shape == (1280, 2560, 3, 3)
    assert weight.std().item() == pytest.approx((2560 * 9) ** -0.5, rel=0.01)
    # Rows are stretches of one pool of numbers, and yet independent.
    assert torch.linalg.matrix_rank(weight[:64].flatten(1)) == 64


def test_inspect_makes_no_weights() -> None:
    info = inspect("random:full", "local")
    assert (info.frames, info.latent_px, info.card.layout, info.card.sha256) == (4, 32, "random", "")
    assert {part.dtypes for part in info.parts} == {("float32",)}
