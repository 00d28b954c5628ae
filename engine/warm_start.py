"""Warm start: fit the field to diffused views of known cameras before distillation begins.

Not in the paper. Distillation from nothing takes thousands of steps; a few sets of diffused views, though not
quite consistent with each other, already fix shape and colour, and distillation then only has to reconcile
them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import binary_propagation
from torch import Tensor

from ..kernels.ray_march import lattice_points
from .cameras import Cameras, official_views, orbit_cameras
from .conditioning import Conditioner
from .config import FusionConfig, WarmStart
from .field_state import FieldState
from .graphed import GraphedStep
from .losses import sparsity_loss
from .model import VIEWS, Cancel, MultiViewModel, Progress
from .nerf.render import MOST_CANDIDATES, Capacity, render_rays
from .picture import PreparedPicture
from .sampler import decode_views, sample_views

GREYS = (0.5, 0.25, 0.75, 0.0, 1.0)
"""What may be behind the diffused views, from the middle outwards: the middle leaves most objects visible."""
CLEAR = 0.25
"""Largest channel difference between object and background with which silhouettes are safe."""
MASK_FROM, MASK_TO = 0.2, 0.7
"""Shares of the object's own difference at which a pixel begins to count, and fully counts, as object."""
VISIBLE = 0.04
"""A difference beyond the noise of a diffused background."""
EDGE_PX = 2
LEAST_CONTRAST, MOST_CONTRAST = 0.1, 0.6
KEPT_OF_A_RAY = 160
"""Samples worth a gradient that there is room for in a captured fit, as a mean over the rays: more than the initial
blob has, several times those of a finished object."""
LAMBDA_MASK = 0.5
LAMBDA_SPARSITY = 0.05
LR_GRID, LR_NETWORKS = 0.02, 0.005
"""Pictures pull steadier than distillation does: a few times its rates halve the steps to the same PSNR."""


@dataclass(frozen=True)
class ViewSet:
    """Four orthogonal views to be diffused."""

    index: int
    azimuth_deg: tuple[float, ...]
    elevation_deg: float


ViewSource = Callable[[ViewSet, Progress | None, Cancel | None], Tensor]
"""Pictures uint8 [4, S, S, 3] of a view set over an even background; reports and asks as a stage of its
own."""


def sampling_steps(settings: WarmStart) -> int:
    """Steps of diffusion before the fit, for progress bars."""
    return settings.view_sets * settings.ddim_steps


def plan_views(config: FusionConfig) -> list[ViewSet]:
    """The sets of a configuration: azimuths evenly spaced over all sets, elevations through the camera range.

    Elevations cycle through the middles of the three thirds of the range.
    """
    assert config.warm_start is not None
    count = config.warm_start.view_sets
    low, high = config.camera.elevation_deg
    return [
        ViewSet(
            index,
            tuple(90.0 * (k + index / count) for k in range(VIEWS)),
            low + (high - low) * (2 * (index % 3) + 1) / 6,
        )
        for index in range(count)
    ]


def view_cameras(config: FusionConfig, view_sets: list[ViewSet]) -> Cameras:
    """Cameras of all views, in order; field of view and relative distance in the middle of their ranges.

    The diffusion model is told directions only, so distance and field of view are what it was trained on.
    """
    fovy_deg = sum(config.camera.fovy_deg) / 2
    distance = sum(config.camera.relative_distance) / 2 / math.tan(math.radians(fovy_deg) / 2)
    azimuth = [value for views in view_sets for value in views.azimuth_deg]
    elevation = [views.elevation_deg for views in view_sets for _ in views.azimuth_deg]
    return orbit_cameras(azimuth, elevation, fovy_deg, distance)


def clearest_grey(picture: PreparedPicture | None) -> float:
    """The first of :data:`GREYS` from which nearly all of the object differs clearly, else the one it differs most
    from.

    A grey object before the same grey has no silhouette, and nothing tells the fit where it ends.
    """
    if picture is None:
        return GREYS[0]
    colours = picture.rgba[picture.rgba[..., 3] > 127, :3].astype(np.float32) / 255
    if not len(colours):
        return GREYS[0]
    differences = {grey: float(np.quantile(np.abs(colours - grey).max(1), 0.05)) for grey in GREYS}
    clear = [grey for grey, difference in differences.items() if difference >= CLEAR]
    return clear[0] if clear else max(GREYS, key=differences.__getitem__)


