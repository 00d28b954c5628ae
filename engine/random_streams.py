"""Named random generators, all derived from one seed: no consumer shifts the numbers of another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

HOST = ("cameras", "timesteps", "shading", "background")
"""Small draws that decide shapes or settings: always on the CPU, so that reading them never waits for the
device."""
DEVICE = ("noise", "vae", "jitter", "occupancy", "rays")


def stream_seed(seed: int, name: str) -> int:
    """A 63-bit seed for one stream: the first bytes of sha256("seed/name")."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class RandomStreams:
    """One ``torch.Generator`` per name in :data:`HOST` (on the CPU) and :data:`DEVICE` (on ``device``)."""

    def __init__(self, seed: int, device: torch.device) -> None:
        places = dict.fromkeys(HOST, torch.device("cpu")) | dict.fromkeys(DEVICE, device)
        self._generators = {
            name: torch.Generator(place).manual_seed(stream_seed(seed, name))
            for name, place in places.items()
        }

    def __getitem__(self, name: str) -> torch.Generator:
        return self._generators[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._generators)

    def uniform(self, name: str) -> float:
        """One float in [0, 1) from a stream on the CPU."""
        return torch.rand((), generator=self[name], dtype=torch.float64).item()

    def state(self) -> dict[str, Tensor]:
        """uint8 tensors on the CPU, one per stream."""
        return {name: generator.get_state() for name, generator in self._generators.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name, generator in self._generators.items():
            generator.set_state(state[name])
