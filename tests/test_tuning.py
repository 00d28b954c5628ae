"""The choice of launch configurations: measured once, kept on disk, and safe from what may be in the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from imagedream_rt.kernels import _tuning
from imagedream_rt.kernels._tuning import Launch, Tuned, cache_file, report_to, tuned_count

triton = pytest.importorskip("triton")

DEVICE = torch.device("cuda", 0)
SLOW, FAST, BROKEN = Launch.of(BLOCK=16), Launch.of(BLOCK=32, warps=8), Launch.of(BLOCK=64, stages=5)
TIMES = {SLOW: 3.0, FAST: 1.0}


class Bench:
    """Stands in for the GPU: what was launched and what was measured."""

    def __init__(self) -> None:
        self.launched: list[Launch] = []
        self.measured: list[Launch] = []
        self.capturing = False
        self.pending = False

    def run(self, launch: Launch) -> None:
        if launch == BROKEN:
            raise triton.runtime.errors.OutOfResources(300_000, 200_000, "shared memory")
        self.launched.append(launch)
        self.pending = True

    def finish(self, device: torch.device) -> None:
        assert device == DEVICE
        self.pending = False

    def time(self, run: Callable[[], None], **_: Any) -> float:
        assert not self.pending
        run()
        self.measured.append(self.launched[-1])
        return TIMES[self.launched[-1]]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    bench = Bench()
    monkeypatch.setenv("IMAGEDREAM_RT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_tuning, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA A100-SXM4 / 80GB")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bench.capturing)
    monkeypatch.setattr(triton.testing, "do_bench_cudagraph", bench.time)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: bench)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", bench.finish)
    return bench


def tuned(source: str = "source", *candidates: Launch) -> Tuned:
    """A fresh choice, as a new process has; ``source`` stands for the kernel's."""
    return Tuned("product", SimpleNamespace(cache_key=source), lambda *key: candidates or (SLOW, FAST))


def test_the_fastest_is_measured_once_and_found_again_by_the_next_process(bench: Bench) -> None:
    first = tuned()
    assert first.choose(DEVICE, (5120, torch.float16), bench.run) == FAST
    assert bench.measured == [SLOW, FAST]
    assert first.choose(DEVICE, (5120, torch.float16), bench.run) == FAST
    assert tuned().choose(DEVICE, (5120, torch.float16), bench.run) == FAST
    assert bench.measured == [SLOW, FAST]
    assert tuned_count(DEVICE) == 1

    assert first.choose(DEVICE, (320, torch.float16), bench.run) == FAST
    assert len(bench.measured) == 4
    assert tuned_count(DEVICE) == 2


