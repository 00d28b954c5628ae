"""Checkpoint files from strangers: read where sound, refused with one sentence where not, and never run."""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import refused
from safetensors.torch import save_file

from imagedream_rt.engine.checkpoint_files import (
    file_format,
    flat_tensors,
    read_json,
    read_tensors,
    sha256_of,
)

TENSORS = {"a": torch.arange(600.0).reshape(3, 200), "b.c": torch.tensor([1.5], dtype=torch.float16)}


class Payload:
    """Unpickled carelessly, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def assert_reads(path: Path) -> None:
    found = read_tensors(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize(
    "wrap", [lambda tensors: tensors, lambda tensors: {"state_dict": tensors, "step": 3}]
)
def test_pt(tmp_path: Path, new_format: bool, wrap: Callable[[Any], Any]) -> None:
    path = tmp_path / "weights.bin"
    torch.save(wrap(TENSORS), path, _use_new_zipfile_serialization=new_format)
    assert file_format(path) == "pt"
    assert_reads(path)


def test_safetensors_by_content_whatever_the_name(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    save_file(TENSORS, path)
    assert file_format(path) == "safetensors"
    assert_reads(path)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_reading_maps_the_file(tmp_path: Path, suffix: str) -> None:
    """64 MiB are opened without being read: the process does not grow by them."""
    path = tmp_path / f"big.{suffix}"
    big = {"big": torch.zeros(2**24)}
    if suffix == "pt":
        torch.save(big, path)
    else:
        save_file(big, path)
    before = resident_bytes()
    tensors = read_tensors(path)
    assert tensors["big"].shape == (2**24,)
    assert resident_bytes() - before < 16 * 2**20


def resident_bytes() -> int:
    status = Path("/proc/self/statm")
    if not status.is_file():
        pytest.skip("no /proc here to read the process's memory from")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("new_format", [True, False])
def test_malicious_pickle_is_refused_and_not_run(tmp_path: Path, new_format: bool) -> None:
    mark, path = tmp_path / "ran", tmp_path / "evil.pt"
    torch.save({"a": torch.zeros(2), "b": Payload(mark)}, path, _use_new_zipfile_serialization=new_format)
    message = refused(lambda: read_tensors(path))
    assert str(path) in message
    assert "system" in message
    assert not mark.exists()
    torch.load(path, weights_only=False)  # it would have worked
    assert mark.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_bare_malicious_pickle(tmp_path: Path, protocol: int, recwarn: pytest.WarningsRecorder) -> None:
    mark, path = tmp_path / "ran", tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps(Payload(mark), protocol))
    assert str(path) in refused(lambda: read_tensors(path))
    assert not mark.exists()
    assert not recwarn.list


def test_whole_module_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    assert "torch.nn.modules.linear.Linear" in refused(lambda: read_tensors(tmp_path / "module.pt"))


def saved(path: Path) -> bytes:
    save_file(TENSORS, path) if path.suffix == ".safetensors" else torch.save(TENSORS, path)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("kept", [0, 1, 7, 20, 0.5, 0.99])
def test_truncated(tmp_path: Path, suffix: str, kept: float) -> None:
    path = tmp_path / f"weights.{suffix}"
    whole = saved(path)
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    message = refused(lambda: read_tensors(path))
    assert message.startswith(f"{path}: ")
    if kept == 0:
        assert "empty" in message
    if kept in (20, 0.5, 0.99):
        assert "truncated" in message


def test_truncated_old_format(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-9])
    assert "truncated" in refused(lambda: read_tensors(path))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"F32"', b'"F99"'),
        (b"[3,200]", b"[3,201]"),
        (b'{"', b"{#"),
        (b'"data_offsets":[0,', b'"data_offsets":[9,'),
    ],
)
def test_damaged_safetensors_header(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = tmp_path / "weights.safetensors"
    whole = saved(path)
    assert old in whole
    path.write_bytes(whole.replace(old, new, 1))
    assert "damaged" in refused(lambda: read_tensors(path))


def test_archives_that_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("letter.txt", "dear reader")
    assert str(path) in refused(lambda: read_tensors(path))
    saved(tmp_path / "weights.pt")
    with (
        zipfile.ZipFile(tmp_path / "weights.pt") as stored,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in stored.infolist():
            packed.writestr(entry.filename, stored.read(entry))
    assert "compressed" in refused(lambda: read_tensors(path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"just some words about nothing in particular", "neither"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>Please log in</body></html>", "neither"),
        (bytes(range(256)), "neither"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    assert words in refused(lambda: read_tensors(path))


def test_missing_and_unreadable(tmp_path: Path) -> None:
    assert "no such file" in refused(lambda: read_tensors(tmp_path / "absent.pt"))
    assert "directory" in refused(lambda: read_tensors(tmp_path))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([torch.zeros(2)], "holds a list"),
        (3, "holds a int"),
        ({}, "no tensors"),
        ({"state_dict": {}}, "no tensors"),
        ({"a": torch.zeros(2), "epoch": 3}, "'epoch' is a int"),
        ({7: torch.zeros(2)}, "7"),
        ({"a": torch.eye(3).to_sparse()}, "sparse"),
    ],
)
def test_what_is_no_flat_dict_of_tensors(value: Any, words: str) -> None:
    message = refused(lambda: flat_tensors(value, "it"))
    assert words in message
    assert message.startswith("it: ")


def test_flat_tensors_keep_no_graph() -> None:
    assert not flat_tensors({"a": torch.zeros(2, requires_grad=True)}, "it")["a"].requires_grad


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b"[" * 100_000])
def test_bad_json(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    assert str(path) in refused(lambda: read_json(path))
    assert "no such file" in refused(lambda: read_json(tmp_path / "absent.json"))


def test_sha256(tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()
