"""Trains the embedded model's UNet, image encoder and caption encoder together on latents (paper section 4).

The paper's recipe at small scale: epsilon prediction on four views with a clean fifth frame of camera zero; prompt
dropped with probability 0.1, replaced by what inference uses for "no prompt": zero features and a zero latent. Ours:
the image and caption encoders learn along (there is no CLIP to borrow), and the loss is weighted by min(SNR, 5) / SNR.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..model import VIEWS
from ..schedule import TRAIN_STEPS, q_sample
from ..text import TextEncoder
from ..unet import MultiViewUNet
from ..vae import LatentCodec
from ..vision import MEAN, STD, VisionEncoder
from .dataset import GroupSampler, signed
from .kinds import KINDS
from .objects import COLOURS

DROP_PROMPT = 0.1
DROP_TEXT = 0.5
LEARNING_RATE = 6e-4
WARMUP_STEPS = 400
SNR_LIMIT = 5.0
EMA = 0.9995


class Denoiser(nn.Module):
    """What is trained together."""

    def __init__(self, unet: MultiViewUNet, text: TextEncoder, vision: VisionEncoder) -> None:
        super().__init__()
        self.unet, self.text, self.vision = unet, text, vision


@dataclass
class Batch:
    """B groups, ready for a step."""

    latents: Tensor
    """[B, 4, 4, h, w] clean, scaled."""
    prompt_latent: Tensor
    """[B, 4, h, w]."""
    pixels: Tensor
    """[B, 3, px, px] for the image encoder."""
    camera: Tensor
    """[B, 5, 16]."""
    caption: Tensor
    """[B, 77] ids."""


class LatentPool:
    """Groups encoded once by the codec and drawn many times, with fresh posterior noise; steadily replaced."""

    def __init__(self, groups: GroupSampler, codec: LatentCodec, text: TextEncoder, size: int) -> None:
        """``size`` groups, a multiple of the sampler's chunk."""
        self.groups, self.codec, self.size, self.chunk = groups, codec, size, groups.chunk
        self.captions = _caption_table(text).to(groups.device)
        self.empty = text.tokenize([""])[0].to(groups.device)
        self.pixel_mean, self.pixel_std = (
            torch.tensor(values, device=groups.device)[:, None, None] for values in (MEAN, STD)
        )
        first = self._encode()
        self.columns = [torch.empty((size, *c.shape[1:]), dtype=c.dtype, device=c.device) for c in first]
        self.cursor, self.filled = 0, 0
        while self.filled < size:
            self.refresh()

    @torch.no_grad()
    def _encode(self) -> tuple[Tensor, ...]:
        drawn = self.groups.sample()
        pictures = torch.cat((drawn.views, drawn.prompt[:, None]), 1).flatten(0, 1)
        with torch.autocast(pictures.device.type, torch.bfloat16, enabled=pictures.is_cuda):
            mean, std = self.codec.moments(signed(pictures))
        mean, std = mean.half().unflatten(0, (-1, VIEWS + 1)), std.half().unflatten(0, (-1, VIEWS + 1))
        return mean, std, drawn.prompt, drawn.camera, drawn.kind * len(COLOURS) + drawn.colour_name

    def refresh(self) -> None:
        """Replaces the oldest ``chunk`` groups."""
        for column, fresh in zip(self.columns, self._encode(), strict=True):
            column[self.cursor : self.cursor + self.chunk] = fresh
        self.cursor = (self.cursor + self.chunk) % self.size
        self.filled += self.chunk

    def draw(self, count: int) -> Batch:
        """``count`` random groups; half of the captions are empty."""
        device = self.groups.device
        rows = torch.randint(self.size, (count,), device=device)
        mean, std, prompt, camera, caption = (column[rows] for column in self.columns)
        latents = self.codec.sample(mean.float(), std.float(), torch.randn(mean.shape, device=device))
        captions = self.captions[caption]
        silent = torch.rand(count, device=device) < DROP_TEXT
        return Batch(
            latents=latents[:, :VIEWS],
            prompt_latent=latents[:, VIEWS],
            pixels=(prompt.movedim(-1, 1).float() / 255 - self.pixel_mean) / self.pixel_std,
            camera=functional.pad(camera, (0, 0, 0, 1)),
            caption=torch.where(silent[:, None], self.empty, captions),
        )


def _caption_table(text: TextEncoder) -> Tensor:
    return text.tokenize([f"a {colour} {kind}" for kind in KINDS for colour in COLOURS])


def denoising_loss(model: Denoiser, batch: Batch, empty_caption: Tensor, abar: Tensor) -> Tensor:
    """Weighted squared error of the predicted noise of the four views; ``abar`` is the schedule, [1000]."""
    device, count = batch.latents.device, len(batch.latents)
    t = torch.randint(TRAIN_STEPS, (count,), device=device)
    noise = torch.randn(batch.latents.shape, device=device)
    noisy = q_sample(batch.latents, t, noise, abar)
    keep = (torch.rand(count, device=device) >= DROP_PROMPT).float()

    context = model.text.context(torch.where(keep[:, None] > 0, batch.caption, empty_caption))
    hidden = model.vision.hidden(batch.pixels) * keep[:, None, None]
    frames = functional.pad(noisy, (0, 0, 0, 0, 0, 0, 0, 1))
    predicted = model.unet(
        frames,
        t,
        context,
        camera=batch.camera,
        image_hidden=hidden,
        image_latent=batch.prompt_latent * keep[:, None, None, None],
    )
    error = (predicted[:, :VIEWS].float() - noise).square().mean((1, 2, 3, 4))
    snr = abar[t] / (1 - abar[t])
    return (error * (snr.clamp_max(SNR_LIMIT) / snr)).mean()


def learning_rate(step: int, used: float) -> float:
    """Linear warm-up by steps, then half a cosine over the share ``used`` of the time, down to 1 %."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(used, 1.0)))
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * max(cosine, 0.01)
