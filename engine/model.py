"""The loaded model: everything that comes out of one checkpoint, and nothing that depends on a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from .graphed import forget_graphs

if TYPE_CHECKING:
    from .text import TextEncoder
    from .unet import MultiViewUNet
    from .vae import LatentCodec
    from .vision import VisionEncoder

Controller = Literal["pixel", "local", "local-linear", "global", "none"]
"""Paper section 3.2. ``pixel``: image tokens and a fifth, clean frame; ``local``: resampled hidden states;
``local-linear``: all 257 hidden states through one linear map; ``global``: the pooled CLIP feature;
``none``: MVDream, text only."""

VIEWS = 4


@dataclass(frozen=True)
class ModelCard:
    """What a checkpoint is, for ``info`` and ``metadata.json``."""

    name: str
    """As the user gave it: a path, a hub id or ``builtin:nano``."""
    family: str
    """``imagedream``, ``mvdream`` or ``nano``."""
    layout: str
    """``official-pt``, ``official-safetensors`` or ``diffusers``."""
    controller: Controller
    controller_reason: str
    """Why this controller: given by the caller, guessed from the name, or the only one that the tensors allow."""
    picture_px: int
    """Side of the square pictures that the VAE sees: 256, or 128 for the embedded model."""
    sha256: str
    """Of the weights file (the UNet's file for a folder)."""


@dataclass
class MultiViewModel:
    """One checkpoint, loaded: the networks on one device in one dtype, in eval mode, without gradients."""

    card: ModelCard
    unet: MultiViewUNet
    vae: LatentCodec
    text: TextEncoder
    vision: VisionEncoder | None
    alphas_cumprod: torch.Tensor
    """[1000] float32 (SPEC section 5)."""

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    @property
    def frames(self) -> int:
        """Frames that the UNet denoises together: five with the pixel controller, else four."""
        return VIEWS + (self.card.controller == "pixel")

    @property
    def latent_px(self) -> int:
        return self.card.picture_px // self.vae.downscale

    @contextmanager
    def encoders_parked(self, *, vision: bool) -> Iterator[None]:
        """The text encoder, and with ``vision`` the image encoder, in host memory meanwhile; only of a GPU's.

        2 GB at the released size, for while conditions that were made before are used. The graphs that networks
        replay are dropped: those of encoders hold addresses, the others memory.
        """
        device = self.device
        parked = [self.text] + ([self.vision] if vision and self.vision is not None else [])
        if device.type != "cuda":
            yield
            return
        for network in (self.unet, self.vae, *parked):
            forget_graphs(network)
        try:
            for network in parked:
                network.to("cpu")
            # CUDA graphs take their memory from the device, not from what PyTorch keeps for later.
            torch.cuda.empty_cache()
            yield
        finally:
            for network in parked:
                network.to(device)


Progress = Callable[[str, int, int], None]
"""``on_progress(stage, done, total)``; stages: prepare, views, warm-start, condition, fuse, mesh,
files."""

Cancel = Callable[[], bool]
"""Asked between steps; true stops the work with :class:`~.errors.Cancelled`."""
