"""Prompt and background to tensors: rows, cache, truncation, and the latents of the fifth frame."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from imagedream_rt.engine import conditioning as module
from imagedream_rt.engine.conditioning import Conditioner
from imagedream_rt.engine.errors import InputError
from imagedream_rt.engine.model import Controller, MultiViewModel
from imagedream_rt.engine.picture import PreparedPicture, composite
from imagedream_rt.engine.weights import load_model

WITH_PICTURE: list[Controller] = ["pixel", "local", "local-linear", "global"]
RECORDED = load_file(Path(__file__).parent / "fixtures" / "denoise_batch.safetensors")


@cache
def tiny(controller: Controller) -> MultiViewModel:
    return load_model("random:tiny", controller=controller, device="cpu")


def given(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor


def picture(alpha: int | None = None) -> PreparedPicture:
    rgba = np.random.default_rng(0).integers(0, 256, (48, 48, 4), dtype=np.uint8)
    if alpha is not None:
        rgba[..., 3] = alpha
    return PreparedPicture(rgba)


def over(rgba: np.ndarray, *colour: float) -> torch.Tensor:
    """uint8 [1, 3, H, W]."""
    return composite(torch.from_numpy(rgba), torch.tensor([colour]))


@pytest.mark.parametrize("controller", WITH_PICTURE)
def test_rows_are_prompt_and_nothing(controller):
    model = tiny(controller)
    assert model.vision is not None
    got = Conditioner(model, picture(), "a cat", "ugly").at((0.2, 0.4, 1.0))
    rgb = over(picture().rgba, 51, 102, 255)
    encode = model.vision.pooled if controller == "global" else model.vision.hidden
    features = encode(model.vision.preprocess(rgb))
    assert torch.equal(got.context[:1], model.text(["a cat"]))
    assert torch.equal(got.context[1:], model.text(["ugly"]))
    assert torch.equal(given(got.image_tokens)[:1], model.unet.embed_image(features))
    nothing = model.unet.embed_image(torch.zeros_like(features))
    assert torch.equal(given(got.image_tokens)[1:], nothing)
    assert nothing.abs().max() > 0.01
    assert (got.image_mean is None) == (got.image_std is None) == (controller != "pixel")


def test_pixel_keeps_the_posterior_of_the_composite():
    model = tiny("pixel")
    got = Conditioner(model, picture()).at_grey(0.25)
    seen = model.vae.preprocess(over(picture().rgba, 63, 63, 63), model.card.picture_px)
    mean, std = model.vae.moments(seen)
    assert torch.equal(given(got.image_mean), mean)
    assert torch.equal(given(got.image_std), std)


def test_image_latent_is_a_posterior_sample_above_zeros():
    model = tiny("pixel")
    conditioning = Conditioner(model, picture()).at_grey(0.5)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latent = given(conditioning.image_latent(noise, model.vae))
    assert latent.shape == (2, 4, 8, 8)
    by_hand = model.vae.scaling_factor * (
        given(conditioning.image_mean) + given(conditioning.image_std) * noise
    )
    assert torch.equal(latent[:1], by_hand)
    assert (latent[1] == 0).all()
    alone = conditioning.conditional()
    assert alone.context.shape[0] == given(alone.image_tokens).shape[0] == 1
    assert torch.equal(given(alone.image_latent(noise, model.vae)), latent[:1])
    assert Conditioner(tiny("local"), picture()).at_grey(0.5).image_latent(noise, model.vae) is None


def test_text_alone():
    got = Conditioner(tiny("none"), None, "a cat", "ugly").at_grey(0.5)
    assert got.context.shape == (2, 77, 64)
    assert got.image_tokens is None
    assert got.image_mean is None
    assert got.conditional().context.shape[0] == 1


def test_only_the_integer_level_counts_and_is_computed_once(monkeypatch):
    conditioner = Conditioner(tiny("local"), picture())
    calls = []

    def counted(rgba, colours):
        calls.append(colours.tolist())
        return composite(rgba, colours)

    monkeypatch.setattr(module, "composite", counted)
    low = conditioner.at_grey(100.2 / 255)
    assert conditioner.at_grey(100.9 / 255) is low
    assert conditioner.at((100.5 / 255,) * 3) is low
    assert calls == [[[100, 100, 100]]]
    above = conditioner.at_grey(101.1 / 255)
    assert above.context is low.context
    assert not torch.equal(given(above.image_tokens), given(low.image_tokens))
    assert conditioner.at_grey(-0.5) is conditioner.at_grey(0.0)
    assert conditioner.at_grey(1.5) is conditioner.at_grey(1.0)


def test_opaque_pictures_do_not_depend_on_the_background():
    conditioner = Conditioner(tiny("pixel"), picture(alpha=255))
    dark, light = conditioner.at_grey(0.0), conditioner.at_grey(1.0)
    assert torch.equal(given(dark.image_tokens), given(light.image_tokens))
    assert torch.equal(given(dark.image_mean), given(light.image_mean))


def test_the_cache_is_bounded_and_forgets_the_oldest(monkeypatch):
    monkeypatch.setattr(module, "CACHED_COLOURS", 3)
    conditioner = Conditioner(tiny("local"), picture())
    first, second = conditioner.at_grey(0.0), conditioner.at_grey(0.1)
    conditioner.at_grey(0.2)
    assert conditioner.at_grey(0.0) is first  # now the most recently used
    conditioner.at_grey(0.3)
    assert conditioner.at_grey(0.0) is first
    assert conditioner.at_grey(0.1) is not second
    assert torch.equal(given(conditioner.at_grey(0.1).image_tokens), given(second.image_tokens))


def test_tensors_are_ordinary_and_without_gradient_whoever_asks_first():
    model = tiny("pixel")
    with torch.inference_mode():
        conditioner = Conditioner(model, picture())
        got = conditioner.at_grey(0.5)
    for tensor in map(given, (got.context, got.image_tokens, got.image_mean, got.image_std)):
        assert not tensor.is_inference()
        assert not tensor.requires_grad


def test_truncating_the_grey_stays_within_one_level_of_the_released_composite():
    grey = 0.37 * 255  # 94.35: recorded at this level, with soft alpha
    released = torch.from_numpy(RECORDED["pixel.composite"]).permute(2, 0, 1)
    rgba = RECORDED["pixel.prompt_rgba"]
    assert torch.equal(over(rgba, grey, grey, grey)[0], released)
    assert (over(rgba, 94, 94, 94)[0].int() - released).abs().max() == 1


def test_identity_names_what_the_conditions_depend_on():
    model = tiny("local")
    one = Conditioner(model, picture(), "a cat", "ugly").identity
    assert one == Conditioner(model, picture(), "a cat", "ugly").identity
    assert one["prompt"] == "a cat"
    assert one["picture"] != Conditioner(model, picture(alpha=3), "a cat", "ugly").identity["picture"]
    assert Conditioner(tiny("none"), None, "a cat").identity["picture"] == "none"


def test_a_picture_too_many_or_too_few_is_refused():
    with pytest.raises(InputError, match="text alone"):
        Conditioner(tiny("none"), picture(), "a cat")
    with pytest.raises(InputError, match="needs a prompt picture"):
        Conditioner(tiny("pixel"), None, "a cat")
    with pytest.raises(InputError, match="finite"):
        Conditioner(tiny("local"), picture()).at((0.0, float("nan"), 0.0))
