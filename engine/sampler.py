"""Diffuse four consistent views: guided denoising of groups of frames, and the loops around it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from .cameras import official_views
from .conditioning import Conditioner, Conditioning
from .errors import Cancelled, ImageDreamError, InputError
from .model import VIEWS, Cancel, MultiViewModel, Progress
from .schedulers import named_scheduler


def denoise(
    model: MultiViewModel,
    latents: torch.Tensor,
    t: torch.Tensor,
    camera: torch.Tensor,
    conditioning: Conditioning,
    image_latent: torch.Tensor | None,
) -> torch.Tensor:
    """Predicted noise of V views under each of the R rows of ``conditioning``: [R, V, 4, h, w].

    ``latents`` [V, 4, h, w] noisy, V a multiple of four: each four consecutive views are one group that the
    UNet denoises jointly. ``t`` [] one timestep for all. ``camera`` [V, 16]. With ``image_latent``
    [R, 4, h, w] each group gets the prompt's clean latent as a fifth frame, whose camera is all zeros and
    whose own noise is not predicted. The batch is [row 0 of group 0, row 0 of group 1, ..., row 1 of group 0,
    ...].

    A function of tensors: it neither waits for the device nor branches on values.
    """
    frames = latents.unflatten(0, (-1, VIEWS))
    cameras = camera.unflatten(0, (-1, VIEWS))
    if image_latent is not None:
        frames, cameras = (torch.cat([x, torch.zeros_like(x[:, :1])], dim=1) for x in (frames, cameras))
    rows, groups = conditioning.context.shape[0], frames.shape[0]

    def each_row(per_group: torch.Tensor) -> torch.Tensor:
        return per_group.expand(rows, *per_group.shape).flatten(0, 1)

    def each_group(per_row: torch.Tensor | None) -> torch.Tensor | None:
        return (
            None if per_row is None else per_row[:, None].expand(-1, groups, *per_row.shape[1:]).flatten(0, 1)
        )

    # Keys and values need no copy for every group: one row serves all frames of its groups, which lie together.
    known = conditioning.key_values is not None
    eps = model.unet(
        each_row(frames),
        t.expand(rows * groups),
        None if known else each_group(conditioning.context),
        camera=each_row(cameras),
        image_latent=each_group(image_latent),
        image_tokens=None if known else each_group(conditioning.image_tokens),
        key_values=conditioning.key_values,
        keep=VIEWS,
    )
    return eps.reshape(rows, *latents.shape)


def denoise_guided(
    model: MultiViewModel,
    latents: torch.Tensor,
    t: torch.Tensor,
    camera: torch.Tensor,
    conditioning: Conditioning,
    image_latent: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`denoise` with both rows in one batch: (conditional, unconditional) noise, each [V, 4, h, w]."""
    eps_cond, eps_uncond = denoise(model, latents, t, camera, conditioning, image_latent).unbind(0)
    return eps_cond, eps_uncond


