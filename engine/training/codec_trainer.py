"""Trains the embedded model's VAE on rendered pictures: reconstruction in colour and in edges, a whisper of KL."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..graphed import GraphedStep
from ..layers import fast_memory_format
from ..vae import LatentCodec
from .dataset import GroupSampler, signed

KL_WEIGHT = 2e-7
LEARNING_RATE = 1e-3
EDGE_WEIGHT = 0.5
POOL = 16_384
"""Pictures kept; on the CPU, for trials, a single chunk."""
REFRESH_EVERY = 50


class Averages:
    """Exponential moving averages of a module's parameters, kept in a copy of it."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (step + 1) / (step + 10))
        mine, theirs = ([p.detach() for p in m.parameters()] for m in (self.module, module))
        torch._foreach_lerp_(mine, theirs, 1 - decay)


def codec_loss(codec: LatentCodec, pictures: Tensor) -> Tensor:
    """L1 + L1 of first differences + KL of a batch of pictures [N, 3, H, W] in [-1, 1]."""
    posterior = codec.vae.encode(pictures).latent_dist
    mean, logvar = posterior.mean, posterior.logvar
    decoded = codec.vae.decode(mean + (0.5 * logvar).exp() * torch.randn_like(mean)).sample.float()
    error = decoded - pictures
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (mean.float() ** 2 + logvar.float().exp() - 1 - logvar.float()).sum((1, 2, 3)).mean()
    return error.abs().mean() + EDGE_WEIGHT * edges + error.square().mean() + KL_WEIGHT * kl


def blurred(pictures: Tensor) -> Tensor:
    """A quarter of the batch as the fusion's early stages show it: rendered small and magnified."""
    count = len(pictures) // 8
    parts = [pictures[2 * count :]]
    for index, factor in enumerate((2, 4)):
        small = functional.avg_pool2d(pictures[index * count : (index + 1) * count], factor)
        parts.append(functional.interpolate(small, scale_factor=factor, mode="bilinear", align_corners=False))
    return torch.cat(parts)


def train_codec(
    codec: LatentCodec, groups: GroupSampler, seconds: float, batch: int, report: Callable[[str, float], None]
) -> LatentCodec:
    """Trains ``codec`` for ``seconds``; returns its moving average, with ``scaling_factor`` 1 / std of latents."""
    device = groups.device
    cuda = device.type == "cuda"
    fast_memory_format(codec)
    averages = Averages(codec, 0.999)
    rate, losses = torch.zeros((), device=device), torch.zeros((), device=device)
    optimizer = torch.optim.AdamW(
        codec.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0, fused=cuda, capturable=cuda
    )
    start, count = time.monotonic(), 0
    fresh = _pictures(groups)
    size = POOL // len(fresh) * len(fresh) if cuda else len(fresh)
    pool = torch.cat([fresh, *(_pictures(groups) for _ in range(size // len(fresh) - 1))])

    def step() -> None:
        rows = torch.randint(len(pool), (batch,), device=device)
        pictures = blurred(signed(pool[rows]))
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda, cache_enabled=False):
            loss = codec_loss(codec, pictures)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        losses.add_(loss.detach())

    graphed = GraphedStep(step, device)
    while (used := (time.monotonic() - start) / seconds) < 1:
        if count % REFRESH_EVERY == REFRESH_EVERY - 1:
            at = (count // REFRESH_EVERY * len(fresh)) % size
            pool[at : at + len(fresh)] = _pictures(groups)
        rate.fill_(LEARNING_RATE * min(1.0, (count + 1) / 200) * max(0.02, 1 - used))
        graphed()
        averages.update(codec, count)
        count += 1
        if count % 100 == 0:
            report(f"codec step {count} loss {losses.item() / 100:.4f}", used)
            losses.zero_()
    trained = averages.module
    assert isinstance(trained, LatentCodec)
    _set_scale(trained, signed(_pictures(groups)))
    return trained


def _pictures(groups: GroupSampler) -> Tensor:
    drawn = groups.sample()
    return torch.cat((drawn.views.flatten(0, 1), drawn.prompt))


@torch.no_grad()
def _set_scale(codec: LatentCodec, pictures: Tensor) -> None:
    mean, std = codec.moments(pictures)
    scale = 1 / (mean + std * torch.randn_like(mean)).float().std().item()
    codec.scaling_factor = scale
    codec.vae.register_to_config(scaling_factor=scale)