class DiffusedViews:
    """The diffusion model as a :data:`ViewSource`; every set starts from the same noise, which keeps sets
    alike."""

    def __init__(
        self, model: MultiViewModel, conditioner: Conditioner, config: FusionConfig, seed: int
    ) -> None:
        assert config.warm_start is not None
        self.model = model
        self.conditioner = conditioner
        self.steps = config.warm_start.ddim_steps
        self.guidance_scale = config.guidance_scale
        self.seed = seed
        self.grey = clearest_grey(conditioner.picture)

    def __call__(self, views: ViewSet, on_progress: Progress | None, cancel: Cancel | None) -> Tensor:
        latents = sample_views(
            self.model,
            self.conditioner,
            camera=official_views(views.elevation_deg, views.azimuth_deg),
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            seed=self.seed,
            grey=self.grey,
            on_progress=on_progress,
            cancel=cancel,
        )
        return torch.from_numpy(decode_views(self.model, latents))


@dataclass(frozen=True)
class Silhouettes:
    """What pictures of an object over an even background tell about where it is."""

    background: Tensor
    """[V, 3]: the median of the border pixels."""
    coverage: Tensor
    """[V, H, W] in [0, 1]."""
    certainty: Tensor
    """[V, H, W]: 0 where a pixel of the background's colour is enclosed by object and may be either, else
    1."""


