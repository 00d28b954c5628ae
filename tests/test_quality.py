"""The quality benchmark: what is measured how often, what two loops' figures are compared with, and a run in small."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from command_line import SECONDS, CommandLine

from imagedream_rt.benchmarks import quality
from imagedream_rt.benchmarks.quality import plan, run
from imagedream_rt.benchmarks.quality_report import (
    Loop,
    QualityReport,
    Row,
    Task,
    agreement,
    gain,
    summaries,
)
from imagedream_rt.engine.config import DRAFT, OFFICIAL, FusionConfig
from imagedream_rt.engine.errors import InputError


def row(preset: str, loop: Loop, seed: int, number: int, psnr: float, **changes: float) -> Row:
    figures: dict[str, Any] = {
        "psnr_db": psnr,
        "iou": 0.9,
        "chamfer": 0.02,
        "fuse_s": 3.0,
        "mesh_s": 1.0,
        **changes,
    }
    return Row(preset, loop, seed, number, **figures)


# Two objects, two seeds: a seed changes an object by 1 dB in our loop and by 2 dB in the plain one.
PAIRS = [
    *(
        row("turbo", "ours", seed, number, psnr)
        for seed, number, psnr in ((0, 0, 20), (1, 0, 21), (0, 1, 25), (1, 1, 26))
    ),
    *(
        row("turbo", "reference", seed, number, psnr)
        for seed, number, psnr in ((0, 0, 20), (1, 0, 22), (0, 1, 24), (1, 1, 26))
    ),
]


def test_agreement_by_hand():
    psnr, iou, chamfer = agreement(PAIRS, "turbo")
    assert (psnr.figure, psnr.objects, psnr.seeds) == ("psnr_db", 2, 2)
    assert (psnr.ours, psnr.reference, psnr.difference) == (23.0, 23.0, 0.0)
    # Variances over seeds: 0.5 twice, 2 twice.
    assert psnr.spread == pytest.approx(math.sqrt(1.25))
    assert psnr.bound == pytest.approx(2 * math.sqrt(1.25) * math.sqrt(2 / 4))
    assert psnr.within
    assert iou.bound == chamfer.bound == 0.0
    assert iou.within


def test_a_difference_that_seeds_do_not_explain():
    worse = [row("turbo", "ours", seed, number, 18.0 + seed) for seed in (0, 1) for number in (0, 1)]
    psnr, *_ = agreement([*worse, *PAIRS[4:]], "turbo")
    assert psnr.difference == -4.5
    assert not psnr.within


def test_agreement_needs_pairs_and_two_seeds():
    assert agreement(PAIRS[:4], "turbo") == []
    assert agreement([one for one in PAIRS if one.seed == 0], "turbo") == []
    failed = [*PAIRS[:-1], Row("turbo", "reference", 1, 1, problem="empty")]
    assert agreement(failed, "turbo") == []


def test_summaries_leave_failures_out_and_count_them():
    rows = [
        row("draft", "ours", 0, 0, 20.0, fuse_s=1.0),
        row("draft", "ours", 1, 0, 22.0, fuse_s=2.0),
        row("draft", "ours", 0, 1, 25.0, fuse_s=30.0),
        Row("draft", "ours", 1, 1, problem="the field is empty"),
        Row("official", "ours", 0, 0, problem="the field is empty"),
    ]
    (found,) = summaries(rows)
    assert (found.preset, found.objects, found.seeds, found.failed) == ("draft", 2, 2, 1)
    assert found.psnr_db == pytest.approx(fmean([20, 22, 25]))
    assert found.psnr_std == pytest.approx(math.sqrt(8))  # of the objects' means, 21 and 25
    assert found.fuse_s == 2.0  # median


def test_gain_is_paired_by_object():
    rows = [
        *(row("turbo", "ours", 0, number, psnr) for number, psnr in ((0, 21.0), (1, 27.0), (2, 99.0))),
        *(row("official", "ours", 0, number, psnr) for number, psnr in ((0, 20.0), (1, 24.0))),
    ]
    psnr, *_ = gain(rows, "turbo", "official")
    assert (psnr.objects, psnr.difference) == (2, 2.0)
    assert psnr.error == pytest.approx(math.sqrt(2) / math.sqrt(2))
    assert gain(rows, "turbo", "draft") == []
    report = QualityReport(quality.Conditions("builtin:nano", "a GPU", "float16", {}, {}), 1, rows)
    assert [(one.preset, one.against) for one in report.gains()] == [("turbo", "official")] * 3


def test_the_adapted_official_schedule_is_the_official_one():
    adapted = quality.configuration("official-adapted", "nano")
    for name in ("steps", "stages", "field", "render", "min_step", "max_step", "lambda_orient", "lr_grid"):
        assert getattr(adapted, name) == getattr(OFFICIAL, name)
    assert adapted.camera == DRAFT.camera
    assert quality.configuration("turbo", "nano").guidance_scale == DRAFT.guidance_scale


def test_the_plan():
    tasks = plan(["draft", "turbo"], ["turbo"], objects=3, skip=2, seeds=2)
    assert len(tasks) == len(set(tasks)) == 3 * 2 * 3
    assert {task.object for task in tasks} == {2, 3, 4}
    assert {task.preset for task in tasks if task.loop == "reference"} == {"turbo"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objects": 0}, "--objects is 0"),
        ({"skip": -1}, "--skip -1"),
        ({"seeds": 0}, "--seeds 0"),
        ({"seeds": 1}, "--seeds must be at least 2"),
    ],
)
def test_counts_that_make_no_comparison(changes: dict[str, int], said: str):
    with pytest.raises(InputError, match=said):
        plan(["draft"], ["draft"], **{"objects": 1, "seeds": 2, **changes})


class FakeWorker:
    """In place of a fusion: figures that tell the task."""

    done: list[Task] = []  # noqa: RUF012
    dtypes: list[torch.dtype] = []  # noqa: RUF012

    def __init__(
        self, model: str, device: str, dtype: torch.dtype, settings: dict[str, FusionConfig]
    ) -> None:
        self.dtypes.append(dtype)

    def __call__(self, task: Task) -> Row:
        self.done.append(task)
        return row(task.preset, task.loop, task.seed, task.object, 20.0 + task.object)


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quality, "_Worker", FakeWorker)
    done: list[Task] = []
    monkeypatch.setattr(FakeWorker, "done", done)
    tasks = plan(["seconds"], [], objects=3)

    def stop(one: Row) -> None:
        if one.object == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [SECONDS], tasks, device="cpu", on_row=stop)
    held = json.loads((tmp_path / "quality.json").read_text())
    assert [one["object"] for one in held["rows"]] == [0, 1]
    report = run(tmp_path, [SECONDS], tasks, device="cpu")
    assert [task.object for task in done] == [0, 1, 2]
    assert [one.object for one in report.rows] == [0, 1, 2]
    # Of another preset they stay, of the same with other settings they go.
    other = SECONDS.changed(name="other")
    assert len(run(tmp_path, [other], plan(["other"], [], objects=1), device="cpu").rows) == 4
    changed = SECONDS.changed(steps=5)
    rows = run(tmp_path, [changed], plan(["seconds"], [], objects=1), device="cpu").rows
    assert [one.preset for one in rows] == ["other", "seconds"]
    again = run(tmp_path, [changed], plan(["seconds"], [], objects=1), device="cpu", model="another").rows
    assert [one.preset for one in again] == ["seconds"]


def test_another_dtype_measures_our_loop_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quality, "_Worker", FakeWorker)
    done: list[Task] = []
    monkeypatch.setattr(FakeWorker, "done", done)
    tasks = plan(["seconds"], ["seconds"], objects=1, seeds=2)
    assert run(tmp_path, [SECONDS], tasks, device="cpu").conditions.dtype == "float32"
    assert len(done) == 4
    report = run(tmp_path, [SECONDS], tasks, device="cpu", dtype=torch.bfloat16)
    assert (
        report.conditions.dtype == json.loads((tmp_path / "quality.json").read_text())["dtype"] == "bfloat16"
    )
    assert [task.loop for task in done[4:]] == ["ours", "ours"]
    assert FakeWorker.dtypes[-2:] == [torch.float32, torch.bfloat16]
    assert len(report.rows) == 4
    with pytest.raises(InputError, match="dtype is"):
        run(tmp_path, [SECONDS], tasks, device="cpu", dtype=torch.float64)


def test_what_a_run_refuses(tmp_path: Path):
    tasks = plan(["seconds"], [], objects=1)
    with pytest.raises(InputError, match="no configuration is named seconds"):
        run(tmp_path, [], tasks)
    with pytest.raises(InputError, match="--workers is 0"):
        run(tmp_path, [SECONDS], tasks, workers=0)


@pytest.mark.slow
def test_both_loops_by_two_processes(tmp_path: Path):
    """The whole way: each process loads the model, fuses an object and measures its mesh."""
    tasks = [Task("seconds", "ours", 0, 0), Task("seconds", "reference", 0, 0)]
    report = run(tmp_path, [SECONDS], tasks, device="cpu", workers=2)
    ours, reference = sorted(report.rows, key=lambda one: one.loop)
    assert ours.problem is None
    assert reference.problem is None
    # On the CPU both compute in float32 with the same draws.
    assert ours.psnr_db == pytest.approx(reference.psnr_db, abs=0.05)
    assert ours.iou == pytest.approx(reference.iou, abs=0.01)
    assert ours.fuse_s is not None
    assert ours.fuse_s > 0


def test_the_command_prints_tables_and_verdicts(
    run: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(quality, "_Worker", FakeWorker)
    options = ("--objects", 2, "--device", "cpu", "-o", tmp_path)
    ran = run("bench", "quality", "--reference", "seconds", "--preset", "draft", *options)
    assert ran.code == 0
    assert "seconds    reference" in ran.out
    assert "seconds, ours - reference, psnr_db: +0.0000, within the ±0.0000" in ran.out
    assert ran.err.count("object") == 12
    found = run("bench", "quality", "--preset", "draft", "--seeds", 1, *options, "--json").json()
    assert found["agreements"]["seconds"][0]["within"] is True
    assert len(found["rows"]) == 12
    refused = run("bench", "quality", "--reference", "seconds", "--seeds", 1, *options)
    assert (refused.code, "--seeds must be at least 2" in refused.err) == (2, True)


def test_the_plot(tmp_path: Path):
    pytest.importorskip("matplotlib")
    conditions = quality.Conditions("builtin:nano", "a GPU", "float16", {}, {})
    report = QualityReport(conditions, 1, PAIRS)
    (path,) = quality.draw(report, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")
