from __future__ import annotations

import json
from pathlib import Path

import pytest

from imagedream_rt.engine.errors import ImageDreamError, InputError
from imagedream_rt.engine.files import check_writable_folder, replacing, staged, write_json


def everything_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_writable_folder_passes_and_is_left_as_it_was(tmp_path: Path) -> None:
    assert check_writable_folder(tmp_path) == tmp_path
    assert check_writable_folder(str(tmp_path / "new" / "deeper")) == tmp_path / "new" / "deeper"
    assert everything_below(tmp_path) == set()


def test_a_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(InputError, match=r"note\.txt is not a folder"):
        check_writable_folder(tmp_path / "note.txt" / "out")
    with pytest.raises(InputError, match=r"note\.txt is not a folder"):
        check_writable_folder(tmp_path / "note.txt")


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="no /proc, which refuses even root")
def test_an_unwritable_folder_is_refused_before_and_during_work() -> None:
    with pytest.raises(InputError, match="output folder /proc"):
        check_writable_folder("/proc")
    with pytest.raises(InputError, match="output folder /proc/out"), staged("/proc/out"):
        pytest.fail("the body must not run")


def test_staged_files_appear_together_and_replace_older_ones(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with staged(tmp_path) as stage:
        (stage / "a.txt").write_text("new")
        (stage / "b.txt").write_text("b")
        assert (tmp_path / "a.txt").read_text() == "old"
        assert not (tmp_path / "b.txt").exists()
    assert everything_below(tmp_path) == {"a.txt", "b.txt"}
    assert (tmp_path / "a.txt").read_text() == "new"


def fail_halfway(folder: Path, failure: type[BaseException]) -> None:
    with staged(folder) as stage:
        (stage / "a.txt").write_text("half")
        raise failure


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_everything_as_it_was(tmp_path: Path, failure: type[BaseException]) -> None:
    (tmp_path / "a.txt").write_text("old")
    for folder in (tmp_path, tmp_path / "new" / "deeper"):
        with pytest.raises(failure):
            fail_halfway(folder, failure)
    assert everything_below(tmp_path) == {"a.txt"}
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_folder_in_the_way_of_a_file_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(InputError, match=r"a\.txt"), replacing(tmp_path / "a.txt") as partial:
        partial.write_text("new")
    assert everything_below(tmp_path) == {"a.txt"}


def test_a_writer_that_writes_nothing_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(ImageDreamError, match="without a file"), replacing(tmp_path / "a.txt"):
        pass
    assert everything_below(tmp_path) == set()


def test_json_is_read_back_and_nan_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "m.json", {"name": "Käfer", "seconds": 1.5})
    assert json.loads((tmp_path / "m.json").read_text(encoding="utf-8")) == {"name": "Käfer", "seconds": 1.5}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "m.json", {"seconds": float("nan")})
    assert json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))["seconds"] == 1.5


def test_files_have_the_permissions_of_any_other_new_file(tmp_path: Path) -> None:
    with staged(tmp_path) as stage:
        (stage / "secret").touch(mode=0o600)
        (stage / "usual").touch()
    (tmp_path / "other").touch()
    assert (tmp_path / "secret").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert {path.name for path in tmp_path.iterdir()} == {"secret", "usual", "other"}
