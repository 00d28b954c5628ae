"""Where there is matter: a coarse grid that lets rays skip empty cells (Mueller et al. 2022, appendix C;
nerfacc)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..config import RenderConfig

DECAY = 0.95
THRESHOLD = 0.01


class OccupancyGrid(nn.Module):
    """Running maxima of density times step in the G^3 cells of the box [-1, 1]^3, indexed (x, y, z).

    A new grid holds nothing and shows nothing until its first update.
    """

    values: Tensor
    """[G^3] float32"""
    occupied: Tensor
    """[G, G, G] bool"""

    def __init__(self, config: RenderConfig) -> None:
        super().__init__()
        self.config = config
        size = config.occupancy_resolution
        self.register_buffer("values", torch.zeros(size**3))
        self.register_buffer("occupied", torch.zeros(size, size, size, dtype=torch.bool))

    @property
    def mean(self) -> Tensor:
        """Mean value, a scalar on the device."""
        return self.values.mean()

    @property
    def alpha_threshold(self) -> Tensor:
        """Samples that absorb less are not worth a gradient: min(mean, 0.01), a scalar on the device."""
        return self.mean.clamp(max=THRESHOLD)

    @torch.no_grad()
    def update(self, step: int, density: Callable[[Tensor], Tensor], generator: torch.Generator) -> bool:
        """Refresh the grid if ``step`` is one of every ``occupancy_every`` steps; returns whether it did.

        Before ``occupancy_warmup_steps`` every cell is looked at; later a quarter of the cells drawn
        uniformly, with repetition, and the occupied cells (or as many draws of those, if they are more).
        Each look is one uniformly drawn point of the cell. ``density`` maps points [N, 3] to [N].
        """
        if step % self.config.occupancy_every:
            return False
        self._look(self._pick(step, generator), density, generator)
        return True

    @torch.no_grad()
    def refresh(
        self, density: Callable[[Tensor], Tensor], generator: torch.Generator, *, all_cells: bool
    ) -> None:
        """An :meth:`update` whose number of looks the host knows, so that it never waits for the device.

        Without ``all_cells`` there are always as many looks at occupied cells as at uniformly drawn ones:
        where fewer cells are occupied, the rest look at the uniformly drawn ones once more.
        """
        cells = self._all() if all_cells else self._pick_as_many(generator)
        self._look(cells, density, generator)

    def _look(self, cells: Tensor, density: Callable[[Tensor], Tensor], generator: torch.Generator) -> None:
        size = self.config.occupancy_resolution
        corner = torch.stack((cells // size**2, cells // size % size, cells % size), dim=1)
        inside = torch.rand(len(cells), 3, generator=generator, device=generator.device).to(
            self.values.device
        )
        self.update_cells(cells, density((corner + inside) / size * 2.0 - 1.0))

    @torch.no_grad()
    def update_cells(self, cells: Tensor, density: Tensor) -> None:
        """Enter looks at cells [M] int64 (may repeat) with densities [M]; the other cells stay as they are.

        value = max(0.95 value, density step); of several looks at one cell the greatest counts, where the
        released code keeps an arbitrary one.
        """
        values = self.values.clone()
        values[cells] = self.values[cells] * DECAY
        values.scatter_reduce_(0, cells, density.to(values) * self.config.step_size, "amax")
        self.values.copy_(values)
        self.occupied.copy_((values > self.alpha_threshold).view_as(self.occupied))

    def _all(self) -> Tensor:
        return torch.arange(self.values.numel(), device=self.values.device)

    def _pick_as_many(self, generator: torch.Generator) -> Tensor:
        total, device = self.values.numel(), self.values.device
        quarter = total // 4
        place = generator.device
        uniform = torch.randint(total, (quarter,), generator=generator, device=place).to(device)
        random = torch.rand(quarter, generator=generator, device=place).to(device)
        occupied = self.occupied.view(-1)
        number = occupied.sum()
        occupied_first = torch.argsort(occupied.to(torch.int8), descending=True, stable=True)
        slot = torch.arange(quarter, device=device)
        many = number > quarter
        chosen = occupied_first[torch.where(many, (random * number).long(), slot)]
        return torch.cat((uniform, torch.where(many | (slot < number), chosen, uniform)))

    def _pick(self, step: int, generator: torch.Generator) -> Tensor:
        total, device = self.values.numel(), self.values.device
        if step < self.config.occupancy_warmup_steps:
            return self._all()
        quarter = total // 4

        def draw(high: int) -> Tensor:
            return torch.randint(high, (quarter,), generator=generator, device=generator.device).to(device)

        uniform = draw(total)
        occupied = self.occupied.view(-1).nonzero().squeeze(1)
        if len(occupied) > quarter:
            occupied = occupied[draw(len(occupied))]
        return torch.cat((uniform, occupied))
