"""A model whose UNet and VAE decoder are plans: the backend ``tensorrt``. The rest stays as it is.

Encoders run once per job, and fusion differentiates through the VAE's encoder, which a plan cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..engine.blocks import KeyValues
from ..engine.errors import InputError
from ..engine.model import MultiViewModel
from ..engine.unet import MultiViewUNet
from ..engine.vae import LatentCodec
from .flavours import local_architecture
from .trt_runtime import Plan, Workspace


class PlanUNet(nn.Module):
    """Called like :class:`~..engine.unet.MultiViewUNet`; image adaptor, keys and values stay outside of the plan.

    A plan of ``unet_cached`` serves every call; one of ``unet`` those with context, as the views are made, but not the
    fusion's, which knows keys and values beforehand.
    """

    def __init__(self, unet: MultiViewUNet, plan: Plan) -> None:
        super().__init__()
        self.config = unet.config
        self.plan = plan
        # What runs outside of the plan; it also says device and dtype.
        self.camera_embed = unet.camera_embed
        if unet.config.with_image:
            self.image_embed = unet.image_embed
        self.cross_attentions = nn.ModuleList(unet._cross_attentions())

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def takes_key_values(self) -> bool:
        """Whether they can be given, and so be made once for many calls."""
        return self.plan.manifest.component == "unet_cached"

    def embed_image(self, image_hidden: Tensor) -> Tensor:
        """As :meth:`MultiViewUNet.embed_image`."""
        return MultiViewUNet.embed_image(self, image_hidden)  # type: ignore[arg-type]

    def prompt_key_values(self, context: Tensor, image_tokens: Tensor | None = None) -> list[KeyValues]:
        """As :meth:`MultiViewUNet.prompt_key_values`."""
        return MultiViewUNet.prompt_key_values(self, context, image_tokens)  # type: ignore[arg-type]

    def _cross_attentions(self) -> list[nn.Module]:
        return list(self.cross_attentions)

    def use_attention_backend(self, backend: str) -> None:
        """The plan has its own attention. Raises :class:`InputError` for any other than ``auto``."""
        if backend != "auto":
            raise InputError(
                f"attention {backend!r} cannot be chosen with plans, which have their own; leave it out"
            )

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Tensor | None,
        camera: Tensor | None = None,
        image_hidden: Tensor | None = None,
        image_latent: Tensor | None = None,
        image_tokens: Tensor | None = None,
        key_values: Sequence[KeyValues] | None = None,
        keep: int | None = None,
    ) -> Tensor:
        """As :meth:`MultiViewUNet.forward`; camera, tokens and image latent as the plan was built, all or none."""
        if image_hidden is not None:
            image_tokens = self.embed_image(image_hidden)
        given = {
            "sample": latents,
            "timestep": timesteps,
            "encoder_hidden_states": context,
            "camera": camera,
            "image_tokens": image_tokens,
            "image_latent": image_latent,
        }
        if self.takes_key_values:
            if key_values is None and context is not None:
                key_values = self.prompt_key_values(context, image_tokens)
            given |= _named(key_values or (), len(latents))
        elif key_values is not None:
            raise InputError(
                f"{self.plan.path} has no inputs for keys and values, which fusion gives; export the component "
                "unet_cached, which serves the views as well"
            )
        inputs = []
        for spec in self.plan.manifest.inputs:
            x = given.get(spec["name"])
            if x is None:
                raise InputError(f"{self.plan.path.name} needs {spec['name']}")
            inputs.append(x.to(getattr(torch, spec["dtype"])).contiguous())
        return self.plan(*inputs)[0][:, :keep].to(latents.dtype)


def _named(key_values: Sequence[KeyValues], batch: int) -> dict[str, Tensor]:
    """Keys and values by the names of the graph's inputs, [batch, L, C]; a row serves the groups that follow it."""
    found = {}
    for number, layer in enumerate(key_values):
        for name, x in zip(("key_text", "value_text", "key_image", "value_image"), layer, strict=True):
            if x is not None:
                rows = x.flatten(2)
                if len(rows) != batch:
                    rows = rows.repeat_interleave(batch // len(rows), dim=0)
                found[f"{name}_{number:02d}"] = rows
    return found


class PlanCodec(LatentCodec):
    """The VAE with its decoder as a plan."""

    def __init__(self, codec: LatentCodec, plan: Plan) -> None:
        super().__init__(codec.vae, codec.scaling_factor)
        self.plan = plan

    def decode(self, latents: Tensor) -> Tensor:
        return self.plan(latents.to(self.vae.dtype).contiguous())[0]


def plans_in(folder: str | Path) -> Callable[[MultiViewModel], MultiViewModel]:
    """The plans of a folder as :class:`~..engine.pipeline.ImageTo3D` takes them: :func:`with_plans`, to be called."""
    return partial(with_plans, folder=folder)


def with_plans(model: MultiViewModel, folder: str | Path) -> MultiViewModel:
    """``model`` (on the GPU) with the plans of ``folder`` for this GPU in place of its UNet and VAE decoder.

    The plans share activation memory and run on the current stream, so a CUDA graph can capture them.

    Raises :class:`InputError` if there is no plan of the UNet, if a plan does not belong here, or if it was made of
    another checkpoint.
    """
    folder, architecture = Path(folder), local_architecture()
    if architecture is None:
        raise InputError("backend tensorrt needs a CUDA device; there is none here")
    names = ("unet_cached", "unet", "vae_decoder")
    found = {name: path for name in names if (path := folder / f"{name}.{architecture}.plan").is_file()}
    chosen = next((name for name in names[:2] if name in found), None)
    if chosen is None:
        raise InputError(
            f"{folder} has no unet_cached.{architecture}.plan; make it: imagedream-rt export {model.card.name} "
            f"-o {folder} --sm {architecture.removeprefix('sm')}"
        )
    if chosen == "unet_cached":
        found.pop("unet", None)
    workspace = Workspace(model.device)
    plans = {name: Plan(path, workspace=workspace) for name, path in found.items()}
    for plan in plans.values():
        source = plan.manifest.source
        if source.sha256 != model.card.sha256 or source.controller != model.card.controller:
            raise InputError(
                f"{plan.path} was made of {source.model}, and not of {model.card.name} as it is now"
            )
    changed = replace(model, unet=PlanUNet(model.unet, plans[chosen]))  # type: ignore[arg-type]
    if "vae_decoder" in plans:
        changed = replace(changed, vae=PlanCodec(model.vae, plans["vae_decoder"]))
    return changed
