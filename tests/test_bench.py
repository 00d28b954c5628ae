"""The benchmarks' clockwork without a GPU: what is timed, what is refused, what is printed and written."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import CommandLine

from imagedream_rt.benchmarks import harness, kernels
from imagedream_rt.benchmarks.harness import Case, Report, Row, best_peer, measure, relative_error
from imagedream_rt.engine.errors import InputError

CEILINGS = {"TFLOP/s": 700.0, "TB/s": 4.0}
TIMES = {"ours": 2.0, "peer": 5.0, "slow peer": 8.0}


class Clock:
    """Stands in for the GPU: knows how long each function takes, and who was timed how."""

    def __init__(self) -> None:
        self.timed: list[tuple[str, bool]] = []

    def __call__(self, function: Callable[[], Any], *, graph: bool) -> tuple[float, float, float]:
        name = function.__name__
        self.timed.append((name, graph))
        median = TIMES[name]
        return median - 0.5, median, median + 0.5


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(harness, "time_us", clock)
    monkeypatch.setattr(harness, "ceilings", lambda: CEILINGS)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return clock


def named(name: str, result: harness.Result | Exception) -> harness.Contender:
    def contender() -> harness.Result:
        if isinstance(result, Exception):
            raise result
        return result

    contender.__name__ = name
    return contender


TRUTH = torch.tensor([1.0, 2.0, 2.0])


def case(**results: harness.Result | Exception) -> Case:
    """Contenders by name (underscores are spaces) with what they return or raise; 6 MB of work."""
    contenders = {
        name.replace("_", " "): named(name.replace("_", " "), result) for name, result in results.items()
    }
    return Case("scale", "3 numbers", contenders, lambda: TRUTH, tolerance=1e-3, work=6e6, unit="TB/s")


def test_right_results_are_timed(clock: Clock) -> None:
    report = measure([case(ours=TRUTH * (1 + 5e-4), peer=TRUTH)])
    ours, peer = report.rows
    assert clock.timed == [("ours", True), ("peer", True)]
    assert (ours.p10_us, ours.median_us, ours.p90_us) == (1.5, 2.0, 2.5)
    assert ours.rate == pytest.approx(3.0)  # 6 MB in 2 microseconds
    assert ours.error == pytest.approx(5e-4, rel=1e-3)
    assert (peer.error, peer.problem) == (0.0, None)
    assert (report.device, ours.ceiling) == ("a GPU", CEILINGS["TB/s"])
    assert report.versions["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        (TRUTH * 1.01, "wrong: relative error 1.0e-02, allowed 1e-03"),
        (TRUTH * math.nan, "wrong: relative error inf"),
        (torch.stack((TRUTH, TRUTH)), "wrong: shape [2, 3], must be [3]"),
        ((TRUTH, TRUTH), "argument 2 is shorter"),
        (ImportError("No module named 'peer'"), "No module named 'peer'"),
        (TypeError(), "TypeError"),
    ],
    ids=["wrong", "nan", "shape", "count", "missing", "wordless"],
)
def test_wrong_and_failing_contenders_get_no_time_and_stop_nobody(
    clock: Clock, result: harness.Result | Exception, problem: str
) -> None:
    first, last = measure([case(slow_peer=result, peer=TRUTH)]).rows
    assert first.problem is not None
    assert problem in first.problem
    assert (first.median_us, first.rate) == (None, None)
    assert last.median_us == 5.0
    assert clock.timed == [("peer", True)]


def test_every_returned_tensor_is_checked(clock: Clock) -> None:
    pair = Case(
        "pair", "x", {"ours": named("ours", (TRUTH, TRUTH + 1))}, lambda: (TRUTH, TRUTH), 1e-3, 1.0, "TB/s"
    )
    assert "wrong" in (measure([pair]).rows[0].problem or "")


def test_a_contender_can_be_kept_out_of_graphs(clock: Clock) -> None:
    measure([replace(case(ours=TRUTH, peer=TRUTH), captured={"peer": False})])
    assert clock.timed == [("ours", True), ("peer", False)]


def test_cases_are_made_one_at_a_time(clock: Clock) -> None:
    """So that the memory of one is free before the next is made."""
    events: list[str] = []

    def cases() -> Iterator[Case]:
        for number in range(2):
            events.append(f"made {number}")
            yield case(ours=TRUTH)

    measure(cases(), lambda rows: events.append(f"{len(rows)} of {rows[0].ceiling}"))
    assert events == ["made 0", "1 of 4.0", "made 1", "1 of 4.0"]


def test_best_peer_is_the_fastest_other(clock: Clock) -> None:
    rows = measure([case(ours=TRUTH, slow_peer=TRUTH, peer=TRUTH)]).rows
    found = best_peer(rows)
    assert found is not None
    assert found.contender == "peer"
    assert best_peer(rows[:1]) is None
    assert best_peer(measure([case(ours=TRUTH, peer=-TRUTH)]).rows) is None


def test_relative_error() -> None:
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert relative_error(torch.tensor([math.nan]), torch.tensor([1.0])) == math.inf


def test_only_known_kernels_are_benchmarked() -> None:
    with pytest.raises(InputError, match="no benchmark of no_such_kernel; there are "):
        list(kernels.cases(["no_such_kernel"]))


def report() -> Report:
    rows = [
        Row("scale", "3 numbers", "ours", 2.0, 1.5, 2.5, 3.0, "TB/s", 1e-4, True, 4.0),
        Row("scale", "3 numbers", "peer", 5.0, 4.5, 5.5, 1.2, "TB/s", 0.0, True, 4.0),
        Row("scale", "4 numbers", "peer", None, None, None, None, "TB/s", None, True, 4.0, "not installed"),
        Row("product", "big", "ours", 9.0, 8.0, 9.5, 500.0, "TFLOP/s", 0.0, False, 700.0),
    ]
    return Report("a GPU", harness.versions(), rows)


def test_files_of_a_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = kernels.draw(report(), tmp_path / "out")
    assert [path.name for path in written] == ["kernels.json", "kernels.png"]
    assert written[1].read_bytes().startswith(b"\x89PNG")


def test_other_kernels_keep_their_rows(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While device and versions are the same."""
    monkeypatch.setattr(kernels, "benchmarked", lambda: ["scale", "shift"])
    monkeypatch.setattr(
        kernels,
        "cases",
        lambda names: iter([replace(case(ours=TRUTH, peer=OSError("broken")), kernel=names[0])]),
    )

    def kernels_in_file(*measured: str) -> list[str]:
        kernels.run(tmp_path, measured)
        found = json.loads((tmp_path / "kernels.json").read_text())
        assert [row["problem"] for row in found["rows"]] == [None, "broken"] * (len(found["rows"]) // 2)
        assert (found["warm_up"], found["repeats"]) == (harness.WARM_UP, harness.REPEATS)
        return [row["kernel"] for row in found["rows"]]

    assert kernels_in_file("shift") == ["shift"] * 2
    assert kernels_in_file("scale") == ["scale"] * 2 + ["shift"] * 2
    assert kernels_in_file("scale") == ["scale"] * 2 + ["shift"] * 2
    monkeypatch.setattr(harness, "versions", lambda: {"torch": torch.__version__, "a peer": "1.0"})
    assert kernels_in_file("scale") == ["scale"] * 2 + ["shift"] * 2
    monkeypatch.setattr(harness, "versions", lambda: {"torch": "another"})
    assert kernels_in_file("scale") == ["scale"] * 2
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another GPU")
    assert kernels_in_file("shift") == ["shift"] * 2
    assert kernels_in_file("scale") == ["scale"] * 2 + ["shift"] * 2
    (tmp_path / "kernels.json").write_text("{")
    assert kernels_in_file() == ["scale"] * 2 + ["shift"] * 2


def test_without_matplotlib_there_is_only_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    assert [path.name for path in kernels.draw(report(), tmp_path)] == ["kernels.json"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["kernels", "loop", "schedule"])
def test_the_commands_need_a_gpu(
    command: str, run: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ran = run("bench", command, "-o", tmp_path / "out")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: benchmarks need a CUDA device")
    assert not (tmp_path / "out").exists()


def test_the_command_names_the_kernels_there_are(run: CommandLine, clock: Clock, tmp_path: Path) -> None:
    ran = run("bench", "kernels", "no_such_kernel", "-o", tmp_path / "out")
    assert ran.code == 2
    assert "no benchmark of no_such_kernel; there are" in ran.err


@pytest.fixture
def two_cases(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [case(ours=TRUTH, peer=TRUTH, slow_peer=ImportError("not here")), case(peer=TRUTH)]
    monkeypatch.setattr(kernels, "benchmarked", lambda: ["scale"])
    monkeypatch.setattr(kernels, "cases", lambda names: iter(found))


def test_the_command_prints_the_table(run: CommandLine, two_cases: None, tmp_path: Path) -> None:
    ran = run("bench", "kernels", "-o", tmp_path)
    assert ran.code == 0, ran.err
    lines = [" ".join(line.split()) for line in ran.out.splitlines() if line]
    assert lines[:4] == [
        "scale",
        "case contender median µs p10-p90 TB/s of ceiling speed",
        "3 numbers ours 2.0 1.5-2.5 3 75% of 4 2.50x",
        "3 numbers peer 5.0 4.5-5.5 1.2 30% of 4 1.00x",
    ]
    assert lines[4] == "3 numbers slow peer not here"
    assert (tmp_path / "kernels.json").is_file()
    assert str(tmp_path / "kernels.json") in lines[6]


def test_the_command_as_json(run: CommandLine, two_cases: None, tmp_path: Path) -> None:
    found = run("bench", "kernels", "-o", tmp_path, "--json").json()
    assert found["files"][0] == str(tmp_path / "kernels.json")
    assert [row["contender"] for row in found["rows"]] == ["ours", "peer", "slow peer", "peer"]
    assert {row["ceiling"] for row in found["rows"]} == {CEILINGS["TB/s"]}


@pytest.mark.gpu
def test_the_clock_on_the_gpu() -> None:
    """A copy of 64 MB takes between the time at 20 TB/s and at 0.1 TB/s, in a graph and outside."""
    source = torch.zeros(2**24, device="cuda")
    target = torch.empty_like(source)
    for graph in (True, False):
        low, median, high = harness.time_us(lambda: target.copy_(source), graph=graph)
        assert 6 < median < 1400
        assert low <= median <= high
