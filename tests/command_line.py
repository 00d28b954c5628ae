"""Running the command line in this process, and the small things to run it on."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from imagedream_rt.engine import cli
from imagedream_rt.engine.config import (
    DRAFT,
    FieldConfig,
    FusionConfig,
    HashGridConfig,
    RenderConfig,
    Stage,
    WarmStart,
)

TINY = ("--model", "random:tiny", "--device", "cpu")

SECONDS: FusionConfig = replace(
    DRAFT,
    name="seconds",
    steps=4,
    stages=(Stage(0, 16, 4),),
    field=FieldConfig(grid=HashGridConfig(levels=4, log2_table=10, base_resolution=8)),
    render=RenderConfig(samples_per_ray=64, occupancy_resolution=16),
    warm_start=WarmStart(view_sets=1, ddim_steps=2, fit_steps=3, rays=256),
    checkpoint_every=1,
)
"""A fusion that is over at once; what comes out is a coloured ball."""


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        """All of stdout as one JSON object."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


class CommandLine:
    """Calls the program's ``main`` with the arguments, converted to text."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Ran:
        self._capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        said = self._capsys.readouterr()
        return Ran(code, said.out, said.err)


def object_picture() -> Image.Image:
    """A red ball with a green cap before nothing: RGBA, 96 x 96, hard edges."""
    picture = Image.new("RGBA", (96, 96), (0, 0, 0, 0))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((20, 24, 76, 80), fill=(210, 60, 40, 255))
    draw.rectangle((36, 14, 60, 34), fill=(40, 170, 70, 255))
    return picture


def save_object_picture(folder: Path) -> Path:
    path = folder / "object.png"
    object_picture().save(path)
    return path
