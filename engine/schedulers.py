"""What a sampling loop steps with: the released DDIM, or any fitting scheduler of diffusers by its name."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from .errors import InputError, MissingDependency
from .schedule import TRAIN_STEPS, betas, ddim_step, ddim_table, ddim_timesteps

SHORT_NAMES = {
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
    "pndm": "PNDMScheduler",
    "lms": "LMSDiscreteScheduler",
    "ddpm": "DDPMScheduler",
}


MAX_STEPS = TRAIN_STEPS - 2
"""Of a scheduler of diffusers: with more, several of them visit a timestep twice and divide by zero."""

_NOT_THIS_MODEL = ("Inverse", "CogVideoX")
"""In class names: schedulers that add noise, and those that rescale the schedule they are given."""


class Scheduler(Protocol):
    """Set to a number of steps; may keep state from step to step, so each sampling makes its own."""

    @property
    def timesteps(self) -> Sequence[torch.Tensor]:
        """Scalars [], noisiest first."""
        ...

    def start(self, noise: torch.Tensor) -> torch.Tensor:
        """The first latents from standard normal noise."""
        ...

    def model_input(self, step: int, latents: torch.Tensor) -> torch.Tensor:
        """What the model is shown: latents of the variance that it was trained on."""
        ...

    def step(
        self, step: int, latents: torch.Tensor, eps: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """The latents after that step; stochastic schedulers draw from ``generator``, which is on the CPU."""
        ...


def named_scheduler(name: str, steps: int, alphas_cumprod: torch.Tensor) -> Scheduler:
    """``ddim`` (this package's), a key of :data:`SHORT_NAMES`, or the name of a scheduler class of diffusers.

    ``alphas_cumprod`` [1000] is on the device of the latents to come. Raises :class:`InputError` for an
    unknown name, a scheduler that does not fit a model which predicts noise on this schedule, or a number of
    steps that it cannot take; :class:`MissingDependency` when it needs a package that is not installed.
    """
    if name.lower() == "ddim":
        return DdimScheduler(steps, alphas_cumprod)
    return DiffusersScheduler(name, steps, alphas_cumprod.device)


class DdimScheduler:
    """The released sampler at eta 0: see :func:`~.schedule.ddim_table`."""

    def __init__(self, steps: int, alphas_cumprod: torch.Tensor) -> None:
        timesteps, alpha, alpha_prev = ddim_table(steps, alphas_cumprod)
        self.timesteps = timesteps.unbind()
        self._alpha, self._alpha_prev = alpha.unbind(), alpha_prev.unbind()

    def start(self, noise: torch.Tensor) -> torch.Tensor:
        return noise

    def model_input(self, step: int, latents: torch.Tensor) -> torch.Tensor:
        return latents

    def step(
        self, step: int, latents: torch.Tensor, eps: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        return ddim_step(latents, eps, self._alpha[step], self._alpha_prev[step])


class DiffusersScheduler:
    """A scheduler of diffusers on the released noise schedule, spaced as Stable Diffusion 2.1 has it."""

    def __init__(self, name: str, steps: int, device: torch.device) -> None:
        scheduler = _class_named(name)
        ddim_timesteps(steps)  # the same rule and message for every scheduler
        if steps > MAX_STEPS:
            raise InputError(f"steps is {steps}; scheduler {name} takes 1 to {MAX_STEPS}")
        wanted = {
            "num_train_timesteps": TRAIN_STEPS,
            "trained_betas": betas().numpy(),
            "prediction_type": "epsilon",
            "timestep_spacing": "leading",
            "steps_offset": 1,
            "clip_sample": False,
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
        }
        known = inspect.signature(scheduler.__init__).parameters
        self._scheduler = scheduler(**{key: value for key, value in wanted.items() if key in known})
        try:
            # It counts on the host, where looking at a timestep waits for nobody; the model gets copies made ahead.
            self._scheduler.set_timesteps(steps, device="cpu")
        except (ValueError, IndexError, RuntimeError) as error:
            raise InputError(f"scheduler {name} cannot take {steps} steps: {error}") from error
        self._timesteps = list(self._scheduler.timesteps)
        self.timesteps = list(self._scheduler.timesteps.to(device))
        self._takes_generator = "generator" in inspect.signature(self._scheduler.step).parameters

    def start(self, noise: torch.Tensor) -> torch.Tensor:
        return noise * self._scheduler.init_noise_sigma

    def model_input(self, step: int, latents: torch.Tensor) -> torch.Tensor:
        return self._scheduler.scale_model_input(latents, self._timesteps[step])

    def step(
        self, step: int, latents: torch.Tensor, eps: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        options: dict[str, Any] = {"generator": generator} if self._takes_generator else {}
        return self._scheduler.step(eps, self._timesteps[step], latents, return_dict=False, **options)[0]


def _class_named(name: str) -> Any:
    import diffusers  # takes seconds, and the DDIM above does without

    class_name = SHORT_NAMES.get(name.lower(), name)
    scheduler = getattr(diffusers, class_name, None) if class_name.endswith("Scheduler") else None
    choices = f"take ddim, {', '.join(SHORT_NAMES)} or a class name of diffusers"
    if scheduler is None:
        raise InputError(f"unknown scheduler {name!r}; {choices} (DPMSolverSinglestepScheduler, for example)")
    absent = getattr(scheduler, "_backends", None)  # what diffusers puts in the place of such a class
    if absent:
        raise MissingDependency(f"{class_name} needs {' and '.join(absent)}: pip install {' '.join(absent)}")
    accepted = inspect.signature(scheduler.__init__).parameters
    fits = {"trained_betas", "prediction_type"} <= set(accepted)
    if not fits or any(part in class_name for part in _NOT_THIS_MODEL):
        raise InputError(
            f"scheduler {class_name} does not sample with a model that predicts noise; {choices}"
        )
    return scheduler
