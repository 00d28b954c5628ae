"""Is there room for what is about to be made? Asked before the work, not found out in its middle."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..engine.errors import InputError

GIB = 2**30


def check_disk(folder: Path, needed: int, what: str) -> None:
    """Raises :class:`InputError` if ``folder`` (or what it will be made in) has less than ``needed`` bytes free."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"not enough disk: {what} takes about {_gib(needed)}, and {existing} has {_gib(free)} free; choose "
            "another place with -o, or fewer components"
        )


def check_memory(needed: int, what: str) -> None:
    """Raises :class:`InputError` if less than ``needed`` bytes of memory are available; unknown counts as enough."""
    available = available_memory()
    if available is not None and available < needed:
        raise InputError(
            f"not enough memory: {what} takes about {_gib(needed)}, and {_gib(available)} are available; close "
            "other programs, or use a machine with more"
        )


def available_memory() -> int | None:
    """Bytes that a new process can have without swapping, where the system tells it."""
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
