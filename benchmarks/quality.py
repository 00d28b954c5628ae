"""How good a fused object is and how long it takes: presets beside each other, the fast loop beside the plain one.

Procedural objects that the embedded model never saw are fused from one picture each and compared with the truth
(:mod:`..engine.training.evaluate`). ``ours`` is the loop as users run it: half precision (or the ``dtype`` asked for),
kernels and captured steps where the device has them. ``reference`` is the plain loop: one operation after the other,
float32 throughout, networks without this package's kernels, and the prompt conditioned anew in every step; its
renderer is this package's own as well.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path

import torch

from ..engine.backends import Backends
from ..engine.checkpoint import config_to_json
from ..engine.conditioning import Conditioner
from ..engine.config import EMBEDDED_CAMERA, EMBEDDED_GUIDANCE, OFFICIAL, FusionConfig
from ..engine.config import preset as preset_named
from ..engine.errors import FusionError, InputError
from ..engine.files import write_json
from ..engine.fuse import Fusion
from ..engine.fused_field import FusedField
from ..engine.layers import use_kernels
from ..engine.picture import PreparedPicture
from ..engine.pipeline import ImageTo3D
from ..engine.training.evaluate import measure_fusion
from ..engine.training.objects import TEST_SEEDS
from ..engine.warmup import warm_up
from ..engine.weights import load_model, pick_device, pick_dtype
from .harness import versions
from .loop import Forgetful
from .plot import write_figure
from .quality_report import Conditions, Loop, QualityReport, Row, Task, figure

FILE = "quality"

ADAPTED = replace(
    OFFICIAL,
    name="official-adapted",
    camera=EMBEDDED_CAMERA,
    guidance_scale=EMBEDDED_GUIDANCE,
    random_background=1.0,
    background_colours="grey",
)
"""The official schedule in the world of the embedded model: its cameras, its guidance, and the same colour behind
object and prompt. As released, half of the steps show a random colour and put a grey behind the prompt, which that
model never saw."""


def configuration(name: str, family: str) -> FusionConfig:
    """A preset for a model of that family, or :data:`ADAPTED`."""
    return ADAPTED if name == ADAPTED.name else preset_named(name, family=family)


def plan(
    presets: Sequence[str], guarded: Sequence[str], *, objects: int, skip: int = 0, seeds: int = 1
) -> list[Task]:
    """Every preset by our loop with every seed, and the ``guarded`` ones by the plain loop too.

    Raises :class:`InputError` for counts that make no comparison.
    """
    if objects < 1 or skip < 0 or seeds < 1:
        raise InputError(
            f"--objects is {objects}, --skip {skip} and --seeds {seeds}; they must be at least 1, 0 and 1"
        )
    if guarded and seeds < 2:
        raise InputError("two loops are compared by what another seed changes: --seeds must be at least 2")
    loops: list[tuple[str, Loop]] = [(name, "ours") for name in presets]
    loops += [(name, "reference") for name in guarded]
    numbers = range(skip, skip + objects)
    return [
        Task(name, loop, seed, number) for name, loop in loops for seed in range(seeds) for number in numbers
    ]


def run(
    folder: Path,
    presets: Sequence[FusionConfig],
    tasks: Sequence[Task],
    *,
    model: str = "builtin:nano",
    device: str = "auto",
    dtype: torch.dtype | None = None,
    workers: int = 1,
    on_row: Callable[[Row], None] | None = None,
) -> QualityReport:
    """Do the ``tasks`` on configurations of ``presets`` by that many processes on one device; ``dtype`` is ours.

    ``quality.json`` in ``folder`` is written after every row. Rows that are there already under the same conditions
    stay and are not measured again, so a run that was stopped continues; those of the plain loop, which is always in
    float32, stay with another ``dtype`` too. Raises :class:`InputError` if a task's preset is not among them, or the
    folder cannot be written.
    """
    settings = {config.name: config for config in presets}
    if unknown := {task.preset for task in tasks} - set(settings):
        raise InputError(f"no configuration is named {', '.join(sorted(unknown))}")
    if workers < 1:
        raise InputError(f"--workers is {workers}; it must be at least 1")
    target = pick_device(device)
    dtype = pick_dtype(dtype, target)
    conditions = Conditions(
        model,
        torch.cuda.get_device_name(target) if target.type == "cuda" else target.type,
        str(dtype).removeprefix("torch."),
        versions(),
        {name: config_to_json(config) for name, config in settings.items()},
    )
    path = folder / f"{FILE}.json"
    conditions, rows = _with_others(conditions, path)
    done = {row.task for row in rows}
    left = [task for task in tasks if task not in done]
    for row in _rows(left, _Worker(model, str(target), dtype, settings), workers):
        rows.append(row)
        write_json(path, QualityReport(conditions, workers, rows).to_dict())
        if on_row is not None:
            on_row(row)
    return QualityReport(conditions, workers, rows)


def draw(report: QualityReport, folder: Path) -> list[Path]:
    """``quality.png`` in ``folder``; nothing without matplotlib."""
    return write_figure(folder / f"{FILE}.png", lambda: figure(report))


def _with_others(conditions: Conditions, path: Path) -> tuple[Conditions, list[Row]]:
    """What the file holds under the same conditions, and the presets that it holds besides."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        same = all(held[name] == getattr(conditions, name) for name in ("model", "device", "versions"))
        known = {
            name: settings
            for name, settings in held["presets"].items()
            if settings == conditions.presets.get(name, settings)
        }
        rows = [Row(**row) for row in held["rows"] if row["preset"] in known]
        if held["dtype"] != conditions.dtype:
            rows = [row for row in rows if row.loop == "reference"]
    except (OSError, ValueError, TypeError, KeyError):
        return conditions, []
    if not same:
        return conditions, []
    presets = {**known, **conditions.presets}
    return replace(conditions, presets=presets), rows


