"""Everything that one optimisation step changes: field, background, occupancy grid, AdamW moments, random
streams."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from .backends import OWN, Backends
from .checkpoint import load_optimizer_state, optimizer_state, prefixed, without_prefix
from .config import FusionConfig
from .graphed import GraphedStep
from .nerf.background import Background
from .nerf.field import Field
from .nerf.occupancy import OccupancyGrid
from .nerf.volume import volume_backend
from .random_streams import RandomStreams, stream_seed

MODULES = ("field", "background", "occupancy")


class FieldState:
    """A field being optimised. Same configuration, seed and device give the same state."""

    def __init__(
        self, config: FusionConfig, seed: int, device: torch.device, backends: Backends = OWN
    ) -> None:
        self.config = config
        self.device = device
        self.volume = volume_backend(backends.volume)
        self.streams = RandomStreams(seed, device)
        initial = torch.Generator().manual_seed(stream_seed(seed, "initial weights"))
        self.field = Field(config.field, encoding=backends.encoding, generator=initial).to(device)
        self.background = Background(generator=initial).to(device)
        self.occupancy = OccupancyGrid(config.render).to(device)
        self.restart_optimizer()

    def restart_optimizer(self) -> None:
        """AdamW with fresh moments; four groups, the grid first, with the configuration's learning rates."""
        config = self.config
        named = [(f"field.{name}", parameter) for name, parameter in self.field.named_parameters()]
        named += [(f"background.{name}", parameter) for name, parameter in self.background.named_parameters()]
        self._names: dict[nn.Parameter, str] = {parameter: name for name, parameter in named}
        groups = [
            {"params": list(self.field.grid.parameters()), "lr": config.lr_grid},
            {"params": list(self.field.density_mlp.parameters()), "lr": config.lr_density},
            {"params": list(self.field.feature_mlp.parameters()), "lr": config.lr_feature},
            {"params": list(self.background.parameters()), "lr": config.lr_background},
        ]
        # On a GPU one kernel for all parameters, which a CUDA graph can hold; on a CPU the order of operations
        # that recorded results were made with.
        on_gpu = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            groups,
            betas=config.adam_betas,
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            fused=on_gpu,
            capturable=on_gpu,
        )

    def graphed_refresh(self) -> Callable[[int], None]:
        """What keeps the occupancy grid up to date at a step, as :meth:`OccupancyGrid.update`, by CUDA graphs."""
        stream, config = self.streams["occupancy"], self.config.render
        refreshes = {
            all_cells: GraphedStep(
                partial(self.occupancy.refresh, self.field.density, stream, all_cells=all_cells),
                self.device,
                [stream],
            )
            for all_cells in (True, False)
        }

        def refresh(step: int) -> None:
            if step % config.occupancy_every == 0:
                refreshes[step < config.occupancy_warmup_steps]()

        return refresh

    def set_learning_rates(self, *, grid: float, networks: float) -> None:
        """Other rates than the configuration's, until the optimiser is restarted."""
        first, *others = self.optimizer.param_groups
        first["lr"] = grid
        for group in others:
            group["lr"] = networks

    def minimise(self, loss: Tensor) -> None:
        """One AdamW step on every parameter that the loss reaches, be it with a gradient of zero."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def finite(self) -> bool:
        """Whether all parameters are; waits for the device."""
        return bool(torch.stack([parameter.isfinite().all() for parameter in self._names]).all())

    def tensors(self) -> dict[str, Tensor]:
        held = prefixed("optimizer", optimizer_state(self.optimizer, self._names))
        held |= prefixed("random", self.streams.state())
        for name in MODULES:
            held |= prefixed(name, getattr(self, name).state_dict())
        return held

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of :meth:`tensors`."""
        for name in MODULES:
            getattr(self, name).load_state_dict(without_prefix(name, tensors))
        self.restart_optimizer()
        load_optimizer_state(self.optimizer, self._names, without_prefix("optimizer", tensors))
        self.streams.load_state(without_prefix("random", tensors))
