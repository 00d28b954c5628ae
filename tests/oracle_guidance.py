"""Stand-ins for the diffusion model: an oracle that knows the true noise, and a source of true views."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from analytic_scene import render_scene
from torch import Tensor

from imagedream_rt.engine.cameras import Cameras
from imagedream_rt.engine.config import FusionConfig
from imagedream_rt.engine.distill import reconstruction_target
from imagedream_rt.engine.schedule import alphas_cumprod, q_sample
from imagedream_rt.engine.warm_start import ViewSet, view_cameras

# Columns of length about two: a colour moves the latents about as much as with Stable Diffusion's VAE.
MIX = torch.tensor([[1.0, 1.0, 1.0, 0.5], [1.0, -1.0, 0.2, 1.2], [1.0, 0.2, -1.2, -0.8]])


class OracleGuidance:
    """Latents are a fixed linear mix of the pixels; the noise predicted is the one that leads to the true
    view."""

    identity = {"teacher": "oracle of the analytic scene"}  # noqa: RUF012 (as the protocol has it)

    def __init__(self, config: FusionConfig, latent_px: int) -> None:
        self.config = config
        self.latent_px = latent_px
        self.alphas_cumprod = alphas_cumprod()

    def encode(self, rgb: Tensor, generator: torch.Generator) -> Tensor:
        pictures = (2 * rgb - 1) @ MIX
        size = (self.latent_px, self.latent_px)
        return F.interpolate(pictures.permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=False)

    def target(
        self,
        latents: Tensor,
        cameras: Cameras,
        colour: tuple[float, float, float],
        t: int,
        generator: torch.Generator,
    ) -> Tensor:
        timestep = torch.tensor(t)
        noisy = q_sample(
            latents, timestep, torch.randn(latents.shape, generator=generator), self.alphas_cumprod
        )
        true = self.encode(render_scene(cameras, self.latent_px, torch.tensor(colour))[0], generator)
        alpha = self.alphas_cumprod[t]
        eps = (noisy - alpha.sqrt() * true) / (1 - alpha).sqrt()
        return reconstruction_target(
            noisy,
            eps,
            eps,
            timestep,
            self.alphas_cumprod,
            guidance_scale=self.config.guidance_scale,
            std_rescale=self.config.recon_std_rescale,
        )


def true_views(config: FusionConfig, side: int, background: float = 0.5):
    """A view source that renders the scene instead of diffusing it."""

    def source(views: ViewSet, on_progress, cancel) -> Tensor:
        pictures, _ = render_scene(view_cameras(config, [views]), side, torch.full((3,), background))
        return (pictures * 255).to(torch.uint8)

    return source
