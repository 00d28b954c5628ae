"""Multi-view score distillation: what the diffusion model would rather see than the rendered views."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import FusionConfig
from .model import VIEWS, MultiViewModel
from .sampler import denoise
from .schedule import TRAIN_STEPS, predict_x0, q_sample

if TYPE_CHECKING:
    from .cameras import Cameras
    from .conditioning import Conditioner, Conditioning

STD_FLOOR = 1e-8

Colour = tuple[float, float, float]
"""RGB in [0, 1]."""


class Guidance(Protocol):
    """What the fusion needs from a teacher: the diffusion model, or an oracle in tests."""

    identity: dict[str, str]
    """What the targets depend on (model, picture, prompt): a checkpoint is resumed only with the same."""

    def encode(self, rgb: Tensor, generator: torch.Generator) -> Tensor:
        """Renders [V, H, W, 3] in [0, 1] to float32 latents [V, 4, h, w], differentiable."""
        ...

    def target(
        self, latents: Tensor, cameras: Cameras, colour: Colour, t: int, generator: torch.Generator
    ) -> Tensor:
        """x0 [V, 4, h, w] float32, without gradient, of ``latents`` seen by ``cameras`` over ``colour``."""
        ...


def timestep_range(config: FusionConfig, step: int) -> tuple[int, int]:
    """Least and greatest timestep of a step, both inclusive, truncated as in the released code.

    >>> from imagedream_rt.engine.config import OFFICIAL
    >>> timestep_range(OFFICIAL, 1000)
    (860, 919)
    """
    return int(TRAIN_STEPS * config.min_step.at(step)), int(TRAIN_STEPS * config.max_step.at(step))


def matched_colour(background_rgb: Tensor, match: Literal["grey", "colour"]) -> Colour:
    """The colour to put behind the prompt: the mean of the rendered background [..., 3].

    ``grey`` (released code) is the mean over the channels too; ``colour`` (paper) is not. Waits for the
    device.
    """
    mean = background_rgb.detach().float().reshape(-1, 3).mean(0)
    if match == "grey":
        mean = mean.mean().expand(3)
    red, green, blue = mean.tolist()
    return red, green, blue


def reconstruction_target(
    noisy: Tensor,
    eps_cond: Tensor,
    eps_uncond: Tensor,
    t: Tensor,
    alphas_cumprod: Tensor,
    *,
    guidance_scale: float,
    std_rescale: float,
) -> Tensor:
    """The x0 of the guided prediction, its contrast pulled towards that of the conditional prediction.

    ``noisy``, ``eps_cond``, ``eps_uncond``: [V, 4, h, w], V a multiple of four, groups of four consecutive
    views; ``t`` integer []; ``alphas_cumprod`` [1000]. With ``std_rescale`` r, each group becomes
    ``x0 * (r * std(x0_cond) / std(x0) + 1 - r)``, unbiased std over the whole group. Returns float32, no
    gradient expected. Source: released ``multiview_diffusion_guidance``; the rescale is Lin et al. 2023,
    equation 15.
    """
    noisy, eps_cond, eps_uncond = noisy.float(), eps_cond.float(), eps_uncond.float()
    guided = predict_x0(noisy, eps_uncond + guidance_scale * (eps_cond - eps_uncond), t, alphas_cumprod)
    if std_rescale == 0.0:
        return guided
    conditional = predict_x0(noisy, eps_cond, t, alphas_cumprod)
    factor = (_group_std(conditional) + STD_FLOOR) / (_group_std(guided) + STD_FLOOR)
    factor = factor.repeat_interleave(VIEWS)[:, None, None, None]
    return std_rescale * (guided * factor) + (1 - std_rescale) * guided


def _group_std(x: Tensor) -> Tensor:
    return x.reshape(-1, VIEWS * x[0].numel()).std(dim=1)


class MultiViewGuidance:
    """The diffusion model as a :class:`Guidance`, conditioned on one prompt (through its conditioner)."""

    def __init__(self, model: MultiViewModel, conditioner: Conditioner, config: FusionConfig) -> None:
        self.model = model
        self.conditioner = conditioner
        self.config = config
        self.alphas_cumprod = model.alphas_cumprod.to(model.device)
        self.identity = {
            "model": f"{model.card.family} {model.card.controller} {model.card.sha256}",
            **conditioner.identity,
        }

    def encode(self, rgb: Tensor, generator: torch.Generator) -> Tensor:
        """Bilinear to the model's picture size where needed, not antialiased; then a posterior sample."""
        pictures = rgb.permute(0, 3, 1, 2)
        side = self.model.card.picture_px
        if pictures.shape[-2:] != (side, side):
            pictures = F.interpolate(pictures, size=(side, side), mode="bilinear", align_corners=False)
        noise = self._noise(len(rgb), generator)
        return self.model.vae.encode(pictures * 2 - 1, noise).float()

    @torch.no_grad()
    def target(
        self, latents: Tensor, cameras: Cameras, colour: Colour, t: int, generator: torch.Generator
    ) -> Tensor:
        timestep = torch.tensor(t, device=latents.device)
        camera = cameras.embedding().to(latents.device)
        return self.target_given(self.conditioner.at(colour), latents, camera, timestep, generator)

    @torch.no_grad()
    def target_given(
        self,
        conditioning: Conditioning,
        latents: Tensor,
        camera: Tensor,
        timestep: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """:meth:`target` under given conditions: a function of tensors, which never waits for the device.

        ``camera`` [V, 16] embeddings, ``timestep`` integer []. Draws the noise of the views, then that of the
        prompt latent, from ``generator``.
        """
        noise = self._noise(len(latents), generator)
        noisy = q_sample(latents.detach(), timestep, noise, self.alphas_cumprod)
        prompt_noise = self._noise(1, generator)
        scale = self.config.guidance_scale
        if scale == 1.0:
            # Guidance and rescale then change nothing: half the work.
            conditioning = conditioning.conditional()
        image_latent = conditioning.image_latent(prompt_noise, self.model.vae)
        eps = denoise(self.model, noisy, timestep, camera, conditioning, image_latent)
        if scale == 1.0:
            return predict_x0(noisy, eps[0], timestep, self.alphas_cumprod)
        eps_cond, eps_uncond = eps.unbind(0)
        return reconstruction_target(
            noisy,
            eps_cond,
            eps_uncond,
            timestep,
            self.alphas_cumprod,
            guidance_scale=scale,
            std_rescale=self.config.recon_std_rescale,
        )

    def _noise(self, count: int, generator: torch.Generator) -> Tensor:
        px = self.model.latent_px
        noise = torch.randn(count, 4, px, px, generator=generator, device=generator.device)
        return noise.to(self.model.device)
