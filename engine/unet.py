"""The multi-view UNet: predicts the noise of F frames of latents jointly.

Parameter names equal those of the released checkpoints without ``model.diffusion_model.``, so their tensors load
strictly and without renaming. Source: MVDream (arXiv 2308.16512), ImageDream (arXiv 2312.02201) and their released code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..kernels.attention import AttentionBackend, check_attention_backend
from .adaptors import RESAMPLER_HEAD_DIM, GlobalProjector, LinearProjector, Resampler
from .blocks import (
    GROUPS,
    Downsample,
    GroupNorm32,
    MultiViewSelfAttention,
    MultiViewTransformer,
    Prompt,
    ResBlock,
    Stage,
    Upsample,
)
from .errors import InputError, MissingDependency

ImageAdaptor = Literal["none", "resampler", "linear", "global"]


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a :class:`MultiViewUNet`; the defaults are the released ImageDream model."""

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    """Channels of each level, in units of ``model_channels``; every level halves height and width."""
    num_res_blocks: int = 2
    """Residual blocks of a level on the way down; one more on the way up."""
    transformer_levels: tuple[int, ...] = (0, 1, 2)
    """Levels whose residual blocks are followed by a transformer. The middle always has one."""
    context_dim: int = 1024
    head_dim: int = 64
    camera_dim: int = 16
    image_adaptor: ImageAdaptor = "resampler"
    """``none`` leaves out the image branch of the cross-attentions (MVDream)."""
    image_dim: int = 1280
    """Width of the picture's hidden states, or of the pooled feature for ``global``."""
    image_tokens: int = 16
    """Tokens that ``resampler`` or ``global`` make; ``linear`` keeps one for each hidden state."""
    resampler_width: int = 1024
    resampler_depth: int = 4
    resampler_heads: int = 12
    """Heads of 64 channels."""

    def __post_init__(self) -> None:
        sizes = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        for name, value in sizes.items():
            if value < 1:
                raise InputError(f"UNet setting {name} is {value}; it must be at least 1")
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise InputError(f"UNet setting channel_mult is {self.channel_mult}; it needs a positive number a level")
        if not set(self.transformer_levels) <= set(range(len(self.channel_mult))):
            raise InputError(
                f"UNet setting transformer_levels is {self.transformer_levels}; the levels are "
                f"0 to {len(self.channel_mult) - 1}"
            )
        if self.model_channels % GROUPS:
            raise InputError(f"UNet setting model_channels is {self.model_channels}; it must be a multiple of {GROUPS}")
        for level in {*self.transformer_levels, len(self.channel_mult) - 1}:
            channels = self.channel_mult[level] * self.model_channels
            if channels % self.head_dim:
                raise InputError(
                    f"UNet setting head_dim is {self.head_dim}, which does not divide the {channels} channels of "
                    f"level {level}; give the head width that the model was trained with"
                )

    @property
    def with_image(self) -> bool:
        return self.image_adaptor != "none"

    @property
    def downscale(self) -> int:
        """Latents' height and width must be multiples of this."""
        return 2 ** (len(self.channel_mult) - 1)