def sample_views(
    model: MultiViewModel,
    conditioner: Conditioner,
    *,
    camera: torch.Tensor | None = None,
    steps: int = 30,
    guidance_scale: float = 5.0,
    seed: int = 0,
    scheduler: str = "ddim",
    grey: float = 0.5,
    on_progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> torch.Tensor:
    """Latents [4, 4, h, w], float32 and scaled, of four views of the prompt.

    ``camera`` [4, 16] is what :func:`~.cameras.official_views` gives, and by default the views at azimuth 0,
    90, 180 and 270 and elevation 0. ``scheduler`` is ``ddim``, the released sampler at eta 0 (30 steps make
    31), or a name that :func:`~.schedulers.named_scheduler` knows. Guidance is eps_u + s (eps_c - eps_u);
    with ``guidance_scale`` 1 the unconditional half, which then has no effect, is not computed. ``grey`` in
    [0, 1] lies behind the prompt picture.

    All random numbers come from one CPU generator seeded with ``seed``, in the released order: the prompt's
    VAE noise (``pixel`` only), then the noise of all frames, the fifth included. So a seed gives the same
    views on every device, up to rounding.

    Calls ``on_progress("views", done, total)`` after every step, and raises :class:`Cancelled` when
    ``cancel()`` is true before one. Raises :class:`InputError` for settings out of range, and
    :class:`ImageDreamError` when the result is not finite.
    """
    if not (math.isfinite(guidance_scale) and guidance_scale >= 0.0):
        raise InputError(f"guidance_scale is {guidance_scale}; it must be finite and not negative")
    if not 0.0 <= grey <= 1.0:
        raise InputError(f"grey is {grey}; it must lie in [0, 1]")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed is {seed}; it must lie in [0, 2^63)")
    camera = official_views() if camera is None else camera
    if camera.shape != (VIEWS, 16):
        raise InputError(f"camera has shape {list(camera.shape)}; the sampler takes four views, [4, 16]")
    chosen = named_scheduler(scheduler, steps, model.alphas_cumprod.to(model.device))

    conditioning = conditioner.at_grey(grey)
    with torch.inference_mode():
        generator = torch.Generator().manual_seed(seed)
        frame = (4, model.latent_px, model.latent_px)
        image_latent = None
        if conditioning.image_mean is not None:
            prompt_noise = torch.randn(1, *frame, generator=generator)
            image_latent = conditioning.image_latent(prompt_noise.to(model.device), model.vae)
        noise = torch.randn(model.frames, *frame, generator=generator)[:VIEWS].to(model.device)
        guided = _Guided(model, camera.to(model.device), conditioning, image_latent, guidance_scale)
        total = len(chosen.timesteps)
        latents = chosen.start(noise)
        for step, t in enumerate(chosen.timesteps):
            if cancel is not None and cancel():
                raise Cancelled(f"cancelled after {step} of {total} steps of the views")
            eps = guided(chosen.model_input(step, latents), t)
            latents = chosen.step(step, latents, eps, generator)
            if on_progress is not None:
                on_progress("views", step + 1, total)
        if not bool(torch.isfinite(latents).all()):
            raise ImageDreamError(
                f"the views are not finite after {total} steps of scheduler {scheduler} in {model.dtype}; "
                "try ddim, or float32"
            )
    return latents.clone()  # out of inference mode: an ordinary tensor, which autograd accepts


def decode_views(model: MultiViewModel, latents: torch.Tensor) -> np.ndarray:
    """Pictures uint8 [N, H, W, 3] of scaled latents [N, 4, h, w]; clamped and truncated as released."""
    with torch.inference_mode():
        pictures = model.vae.decode(latents).float()
        levels = ((pictures + 1.0) / 2.0).clamp(0.0, 1.0) * 255.0
        return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


class _Guided:
    """eps(latents, t) with guidance: what every sampler loop calls."""

    def __init__(
        self,
        model: MultiViewModel,
        camera: torch.Tensor,
        conditioning: Conditioning,
        image_latent: torch.Tensor | None,
        scale: float,
    ) -> None:
        if scale == 1.0:
            conditioning = conditioning.conditional()
            image_latent = None if image_latent is None else image_latent[:1]
        if conditioning.key_values is None and model.unet.takes_key_values:
            # They are those of all steps.
            made = model.unet.prompt_key_values(conditioning.context, conditioning.image_tokens)
            conditioning = replace(conditioning, key_values=made)
        self._model, self._camera, self._scale = model, camera, scale
        self._conditioning, self._image_latent = conditioning, image_latent

    def __call__(self, latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        arguments = (self._model, latents, t, self._camera, self._conditioning, self._image_latent)
        if self._scale == 1.0:
            return denoise(*arguments)[0]
        eps_cond, eps_uncond = denoise_guided(*arguments)
        return eps_uncond + self._scale * (eps_cond - eps_uncond)
