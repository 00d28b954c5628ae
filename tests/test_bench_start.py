"""``bench start``: two processes, what they say of themselves, and what is refused before any is started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import CommandLine

from imagedream_rt.benchmarks import start
from imagedream_rt.engine.errors import InputError


def test_two_processes_on_the_cpu() -> None:
    seen: list[start.Start] = []
    report = start.run("random:tiny", "draft", "cpu", ["attention=torch"], on_row=seen.append)
    assert [row.caches for row in report.rows] == ["empty", "kept"]
    assert seen == report.rows
    for row in report.rows:
        assert 0.0 < row.imported_s < row.loaded_s < row.ready_s
        assert row.views_ms > 0.0
    assert report.device
    assert (report.backends["unet"], report.backends["attention"]) == ("eager", "torch")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "no_such_model"}, "no_such_model"),
        ({"preset": "slow"}, "unknown preset 'slow'"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"backend": ["unet=magic"]}, "unknown backend 'magic'"),
    ],
)
def test_bad_input_starts_nothing(
    given: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    with pytest.raises(InputError, match=message):
        start.run(**{"model": "random:tiny", "device": "cpu", **given})


def test_a_process_that_fails_is_an_error_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "import sys; print('one', file=sys.stderr); sys.exit('out of memory')"
    begin = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda _, **named: begin([sys.executable, "-c", words], **named))
    with pytest.raises(InputError, match="random:tiny on cpu failed: out of memory"):
        start.run("random:tiny", device="cpu")


def test_the_command(run: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(
        model: str, preset: str, device: str, backend: list[str], *, on_row: Any
    ) -> start.StartReport:
        row = start.Start("kept", 2.0, 3.0, 7.5, 210.0)
        on_row(row)
        return start.StartReport(model, preset, {"unet": "compiled"}, device, {}, [row])

    monkeypatch.setattr(start, "run", measure)
    ran = run("bench", "start", "--backend", "unet=compiled", "-o", tmp_path)
    assert ran.code == 0, ran.err
    assert "caches kept   imported after 2.0 s, model loaded 3.0 s, at full speed 7.5 s" in ran.err
    found = json.loads((tmp_path / "start.json").read_text())
    assert (found["model"], found["rows"][0]["ready_s"]) == ("random:full", 7.5)
