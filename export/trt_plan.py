"""ONNX to plans: built in a child process, with progress, a manifest and the build's log; or nothing at all."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.checkpoint_files import sha256_of
from ..engine.errors import ImageDreamError, InputError
from ..engine.files import staged
from .components import MAX_BATCH
from .flavours import TensorRT
from .manifest import PlanManifest
from .onnx_check import check_file
from .onnx_graph import parameter_of, read_metadata
from .onnx_report import AGAIN, OnnxReport, data_path
from .preflight import GIB, check_disk, check_memory
from .trt_build import BuildJob

Share = Callable[[float], None]
"""Told the share of a build that is done, 0 to 1."""


@dataclass(frozen=True)
class PlanOptions:
    """How plans are built; the defaults are a static batch and weights inside."""

    profile: tuple[int, int, int] | None = None
    """Least, usual and greatest batch; None for the one that the engine calls the component with."""
    refit: bool = False
    strip_weights: bool = False
    timing_cache: Path | None = None
    optimization_level: int = 3
    """TensorRT's builder optimization level, 0 to 5."""

    def check(self) -> None:
        """Raises :class:`InputError` for a profile that contradicts the graph, or a level that is not there."""
        if self.profile is not None:
            least, usual, most = self.profile
            if not 1 <= least <= usual <= most:
                raise InputError(
                    f"profile {least},{usual},{most}: its batches must be at least 1 and ascend (min,opt,max)"
                )
            if most > MAX_BATCH:
                raise InputError(
                    f"profile {least},{usual},{most}: the graphs take batches of up to {MAX_BATCH}"
                )
        if not 0 <= self.optimization_level <= 5:
            raise InputError(f"optimization level is {self.optimization_level}; the levels are 0 to 5")
        if self.strip_weights and not self.refit:
            raise InputError("a plan without weights needs --refit, or it could never get them")


def build_plan(
    onnx: Path,
    architecture: str,
    tensorrt: TensorRT,
    options: PlanOptions,
    on_share: Share | None = None,
) -> Path:
    """Build ``<component>.<architecture>.plan`` beside ``onnx``, with its manifest and the build's log.

    Nothing stays of a build that fails or is interrupted.

    Raises:
        InputError: the ONNX file is not whole or not ours, the profile contradicts it, or there is too little disk
            or memory.
        ImageDreamError: TensorRT failed; the message is its own.
    """
    options.check()
    check_file(onnx)
    about = read_metadata(onnx)
    if "component" not in about:
        raise InputError(f"{onnx} was not written by this program; {AGAIN}")
    report = OnnxReport.read(onnx)
    report.check_unchanged(onnx)
    batch = int(about["batch"])
    size = data_path(onnx).stat().st_size
    check_disk(onnx.parent, int(1.2 * size) + 64 * 2**20, f"the plan of {onnx.name}")
    check_memory(3 * size + GIB // 2, f"building the plan of {onnx.name}")
    plan = onnx.with_name(f"{onnx.stem}.{architecture}.plan")
    with staged(onnx.parent) as stage:
        job = BuildJob(
            onnx=str(onnx.absolute()),
            plan=str((stage / plan.name).absolute()),
            log=str((stage / f"{plan.name}.log").absolute()),
            flavour=tensorrt.flavour,
            architecture=architecture,
            profile=options.profile or (batch, batch, batch),
            refit=options.refit,
            strip_weights=options.strip_weights,
            weights=tuple(about["weights"]) if options.refit else (),
            timing_cache=None if options.timing_cache is None else str(options.timing_cache.absolute()),
            optimization_level=options.optimization_level,
        )
        result = run_child(job, stage, on_share)
        manifest = PlanManifest(
            component=about["component"],
            source=report.source,
            dtype=about["dtype"],
            inputs=about["inputs"],
            outputs=about["outputs"],
            profile=job.profile,
            flavour=tensorrt.flavour,
            version=result["version"],
            architecture=architecture,
            platform=this_platform() if tensorrt.flavour == "tensorrt" else "any",
            driver=driver_version() if tensorrt.flavour == "tensorrt" else None,
            onnx_sha256=report.sha256,
            onnx_error=report.check["worst"],
            layers=result["layers"],
            build_s=result["build_s"],
            build_peak_bytes=result["peak_bytes"],
            size_bytes=Path(job.plan).stat().st_size,
            sha256=sha256_of(Path(job.plan)),
            refit=options.refit,
            stripped=options.strip_weights,
            weights=weights_map(job.weights),
            rebuild=rebuild_command(onnx, tensorrt.flavour, architecture, options),
        )
        manifest.save(Path(job.plan))
    return plan


def weights_map(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What a refit sets each name to."""
    found = {}
    for name in names:
        parameter, transposed = parameter_of(name)
        found[name] = {"parameter": parameter, "transposed": transposed}
    return found


def rebuild_command(onnx: Path, flavour: str, architecture: str, options: PlanOptions) -> str:
    words = ["imagedream-rt", "export", str(onnx), "--tensorrt", flavour]
    if flavour == "tensorrt_rtx":
        words += ["--sm", architecture.removeprefix("sm")]
    if options.profile is not None:
        words += ["--profile", ",".join(map(str, options.profile))]
    words += ["--refit"] * options.refit + ["--strip-weights"] * options.strip_weights
    return shlex.join(words)


def run_child(job: BuildJob, stage: Path, on_share: Share | None) -> dict[str, Any]:
    """Build in a child process; returns its last words. Raises :class:`ImageDreamError` when it fails or dies."""
    order = stage / "job.json"
    job.save(order)
    command = [sys.executable, "-m", f"{__package__}.trt_build", str(order)]
    what = f"{Path(job.onnx).name} for {job.architecture}"
    result: dict[str, Any] = {}
    with (stage / "child.err").open("w+", encoding="utf-8", errors="replace") as complaints:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True)
        try:
            assert child.stdout is not None
            for line in child.stdout:
                event = _event(line)
                if "share" in event and on_share is not None:
                    on_share(event["share"])
                result = event or result
            code = child.wait()
        finally:
            # Reached with a living child only when the caller is interrupted.
            child.kill()
            child.wait()
        complaints.seek(0)
        said = " ".join(complaints.read().split())[-300:]
    order.unlink()
    (stage / "child.err").unlink()
    if code == 0 and "layers" in result:
        return result
    if "error" in result:
        raise ImageDreamError(f"{job.flavour} could not build {what}: {explained(result['error'])}")
    died = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    raise ImageDreamError(
        f"{job.flavour} {died} while building {what}, without a plan" + (said and f": {said}")
    )


def explained(message: str) -> str:
    """TensorRT's message on one line, with what is known about it."""
    line = " ".join(message.split())[:400]
    if "CUDA_SUCCESS" in line:
        return f"it needs a CUDA driver, as refittable plans always do; build those on a machine with a GPU ({line})"
    return line


def _event(line: str) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:  # a library's own words
        return {}
    return event if isinstance(event, dict) else {}


def this_platform() -> str:
    return f"{platform.system()} {platform.machine()}"


def driver_version() -> str | None:
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return (
            subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
        )
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
