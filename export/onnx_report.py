"""What stands beside each ONNX file: its source, its hashes and how it compared with PyTorch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..engine.checkpoint_files import sha256_of
from ..engine.errors import InputError
from ..engine.files import write_json
from .manifest import FORMAT, Source

AGAIN = "export it again from the checkpoint with `imagedream-rt export`"


def data_path(onnx: Path) -> Path:
    """The file with the weights."""
    return onnx.with_name(onnx.name + ".data")


def report_path(onnx: Path) -> Path:
    return onnx.with_name(onnx.name + ".json")


@dataclass(frozen=True)
class OnnxReport:
    """Report of one ONNX file."""

    component: str
    source: Source
    dtype: str
    nodes: dict[str, int]
    """How many operators of which type."""
    check: dict[str, Any]
    """:class:`~.onnx_check.CheckReport`."""
    seconds: dict[str, float]
    size_bytes: int
    """Of both files."""
    sha256: str
    data_sha256: str
    versions: dict[str, Any]
    format: int = FORMAT

    def save(self, onnx: Path) -> Path:
        path = report_path(onnx)
        write_json(path, asdict(self))
        return path

    @classmethod
    def read(cls, onnx: Path) -> OnnxReport:
        """Raises :class:`InputError` if the report is missing or damaged."""
        path = report_path(onnx)
        if not path.is_file():
            raise InputError(f"{onnx} has no report ({path.name}); {AGAIN}")
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**given, "source": Source(**given["source"])})
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged ({type(error).__name__}: {error}); {AGAIN}") from error

    def check_unchanged(self, onnx: Path) -> None:
        """That both files are those of the report. Raises :class:`InputError`."""
        for path, digest in ((onnx, self.sha256), (data_path(onnx), self.data_sha256)):
            if not path.is_file() or sha256_of(path) != digest:
                raise InputError(f"{path} is not what its report was written for; {AGAIN}")
