"""What a distillation step minimises: the pull towards the target, and the regularisers of the render."""

from __future__ import annotations

from torch import Tensor

from . import losses
from .config import FusionConfig
from .nerf.render import RenderOutput


def objective(
    config: FusionConfig, out: RenderOutput, latents: Tensor, target: Tensor, lambda_orient: float | Tensor
) -> dict[str, Tensor]:
    """Every loss by name, unweighted, and their weighted sum as ``loss``; scalars.

    ``latents``, ``target`` [V, 4, h, w]. A regulariser of weight 0 is left out; ``lambda_orient`` as a tensor
    always takes part.
    """
    weights: dict[str, float | Tensor] = {
        "orient": lambda_orient,
        "sparsity": config.lambda_sparsity,
        "opaque": config.lambda_opaque,
        "z_variance": config.lambda_z_variance,
    }
    values = {"sds": losses.reconstruction_loss(latents, target)}
    total = config.lambda_sds * values["sds"]
    for name, weight in weights.items():
        if isinstance(weight, Tensor) or weight != 0.0:
            values[name] = _regulariser(name, out)
            total = total + weight * values[name]
    values["loss"] = total
    return values


def _regulariser(name: str, out: RenderOutput) -> Tensor:
    if name == "orient":
        assert out.facing_away is not None
        return losses.orientation_loss(out.facing_away, out.opacity)
    if name == "sparsity":
        return losses.sparsity_loss(out.opacity)
    if name == "opaque":
        return losses.opaque_loss(out.opacity)
    return losses.z_variance_loss(out.z_variance, out.opacity)