def test_the_file_is_named_after_device_and_version_and_readable(bench: Bench) -> None:
    tuned().choose(DEVICE, (5120, torch.float16), bench.run)
    path = cache_file(DEVICE)
    assert path.name == f"tuned-NVIDIA-A100-SXM4-80GB-triton-{triton.__version__}.json"
    ((entry, launch),) = json.loads(path.read_text()).items()
    assert entry.startswith("product(5120, torch.float16) ")
    assert launch == "BLOCK=32 warps=8 stages=2"
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_without_the_variable_the_cache_is_in_the_home_folder(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("IMAGEDREAM_RT_CACHE")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_file(DEVICE).parent == tmp_path / ".cache" / "imagedream_rt"


def test_another_source_is_measured_anew(bench: Bench) -> None:
    tuned("source").choose(DEVICE, (1,), bench.run)
    tuned("changed").choose(DEVICE, (1,), bench.run)
    assert bench.measured == [SLOW, FAST, SLOW, FAST]


def test_a_choice_that_is_no_candidate_any_more_is_measured_anew(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned("source", SLOW, FAST).choose(DEVICE, (1,), bench.run)
    other = Launch.of(BLOCK=128)
    monkeypatch.setitem(TIMES, other, 2.0)
    assert tuned("source", SLOW, other).choose(DEVICE, (1,), bench.run) == other


@pytest.mark.parametrize(
    "content", ["", "{", "[1, 2]", '{"product(1)": ["BLOCK=16"]}', b"\xff\xfe\x00"], ids=str
)
def test_a_damaged_file_is_replaced(bench: Bench, content: str | bytes) -> None:
    path = cache_file(DEVICE)
    path.parent.mkdir(parents=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert tuned().choose(DEVICE, (1,), bench.run) == FAST
    assert list(json.loads(path.read_text()).values()) == [str(FAST)]


def test_a_folder_that_cannot_be_written_costs_no_more_than_time(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("IMAGEDREAM_RT_CACHE", str(tmp_path / "file" / "cache"))
    choice = tuned()
    for _ in range(2):
        assert choice.choose(DEVICE, (1,), bench.run) == FAST
    assert bench.measured == [SLOW, FAST]


def test_nothing_is_measured_while_a_graph_is_captured(bench: Bench) -> None:
    bench.capturing = True
    choice = tuned()
    assert choice.choose(DEVICE, (1,), bench.run) == SLOW
    assert bench.launched == []
    # Nor is the makeshift kept: the next call outside of a capture measures.
    bench.capturing = False
    assert choice.choose(DEVICE, (1,), bench.run) == FAST
    # And a measured choice holds in a capture, of another process too.
    bench.capturing = True
    assert tuned().choose(DEVICE, (1,), bench.run) == FAST


def test_a_candidate_that_the_device_cannot_run_is_passed_over(bench: Bench) -> None:
    assert tuned("source", BROKEN, SLOW).choose(DEVICE, (1,), bench.run) == SLOW
    with pytest.raises(RuntimeError, match=r"no configuration of product runs on this device for \(2,\)"):
        tuned("source", BROKEN, BROKEN).choose(DEVICE, (2,), bench.run)


def test_a_single_candidate_needs_no_measurement(bench: Bench) -> None:
    assert tuned("source", SLOW).choose(DEVICE, (1,), bench.run) == SLOW
    assert bench.launched == []
    assert not cache_file(DEVICE).exists()


def test_the_interpreter_takes_the_first_candidate(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuned().choose(torch.device("cpu"), (1,), bench.run) == SLOW
    monkeypatch.setattr(_tuning, "interpreted", lambda: True)
    assert tuned().choose(DEVICE, (1,), bench.run) == SLOW
    assert bench.launched == []


def test_progress_is_reported_and_the_sink_restored(bench: Bench) -> None:
    seen: list[tuple[str, int, int]] = []
    with report_to(lambda *report: seen.append(report)):
        tuned().choose(DEVICE, (5, "a"), bench.run)
    assert seen == [("tuning product for 5, a", done, 2) for done in (0, 0, 1, 2)]
    tuned("changed").choose(DEVICE, (5, "a"), bench.run)
    assert len(seen) == 4


def test_launch_options() -> None:
    launch = Launch.of(BLOCK=32, ROWS=2, warps=8, stages=3)
    assert launch.options == {"BLOCK": 32, "ROWS": 2, "num_warps": 8, "num_stages": 3}
    assert launch["ROWS"] == 2
    assert str(launch) == "BLOCK=32 ROWS=2 warps=8 stages=3"


@pytest.mark.gpu
def test_measuring_leaves_alone_what_is_queued(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Memory that was freed, but is still to be read by what was queued before, may be the results' memory."""
    monkeypatch.setenv("IMAGEDREAM_RT_CACHE", str(tmp_path))
    numbers = torch.ones(2**20, device="cuda")
    torch.cuda.synchronize()
    torch.cuda._sleep(2**28)
    copied = numbers.clone()
    place = numbers.data_ptr()
    del numbers
    results = torch.empty(2**20, device="cuda")
    assert results.data_ptr() == place
    Tuned("zeros", SimpleNamespace(cache_key="zeros"), lambda *key: (SLOW, FAST)).choose(
        results.device, (1,), lambda launch: _zero(results)
    )
    assert bool((copied == 1).all())


def _zero(tensor: torch.Tensor) -> None:
    tensor.zero_()
