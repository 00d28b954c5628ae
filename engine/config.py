"""Settings of the fusion as frozen dataclasses, and the named presets (SPEC sections 7 to 11)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from .errors import InputError


@dataclass(frozen=True)
class CameraRange:
    """What a training camera is drawn from. One elevation, field of view and distance per group of four views."""

    elevation_deg: tuple[float, float] = (0.0, 5.0)
    elevation_sampling: Literal["official", "uniform"] = "official"
    """``official``: half uniform, half the released code's arcsine branch that only reaches 3.18 degrees."""
    fovy_deg: tuple[float, float] = (45.0, 50.0)
    relative_distance: tuple[float, float] = (0.6, 0.75)
    """Distance times tan(fovy / 2): half the height of the frame at the origin, in scene units."""
    light_distance: tuple[float, float] = (0.8, 1.5)
    light_perturbation: float = 1.0


@dataclass(frozen=True)
class HashGridConfig:
    """Multiresolution hash encoding, indexed as tiny-cuda-nn's ``HashGrid`` does."""

    levels: int = 16
    features: int = 2
    log2_table: int = 19
    base_resolution: int = 16
    growth: float = 1.447269237440378


@dataclass(frozen=True)
class FieldConfig:
    """Hash grid and two bias-free MLPs; density = softplus(net + strength (1 - |x| / radius))."""

    grid: HashGridConfig = HashGridConfig()
    hidden: int = 64
    blob_strength: float = 10.0
    blob_radius: float = 0.5


@dataclass(frozen=True)
class RenderConfig:
    """Marching through the box [-1, 1]^3."""

    samples_per_ray: int = 512
    """Sets the step: 1.732 * 2 / samples_per_ray."""
    occupancy_resolution: int = 32
    occupancy_every: int = 16
    occupancy_warmup_steps: int = 256
    transmittance_stop: float = 1e-4
    max_samples: int = 2**24
    """Most samples of one render; beyond it the farthest samples of each ray are dropped, with a warning."""

    @property
    def step_size(self) -> float:
        return 1.732 * 2 / self.samples_per_ray


@dataclass(frozen=True)
class Stage:
    """From ``start`` on: render ``views`` pictures of ``resolution`` pixels a step."""

    start: int
    resolution: int
    views: int


@dataclass(frozen=True)
class Ramp:
    """Linear from ``begin`` to ``end`` over the first ``steps`` steps, then constant."""

    begin: float
    end: float
    steps: int

    def at(self, step: int) -> float:
        if self.steps <= 0:
            return self.end
        return self.begin + (self.end - self.begin) * min(max(step / self.steps, 0.0), 1.0)


@dataclass(frozen=True)
class WarmStart:
    """Fit the field to diffused views before distillation begins (not in the paper; off in its presets)."""

    view_sets: int
    """How many sets of four orthogonal views are sampled, evenly spaced in azimuth."""
    ddim_steps: int
    fit_steps: int
    rays: int
    """Rays of one fit step."""


