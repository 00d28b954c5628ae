"""``imagedream-rt train``: the embedded model from nothing, bounded by a time budget, resumable."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import (
    load_optimizer_state,
    optimizer_state,
    prefixed,
    read_tensors,
    without_prefix,
    write_tensors,
)
from ..errors import InputError
from ..graphed import GraphedStep
from ..layers import fast_memory_format
from ..model import ModelCard, MultiViewModel
from ..run_context import current
from ..schedule import alphas_cumprod
from ..vae import LatentCodec
from ..weights import save_model_folder
from . import nano
from .codec_trainer import Averages, train_codec
from .dataset import GroupSampler
from .denoiser_trainer import EMA, Denoiser, LatentPool, denoising_loss, learning_rate
from .objects import TEST_SEEDS

KIND = "training"
CODEC_SHARE = 0.15
"""Of the time budget, for the codec."""
REFRESH_EVERY = 20
"""Steps from one chunk of fresh groups to the next."""

Report = Callable[[str, float], None]
"""``report(line, share of the time budget used)``."""


class Trainer:
    """Codec first, then the denoiser; ``folder`` holds ``training.safetensors`` and the model so far in ``nano/``."""

    def __init__(
        self, folder: Path, *, minutes: float, device: torch.device, batch: int, seed: int = 0
    ) -> None:
        if not minutes > 0:
            raise InputError(f"--minutes is {minutes}; it must be positive")
        if batch < 1:
            raise InputError(f"--batch is {batch}; it must be at least 1")
        self.folder, self.seconds, self.device, self.batch = folder, minutes * 60, device, batch
        self.seed = seed
        torch.manual_seed(seed)
        self.tokenizer = tempfile.TemporaryDirectory()
        nano.write_tokenizer(Path(self.tokenizer.name))
        self.codec: LatentCodec | None = None
        self.model = Denoiser(
            nano.new_unet(), nano.new_text(Path(self.tokenizer.name)), nano.new_vision()
        ).to(device)
        fast_memory_format(self.model)
        self.averages = Averages(self.model, EMA)
        self.rate = torch.zeros((), device=device)
        cuda = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.rate,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            fused=cuda,
            capturable=cuda,
        )
        self.step, self.used_seconds = 0, 0.0

    @property
    def checkpoint(self) -> Path:
        return self.folder / "training.safetensors"

    def run(self, report: Report, save_every_s: float = 120.0) -> Path:
        """Trains until the budget is spent; returns the model's folder. An interrupt saves first."""
        with current(self.device):
            return self._run(report, save_every_s)

    def _run(self, report: Report, save_every_s: float) -> Path:
        start = time.monotonic() - self.used_seconds
        # a resumed run draws other groups and other noise than the run before it
        torch.manual_seed(self.seed + self.step)
        generator = torch.Generator(self.device).manual_seed(self.seed + self.step)
        chunk = 128 if self.device.type == "cuda" else 2
        groups = GroupSampler(nano.PICTURE_PX, self.device, generator, max_seed=TEST_SEEDS, chunk=chunk)
        if self.codec is None:
            self.codec = train_codec(
                nano.new_codec().to(self.device),
                groups,
                CODEC_SHARE * self.seconds,
                max(self.batch // 2, 1),
                lambda line, used: report(line, used * CODEC_SHARE),
            )
            self.used_seconds = time.monotonic() - start
            self.save()
        try:
            self._train_denoiser(groups, start, report, save_every_s)
        finally:
            self.used_seconds = min(time.monotonic() - start, self.seconds)
            self.save()
        return self.folder / "nano"

    def _train_denoiser(
        self, groups: GroupSampler, start: float, report: Report, save_every_s: float
    ) -> None:
        assert self.codec is not None
        cuda = self.device.type == "cuda"
        self.model.train()
        unet = self.model.unet
        if cuda:
            torch.backends.cuda.matmul.allow_tf32 = True
            unet.forward = torch.compile(type(unet).forward.__get__(unet))  # type: ignore[method-assign]
        pool = LatentPool(groups, self.codec, self.model.text, 32_768 if cuda else 4)
        abar, losses = alphas_cumprod().to(self.device), torch.zeros((), device=self.device)
        parameters = list(self.model.parameters())

        def step() -> None:
            batch = pool.draw(self.batch)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=cuda, cache_enabled=False):
                loss = denoising_loss(self.model, batch, pool.empty, abar)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            self.optimizer.step()
            losses.add_(loss.detach())

        graphed, saved = GraphedStep(step, self.device), time.monotonic()
        while (used := (time.monotonic() - start) / self.seconds) < 1:
            if self.step % REFRESH_EVERY == 0:
                pool.refresh()
            self.rate.fill_(learning_rate(self.step, used))
            graphed()
            self.averages.update(self.model, self.step)
            self.step += 1
            if self.step % 100 == 0:
                report(f"step {self.step} loss {losses.item() / 100:.4f}", used)
                losses.zero_()
            if time.monotonic() - saved > save_every_s:
                self.used_seconds = time.monotonic() - start
                self.save()
                saved = time.monotonic()

    def save(self) -> None:
        """The whole state, and the averaged weights as a model folder."""
        assert self.codec is not None
        names = {p: name for name, p in self.model.named_parameters()}
        tensors: dict[str, Tensor] = {
            **prefixed("codec", self.codec.state_dict()),
            **prefixed("model", self.model.state_dict()),
            **prefixed("ema", self.averages.module.state_dict()),
            **prefixed("adam", optimizer_state(self.optimizer, names)),
        }
        header: dict[str, Any] = {
            "kind": KIND,
            "step": self.step,
            "used_seconds": self.used_seconds,
            "scaling_factor": self.codec.scaling_factor,
        }
        write_tensors(self.checkpoint, tensors, header)
        save_model_folder(self._as_model(), self.folder / "nano")

    def resume(self) -> None:
        """Continues from the folder's checkpoint. Raises :class:`InputError` if there is none."""
        tensors, header = read_tensors(self.checkpoint, [KIND])
        self.codec = nano.new_codec().to(self.device).eval().requires_grad_(False)
        self.codec.load_state_dict(without_prefix("codec", tensors))
        self.codec.scaling_factor = header["scaling_factor"]
        self.codec.vae.register_to_config(scaling_factor=header["scaling_factor"])
        self.model.load_state_dict(without_prefix("model", tensors))
        self.averages.module.load_state_dict(without_prefix("ema", tensors))
        names = {p: name for name, p in self.model.named_parameters()}
        load_optimizer_state(self.optimizer, names, without_prefix("adam", tensors))
        for state in self.optimizer.state.values():
            state["step"] = state["step"].to(self.rate.device if self.device.type == "cuda" else "cpu")
        self.step, self.used_seconds = header["step"], header["used_seconds"]

    def _as_model(self) -> MultiViewModel:
        assert self.codec is not None
        averaged = self.averages.module
        assert isinstance(averaged, Denoiser)
        card = ModelCard(
            name="nano",
            family="nano",
            layout="diffusers",
            controller="pixel",
            controller_reason="trained with a fifth, clean frame",
            picture_px=nano.PICTURE_PX,
            sha256="",
        )
        return MultiViewModel(
            card, averaged.unet, self.codec, averaged.text, averaged.vision, alphas_cumprod()
        )
