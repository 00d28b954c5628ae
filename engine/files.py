"""Files that are there whole or not at all: everything is written beside its place and then renamed into
it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import ImageDreamError, InputError


def check_writable_folder(folder: str | Path) -> Path:
    """That files can be written to ``folder``, which need not exist yet; asked before long work starts.

    Leaves nothing behind: a probe file is written and removed in the folder or in the nearest one above it
    that exists. Raises :class:`InputError`.
    """
    folder = Path(folder)
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise InputError(f"output folder {folder}: {existing} is not a folder; choose another place")
    probe = existing / f".{secrets.token_hex(8)}.probe"
    try:
        with probe.open("xb"):
            pass
        probe.unlink()
    except OSError as error:
        raise _unwritable(folder, error) from None
    return folder


@contextlib.contextmanager
def staged(folder: str | Path) -> Iterator[Path]:
    """A fresh hidden folder inside ``folder``; the files written to it move into ``folder`` at the end.

    ``folder`` is made if missing. If the body fails, nothing of what it wrote stays, nor does a folder that
    was made for it; files that were there before are untouched. Raises :class:`InputError` where the system
    refuses to write.

    >>> with staged("out/demo") as stage:  # doctest: +SKIP
    ...     (stage / "metadata.json").write_text("{}")
    """
    folder = Path(folder)
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    stage = folder / f".{secrets.token_hex(8)}.partial"
    done = False
    try:
        stage.mkdir(parents=True)
        yield stage
        usual = _usual_mode(stage)
        for path in sorted(stage.iterdir()):
            _flush(path)
            path.chmod(usual)
        for path in sorted(stage.iterdir()):
            os.replace(path, folder / path.name)
        done = True
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if not done:
            for path in missing:
                with contextlib.suppress(OSError):
                    path.rmdir()


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path to write to, of the same file name, which becomes ``path`` if the body succeeds (see
    :func:`staged`)."""
    path = Path(path)
    with staged(path.parent) as stage:
        yield stage / path.name
        if not (stage / path.name).is_file():
            raise ImageDreamError(f"{path}: its writer ended without a file and without an error")


def write_json(path: str | Path, value: dict[str, Any]) -> None:
    """``value`` as indented UTF-8 JSON. Raises ``ValueError`` for NaN and infinities, which JSON has not."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    with replacing(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def _usual_mode(folder: Path) -> int:
    """Permissions that this user's new files have in ``folder``; some writers keep theirs to the user alone."""
    probe = folder / f".{secrets.token_hex(8)}"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    return mode


def _flush(path: Path) -> None:
    # Renaming before the bytes are on the disk can leave an empty file after a power cut.
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _unwritable(folder: Path, error: OSError) -> InputError:
    reason = error.strerror or str(error).partition("\n")[0]
    if error.filename2:
        reason = f"{reason}: {error.filename2}"
    return InputError(
        f"output folder {folder}: cannot write there ({reason}); choose a folder that you may write to"
    )
