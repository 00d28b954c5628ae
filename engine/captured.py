"""Distillation steps as CUDA-graph replays: the same mathematics as the plain step, without the host.

One graph holds a whole step of a stage: rays, render, VAE, noise, UNet, losses, backward and AdamW. What the
host decides (cameras, light, timestep, see :mod:`.draws`) reaches it as one row of numbers; what depends on
the device's own results (the grey behind the prompt, the number of samples) stays there. Samples live in
buffers of a fixed capacity with room to spare; when a look at the counts, every few steps, finds them too full
or too empty, the step is captured again with others.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.shade import Shading
from .condition_bank import Conditions
from .config import FusionConfig, Stage
from .distill import MultiViewGuidance
from .draws import StepDraws, StepTensors, draw_step, pack, row_width, unpack
from .field_state import FieldState
from .graphed import GraphedStep
from .nerf.render import MOST_CANDIDATES, Capacity, RenderOutput, render, sample_rays_within
from .objective import objective

LOOK_EVERY = 20
"""Steps between looks at the sample counts."""
ROOM = 1.4
"""Capacity over the most samples seen lately."""
TIGHT, WASTEFUL = 0.92, 0.45
"""Shares of the capacity in use above and below which it is changed."""
GRAIN = 2**17
"""Capacities are multiples of this."""


class StepResult(NamedTuple):
    """What a step leaves for those who watch the loop; tensors that the next step overwrites."""

    opacity: Tensor
    values: dict[str, Tensor]


class CapturedDistillation:
    """Distillation steps of a configuration on a state; off CUDA they run uncaptured, for tests."""

    def __init__(
        self, config: FusionConfig, state: FieldState, guidance: MultiViewGuidance, conditions: Conditions
    ) -> None:
        self.config, self.state, self.guidance, self.conditions = config, state, guidance, conditions
        self._stage: Stage | None = None
        self._refresh = state.graphed_refresh()

    def advance(self, step: int) -> StepResult:
        """One step, begun and not waited for."""
        config, state = self.config, self.state
        self._refresh(config.fitted_steps + step)
        stage = config.stage_at(step)
        if stage != self._stage:
            self._enter(stage)
        draws = draw_step(config, step, state.streams)
        host_row = self._host_rows[step % LOOK_EVERY]
        host_row.copy_(pack(draws, config.lambda_orient.at(step)))
        self._row.copy_(host_row, non_blocking=True)
        self.conditions.prepare(lambda: self._background(draws, stage))
        if self._capacity is None:
            self._choose_capacity(self._count_samples())
        self._replay()
        if step % LOOK_EVERY == LOOK_EVERY - 1:
            self._look()
        return self._result

    @torch.no_grad()
    def _background(self, draws: StepDraws, stage: Stage) -> Tensor:
        """What will be behind the object in the step whose row was written."""
        if draws.background is not None:
            return draws.background
        return self.state.background(self.inputs.cameras.rays(stage.resolution).directions)

    def sample_counts(self) -> tuple[int, int]:
        """The most candidates and samples since the last look. Waits for the device."""
        candidates, kept = self._most_found.tolist()
        return candidates, kept

    @property
    def _most(self) -> Capacity:
        """The largest buffers there may be."""
        return Capacity(MOST_CANDIDATES, self.config.render.max_samples)

    def _enter(self, stage: Stage) -> None:
        self._stage = stage
        width, device = row_width(stage.views), self.state.device
        self._row = torch.zeros(width, device=device)
        self.inputs = unpack(self._row, stage.views)
        pinned = device.type == "cuda"
        # As many rows as there are steps between two looks, at which the host waits for the device: no row is
        # written again before it was read.
        self._host_rows = torch.zeros(LOOK_EVERY, width, pin_memory=pinned)
        self._most_found = torch.zeros(2, dtype=torch.int32, device=device)
        self._capacity: Capacity | None = None

    def _count_samples(self) -> tuple[int, int]:
        """Samples of the step whose row was written, before any capacity. Waits for the device."""
        assert self._stage is not None
        rays = self.inputs.cameras.rays(self._stage.resolution)
        state = self.state
        _, found = sample_rays_within(
            self._most,
            state.field,
            state.occupancy,
            rays.origins.reshape(-1, 3),
            rays.directions.reshape(-1, 3),
            None,
            self.config.render,
        )
        candidates, kept = found.tolist()
        return candidates, kept

    def _choose_capacity(self, found: tuple[int, int]) -> None:
        rows = (
            min(math.ceil(n * ROOM / GRAIN + 1) * GRAIN, limit)
            for n, limit in zip(found, self._most, strict=True)
        )
        self._capacity = Capacity(*rows)
        # The old graph's memory must be free, and given back, before the new one takes its own.
        self._replay = GraphedStep(lambda: None, self.state.device)
        self.state.optimizer.zero_grad(set_to_none=True)
        if self.state.device.type == "cuda":
            torch.cuda.empty_cache()
        streams = self.state.streams
        self._replay = GraphedStep(
            self._step, self.state.device, [streams[name] for name in ("jitter", "vae", "noise")], warmup=1
        )

    def _look(self) -> None:
        """Change the capacity if the counts since the last look ask for it. Waits for the device."""
        assert self._capacity is not None
        found = self._most_found.tolist()
        self._most_found.zero_()
        shares = [n / rows for n, rows in zip(found, self._capacity, strict=True)]
        if max(shares) > 1.0:
            warnings.warn(
                f"a render had {found[1]} samples worth a gradient of {found[0]}, and buffers for"
                f" {self._capacity.kept} of {self._capacity.candidates}: its farthest ones were left out",
                stacklevel=3,
            )
        ample = [rows <= GRAIN * 2 for rows in self._capacity]
        wasteful = any(share < WASTEFUL and not a for share, a in zip(shares, ample, strict=True))
        tight = any(
            share > TIGHT and rows < limit
            for share, rows, limit in zip(shares, self._capacity, self._most, strict=True)
        )
        if tight or wasteful:
            self._choose_capacity((found[0], found[1]))

    def _step(self) -> None:
        """All of one step, from the row to the parameters: tensors only."""
        assert self._stage is not None
        state, inputs = self.state, self.inputs
        state.optimizer.zero_grad(set_to_none=True)
        out = self.render(inputs)
        found = out.samples.found
        assert found is not None
        torch.maximum(self._most_found, found, out=self._most_found)
        values = self._losses(out, inputs)
        values["loss"].backward()
        state.optimizer.step()
        self._result = StepResult(
            out.opacity.detach(), {name: value.detach() for name, value in values.items()}
        )

    def render(self, inputs: StepTensors) -> RenderOutput:
        """The views of a step, in the buffers that its graph uses."""
        assert self._stage is not None
        state = self.state
        return render(
            state.field,
            state.background,
            state.occupancy,
            inputs.cameras.rays(self._stage.resolution),
            light_positions=inputs.light_positions,
            shading=Shading(inputs.ambient, inputs.diffuse, inputs.textureless),
            background_colour=inputs.colour,
            background_replaced=inputs.replaced,
            jitter=state.streams["jitter"],
            config=self.config.render,
            with_normals=True,
            capacity=self._capacity,
        )

    def _losses(self, out: RenderOutput, inputs: StepTensors) -> dict[str, Tensor]:
        config, guidance, streams = self.config, self.guidance, self.state.streams
        latents = guidance.encode(out.rgb, streams["vae"])
        target = guidance.target_given(
            self.conditions.at(out.background_rgb),
            latents.detach(),
            inputs.cameras.embedding(),
            inputs.t.long()[0],
            streams["noise"],
        )
        return objective(config, out, latents, target, inputs.lambda_orient[0])