def _rows(tasks: Sequence[Task], worker: _Worker, workers: int) -> Iterator[Row]:
    if workers == 1 or len(tasks) < 2:
        yield from map(worker, tasks)
        return
    if worker.device.startswith("cuda"):
        # Kernels are compiled and tuned by one process, before the others would do it all at once.
        warm = ImageTo3D.from_pretrained(worker.model, worker.device, worker.dtype)
        asked = [worker.settings[name] for name in dict.fromkeys(task.preset for task in tasks)]
        for config in {(one.field, one.render, one.stages): one for one in asked}.values():
            warm_up(warm, config)
        del warm
        torch.cuda.empty_cache()
    threads = max(1, (os.cpu_count() or 1) // workers)
    # The worker travels before it has loaded anything.
    with ProcessPoolExecutor(
        min(workers, len(tasks)), get_context("spawn"), _begin, (worker, threads)
    ) as pool:
        for finished in as_completed([pool.submit(_work, task) for task in tasks]):
            yield finished.result()


_worker: _Worker


def _begin(worker: _Worker, threads: int) -> None:
    global _worker
    torch.set_num_threads(threads)
    _worker = worker


def _work(task: Task) -> Row:
    return _worker(task)


class _Worker:
    """Does tasks one after the other; holds the model once for each loop that is asked for."""

    def __init__(
        self, model: str, device: str, dtype: torch.dtype, settings: dict[str, FusionConfig]
    ) -> None:
        self.model, self.device, self.dtype, self.settings = model, device, dtype, settings

    def __call__(self, task: Task) -> Row:
        config = self.settings[task.preset]
        # The model is loaded before the clock starts.
        fuse = partial(_fuse_plainly, self._plain) if task.loop == "reference" else partial(_fuse, self._ours)
        try:
            score, *_ = measure_fusion(
                TEST_SEEDS + task.object, lambda picture: fuse(picture, config, task.seed)
            )
        except FusionError as error:
            return Row(**asdict(task), problem=str(error))
        return Row(**asdict(task), **asdict(score))

    @cached_property
    def _ours(self) -> ImageTo3D:
        return ImageTo3D.from_pretrained(self.model, self.device, self.dtype)

    @cached_property
    def _plain(self) -> ImageTo3D:
        loaded = load_model(self.model, device=self.device, dtype=torch.float32)
        for network in (loaded.unet, loaded.vae):
            use_kernels(network, "torch")
        plain = Backends(attention="torch", unet="eager", vae="eager", loop="eager")
        return ImageTo3D(loaded, backends=plain)


def _fuse(pipe: ImageTo3D, picture: PreparedPicture, config: FusionConfig, seed: int) -> FusedField:
    return pipe.fuse(picture, preset=config, seed=seed).nerf


def _fuse_plainly(pipe: ImageTo3D, picture: PreparedPicture, config: FusionConfig, seed: int) -> FusedField:
    guidance = Forgetful(pipe.model, Conditioner(pipe.model, picture), config)
    return Fusion.guided_by(guidance, seed=seed, backends=pipe.backends).run()
