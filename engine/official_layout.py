"""The official checkpoints of ImageDream and MVDream: one flat dict with a prefix for each network."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from .blueprint import Layout, Part
from .clip_layout import (
    clip_text_config,
    clip_text_from_official,
    clip_vision_config,
    clip_vision_from_official,
)
from .network_parts import (
    RELEASED_TEXT,
    RELEASED_VAE,
    RELEASED_VISION,
    best_of,
    text_part,
    unet_by_tensors,
    vae_part,
    vision_part,
)
from .official_names import official_clip_name, official_vae_name
from .tokenizer import ClipTokenizer, Tokenizer
from .vae_layout import vae_config, vae_from_official

UNET_PREFIX = "model.diffusion_model."
_VAE_PREFIXES = ("vae_model.", "first_stage_model.")
_CLIP_PREFIXES = ("clip_model.model.", "cond_stage_model.model.")
"""ImageDream's, then MVDream's."""

SCHEDULE_BUFFERS = frozenset(
    (
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
    )
)
"""Left out: they follow from the betas, which all released models share."""


def is_official(tensors: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(UNET_PREFIX) for name in tensors)


def unet_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The UNet's own names, of a full checkpoint or of a UNet alone."""
    if not is_official(tensors):
        return dict(tensors)
    return _under(tensors, UNET_PREFIX)


def official_layout(tensors: Mapping[str, Tensor], tokenizer: Tokenizer | None = None) -> Layout:
    """The networks of a full checkpoint. ``tokenizer``: CLIP's by default.

    Raises :class:`~.errors.MissingDependency` where CLIP's vocabulary is needed and not installed.
    """
    vae_prefix, clip_prefix = _used(tensors, _VAE_PREFIXES), _used(tensors, _CLIP_PREFIXES)
    prefixes = (UNET_PREFIX, vae_prefix, clip_prefix)
    strangers = (name for name in tensors if not name.startswith(prefixes) and name not in SCHEDULE_BUFFERS)
    layout = Layout(extra=tuple(strangers))

    unet = _under(tensors, UNET_PREFIX)
    layout.attempt(lambda: unet_by_tensors(unet, 64, UNET_PREFIX.__add__))
    adaptor = layout.parts["unet"].network.config.image_adaptor if "unet" in layout.parts else None

    def lay(what: str, prefix: str, found: Mapping[str, Tensor], build: Callable[[], Part]) -> None:
        if found:
            layout.attempt(build)
        else:
            layout.complaints.append(f"it has no {what} (tensors {prefix}*)")

    vae = vae_from_official(_under(tensors, vae_prefix))
    levels = len({name.split(".")[2] for name in vae if name.startswith("decoder.up_blocks.")})
    vae_name = official_vae_name(vae_prefix, levels)
    lay(
        "VAE",
        vae_prefix,
        vae,
        lambda: best_of(lambda c: vae_part(c, vae, vae_name), lambda: vae_config(vae), lambda: RELEASED_VAE),
    )

    clip = _under(tensors, clip_prefix)
    text, text_name = clip_text_from_official(clip), official_clip_name(clip_prefix)
    words = tokenizer or ClipTokenizer()
    lay(
        "text encoder",
        clip_prefix,
        text,
        lambda: best_of(
            lambda c: text_part(c, text, words, text_name),
            lambda: clip_text_config(text),
            lambda: RELEASED_TEXT,
        ),
    )

    vision_prefix = f"{clip_prefix}visual."
    vision, vision_name = clip_vision_from_official(clip), official_clip_name(vision_prefix)
    if adaptor == "none":
        layout.extra += tuple(name for name in tensors if name.startswith(vision_prefix))
    elif vision or adaptor is not None:
        lay(
            "image encoder",
            vision_prefix,
            vision,
            lambda: best_of(
                lambda c: vision_part(c, vision, vision_name, pooled=adaptor == "global"),
                lambda: clip_vision_config(vision),
                lambda: RELEASED_VISION,
            ),
        )
    return layout


def _used(tensors: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> str:
    """The prefix that names in this checkpoint begin with; the first if none does."""
    return next(
        (prefix for prefix in prefixes if any(name.startswith(prefix) for name in tensors)), prefixes[0]
    )


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
