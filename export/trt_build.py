"""The child process that builds one plan: ``python -m imagedream_rt.export.trt_build JOB.json``.

TensorRT takes gigabytes while it builds, and when it fails it may take its process along; so it has one of its own.
A line of JSON on stdout tells each step, the last one the result.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .flavours import Flavour, TensorRT, load_tensorrt

LAYERS = "Layers:"
FUSED_ATTENTION = ("mha", "flash_attention")
"""In the names of the kernels that compute a whole attention."""


@dataclass(frozen=True)
class BuildJob:
    """What to build, as the parent writes it."""

    onnx: str
    plan: str
    log: str
    flavour: Flavour
    architecture: str
    profile: tuple[int, int, int]
    """Least, usual and greatest batch."""
    refit: bool
    strip_weights: bool
    weights: tuple[str, ...]
    """Names of the weights that a refit may change."""
    timing_cache: str | None
    optimization_level: int

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> BuildJob:
        given = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**given, "profile": tuple(given["profile"]), "weights": tuple(given["weights"])})


class BuildFailed(Exception):
    """TensorRT said no; the message is its own."""


def main(path: Path) -> int:
    job = BuildJob.load(path)
    tensorrt = load_tensorrt(job.flavour)
    start = time.perf_counter()
    try:
        with open(job.log, "w", encoding="utf-8") as log:
            summary = build(tensorrt, job, log)
    except BuildFailed as error:
        say(error=str(error))
        return 1
    say(
        build_s=round(time.perf_counter() - start, 2),
        peak_bytes=peak_bytes(),
        version=tensorrt.version,
        **summary,
    )
    return 0


def build(tensorrt: TensorRT, job: BuildJob, log: Any) -> dict[str, Any]:
    """Write the plan; returns what its layers are. Raises :class:`BuildFailed`."""
    trt = tensorrt.module
    logger = logger_class(trt)(log)
    builder = trt.Builder(logger)
    network = builder.create_network(typed_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job.onnx):
        raise BuildFailed("; ".join(parser.get_error(at).desc() for at in range(parser.num_errors)))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = job.optimization_level
    if job.flavour == "tensorrt_rtx":
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, job.architecture.upper()), 0)
    config.progress_monitor = monitor_class(trt)()
    config.add_optimization_profile(batch_profile(builder, network, job.profile))
    if job.refit:
        mark_weights(trt, network, config, job)
    cache = open_timing_cache(config, job.timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildFailed(logger.first_error or "it gave no reason")
    with open(job.plan, "wb") as file:
        file.write(memoryview(plan))
    if cache is not None and job.timing_cache is not None:
        Path(job.timing_cache).write_bytes(memoryview(cache.serialize()))
    return {"layers": summary_of(logger.layers)}


def typed_flags(trt: Any) -> int:
    """Strongly typed: the graph's dtypes are kept. TensorRT 11 knows nothing else."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def batch_profile(builder: Any, network: Any, batches: tuple[int, int, int]) -> Any:
    profile = builder.create_optimization_profile()
    for at in range(network.num_inputs):
        tensor = network.get_input(at)
        shape = tuple(tensor.shape)[1:]
        profile.set_shape(tensor.name, *[(batch, *shape) for batch in batches])
    return profile


def mark_weights(trt: Any, network: Any, config: Any, job: BuildJob) -> None:
    """Exactly the named weights can be refitted; other constants stay in the plan."""
    config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
    unknown = [name for name in job.weights if not network.mark_weights_refittable(name)]
    if unknown:
        raise BuildFailed(f"its network has no weights named {', '.join(unknown[:3])}")
    if job.strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)


def open_timing_cache(config: Any, path: str | None) -> Any:
    if path is None:
        return None
    cache = config.create_timing_cache(Path(path).read_bytes() if Path(path).is_file() else b"")
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        raise BuildFailed(f"the timing cache {path} is of another GPU or version; remove it")
    return cache


def logger_class(trt: Any) -> Any:
    class Logger(trt.ILogger):
        """Keeps what TensorRT says from INFO up, and the list of layers in the end."""

        def __init__(self, file: Any) -> None:
            super().__init__()
            self.file = file
            self.layers: list[str] = []
            self.first_error = ""

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR and not self.first_error:
                self.first_error = message
            if message.startswith(LAYERS):
                self.layers = message.splitlines()[1:]
            if severity <= trt.ILogger.Severity.INFO or message.startswith(LAYERS):
                print(message, file=self.file, flush=True)

    return Logger


def monitor_class(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Tells the share that is done, of the nested phases as TensorRT announces them."""

        def __init__(self) -> None:
            super().__init__()
            self.phases: dict[str, tuple[int, int]] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.phases[name] = (max(steps, 1), 0)

        def step_complete(self, name: str, step: int) -> bool:
            self.phases[name] = (self.phases[name][0], step + 1)
            self.tell()
            return True

        def phase_finish(self, name: str) -> None:
            self.phases.pop(name, None)
            self.tell()

        def tell(self) -> None:
            share, part = 0.0, 1.0
            for steps, done in self.phases.values():
                share += part * min(done, steps) / steps
                part /= steps
            say(share=round(min(share, 1.0), 3))

    return Monitor


def summary_of(lines: list[str]) -> dict[str, Any]:
    """How many layers of which type there are, and how many of them are whole attentions."""
    layers = list(named_layers(lines))
    return {
        "total": len(layers),
        "types": dict(Counter(kind for _, kind in layers).most_common()),
        "fused_attention": sum(any(word in name for word in FUSED_ATTENTION) for name, _ in layers),
    }


def named_layers(lines: list[str]) -> Iterator[tuple[str, str]]:
    """(name, type) of each line ``Name: ..., LayerType: ..., ...``."""
    for line in lines:
        head, found, rest = line.partition(", LayerType: ")
        if found and head.startswith("Name: "):
            yield head.removeprefix("Name: "), rest.partition(",")[0]


def peak_bytes() -> int | None:
    """Greatest memory of this process, where the system tells it (``getrusage`` would count the parent's, too)."""
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None


def say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