@dataclass(frozen=True)
class FusionConfig:
    """Everything that decides what a fusion computes, but for the model, the picture and the seed."""

    name: str
    steps: int
    stages: tuple[Stage, ...]
    camera: CameraRange = CameraRange()
    field: FieldConfig = FieldConfig()
    render: RenderConfig = RenderConfig()
    guidance_scale: float = 5.0
    recon_std_rescale: float = 0.2
    min_step: Ramp = Ramp(0.98, 0.02, 8000)
    max_step: Ramp = Ramp(0.98, 0.50, 8000)
    background_match: Literal["grey", "colour"] = "grey"
    """The prompt is composited over the grey of the rendered background's mean (released) or its colour (paper)."""
    random_background: float = 0.5
    """Probability that a step replaces the background network by one random colour."""
    background_colours: Literal["rgb", "grey"] = "rgb"
    """Of what kind that colour is. Over a grey, what a grey match puts behind the prompt is the very same."""
    albedo_only_until: int = 5000
    albedo_probability: float = 0.25
    textureless_probability: float = 0.5
    lambda_sds: float = 1.0
    lambda_orient: Ramp = Ramp(10.0, 1000.0, 5000)
    lambda_sparsity: float = 1.0
    lambda_opaque: float = 0.0
    lambda_z_variance: float = 0.0
    lr_grid: float = 0.01
    lr_density: float = 0.001
    lr_feature: float = 0.001
    lr_background: float = 0.001
    adam_betas: tuple[float, float] = (0.9, 0.99)
    adam_eps: float = 1e-15
    weight_decay: float = 0.01
    warm_start: WarmStart | None = None
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        _check(self)

    def stage_at(self, step: int) -> Stage:
        return [stage for stage in self.stages if stage.start <= step][-1]

    @property
    def fitted_steps(self) -> int:
        """Steps that the field has behind it when distillation begins."""
        return 0 if self.warm_start is None else self.warm_start.fit_steps

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def changed(self, **values: Any) -> FusionConfig:
        """A copy with some settings replaced; unknown names are an :class:`InputError`."""
        known = {f.name for f in fields(self)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InputError(
                f"unknown fusion setting {', '.join(unknown)}; the settings are {', '.join(sorted(known))}"
            )
        return replace(self, **values)


def _check(config: FusionConfig) -> None:
    rules = {
        "steps": (config.steps, config.steps >= 1, "at least 1"),
        "guidance_scale": (config.guidance_scale, config.guidance_scale >= 0, "not negative"),
        "recon_std_rescale": (config.recon_std_rescale, 0 <= config.recon_std_rescale <= 1, "in [0, 1]"),
        "checkpoint_every": (config.checkpoint_every, config.checkpoint_every >= 1, "at least 1"),
    }
    for name, (value, holds, rule) in rules.items():
        if not (math.isfinite(value) and holds):
            raise InputError(f"fusion setting {name} is {value}; it must be {rule}")
    starts = [stage.start for stage in config.stages]
    if not starts or starts[0] != 0 or starts != sorted(set(starts)):
        raise InputError(
            f"fusion stages start at {starts}; the first must start at 0 and the others later, in order"
        )
    for stage in config.stages:
        if stage.views < 4 or stage.views % 4 or stage.resolution < 8:
            raise InputError(f"fusion stage {stage}: views must be a multiple of 4, resolution at least 8")


OFFICIAL = FusionConfig(
    name="official",
    steps=12_500,
    stages=(Stage(0, 64, 8), Stage(5_000, 192, 4), Stage(10_000, 256, 4)),
)
"""The released configuration."""

PAPER = replace(
    OFFICIAL,
    name="paper",
    camera=CameraRange(elevation_sampling="uniform", relative_distance=(0.6, 0.85)),
    background_match="colour",
    recon_std_rescale=0.0,
)
"""What the paper states where the released configuration differs (SPEC section 15)."""

EMBEDDED_CAMERA = CameraRange(
    elevation_deg=(-5.0, 25.0), elevation_sampling="uniform", relative_distance=(0.66, 0.69)
)
"""What the embedded model was trained on."""
EMBEDDED_GUIDANCE = 2.0

DRAFT = FusionConfig(
    name="draft",
    steps=60,
    stages=(Stage(0, 32, 4), Stage(40, 48, 4)),
    camera=EMBEDDED_CAMERA,
    field=FieldConfig(grid=HashGridConfig(levels=8, log2_table=15, base_resolution=8)),
    render=RenderConfig(samples_per_ray=192, occupancy_warmup_steps=64),
    guidance_scale=EMBEDDED_GUIDANCE,
    min_step=Ramp(0.20, 0.02, 60),
    max_step=Ramp(0.30, 0.10, 60),
    background_match="colour",
    albedo_only_until=10**9,
    lambda_orient=Ramp(1.0, 10.0, 100),
    lambda_sparsity=0.1,
    warm_start=WarmStart(view_sets=4, ddim_steps=20, fit_steps=250, rays=2048),
    checkpoint_every=50,
)
"""Minutes on two CPU cores with the embedded model: a field fitted to diffused views, refined by low-noise MV-SDS."""

TURBO = FusionConfig(
    name="turbo",
    steps=400,
    stages=(Stage(0, 128, 4), Stage(150, 256, 4)),
    min_step=Ramp(0.30, 0.10, 400),
    max_step=Ramp(0.50, 0.25, 400),
    random_background=1.0,
    background_colours="grey",
    albedo_only_until=10**9,
    lambda_orient=Ramp(1.0, 10.0, 400),
    lambda_sparsity=0.1,
    warm_start=WarmStart(view_sets=8, ddim_steps=20, fit_steps=600, rays=4096),
)
"""For a GPU, with any model: as ``draft``, with the whole field at the full resolution.

The noise was chosen on two objects, with a small field at 64 pixels: up to 0.5 the refinement gains 0.6 to 1.7 dB;
where its lower end lies between 0.02 and 0.15 changed no more than another step count did.
"""

FAST = replace(
    TURBO,
    name="fast",
    steps=2_000,
    stages=(Stage(0, 128, 4), Stage(500, 256, 4)),
    min_step=Ramp(0.30, 0.10, 2_000),
    max_step=Ramp(0.50, 0.25, 2_000),
    lambda_orient=Ramp(1.0, 10.0, 2_000),
    warm_start=WarmStart(view_sets=12, ddim_steps=30, fit_steps=1_000, rays=4096),
)
"""As ``turbo``, with more of everything."""

PRESETS: dict[str, FusionConfig] = {config.name: config for config in (OFFICIAL, PAPER, FAST, TURBO, DRAFT)}
FOR_EVERY_MODEL = (FAST.name, TURBO.name)
"""Presets that follow the embedded model in what it was trained on; the others are what they say."""


def preset(name: str | FusionConfig, *, family: str = "") -> FusionConfig:
    """The preset of that name for a model of a family (``ModelCard.family``), or the configuration itself.

    Raises :class:`InputError` for an unknown name.
    """
    if isinstance(name, FusionConfig):
        return name
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}")
    if family == "nano" and name in FOR_EVERY_MODEL:
        return replace(PRESETS[name], camera=EMBEDDED_CAMERA, guidance_scale=EMBEDDED_GUIDANCE)
    return PRESETS[name]
