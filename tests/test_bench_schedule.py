"""``bench schedule`` without a GPU: a whole fusion in small, its log, and what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import CommandLine
from fake_gpu import fake_gpu
from tiny_fusion import TINY, TINY_WARM

from imagedream_rt.benchmarks import schedule
from imagedream_rt.engine.config import PRESETS


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, schedule)
    monkeypatch.setattr(schedule, "LINE_EVERY", 4)
    for config in (TINY, TINY_WARM):
        monkeypatch.setitem(PRESETS, config.name, config)


def test_the_log_has_the_diffused_views_and_every_phase(machine: None) -> None:
    seen: list[schedule.Line] = []
    report = schedule.run("random:tiny", "tiny warm", on_line=seen.append)
    assert [(line.phase, line.step) for line in report.log] == [
        ("warm-start", 4),
        ("warm-start", 6),
        ("fuse", 4),
        ("fuse", 8),
    ]
    assert seen == report.log
    times = [0.0, *(line.seconds for line in report.log), report.seconds]
    assert times == sorted(times)
    assert (report.preset, report.steps, report.deterministic, report.peak_gib) == (
        "tiny warm",
        8,
        False,
        3.0,
    )


def test_the_first_steps_alone(machine: None) -> None:
    report = schedule.run("random:tiny", "tiny", steps=3)
    assert [(line.phase, line.step) for line in report.log] == [("fuse", 3)]


def test_deterministic_is_passed_on(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    begin = schedule.Fusion.__init__

    def note(*arguments: Any, **named: Any) -> None:
        asked.append(named["deterministic"])
        begin(*arguments, **named)

    monkeypatch.setattr(schedule.Fusion, "__init__", note)
    assert schedule.run("random:tiny", "tiny", steps=1, deterministic=True).deterministic
    assert asked == [True]


def test_the_command(run: CommandLine, machine: None, tmp_path: Path) -> None:
    ran = run("bench", "schedule", "--preset", "tiny", "--steps", 4, "--deterministic", "-o", tmp_path)
    assert ran.code == 0, ran.err
    assert "fuse       step      4" in ran.err
    assert ran.out.startswith("4 steps in ")
    found = json.loads((tmp_path / "schedule.json").read_text())
    assert (found["device"], found["deterministic"], len(found["log"])) == ("a GPU", True, 1)