def silhouettes(pictures: Tensor, contrast: float | None = None) -> Silhouettes:
    """Soft masks from the difference to the background. ``pictures``: [V, H, W, 3] float in [0, 1].

    ``contrast``: the least largest channel difference between object and background; by default what the
    inside of the objects shows.
    """
    border = torch.cat([pictures[:, 0], pictures[:, -1], pictures[:, 1:-1, 0], pictures[:, 1:-1, -1]], dim=1)
    # The lower median, as torch.median's, which has no deterministic form on a GPU.
    background = border.sort(dim=1).values[:, (border.shape[1] - 1) // 2]
    difference = (pictures - background[:, None, None]).abs().amax(-1)
    if contrast is None:
        contrast = _contrast(difference)
    begin, full = MASK_FROM * contrast, MASK_TO * contrast
    coverage = ((difference - begin) / (full - begin)).clamp(0, 1)
    certainty = torch.ones_like(coverage)
    for view, even in enumerate((coverage < 0.5).cpu().numpy()):
        edge = torch.zeros(even.shape, dtype=torch.bool)
        edge[0] = edge[-1] = True
        edge[:, 0] = edge[:, -1] = True
        outside = binary_propagation(edge.numpy() & even, mask=even)
        certainty[view][torch.from_numpy(even & ~outside).to(certainty.device)] = 0.0
    return Silhouettes(background, coverage, certainty)


def _contrast(difference: Tensor) -> float:
    """What all but a twentieth of the objects' insides [V, H, W] differ by at least; edges, which are blurred, do not
    count."""
    seen = (difference > VISIBLE).float()[:, None]
    inside = -F.max_pool2d(-seen, 2 * EDGE_PX + 1, stride=1, padding=EDGE_PX)[:, 0] > 0.5
    if not bool(inside.any()):
        return LEAST_CONTRAST
    least = float(np.quantile(difference[inside].cpu().numpy(), 0.05))
    return min(max(least, LEAST_CONTRAST), MOST_CONTRAST)


class WarmStartFit:
    """Fits a state's field to pictures uint8 [4 * view_sets, S, S, 3] on the state's device.

    Takes over the state's learning rates; restart its optimiser afterwards. ``captured`` replays a step as one
    CUDA graph, in buffers for as many samples as the rays may have; off CUDA it runs uncaptured, for tests.
    """

    def __init__(self, state: FieldState, pictures: Tensor, *, captured: bool = False) -> None:
        assert state.config.warm_start is not None
        state.set_learning_rates(grid=LR_GRID, networks=LR_NETWORKS)
        self.state = state
        self.pictures = pictures
        self.settings = state.config.warm_start
        self.steps = self.settings.fit_steps
        cameras = view_cameras(state.config, plan_views(state.config)).to(state.device)
        rays = cameras.rays(pictures.shape[1])
        colours = pictures.float() / 255
        seen = silhouettes(colours)
        self._origins, self._directions = rays.origins.reshape(-1, 3), rays.directions.reshape(-1, 3)
        self._rgb = colours.reshape(-1, 3)
        self._background = seen.background
        self._coverage, self._certainty = seen.coverage.reshape(-1), seen.certainty.reshape(-1)
        self._pixels = pictures.shape[1] * pictures.shape[2]
        self._capacity: Capacity | None = None
        self._replay: Callable[[], None] = self._step
        if captured:
            self._capture()

    @classmethod
    def begin(
        cls,
        state: FieldState,
        source: ViewSource,
        on_progress: Progress | None,
        cancel: Cancel | None,
        *,
        captured: bool = False,
    ) -> WarmStartFit:
        """Ask ``source`` for all view sets of the configuration; their steps and the fit's are one bar."""
        plan, settings = plan_views(state.config), state.config.warm_start
        assert settings is not None

        def report(views: ViewSet) -> Progress | None:
            if on_progress is None:
                return None
            whole = sampling_steps(settings) + settings.fit_steps
            return lambda _, done, total: on_progress(
                "warm-start", int((views.index + done / total) * settings.ddim_steps), whole
            )

        pictures = [source(views, report(views), cancel) for views in plan]
        return cls(state, torch.cat(pictures).to(state.device), captured=captured)

    def _capture(self) -> None:
        state, render, rays = self.state, self.state.config.render, self.settings.rays
        self._capacity = Capacity(
            min(rays * lattice_points(render.step_size), MOST_CANDIDATES),
            min(rays * KEPT_OF_A_RAY, render.max_samples),
        )
        self._most_kept = torch.zeros((), dtype=torch.int32, device=state.device)
        streams = [state.streams[name] for name in ("rays", "jitter")]
        self._replay = GraphedStep(self._step, state.device, streams, warmup=2)
        self._refresh = state.graphed_refresh()

    def advance(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """One AdamW step on random rays of all pictures; a captured one's results last until the next."""
        state = self.state
        if self._capacity is None:
            state.occupancy.update(step, state.field.density, state.streams["occupancy"])
        else:
            self._refresh(step)
        self._replay()
        if step == self.steps - 1:
            self._warn_if_cut()
        return self._result

    def _step(self) -> None:
        state = self.state
        streams = state.streams
        chosen = torch.randint(
            len(self._rgb), (self.settings.rays,), generator=streams["rays"], device=state.device
        )
        out = render_rays(
            state.field,
            state.background,
            state.occupancy,
            self._origins[chosen],
            self._directions[chosen],
            background_colour=self._background[chosen // self._pixels],
            jitter=streams["jitter"],
            config=state.config.render,
            volume=state.volume,
            capacity=self._capacity,
        )
        if out.samples.found is not None:
            self._most_kept.copy_(torch.maximum(self._most_kept, out.samples.found[1]))
        mask_error = (out.opacity[:, 0] - self._coverage[chosen]).square()
        values = {
            "rgb": F.smooth_l1_loss(out.rgb, self._rgb[chosen], beta=0.1),
            "mask": (mask_error * self._certainty[chosen]).mean(),
            "sparsity": sparsity_loss(out.opacity),
        }
        values["loss"] = values["rgb"] + LAMBDA_MASK * values["mask"] + LAMBDA_SPARSITY * values["sparsity"]
        state.minimise(values["loss"])
        self._result = out.opacity.detach(), {name: value.detach() for name, value in values.items()}

    def _warn_if_cut(self) -> None:
        """Say so if a step had more samples than its buffers. Waits for the device."""
        if self._capacity is not None and (most := int(self._most_kept)) > self._capacity.kept:
            warnings.warn(
                f"a step of fitting had {most} samples worth a gradient and buffers for {self._capacity.kept}: its"
                " farthest ones were left out",
                stacklevel=2,
            )
