"""Pictures to latents and back: diffusers' ``AutoencoderKL`` behind the operations that the engine needs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..kernels._triton import HALF, use_triton
from .errors import InputError
from .gradient_scale import GradientScale
from .layers import Derived, use_kernels
from .pixels import check_pictures, resize, unit
from .vae_blocks import adopt, mirrored

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class LatentCodec(nn.Module):
    """The VAE with its scaling factor. Pictures are [N, 3, H, W] in [-1, 1], latents [N, 4, H/8, W/8].

    Inputs are cast to the network's dtype and outputs have it, those of ``encode`` apart. Everything is differentiable.
    The layers of ``vae`` that this package has kernels for are replaced, under the names they had.
    """

    def __init__(self, vae: AutoencoderKL, scaling_factor: float) -> None:
        super().__init__()
        adopt(vae)
        self.vae = vae
        self.scaling_factor = float(scaling_factor)
        self.downscale = 2 ** (len(vae.config["block_out_channels"]) - 1)
        self._mirrored = Derived(partial(mirrored, vae.encoder))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LatentCodec:
        """A codec with fresh weights; ``config``: arguments of ``AutoencoderKL``, or a ``config.json``."""
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_config(dict(config))
        return cls(vae, vae.config["scaling_factor"])

    @staticmethod
    def preprocess(rgb: Tensor, px: int) -> Tensor:
        """Pictures, uint8 [N, 3, H, W], as the VAE sees them: float32 [N, 3, px, px] in [-1, 1].

        As the released code: squashed to a square whatever their shape, by Pillow's bilinear filter
        (antialiased, 8-bit arithmetic). Raises :class:`~.errors.InputError` for another dtype or shape.
        """
        check_pictures(rgb)
        return unit(resize(rgb, px, px, Image.Resampling.BILINEAR)).sub(0.5).div(0.5)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior, unscaled, each [N, 4, H/8, W/8].

        The log variance is clamped to [-30, 20] as in latent diffusion. Raises :class:`~.errors.InputError`
        when the pictures have another shape than [N, 3, H, W] with sides that are multiples of ``downscale``.
        """
        if (
            images.ndim != 4
            or images.shape[1] != 3
            or images.shape[2] % self.downscale
            or images.shape[3] % self.downscale
        ):
            raise InputError(
                f"the VAE got pictures of shape {list(images.shape)}; it takes [N, 3, H, W] with sides that "
                f"are multiples of {self.downscale}"
            )
        pictures = images.to(self.vae.dtype)
        encoder = self._mirrored_encoder(pictures)
        if encoder is None:
            posterior = self.vae.encode(pictures).latent_dist
        else:
            from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

            maps = encoder(pictures.flip(2, 3)).flip(2, 3)
            posterior = DiagonalGaussianDistribution(self.vae.quant_conv(maps))
        return posterior.mean, posterior.std

    def _mirrored_encoder(self, pictures: Tensor) -> nn.Module | None:
        """Where it is the faster (see :func:`~.vae_blocks.mirrored`): for gradients through a frozen network."""
        backend = self.vae.encoder.conv_in.backend
        wanted = torch.is_grad_enabled() and pictures.requires_grad and self.vae.quant_conv is not None
        if not (wanted and pictures.dtype in HALF and use_triton(backend, pictures)):
            return None
        encoder: Any = self._mirrored.at(*self.vae.encoder.parameters())
        if encoder is not None:
            use_kernels(encoder, backend)
        return encoder

    def sample(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """Scaled latents ``scaling_factor * (mean + std * noise)``, all [N, 4, h, w]."""
        return self.scaling_factor * (mean + std * noise)

    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """Scaled latents of pictures [N, 3, H, W], with the posterior's noise [N, 4, h, w] given.

        They are in float32 (a wider network's dtype) and so is their gradient until it is scaled to the range of a
        network in float16 (:mod:`.gradient_scale`), if its parameters are frozen.
        """
        wide = torch.promote_types(self.vae.dtype, torch.float32)
        scale = GradientScale() if self._scales_gradient(images) else None
        mean, std = self.moments(images if scale is None else scale.enter(images))
        latents = self.sample(mean.to(wide), std.to(wide), noise)
        return latents if scale is None else scale.leave(latents)

    def _scales_gradient(self, images: Tensor) -> bool:
        wanted = torch.is_grad_enabled() and images.requires_grad and self.vae.dtype == torch.float16
        return wanted and not any(parameter.requires_grad for parameter in self.parameters())

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [N, 3, 8h, 8w], about [-1, 1] (not clamped), of scaled latents [N, 4, h, w]."""
        return self.vae.decode(latents.to(self.vae.dtype) / self.scaling_factor).sample
