"""Losses of the fusion: each a function of tensors that returns one scalar; the weights are settings."""

from __future__ import annotations

import torch
from torch import Tensor

OPAQUE_MARGIN = 1e-3
SPARSITY_FLOOR = 0.01
SOLID_OPACITY = 0.5


def reconstruction_loss(latents: Tensor, target: Tensor) -> Tensor:
    """MV-SDS as reconstruction: ``0.5 * sum((latents - target)^2) / V``; gradient (latents - target) / V.

    ``latents``, ``target``: [V, 4, h, w]; V counts views, not groups. The target takes no gradient. Source:
    released ``multiview_diffusion_guidance`` (paper equation 2 without its constants).
    """
    return 0.5 * (latents - target.detach()).square().sum() / latents.shape[0]


def orientation_loss(facing_away: Tensor, opacity: Tensor) -> Tensor:
    """Punish visible normals that look away from the camera: sum(w max(n.d, 0)^2) / pixels with opacity.

    ``facing_away``: w max(n.d, 0)^2, of samples or summed up over pixels (``RenderOutput.facing_away``);
    ``opacity`` of the pixels; any shapes. The divisor is at least one. Source: released ``mvdream_system``;
    Ref-NeRF equation 11.
    """
    return facing_away.sum() / (opacity > 0).sum().clamp(min=1)


def sparsity_loss(opacity: Tensor) -> Tensor:
    """``mean(sqrt(opacity^2 + 0.01))``. ``opacity``: any shape. Source: released ``mvdream_system``."""
    return (opacity.square() + SPARSITY_FLOOR).sqrt().mean()


def opaque_loss(opacity: Tensor) -> Tensor:
    """Mean entropy of the opacity clamped to [1e-3, 1 - 1e-3]. Source: released ``mvdream_system``."""
    kept = opacity.clamp(OPAQUE_MARGIN, 1 - OPAQUE_MARGIN)
    return -(kept * kept.log() + (1 - kept) * (1 - kept).log()).mean()


def z_variance_loss(z_variance: Tensor, opacity: Tensor) -> Tensor:
    """Mean depth variance of the pixels of opacity above a half (zero without any); same shapes."""
    solid = opacity > SOLID_OPACITY
    return torch.where(solid, z_variance, 0.0).sum() / solid.sum().clamp(min=1)
