"""What commands that run a job share: early checks, the loaded model, interrupts that can be resumed."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .cli_output import Stages, only_our_words
from .errors import Cancelled, InputError

if TYPE_CHECKING:
    import torch

    from .config import FusionConfig
    from .model import Controller
    from .picture import PreparedPicture
    from .pipeline import ImageTo3D

PROGRAM = "imagedream-rt"
CHECKPOINT_NAME = "checkpoint.safetensors"


@contextmanager
def work(debug: bool) -> Iterator[Stages]:
    """Progress on stderr, and stdout kept free for the result."""
    from ..kernels._tuning import report_to

    with only_our_words(debug), Stages() as on_progress, report_to(on_progress.tuning):
        yield on_progress


def prepared_picture(picture: Path | None, keep_background: bool, output: Path) -> PreparedPicture | None:
    """What can be wrong with the picture and the output folder shows before a model is loaded."""
    from .files import check_writable_folder
    from .picture import prepare

    check_writable_folder(output)
    if picture is None:
        return None
    prepared = prepare(picture, keep_background=keep_background)
    for note in prepared.notes:
        print(f"note: {note}", file=sys.stderr)
    return prepared


def dtype_named(name: str | None) -> torch.dtype | None:
    """None stays None: the device's own choice."""
    import torch

    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name is not None and name not in dtypes:
        raise InputError(f"unknown dtype {name!r}; the dtypes are {', '.join(dtypes)}")
    return None if name is None else dtypes[name]


def load_pipeline(
    model: str,
    controller: str | None,
    device: str,
    dtype: str | None,
    backend: Sequence[str] | None = None,
    plans: Path | None = None,
) -> ImageTo3D:
    """``backend``: COMPONENT=NAME each. With ``plans`` the networks that have one there run as TensorRT plans."""
    from .backends import Backends
    from .pipeline import ImageTo3D

    precision = dtype_named(dtype)
    backends, planned = Backends.parse(backend or ()), None
    if plans is not None:
        from ..export.plan_model import plans_in

        planned = plans_in(plans)
    # An unknown controller is refused in there, with those there are.
    return ImageTo3D.from_pretrained(
        model,
        device,
        precision,
        cast("Controller | None", controller),
        backends=backends,
        plans=planned,
    )


def fusion_config(
    pipe: ImageTo3D | None, preset: str | None, steps: int | None, guidance_scale: float | None
) -> FusionConfig:
    """The preset with what the options change; without ``pipe`` only a check of the options."""
    from .config import preset as preset_named

    default, family = ("official", "") if pipe is None else (pipe.default_preset, pipe.model.card.family)
    changes: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale}
    given = {name: value for name, value in changes.items() if value is not None}
    return preset_named(preset or default, family=family).changed(**given)


@contextmanager
def resumable(output: Path, chosen: Path | None, resume: bool) -> Iterator[Path]:
    """Where the fusion saves its state. It goes when all is done, unless the user chose the place."""
    path = chosen or output / CHECKPOINT_NAME
    before = path.stat().st_mtime_ns if path.is_file() else None
    if before is not None and not resume:
        print(
            f"note: {path} is of an earlier run, which --resume would continue; starting anew",
            file=sys.stderr,
        )
    try:
        yield path
    except (KeyboardInterrupt, Cancelled):
        now = path.stat().st_mtime_ns if path.is_file() else None
        if now is None or (now == before and not resume):
            raise Cancelled("interrupted before there was anything to continue from") from None
        command = shlex.join([PROGRAM, *(word for word in sys.argv[1:] if word != "--resume"), "--resume"])
        raise Cancelled(f"interrupted; the state is in {path}. To continue: {command}") from None
    if chosen is None:
        path.unlink(missing_ok=True)
