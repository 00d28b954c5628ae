"""Ragged samples along rays for tests: made up, compared, and memory that is never zero by luck."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from imagedream_rt.kernels.samples import Samples, pack

COUNTS = [0, 3, 1, 0, 41, 2, 0, 17, 16, 5, 0]
"""Samples on each ray: none, few, just as many as a kernel takes at once, more."""


def ragged(
    counts: list[int],
    *,
    seed: int = 4,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Samples:
    """Samples of any length at any place, the same whatever the dtype."""
    generator = torch.Generator().manual_seed(seed)
    rays = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64))
    starts = torch.rand(len(rays), generator=generator) + 1
    ends = starts + torch.rand(len(rays), generator=generator) * 0.5
    return moved(pack(rays, starts.to(dtype), ends.to(dtype), len(counts)), device)


def moved(samples: Samples, device: torch.device | str) -> Samples:
    held = {name: getattr(samples, name) for name in Samples.__dataclass_fields__}
    return replace(samples, **{name: part.to(device) for name, part in held.items() if part is not None})


def assert_same_samples(found: Samples, wanted: Samples) -> None:
    """Row by row that is one, exactly; whether integers have 32 or 64 bits is left open."""
    assert len(found) == len(wanted)
    n = len(wanted) if wanted.count is None else number(wanted.count)
    for name in Samples.__dataclass_fields__:
        one, other = getattr(found, name), getattr(wanted, name)
        assert (one is None) == (other is None), name
        if one is not None:
            rows = slice(n if name in ("ray_indices", "t_starts", "t_ends") else None)
            assert torch.equal(one[rows].double(), other[rows].double()), name


def number(held: Tensor | None) -> int:
    """Of :attr:`Samples.count` or :attr:`Samples.found` of samples in buffers of a fixed capacity."""
    assert held is not None
    assert held.shape == (1,)
    return int(held)


def padded(x: Tensor, rows: int, value: float = float("nan")) -> Tensor:
    """x with rows behind that nobody may use."""
    return torch.cat((x, x.new_full((rows - len(x), *x.shape[1:]), value)))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within it, memory that nobody has written to holds NaN, or the greatest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
