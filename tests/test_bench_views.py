"""``bench views`` without a GPU: what is measured against what, printed and written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import CommandLine
from fake_gpu import fake_gpu

from imagedream_rt.benchmarks import views
from imagedream_rt.engine.graphed_networks import GraphedUNet


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, views)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def test_every_backend_is_compared_with_the_first(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = GraphedUNet.forward
    monkeypatch.setattr(GraphedUNet, "forward", lambda *given, **named: 1.5 * forward(*given, **named))
    seen: list[views.ViewsRow] = []
    report = views.run("random:tiny", ("eager", "compiled", "eager"), steps=1, repeats=2, on_row=seen.append)
    assert [row.unet for row in report.rows] == ["eager", "compiled", "eager"]
    same, other, again = report.rows
    assert same.difference == again.difference == 0.0
    assert other.difference > 0.1
    for row in report.rows:
        assert 0.0 < row.p10_ms <= row.median_ms <= row.p90_ms
        assert row.sampling_ms > 0.0
        assert row.first_s > 0.0
        assert row.peak_gib == 3.0
    assert seen == report.rows
    assert (report.device, report.steps, report.repeats) == ("a GPU", 1, 2)


def test_the_command(
    run: CommandLine, machine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measure(model: str, unets: tuple[str, ...], *, steps: int, on_row: object) -> views.ViewsReport:
        asked.append((model, unets, steps))
        row = views.ViewsRow("graph", 2.0, 200.0, 190.0, 210.0, 180.0, 0.0, 4.0)
        assert callable(on_row)
        on_row(row)
        return views.ViewsReport(model, "a GPU", {}, steps, 20, [row])

    monkeypatch.setattr(views, "run", measure)
    ran = run("bench", "views", "-o", tmp_path, "--compiled", "--steps", 7)
    assert asked == [("random:full", ("eager", "graph", "compiled"), 7)]
    lines = ran.out.splitlines()
    assert lines[0].startswith(
        "graph      200.0 ms (190.0-210.0), denoising 180.0; first call 2.0 s; 4.0 GiB;"
    )
    assert str(tmp_path / "views.json") in lines[-1]
    assert json.loads((tmp_path / "views.json").read_text())["rows"][0]["median_ms"] == 200.0
    assert run("bench", "views", "-o", tmp_path, "--json").json()["rows"][0]["unet"] == "graph"
    assert asked[-1] == ("random:full", ("eager", "graph"), 30)


def test_it_needs_a_gpu(run: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ran = run("bench", "views", "-o", tmp_path / "out")
    assert ran.code == 2
    assert ran.err.startswith("error: benchmarks need a CUDA device")
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
def test_replayed_views_are_the_eager_ones_on_the_gpu(untuned: None) -> None:
    report = views.run("random:tiny", steps=3, repeats=2)
    assert [row.unet for row in report.rows] == ["eager", "graph"]
    assert np.array([row.difference for row in report.rows]).tolist() == [0.0, 0.0]
