"""The multi-view UNet: predicts the noise of F frames of latents jointly.

Parameter names equal those of the released checkpoints without ``model.diffusion_model.``, so their tensors
load strictly and without renaming. Source: MVDream (arXiv 2308.16512) and ImageDream (arXiv 2312.02201), with
their released code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kernels._triton import interpreted, obstacle
from ..kernels.attention import AttentionBackend, check_attention_backend
from .adaptors import GlobalProjector, LinearProjector, Resampler
from .blocks import (
    GROUPS,
    Downsample,
    KeyValues,
    MultiViewSelfAttention,
    MultiViewTransformer,
    Prompt,
    PromptCrossAttention,
    ResBlock,
    Stage,
    Upsample,
)
from .errors import InputError, MissingDependency
from .layers import GroupNorm, StackedParameters, bias_of
from .unet_config import UNetConfig, infer_unet_config

__all__ = ["MultiViewUNet", "UNetConfig", "infer_unet_config", "timestep_embedding"]


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """[B] -> [B, dim] float32: cosines, then sines, of t * 10000^(-i / (dim/2))."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10000.0) * steps / half)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class MultiViewUNet(StackedParameters):
    """Noise predictor over groups of F frames. ``image_scale`` (default 1) weighs the image branch.

    The projections of time and camera embedding in all residual blocks are one parameter, ``to_shifts`` [sum of
    C', E], with ``to_shifts_bias``, for one product; in state dicts each block has its own, as released.
    """

    takes_key_values = True
    """Whether :meth:`forward` can be given keys and values, and so use those of an earlier call."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.image_scale = 1.0
        base, embed_dim = config.model_channels, 4 * config.model_channels
        levels = range(len(config.channel_mult))

        def transformer(channels: int) -> MultiViewTransformer:
            return MultiViewTransformer(channels, config.context_dim, config.head_dim, config.with_image)

        self.time_embed = nn.Sequential(
            nn.Linear(base, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim)
        )
        self.camera_embed = nn.Sequential(
            nn.Linear(config.camera_dim, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim)
        )
        if config.with_image:
            self.image_embed = _image_adaptor(config)

        self.input_blocks = nn.ModuleList((Stage(nn.Conv2d(config.in_channels, base, 3, padding=1)),))
        width, skips = base, [base]
        for level in levels:
            for _ in range(config.num_res_blocks):
                layers: list[nn.Module] = [ResBlock(width, config.channel_mult[level] * base)]
                width = config.channel_mult[level] * base
                if level in config.transformer_levels:
                    layers.append(transformer(width))
                self.input_blocks.append(Stage(*layers))
                skips.append(width)
            if level != levels[-1]:
                self.input_blocks.append(Stage(Downsample(width)))
                skips.append(width)

        self.middle_block = Stage(ResBlock(width, width), transformer(width), ResBlock(width, width))

        self.output_blocks = nn.ModuleList()
        for level in reversed(levels):
            for number in range(config.num_res_blocks + 1):
                layers = [ResBlock(width + skips.pop(), config.channel_mult[level] * base)]
                width = config.channel_mult[level] * base
                if level in config.transformer_levels:
                    layers.append(transformer(width))
                if level and number == config.num_res_blocks:
                    layers.append(Upsample(width))
                self.output_blocks.append(Stage(*layers))

        self.out = nn.Sequential(
            GroupNorm(GROUPS, width, eps=1e-5, silu=True),
            nn.Identity(),
            nn.Conv2d(width, config.out_channels, 3, padding=1),
        )

        for number, layer in enumerate(self._cross_attentions()):
            layer.number = number
        residual = self._residual_blocks().values()
        for number, block in enumerate(residual):
            block.number = number
        # A tuple, which does not make them this module's own once more.
        self._first_convolutions = tuple(block.first_convolution for block in residual)
        self._shift_widths = [convolution.out_channels for convolution in self._first_convolutions]
        self._folding = tuple(m for m in self.modules() if isinstance(m, (Upsample, MultiViewTransformer)))
        self.to_shifts = nn.Parameter(torch.empty(sum(self._shift_widths), embed_dim))
        self.to_shifts_bias = nn.Parameter(torch.empty(sum(self._shift_widths)))
        nn.init.kaiming_uniform_(self.to_shifts, a=math.sqrt(5))  # as nn.Linear
        nn.init.uniform_(self.to_shifts_bias, -(embed_dim**-0.5), embed_dim**-0.5)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def weights_seen(self) -> tuple[int, ...]:
        """What a captured graph of a call has in it of the weights besides their values; another after a change.

        The address of the first of them, and how often those were written to that other weights are folded from.
        """
        folded = (parameter for layer in self._folding for parameter in layer.folded_from())
        return next(self.parameters()).data_ptr(), *(0 if p.is_inference() else p._version for p in folded)

    def use_attention_backend(self, backend: AttentionBackend) -> None:
        """Choose what computes the self-attentions: ``"auto"``, ``"triton"``, ``"torch"`` or ``"xformers"``.

        For all kernels together see :func:`~.layers.use_kernels`.

        Raises:
            InputError: unknown name, or Triton cannot run on this network's device.
            MissingDependency: not installed.
        """
        try:
            check_attention_backend(backend)
            if (
                backend == "triton"
                and not interpreted()
                and (reason := obstacle(next(self.parameters()).device))
            ):
                raise ValueError(f"attention backend 'triton' cannot run here: {reason}")
        except ImportError as error:
            raise MissingDependency(str(error)) from error
        except ValueError as error:
            raise InputError(str(error)) from error
        for module in self.modules():
            if isinstance(module, MultiViewSelfAttention):
                module.backend = backend

    def zero_residual_branches(self) -> None:
        """Set what a training from scratch starts with, as the released code does.

        The last layer of every residual block and transformer, and of the network, becomes zero: each block
        starts as its skip connection.
        """
        last: list[nn.Module] = [self.out[-1]]
        for module in self.modules():
            if isinstance(module, ResBlock):
                last.append(module.out_layers[-1])
            elif isinstance(module, MultiViewTransformer):
                last.append(module.proj_out)
        for layer in last:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def prompt_key_values(self, context: Tensor, image_tokens: Tensor | None = None) -> list[KeyValues]:
        """Keys and values of every cross-attention, in the order in which they run; constant for a prompt.

        ``context`` [rows, L, D] text tokens, ``image_tokens`` [rows, n, D]; a row serves B * F / rows frames.
        """
        context = context.to(self.dtype)
        tokens = None if image_tokens is None else image_tokens.to(self.dtype)
        return [layer.key_values(context, tokens) for layer in self._cross_attentions()]

    def _cross_attentions(self) -> list[PromptCrossAttention]:
        return [module for module in self.modules() if isinstance(module, PromptCrossAttention)]

    def _residual_blocks(self) -> dict[str, ResBlock]:
        return {name: module for name, module in self.named_modules() if isinstance(module, ResBlock)}

    def stacks(self) -> dict[str, dict[str, int]]:
        widths = dict(zip(self._residual_blocks(), self._shift_widths, strict=True))
        return {
            own: {f"{block}.emb_layers.1.{kind}": rows for block, rows in widths.items()}
            for own, kind in (("to_shifts", "weight"), ("to_shifts_bias", "bias"))
        }

    def embed_image(self, image_hidden: Tensor) -> Tensor:
        """Image tokens [B, n, D] of the picture's features.

        Args:
            image_hidden: hidden states [B, T, Dv]; for the ``global`` adaptor the pooled feature, [B, Dp] or
                [B, 1, Dp]. A map of zeros is a valid input: the unconditional branch is made of it.

        Raises:
            InputError: the model has no image branch, or the shape is another.
        """
        config, shape = self.config, list(image_hidden.shape)
        if not config.with_image:
            raise InputError("this model has no image branch; leave out image_hidden")
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
        context: Tensor | None,
        camera: Tensor | None = None,
        image_hidden: Tensor | None = None,
        image_latent: Tensor | None = None,
        image_tokens: Tensor | None = None,
        key_values: Sequence[KeyValues] | None = None,
        keep: int | None = None,
    ) -> Tensor:
        """Predicted noise of every frame, or of the first ``keep`` frames of each group.

        Without image input a model with an image branch runs on text alone; text tokens are never read as
        image tokens. Without ``camera`` the camera term is left out, which differs from a camera of zeros.

        Args:
            latents: [B, F, 4, h, w], noisy, scaled; h and w multiples of ``config.downscale``. Not modified.
            timesteps: [B], 0 to 999; all frames of a group share one.
            context: [B, L, D] text tokens, or [B, F, L, D] for a prompt of its own for each frame; None with
                ``key_values``.
            camera: [B, F, 16] row-major camera-to-world matrices with translations of unit length; zeros for
                the image frame.
            image_hidden: features of the prompt picture, see :meth:`embed_image`.
            image_latent: [B, 4, h, w] clean latent of the prompt picture; replaces the last frame.
            image_tokens: [B, n, D] or [B, F, n, D], already embedded, instead of ``image_hidden``.
            key_values: what :meth:`prompt_key_values` made of the prompt, in place of context and image.
            keep: 1 to F, by default F. No work is done on the other frames where nothing depends on it, which is
                after the last self-attention.

        Returns:
            [B, keep, 4, h, w] in the dtype of ``latents``.

        Raises:
            InputError: a shape does not fit, ``keep`` is out of range, or both ``image_hidden`` and
                ``image_tokens`` are given.
        """
        self._check(latents, timesteps, camera, image_latent, keep)
        if image_hidden is not None:
            if image_tokens is not None:
                raise InputError("give image_hidden or image_tokens, not both")
            image_tokens = self.embed_image(image_hidden)
        if image_tokens is not None:
            if not self.config.with_image:
                raise InputError("this model has no image branch; leave out image_tokens")
            image_tokens = self._rows("image_tokens", image_tokens, latents)
        x = latents.to(self.dtype)
        if image_latent is not None:
            x = torch.cat((x[:, :-1], image_latent[:, None].to(self.dtype)), dim=1)
        if key_values is None:
            if context is None:
                raise InputError("give context, or key_values in its place")
            key_values = self.prompt_key_values(self._rows("context", context, latents), image_tokens)
        prompt = Prompt(key_values, self.image_scale)
        shifts = self._shifts(self._embedding(timesteps, camera, x.shape[1]))
        return self._denoise(x, shifts, prompt, keep).to(latents.dtype)

    def _embedding(self, timesteps: Tensor, camera: Tensor | None, frames: int) -> Tensor:
        """Time plus camera embedding of every frame after the SiLU that all residual blocks begin with, [B*F, E]."""
        time = self.time_embed(timestep_embedding(timesteps, self.config.model_channels).to(self.dtype))
        embedding = time[:, None].expand(-1, frames, -1)
        if camera is not None:
            embedding = embedding + self.camera_embed(camera.to(self.dtype))
        return functional.silu(embedding.flatten(0, 1))

    def _shifts(self, embedding: Tensor) -> tuple[Tensor, ...]:
        """What each residual block adds behind its first convolution, whose bias is in it: [B*F, C'] each."""
        bias = self.to_shifts_bias + torch.cat(
            [bias_of(convolution) for convolution in self._first_convolutions]
        )
        return functional.linear(embedding, self.to_shifts, bias).split(self._shift_widths, dim=1)

    def _denoise(self, x: Tensor, shifts: Sequence[Tensor], prompt: Prompt, keep: int | None) -> Tensor:
        groups, frames = x.shape[:2]
        h, skips = x.flatten(0, 1), []
        for block in self.input_blocks:
            h = block(h, shifts, prompt, frames)
            skips.append(h)
        h = self.middle_block(h, shifts, prompt, frames)
        *blocks, last = self.output_blocks
        for block in blocks:
            h = block(torch.cat((h, skips.pop()), dim=1), shifts, prompt, frames)
        # Frames with prompts of their own stay to the end, and so do those of a network whose last block has no
        # self-attention: the last line drops what is left.
        early = keep if all(layer.shared_by(groups) for layer in prompt.key_values) else None
        h = last(torch.cat((h, skips.pop()), dim=1), shifts, prompt, frames, early)
        return self.out(h).unflatten(0, (groups, -1))[:, :keep]

    def _check(
        self,
        latents: Tensor,
        timesteps: Tensor,
        camera: Tensor | None,
        image_latent: Tensor | None,
        keep: int | None,
    ) -> None:
        config = self.config
        shape, c, multiple = list(latents.shape), config.in_channels, config.downscale
        if len(shape) != 5 or shape[2] != c or 0 in shape or shape[3] % multiple or shape[4] % multiple:
            raise InputError(
                f"latents have shape {shape}; they must be [B, F, {c}, h, w], h and w multiples of {multiple}"
            )
        b, f, _, h, w = shape
        _expect("timesteps", timesteps, (b,))
        if camera is not None:
            _expect("camera", camera, (b, f, config.camera_dim))
        if image_latent is not None:
            _expect("image_latent", image_latent, (b, c, h, w))
        if keep is not None and not 1 <= keep <= f:
            raise InputError(f"keep is {keep}; with these latents it must lie in 1..{f}")

    def _rows(self, name: str, tokens: Tensor, latents: Tensor) -> Tensor:
        """[B, n, D] as it is, [B, F, n, D] as one row a frame, [B*F, n, D]; in the model's dtype."""
        (b, f), width = latents.shape[:2], self.config.context_dim
        fits = tokens.ndim in (3, 4) and list(tokens.shape[:-2]) == [b, f][: tokens.ndim - 2]
        if not fits or tokens.shape[-1] != width or not tokens.shape[-2]:
            raise InputError(
                f"{name} has shape {list(tokens.shape)}; with these latents it must be [{b}, n, {width}] "
                f"or [{b}, {f}, n, {width}]"
            )
        return (tokens if tokens.ndim == 3 else tokens.flatten(0, 1)).to(self.dtype)


def _expect(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tensor.shape != torch.Size(shape):
        raise InputError(
            f"{name} has shape {list(tensor.shape)}; with these latents it must be {list(shape)}"
        )


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
