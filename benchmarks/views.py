"""Four views from a picture: the whole call with each backend of the UNet, in one run on the same weights.

The first call of a backend tunes kernels, compiles and captures what was not kept from an earlier process; it has a
figure of its own. The weights of the model do not matter to the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ..engine.backends import Backends, UNetName
from ..engine.conditioning import Conditioner
from ..engine.model import MultiViewModel
from ..engine.picture import PreparedPicture
from ..engine.pipeline import ImageTo3D
from ..engine.sampler import sample_views
from ..engine.warmup import made_up_prompt
from ..engine.weights import load_model
from .harness import need_cuda, versions

PROMPT, SEED = "a ball", 0


@dataclass(frozen=True)
class ViewsRow:
    """One backend; times of whole calls, from a prepared picture to pictures on the host."""

    unet: UNetName
    first_s: float
    median_ms: float
    p10_ms: float
    p90_ms: float
    sampling_ms: float
    """Median of the denoising alone, its conditions given."""
    difference: float
    """Mean absolute difference of the pictures from the first backend's, of 255 levels."""
    peak_gib: float


@dataclass(frozen=True)
class ViewsReport:
    """All backends, the first of them the one that others are compared with."""

    model: str
    device: str
    versions: dict[str, str]
    steps: int
    repeats: int
    rows: list[ViewsRow]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(
    model: str = "random:full",
    unets: Sequence[UNetName] = ("eager", "graph"),
    *,
    steps: int = 30,
    repeats: int = 20,
    on_row: Callable[[ViewsRow], None] | None = None,
) -> ViewsReport:
    """Measure on the current CUDA device. Raises :class:`InputError` without one."""
    need_cuda()
    loaded = load_model(model, device="cuda", dtype=torch.float16)
    picture = made_up_prompt(loaded)
    rows: list[ViewsRow] = []
    first: np.ndarray | None = None
    for unet in unets:
        row, images = _row(loaded, picture, unet, steps, repeats, first)
        first = images if first is None else first
        rows.append(row)
        if on_row:
            on_row(row)
    return ViewsReport(model, torch.cuda.get_device_name(), versions(), steps, repeats, rows)


def _row(
    model: MultiViewModel,
    picture: PreparedPicture | None,
    unet: UNetName,
    steps: int,
    repeats: int,
    compared_with: np.ndarray | None,
) -> tuple[ViewsRow, np.ndarray]:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    pipe = ImageTo3D(model, backends=Backends(unet=unet))

    def views() -> np.ndarray:
        return pipe.views(picture, PROMPT, SEED, steps).images

    start = time.perf_counter()
    images = views()
    first_s = time.perf_counter() - start
    whole = _times_ms(views, repeats)
    peak_gib = torch.cuda.max_memory_reserved() / 2**30
    conditioner = Conditioner(pipe.model, picture, PROMPT)
    sampling = _times_ms(lambda: sample_views(pipe.model, conditioner, steps=steps, seed=SEED), repeats)
    against = images if compared_with is None else compared_with
    difference = float(np.abs(images.astype(np.float32) - against).mean())
    p10, p50, p90 = (float(x) for x in np.quantile(whole, (0.1, 0.5, 0.9)))
    row = ViewsRow(unet, first_s, p50, p10, p90, float(np.median(sampling)), difference, peak_gib)
    return row, images


def _times_ms(call: Callable[[], object], repeats: int) -> list[float]:
    """Of each call, results on the host included; the first, which is not counted, warms caches."""
    call()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return times
