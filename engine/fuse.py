"""The fusion loop: from a teacher of views to a field, through optional fitted views and multi-view
distillation."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .backends import OWN, Backends, loop_obstacle
from .captured import CapturedDistillation
from .checkpoint import config_to_json, differences, read_tensors, write_tensors
from .condition_bank import Conditions, GreyBank, MatchedColour
from .config import FusionConfig
from .distill import Guidance, MultiViewGuidance, matched_colour
from .draws import draw_step
from .errors import Cancelled, FusionError, InputError
from .field_state import FieldState
from .fused_field import CHECKPOINT_KIND, FusedField
from .model import Cancel, Progress
from .nerf.render import render
from .objective import objective
from .run_context import current, deterministic, interrupt_between_steps
from .warm_start import DiffusedViews, ViewSource, WarmStartFit, sampling_steps

Metrics = Callable[[str, int, dict[str, float]], None]
"""``on_metrics(phase, steps done, values)``, whenever the loop waits for the device anyway."""

WARM, FUSE = "warm-start", "fuse"
EMPTY_OPACITY = 1e-3
EMPTY_STEPS = 8
"""So many renders in a row without anything in them end the fusion: nothing could bring an object back."""
STEPS_BETWEEN_SYNCS = 20


@dataclass(frozen=True)
class Hooks:
    on_progress: Progress | None
    cancel: Cancel | None
    checkpoint_path: Path | None
    on_metrics: Metrics | None


class Fusion:
    """One fusion, from its first step or from a checkpoint. All randomness comes from ``seed``.

    ``views`` provides the pictures that a configuration with a warm start fits first. Raises
    :class:`InputError` if they are needed and missing, and ``MissingDependency`` for a backend that is not
    installed. ``deterministic`` makes a GPU repeat a run bit by bit, as a CPU always does.
    """

    def __init__(
        self,
        config: FusionConfig,
        guidance: Guidance,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        views: ViewSource | None = None,
        backends: Backends = OWN,
        deterministic: bool = False,
    ) -> None:
        if config.warm_start is not None and views is None:
            raise InputError(f"preset {config.name} starts from fitted views; it needs a source of views")
        self.config = config
        self.guidance = guidance
        self.seed = seed
        self.device = torch.device(device)
        self.views = views
        self.backends = backends
        self.deterministic = deterministic
        self.state = FieldState(config, seed, self.device, backends)
        self.warm: WarmStartFit | None = None
        self.phase = FUSE if config.warm_start is None else WARM
        self.done = 0
        self._health = _Health(self.device)
        self._saved: str | None = None

    @classmethod
    def guided_by(
        cls,
        guidance: MultiViewGuidance,
        *,
        seed: int = 0,
        backends: Backends = OWN,
        deterministic: bool = False,
    ) -> Fusion:
        """By the diffusion model, on its device and with its configuration, from its views if that starts from some."""
        model, config = guidance.model, guidance.config
        return cls(
            config,
            guidance,
            seed=seed,
            device=model.device,
            views=DiffusedViews(model, guidance.conditioner, config, seed) if config.warm_start else None,
            backends=backends,
            deterministic=deterministic,
        )

    def run(
        self,
        *,
        on_progress: Progress | None = None,
        cancel: Cancel | None = None,
        checkpoint_path: Path | str | None = None,
        on_metrics: Metrics | None = None,
    ) -> FusedField:
        """Run what is left and return the field.

        With ``checkpoint_path`` a checkpoint is written every ``checkpoint_every`` steps, at the end, on
        ``cancel`` and on Ctrl-C (which takes effect after the step; a second one at once, without a
        checkpoint). Raises :class:`FusionError` for a NaN or an empty field, :class:`Cancelled` if ``cancel``
        said so, and ``KeyboardInterrupt``.
        """
        path = None if checkpoint_path is None else Path(checkpoint_path)
        hooks = Hooks(on_progress, cancel, path, on_metrics)
        with (
            current(self.device),
            deterministic(self.device, self.deterministic),
            interrupt_between_steps() as interrupted,
        ):
            if self.phase == WARM:
                self._fit_views(hooks, interrupted)
            with self._steps(hooks) as advance:
                self._loop(self.config.steps, advance, hooks, interrupted)
        state = self.state
        return FusedField(state.field, state.background, state.occupancy, self.config)

    def resume(self, path: Path | str) -> None:
        """Continue from a checkpoint. Raises :class:`InputError` if it belongs to another run, saying what
        differs."""
        tensors, header = read_tensors(Path(path), (CHECKPOINT_KIND,))
        found = differences(header.get("run", {}), self._identity())
        if found:
            raise InputError(f"{path} cannot be resumed, it is of another run: {'; '.join(found)}")
        try:
            self.state.load_tensors(tensors)
            self.phase, self.done = header["phase"], header["done"]
            if self.phase == WARM:
                views = tensors["views"].to(self.device)
                self.warm = WarmStartFit(self.state, views, captured=self._captures_fit())
        except (KeyError, RuntimeError) as error:
            raise InputError(f"{path} lacks what a checkpoint of this version holds: {error}") from error
        self._saved = f"{path} (step {self.done} of {self.phase})"

    def _identity(self) -> dict[str, Any]:
        return {
            "config": config_to_json(self.config),
            "seed": self.seed,
            "device": self.device.type,
            "guidance": dict(self.guidance.identity),
        }

    def _save(self, path: Path) -> None:
        tensors = self.state.tensors()
        if self.warm is not None:
            tensors["views"] = self.warm.pictures
        header = {
            "kind": CHECKPOINT_KIND,
            "config": config_to_json(self.config),
            "run": self._identity(),
            "phase": self.phase,
            "done": self.done,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }
        write_tensors(path, tensors, header)
        self._saved = f"{path} (step {self.done} of {self.phase})"

    def _fit_views(self, hooks: Hooks, interrupted: Callable[[], bool]) -> None:
        if self.warm is None:
            assert self.views is not None
            cancel = hooks.cancel or (lambda: False)
            try:
                self.warm = WarmStartFit.begin(
                    self.state,
                    self.views,
                    hooks.on_progress,
                    lambda: interrupted() or cancel(),
                    captured=self._captures_fit(),
                )
            except Cancelled:
                if interrupted():
                    raise KeyboardInterrupt from None
                raise
        sampled = sampling_steps(self.warm.settings)
        self._loop(self.warm.steps, self.warm.advance, hooks, interrupted, sampled)
        self.state.restart_optimizer()
        self.warm = None
        self.phase, self.done = FUSE, 0

    def _loop(
        self,
        total: int,
        advance: Callable[[int], tuple[Tensor, dict[str, Tensor]]],
        hooks: Hooks,
        interrupted: Callable[[], bool],
        before: int = 0,
    ) -> None:
        """``advance(step)`` until ``total``; everything that may stop the run happens between two steps.

        ``before`` counts steps of other work that share the progress bar.
        """
        every = 1 if self.device.type == "cpu" else STEPS_BETWEEN_SYNCS
        while self.done < total:
            stop = hooks.cancel is not None and hooks.cancel()
            if stop or interrupted():
                self._pause(hooks.checkpoint_path)
                if not stop:
                    raise KeyboardInterrupt
                raise Cancelled(f"stopped at step {self.done} of {self.phase}; {self._last_good()}")
            opacity, values = advance(self.done)
            self._health.note(self.done, values["loss"], opacity)
            self.done += 1
            last = self.done == total
            save = hooks.checkpoint_path is not None and (
                last or self.done % self.config.checkpoint_every == 0
            )
            if save or last or self.done % every == 0:
                self._check_health()
                if hooks.on_metrics is not None:
                    hooks.on_metrics(self.phase, self.done, _floats(values))
            if save:
                self._pause(hooks.checkpoint_path)
            if hooks.on_progress is not None:
                hooks.on_progress(self.phase, before + self.done, before + total)

    def _pause(self, path: Path | None) -> None:
        """Write a checkpoint, unless what it would hold is broken."""
        if path is None:
            return
        self._check_health()
        if not self.state.finite():
            raise FusionError(
                f"weights are not finite after step {self.done} of {self.phase}; {self._last_good()}"
            )
        self._save(path)

    def _check_health(self) -> None:
        fault = self._health.fault()
        if fault is not None:
            raise FusionError(f"{fault} of {self.phase}; {self._last_good()}")

    def _last_good(self) -> str:
        return f"the last good checkpoint is {self._saved}" if self._saved else "no checkpoint was written"

    def _captures_fit(self) -> bool:
        """Whether the steps of the fit are to be captured: they need no teacher."""
        return self.backends.loop != "eager" and loop_obstacle(self.backends, self.device) is None

    def _captures(self) -> bool:
        """Whether the steps are to be captured. Raises :class:`InputError` if they must be and cannot."""
        if self.backends.loop == "eager":
            return False
        reason = loop_obstacle(self.backends, self.device)
        if not isinstance(self.guidance, MultiViewGuidance):
            reason = "the teacher is not the diffusion model"
        if reason is None:
            return True
        if self.backends.loop == "graph":
            raise InputError(f"loop 'graph' cannot be used here, {reason}: take 'eager' or 'auto'")
        return False

    @contextmanager
    def _steps(self, hooks: Hooks) -> Iterator[Callable[[int], tuple[Tensor, dict[str, Tensor]]]]:
        """What advances the distillation, with all that it needs and nothing more on the device."""
        if not self._captures():
            yield self.distill
            return
        assert isinstance(self.guidance, MultiViewGuidance)
        conditioner = self.guidance.conditioner
        grey = self.config.background_match == "grey"
        conditions: Conditions = (
            GreyBank(conditioner, hooks.on_progress) if grey else MatchedColour(conditioner)
        )
        # Every grey is encoded by now; a matched colour still needs the image encoder in each step.
        with self.guidance.model.encoders_parked(vision=grey):
            yield CapturedDistillation(self.config, self.state, self.guidance, conditions).advance

    def distill(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """One step of multi-view score distillation (paper section 3.3; released ``mvdream_system``)."""
        config, state, streams = self.config, self.state, self.state.streams
        stage = config.stage_at(step)
        state.occupancy.update(config.fitted_steps + step, state.field.density, streams["occupancy"])
        draws = draw_step(config, step, streams)
        cameras, colour = draws.cameras.to(self.device), draws.background
        out = render(
            state.field,
            state.background,
            state.occupancy,
            cameras.rays(stage.resolution),
            light_positions=cameras.light_positions,
            shading=draws.shading,
            background_colour=None if colour is None else colour.to(self.device),
            jitter=streams["jitter"],
            config=config.render,
            volume=state.volume,
            with_normals=config.lambda_orient.at(step) != 0.0,
        )
        latents = self.guidance.encode(out.rgb, streams["vae"])
        seen = matched_colour(out.background_rgb if colour is None else colour, config.background_match)
        target = self.guidance.target(latents.detach(), cameras, seen, draws.t, streams["noise"])
        values = objective(config, out, latents, target, config.lambda_orient.at(step))
        state.minimise(values["loss"])
        return out.opacity, values


def _floats(values: dict[str, Tensor]) -> dict[str, float]:
    stacked = torch.stack([value.detach().float() for value in values.values()])
    return dict(zip(values, stacked.tolist(), strict=True))


class _Health:
    """Watches the loss and the opacity on the device, so that looking at them can wait."""

    def __init__(self, device: torch.device) -> None:
        self.bad_step = torch.tensor(-1, device=device)
        self.empty_steps = torch.tensor(0, device=device)
        self.last_step = 0

    def note(self, step: int, loss: Tensor, opacity: Tensor) -> None:
        sound = loss.detach().isfinite() | (self.bad_step >= 0)
        self.bad_step = torch.where(sound, self.bad_step, step)
        seen = opacity.detach().amax() > EMPTY_OPACITY
        self.empty_steps = torch.where(seen, 0, self.empty_steps + 1)
        self.last_step = step

    def fault(self) -> str | None:
        """What is wrong and at which step; waits for the device."""
        bad, empty = torch.stack([self.bad_step, self.empty_steps]).tolist()
        if bad >= 0:
            return f"the loss is not a finite number at step {bad}"
        if empty >= EMPTY_STEPS:
            return (
                f"the field is empty: nothing was visible in the {empty} renders up to step {self.last_step}"
            )
        return None
