"""Compiling kernels ahead of time, for GPUs that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
"""Most bytes of shared memory that one program may have: A100, H100/H200."""

_COMPILE = """
import json, sys
from importlib import import_module
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

answers = []
for job in json.loads(sys.stdin.read()):
    kernel = getattr(import_module(job["module"]), job["kernel"])
    make = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = make(kernel, job["signature"], job["constants"])
    target = GPUTarget("cuda", job["arch"], 32)
    built = triton.compile(source, target=target, options={"num_warps": job["warps"], "num_stages": job["stages"]})
    answers.append({"shared": built.metadata.shared, "cubin": len(built.asm["cubin"]), "ptx": built.asm["ptx"]})
print(json.dumps(answers))
"""


def compile_ahead(
    module: str,
    kernel: str,
    pointers: Mapping[str, str],
    constants: Sequence[Mapping[str, Any]],
    arch: int,
    *,
    warps: Sequence[int] | int = 4,
    stages: Sequence[int] | int = 2,
) -> list[str]:
    """Compile ``imagedream_rt.kernels.<module>.<kernel>`` for compute capability ``arch``, e.g. 80.

    ``pointers``: Triton types of the run-time arguments, as "*fp16" or "i32"; ``constants``: one set of
    compile-time constants for each build, with ``warps`` and ``stages`` for all or for each. Asserts that
    every build is there and fits into the shared memory; returns each one's PTX.
    """
    pytest.importorskip("triton")
    jobs = [
        {
            "module": f"imagedream_rt.kernels.{module}",
            "kernel": kernel,
            "signature": {**pointers, **dict.fromkeys(values, "constexpr")},
            "constants": dict(values),
            "arch": arch,
            "warps": warps if isinstance(warps, int) else warps[number],
            "stages": stages if isinstance(stages, int) else stages[number],
        }
        for number, values in enumerate(constants)
    ]
    # A process of its own: where the tests run kernels in the interpreter, nothing can be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE],
        input=json.dumps(jobs),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers = json.loads(done.stdout)
    assert len(answers) == len(jobs)
    for answer in answers:
        assert answer["cubin"] > 0
        assert answer["shared"] <= SHARED_MEMORY[arch]
    return [answer["ptx"] for answer in answers]
