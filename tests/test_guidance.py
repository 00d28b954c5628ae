"""The diffusion model as teacher and as source of views, with random weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_fusion import TINY, TINY_WARM

from imagedream_rt.engine.cameras import official_views, sample_cameras
from imagedream_rt.engine.conditioning import Conditioner
from imagedream_rt.engine.distill import MultiViewGuidance, reconstruction_target
from imagedream_rt.engine.model import MultiViewModel
from imagedream_rt.engine.picture import PreparedPicture
from imagedream_rt.engine.sampler import decode_views, denoise_guided, sample_views
from imagedream_rt.engine.schedule import q_sample
from imagedream_rt.engine.warm_start import DiffusedViews, plan_views
from imagedream_rt.engine.weights import load_model

VIEWS = 8


@pytest.fixture(scope="module")
def model() -> MultiViewModel:
    return load_model("random:tiny", device="cpu", controller="pixel")


@pytest.fixture(scope="module")
def guidance(model) -> MultiViewGuidance:
    rgba = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    return MultiViewGuidance(model, Conditioner(model, PreparedPicture(rgba, ()), "a robot"), TINY)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("resolution", [24, 64])
def test_encode_is_a_posterior_sample_of_the_resized_render(model, guidance, resolution):
    rgb = (torch.rand(4, resolution, resolution, 3, generator=seeded(0)) * 1.2).requires_grad_()
    latents = guidance.encode(rgb, seeded(1))
    assert latents.shape == (4, 4, model.latent_px, model.latent_px)
    latents.square().sum().backward()
    assert rgb.grad is not None
    assert rgb.grad.count_nonzero() > 0.9 * rgb.numel()
    pictures = rgb.detach().permute(0, 3, 1, 2)
    if resolution != 64:
        pictures = F.interpolate(pictures, size=(64, 64), mode="bilinear", align_corners=False)
    mean, std = model.vae.moments(2 * pictures - 1)
    expected = model.vae.scaling_factor * (mean + std * torch.randn(latents.shape, generator=seeded(1)))
    torch.testing.assert_close(latents, expected)


def test_target_is_the_guided_reconstruction(model, guidance):
    """Two groups; the noise of the views is drawn first, then that of the prompt's latent."""
    latents = torch.randn(VIEWS, 4, model.latent_px, model.latent_px, generator=seeded(0)).requires_grad_()
    cameras = sample_cameras(TINY.camera, 2, seeded(1))
    colour, t, generator = (0.2, 0.5, 0.9), 400, seeded(2)
    target = guidance.target(latents, cameras, colour, t, generator)
    assert not target.requires_grad

    generator = seeded(2)
    noise = torch.randn(latents.shape, generator=generator)
    prompt_noise = torch.randn(1, *latents.shape[1:], generator=generator)
    noisy = q_sample(latents.detach(), torch.tensor(t), noise, model.alphas_cumprod)
    conditioning = guidance.conditioner.at(colour)
    image_latent = conditioning.image_latent(prompt_noise, model.vae)
    halves = [
        denoise_guided(model, noisy[g], torch.tensor(t), cameras.embedding()[g], conditioning, image_latent)
        for g in (slice(0, 4), slice(4, 8))
    ]
    eps_cond, eps_uncond = (torch.cat(rows) for rows in zip(*halves, strict=True))
    expected = reconstruction_target(
        noisy,
        eps_cond,
        eps_uncond,
        torch.tensor(t),
        model.alphas_cumprod,
        guidance_scale=TINY.guidance_scale,
        std_rescale=TINY.recon_std_rescale,
    )
    torch.testing.assert_close(target, expected, rtol=1e-4, atol=1e-5)
    other = guidance.target(latents, cameras, (0.9, 0.5, 0.2), t, seeded(2))
    assert not torch.allclose(other, target, rtol=1e-3, atol=1e-3)  # the prompt stands on another colour


def test_guidance_of_one_skips_the_unconditional_half(model, guidance, monkeypatch):
    latents = torch.randn(4, 4, model.latent_px, model.latent_px, generator=seeded(0))
    cameras = sample_cameras(TINY.camera, 1, seeded(1))
    plain = MultiViewGuidance(model, guidance.conditioner, replace(TINY, guidance_scale=1.0))
    nearly = MultiViewGuidance(model, guidance.conditioner, replace(TINY, guidance_scale=1.0 + 1e-7))
    both = nearly.target(latents, cameras, (0.5, 0.5, 0.5), 300, seeded(2))
    monkeypatch.delattr("imagedream_rt.engine.distill.reconstruction_target")
    torch.testing.assert_close(
        plain.target(latents, cameras, (0.5, 0.5, 0.5), 300, seeded(2)), both, rtol=1e-4, atol=1e-5
    )


def test_identity_names_model_and_prompt(model, guidance):
    other = MultiViewGuidance(model, Conditioner(model, guidance.conditioner.picture, "a cat"), TINY)
    differing = {name for name in other.identity if other.identity[name] != guidance.identity[name]}
    assert differing == {"prompt"}
    assert model.card.sha256 in guidance.identity["model"]


def test_diffused_views_are_the_sampler_s(model, guidance):
    config = replace(TINY_WARM, guidance_scale=1.5)
    view_set = plan_views(config)[1]
    progress: list[tuple[str, int, int]] = []
    source = DiffusedViews(model, guidance.conditioner, config, seed=4)
    pictures = source(view_set, lambda *event: progress.append(event), None)
    assert config.warm_start is not None
    latents = sample_views(
        model,
        guidance.conditioner,
        camera=official_views(view_set.elevation_deg, view_set.azimuth_deg),
        steps=config.warm_start.ddim_steps,
        guidance_scale=1.5,
        seed=4,
        grey=source.grey,
    )
    assert np.array_equal(pictures.numpy(), decode_views(model, latents))
    assert pictures.shape == (4, 64, 64, 3)
    assert progress[-1][1] == progress[-1][2]
