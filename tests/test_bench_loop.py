"""The benchmark of the loop without a GPU: which loops are measured, what they come to, what is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpu import fake_gpu

from imagedream_rt.benchmarks import ball, harness
from imagedream_rt.benchmarks import loop as loop_benchmark
from imagedream_rt.benchmarks.harness import OURS
from imagedream_rt.benchmarks.loop import (
    LADDER,
    WITHOUT_KERNELS,
    LoopReport,
    StageRow,
    schedule_minutes,
)
from imagedream_rt.engine.config import FieldConfig, HashGridConfig
from imagedream_rt.engine.layers import KernelLayer
from imagedream_rt.engine.nerf.field import Field


def stage_row(loop: str, steps: int, mean_ms: float, resolution: int = 64) -> StageRow:
    return StageRow(loop, resolution, 8, steps, mean_ms, 1.0, 1.0, None, None, None, None, 1.0, {})


def test_schedule_is_every_stage_at_its_mean() -> None:
    rows = [stage_row("ours", 5000, 12.0), stage_row("ours", 2500, 24.0), stage_row("reference", 5000, 120.0)]
    assert schedule_minutes(rows) == pytest.approx({"ours": 2.0, "reference": 10.0})


def test_a_field_can_be_fitted_to_the_ball() -> None:
    grid = HashGridConfig(levels=8, log2_table=14, base_resolution=8)
    field = Field(FieldConfig(grid), generator=torch.Generator().manual_seed(0))
    ball.fit(field, steps=150, points=2**10)
    direction = torch.nn.functional.normalize(torch.randn(500, 3), dim=1)
    inside, outside = (field.density(direction * ball.RADIUS * place) for place in (0.9, 1.3))
    assert inside.mean() > 25.0 > 0.5 > outside.mean()


def test_files_of_the_loop(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        stage_row(loop, 5000, 12.0, px) for loop in ("reference", "+ kernels", "ours") for px in (64, 192)
    ]
    report = LoopReport("random:full", "a GPU", harness.versions(), rows, 1.0, schedule_minutes(rows))
    written = loop_benchmark.write(report, tmp_path)
    assert [path.name for path in written] == ["loop.json", "loop.png"]
    assert json.loads(written[0].read_text())["schedule_min"]["reference"] == pytest.approx(2.0)
    assert written[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("reference", [False, True])
def test_loops_are_measured_from_the_plainest_to_ours(
    reference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the one without kernels has PyTorch's operations in UNet and VAE, while ours chooses for itself."""
    model = fake_gpu(monkeypatch, loop_benchmark)
    backends: dict[str, set[str]] = {}

    def plain(rung: Any, *_: Any) -> Iterator[StageRow]:
        yield stage_row(rung.name, 12_500, 120.0)

    def captured(name: str, *_: Any) -> Iterator[StageRow]:
        layers = [x for net in (model.unet, model.vae) for x in net.modules() if isinstance(x, KernelLayer)]
        backends[name] = {layer.backend for layer in layers}
        yield stage_row(name, 12_500, 12.0)

    for name, stand_in in {
        "_fitted_field": lambda config: {},
        "_plain_rows": plain,
        "_captured_rows": captured,
    }.items():
        monkeypatch.setattr(loop_benchmark, name, stand_in)
    seen: list[str] = []
    report = loop_benchmark.run("random:tiny", reference=reference, on_row=lambda row: seen.append(row.loop))
    plainer = [*(rung.name for rung in LADDER), WITHOUT_KERNELS] if reference else []
    assert seen == list(report.schedule_min) == [*plainer, OURS]
    assert backends == {WITHOUT_KERNELS: {"torch"}, OURS: {"auto"}} if reference else {OURS: {"auto"}}
    assert report.schedule_min[OURS] == pytest.approx(2.5)