def infer_unet_config(state_dict: Mapping[str, Tensor], head_dim: int = 64) -> UNetConfig:
    """The configuration whose tensors have the names and shapes of ``state_dict``.

    ``head_dim`` cannot be seen from shapes; every released model has 64. Only what is needed to tell the sizes is
    read: a strict ``load_state_dict`` afterwards finds missing, extra and wrongly shaped tensors.

    Raises:
        InputError: the tensors are not those of a multi-view UNet; names what is missing or does not fit.
    """

    def shape(name: str, rank: int) -> torch.Size:
        if name not in state_dict or state_dict[name].ndim != rank:
            found = f"has shape {list(state_dict[name].shape)}" if name in state_dict else "is missing"
            raise InputError(f"not the weights of a multi-view UNet: tensor {name} {found}")
        return state_dict[name].shape

    model_channels, in_channels = shape("input_blocks.0.0.weight", 4)[:2]
    channels: list[int] = []
    blocks: list[int] = []
    transformers: set[int] = set()
    number, level = 1, 0
    while f"input_blocks.{number}.0.op.weight" in state_dict or (
        f"input_blocks.{number}.0.out_layers.3.weight" in state_dict
    ):
        if f"input_blocks.{number}.0.op.weight" in state_dict:
            level += 1
        else:
            width = shape(f"input_blocks.{number}.0.out_layers.3.weight", 4)[0]
            if level == len(channels):
                channels.append(width)
                blocks.append(0)
            blocks[-1] += 1
            if width != channels[-1] or len(channels) != level + 1:
                raise InputError(f"not the weights of a multi-view UNet: input_blocks.{number} does not fit its level")
            if f"input_blocks.{number}.1.proj_in.weight" in state_dict:
                transformers.add(level)
        number += 1
    if not blocks or len(set(blocks)) != 1 or any(width % model_channels for width in channels):
        raise InputError(
            f"not the weights of a multi-view UNet: its levels have {channels} channels and {blocks} residual blocks"
        )
    context_dim = shape("middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2)[1]
    return UNetConfig(
        in_channels=in_channels,
        out_channels=shape("out.2.weight", 4)[0],
        model_channels=model_channels,
        channel_mult=tuple(width // model_channels for width in channels),
        num_res_blocks=blocks[0],
        transformer_levels=tuple(sorted(transformers)),
        context_dim=context_dim,
        head_dim=head_dim,
        camera_dim=shape("camera_embed.0.weight", 2)[1],
        **_infer_adaptor(state_dict, shape),
    )


def _infer_adaptor(state_dict, shape):  # type: ignore[no-untyped-def]
    has_branch = "middle_block.1.transformer_blocks.0.attn2.to_k_ip.weight" in state_dict
    has_adaptor = any(name.startswith("image_embed.") for name in state_dict)
    if has_branch != has_adaptor:
        present, absent = ("to_k_ip", "image_embed") if has_branch else ("image_embed", "to_k_ip")
        raise InputError(f"not the weights of a multi-view UNet: it has {present} tensors but no {absent} tensors")
    if not has_adaptor:
        return {"image_adaptor": "none"}
    if "image_embed.latents" in state_dict:
        depth = 0
        while f"image_embed.layers.{depth}.0.to_q.weight" in state_dict:
            depth += 1
        _, tokens, width = shape("image_embed.latents", 3)
        return {
            "image_adaptor": "resampler",
            "image_dim": shape("image_embed.proj_in.weight", 2)[1],
            "image_tokens": tokens,
            "resampler_width": width,
            "resampler_depth": depth,
            "resampler_heads": shape("image_embed.layers.0.0.to_q.weight", 2)[0] // RESAMPLER_HEAD_DIM,
        }
    rows, image_dim = shape("image_embed.proj.weight", 2)
    width = shape("image_embed.norm.weight", 1)[0]
    if rows == width:
        return {"image_adaptor": "linear", "image_dim": image_dim}
    return {"image_adaptor": "global", "image_dim": image_dim, "image_tokens": rows // width}


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """[B] -> [B, dim] float32: cosines, then sines, of t * 10000^(-i / (dim/2))."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10000.0) * steps / half)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class MultiViewUNet(nn.Module):
    """Noise predictor over groups of F frames. ``image_scale`` (default 1) weighs the image branch."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.image_scale = 1.0
        base, embed_dim = config.model_channels, 4 * config.model_channels
        levels = range(len(config.channel_mult))

        def res(in_channels: int, out_channels: int) -> ResBlock:
            return ResBlock(in_channels, out_channels, embed_dim)

        def transformer(channels: int) -> MultiViewTransformer:
            return MultiViewTransformer(channels, config.context_dim, config.head_dim, config.with_image)

        self.time_embed = nn.Sequential(nn.Linear(base, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim))
        self.camera_embed = nn.Sequential(
            nn.Linear(config.camera_dim, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim)
        )
        if config.with_image:
            self.image_embed = _image_adaptor(config)

        self.input_blocks = nn.ModuleList((Stage(nn.Conv2d(config.in_channels, base, 3, padding=1)),))
        width, skips = base, [base]
        for level in levels:
            for _ in range(config.num_res_blocks):
                layers: list[nn.Module] = [res(width, config.channel_mult[level] * base)]
                width = config.channel_mult[level] * base
                if level in config.transformer_levels:
                    layers.append(transformer(width))
                self.input_blocks.append(Stage(*layers))
                skips.append(width)
            if level != levels[-1]:
                self.input_blocks.append(Stage(Downsample(width)))
                skips.append(width)

        self.middle_block = Stage(res(width, width), transformer(width), res(width, width))

        self.output_blocks = nn.ModuleList()
        for level in reversed(levels):
            for number in range(config.num_res_blocks + 1):
                layers = [res(width + skips.pop(), config.channel_mult[level] * base)]
                width = config.channel_mult[level] * base
                if level in config.transformer_levels:
                    layers.append(transformer(width))
                if level and number == config.num_res_blocks:
                    layers.append(Upsample(width))
                self.output_blocks.append(Stage(*layers))

        self.out = nn.Sequential(
            GroupNorm32(width, eps=1e-5), nn.SiLU(), nn.Conv2d(width, config.out_channels, 3, padding=1)
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.time_embed[0].weight.dtype

    def use_attention_backend(self, backend: AttentionBackend) -> None:
        """Choose what computes the self-attentions, ``"torch"`` or ``"xformers"``.

        Raises:
            InputError: unknown name.
            MissingDependency: not installed.
        """
        try:
            check_attention_backend(backend)
        except ImportError as error:
            raise MissingDependency(str(error)) from error
        except ValueError as error:
            raise InputError(str(error)) from error
        for module in self.modules():
            if isinstance(module, MultiViewSelfAttention):
                module.backend = backend

    def embed_image(self, image_hidden: Tensor) -> Tensor:
        """Image tokens [B, n, D] of the picture's features.

        Args:
            image_hidden: hidden states [B, T, Dv]; for the ``global`` adaptor the pooled feature [B, Dp] or [B, 1, Dp].

        Raises:
            InputError: the model has no image branch, or the shape is another.
        """
        config, shape = self.config, list(image_hidden.shape)
        if not config.with_image:
            raise InputError("this model takes no picture (it has no image branch); leave out the image input")
        if config.image_adaptor == "global":
            fits, wanted = len(shape) in (2, 3) and shape[1:-1] in ([], [1]), f"[B, {config.image_dim}]"
        else:
            fits, wanted = len(shape) == 3, f"[B, T, {config.image_dim}]"
        if not fits or shape[-1] != config.image_dim:
            raise InputError(f"image_hidden has shape {shape}; this model needs {wanted}")
        return self.image_embed(image_hidden.to(self.dtype))

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Tensor,
        camera: Tensor | None = None,
        image_hidden: Tensor | None = None,
        image_latent: Tensor | None = None,
        image_tokens: Tensor | None = None,
    ) -> Tensor:
        """Predicted noise of every frame.

        Without image input a model with an image branch runs on text alone; text tokens are never read as image
        tokens. Without ``camera`` the camera term is left out, which differs from a camera of zeros.

        Args:
            latents: [B, F, 4, h, w], noisy, scaled; h and w multiples of ``config.downscale``. Not modified.
            timesteps: [B], 0 to 999; all frames of a group share one.
            context: [B, L, D] text tokens, or [B, F, L, D] for a prompt of its own for each frame.
            camera: [B, F, 16] row-major camera-to-world matrices with translations of unit length; zeros for the
                image frame.
            image_hidden: features of the prompt picture, see :meth:`embed_image`.
            image_latent: [B, 4, h, w] clean latent of the prompt picture; replaces the last frame.
            image_tokens: [B, n, D] or [B, F, n, D], already embedded, instead of ``image_hidden``.

        Returns:
            [B, F, 4, h, w] in the dtype of ``latents``.

        Raises:
            InputError: a shape does not fit, or both ``image_hidden`` and ``image_tokens`` are given.
        """
        self._check(latents, timesteps, context, camera, image_latent)
        if image_hidden is not None:
            if image_tokens is not None:
                raise InputError("give image_hidden or image_tokens, not both")
            image_tokens = self.embed_image(image_hidden)
        if image_tokens is not None:
            if not self.config.with_image:
                raise InputError("this model takes no picture (it has no image branch); leave out image_tokens")
            image_tokens = _rows("image_tokens", image_tokens, latents, self.config.context_dim).to(self.dtype)
        x = latents.to(self.dtype)
        if image_latent is not None:
            x = torch.cat((x[:, :-1], image_latent[:, None].to(self.dtype)), dim=1)
        context = _rows("context", context, latents, self.config.context_dim).to(self.dtype)
        prompt = Prompt(context, image_tokens, self.image_scale)
        return self._denoise(x, self._embedding(timesteps, camera, x.shape[1]), prompt).to(latents.dtype)

    def _embedding(self, timesteps: Tensor, camera: Tensor | None, frames: int) -> Tensor:
        """Time plus camera embedding of every frame, [B*F, E]."""
        time = self.time_embed(timestep_embedding(timesteps, self.config.model_channels).to(self.dtype))
        embedding = time[:, None].expand(-1, frames, -1)
        if camera is not None:
            embedding = embedding + self.camera_embed(camera.to(self.dtype))
        return embedding.flatten(0, 1)

    def _denoise(self, x: Tensor, embedding: Tensor, prompt: Prompt) -> Tensor:
        frames = x.shape[1]
        h, skips = x.flatten(0, 1), []
        for block in self.input_blocks:
            h = block(h, embedding, prompt, frames)
            skips.append(h)
        h = self.middle_block(h, embedding, prompt, frames)
        for block in self.output_blocks:
            h = block(torch.cat((h, skips.pop()), dim=1), embedding, prompt, frames)
        return self.out(h).unflatten(0, (-1, frames))

    def _check(
        self, latents: Tensor, timesteps: Tensor, context: Tensor, camera: Tensor | None, image_latent: Tensor | None
    ) -> None:
        config = self.config
        if latents.ndim != 5 or latents.shape[2] != config.in_channels:
            raise InputError(f"latents have shape {list(latents.shape)}; they must be [B, F, {config.in_channels}, h, w]")
        b, f, c, h, w = latents.shape
        if min(b, f, h, w) < 1 or h % config.downscale or w % config.downscale:
            raise InputError(
                f"latents have shape {list(latents.shape)}; h and w must be positive multiples of {config.downscale}"
            )
        _expect("timesteps", timesteps, (b,))
        if camera is not None:
            _expect("camera", camera, (b, f, config.camera_dim))
        if image_latent is not None:
            _expect("image_latent", image_latent, (b, c, h, w))


def _expect(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tensor.shape != torch.Size(shape):
        raise InputError(f"{name} has shape {list(tensor.shape)}; with these latents it must be {list(shape)}")


def _rows(name: str, tokens: Tensor, latents: Tensor, width: int) -> Tensor:
    """[B, n, D] as it is, [B, F, n, D] flattened to one row a frame."""
    b, f = latents.shape[:2]
    if tokens.shape[:-2] not in (torch.Size((b,)), torch.Size((b, f))) or tokens.shape[-1] != width:
        raise InputError(
            f"{name} has shape {list(tokens.shape)}; with these latents it must be [{b}, n, {width}] "
            f"or [{b}, {f}, n, {width}]"
        )
    return tokens if tokens.ndim == 3 else tokens.flatten(0, 1)


def _image_adaptor(config: UNetConfig) -> nn.Module:
    if config.image_adaptor == "global":
        return GlobalProjector(config.image_dim, config.context_dim, config.image_tokens)
    if config.image_adaptor == "linear":
        return LinearProjector(config.image_dim, config.context_dim)
    return Resampler(
        config.image_dim,
        config.resampler_width,
        config.context_dim,
        config.image_tokens,
        config.resampler_depth,
        config.resampler_heads,
    )
