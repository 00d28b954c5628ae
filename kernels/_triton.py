"""The one place that imports Triton: whether it can be used, and for which tensors.

Kernels are written with :func:`jit` and ``tl`` from here, in modules that begin with ``from __future__ import
annotations``, so that they import where Triton is missing; there they are never launched.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

GLUON_OF = "3.6."
"""The versions of Triton whose lower level, Gluon, the Hopper kernel is written for: it changes with each."""

try:
    import triton
    import triton.language as tl
except ImportError:  # a speed-up, not a need: every kernel has a plain PyTorch reference beside it
    triton = None
    tl: Any = None  # type: ignore[no-redef]

try:  # for instructions that only Hopper has
    if triton is None or not triton.__version__.startswith(GLUON_OF):
        raise ImportError
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError:
    gluon = gl = hopper = TensorDescriptor = None

KernelBackend = Literal["auto", "triton", "torch"]
"""``auto``: Triton on CUDA devices that can run it, else plain PyTorch; the others force one of the two."""

OLDEST_CAPABILITY = (8, 0)
"""Ampere: the kernels count on its asynchronous copies and bfloat16."""

HALF = (torch.float16, torch.bfloat16)
HALF_AND_SINGLE = (*HALF, torch.float32)


def jit(function: Any = None, **options: Any) -> Any:
    """``triton.jit``, bare or with options; without Triton the function as it is, which is then never launched."""
    if function is None:
        return partial(jit, **options)
    return function if triton is None else triton.jit(function, **options)


def gluon_jit(function: Any) -> Any:
    """``gluon.jit``; without Gluon the function as it is, which is then never launched."""
    return function if gluon is None else gluon.jit(function)


def dense_box(tensor: Tensor, shape: list[int], block: list[int]) -> Any:
    """With Gluon: what copies blocks of a tensor whose memory is dense in this shape."""
    strides = [1]
    for size in shape[:0:-1]:
        strides.insert(0, strides[0] * size)
    layout = gl.NVMMASharedLayout.get_default_for(block, getattr(gl, str(tensor.dtype).split(".")[1]))
    return TensorDescriptor(tensor, shape, strides, block, layout)


def overlap(x: Any) -> dict[str, Any]:
    """Keyword arguments of a kernel that, from Hopper on, may start while the one before it ends, on the device of x.

    With PDL it then waits itself before it reads.
    """
    if x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


def constant(value: Any) -> Any:
    """A module constant that kernels may read."""
    return value if triton is None else tl.constexpr(value)


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU (environment variable TRITON_INTERPRET)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def obstacle(device: torch.device | None) -> str | None:
    """Why the kernels do not run on a device (None: there is no CUDA device); None where they do."""
    if device is None or device.type != "cuda":
        return "no CUDA device"
    if triton is None:
        return "triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        needed, found = (".".join(map(str, number)) for number in (OLDEST_CAPABILITY, capability))
        return f"compute capability {found}, the kernels need {needed}"
    return None


@torch.compiler.assume_constant_result
def _runs_on(device: torch.device) -> bool:
    if obstacle(device) is not None:
        return False
    _need_current(device)
    return True


def _need_current(device: torch.device) -> None:
    """Triton launches on the current device, where the memory of another one cannot be read."""
    if device.index != (now := torch.cuda.current_device()):
        raise ValueError(
            f"the tensors are on {device} and the current device is cuda:{now}, where a kernel would run: call this"
            f" within torch.cuda.device({device.index})"
        )


def use_triton(
    backend: str, *tensors: Tensor | None, dtypes: tuple[torch.dtype, ...] = HALF_AND_SINGLE
) -> bool:
    """Whether the Triton kernel computes a function of these tensors (None: an argument left out).

    ``auto`` says yes for CUDA tensors of the ``dtypes`` on a device that runs Triton, and no while a model is
    exported. Raises ``ValueError`` for an unknown backend, if ``triton`` is asked for tensors that it cannot take, or
    if a kernel would run on another device than that of the tensors, and ``ImportError`` if Triton is not installed.
    """
    if backend == "torch":
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    fitting = all(tensor.dtype in dtypes for tensor in given)
    if backend == "auto":
        cuda = all(tensor.is_cuda for tensor in given)
        return cuda and fitting and not torch.compiler.is_exporting() and _runs_on(given[0].device)
    if backend != "triton":
        raise ValueError(f"unknown backend {backend!r}; there are {', '.join(get_args(KernelBackend))}")
    if triton is None:
        raise ImportError("backend 'triton' needs the package triton: pip install triton")
    if not fitting:
        found = ", ".join(sorted({str(tensor.dtype) for tensor in given}))
        raise ValueError(f"backend 'triton' takes {', '.join(map(str, dtypes))}, got {found}")
    if not interpreted():
        if not all(tensor.is_cuda for tensor in given):
            raise ValueError("backend 'triton' needs tensors on a CUDA device; the CPU runs backend 'torch'")
        _need_current(given[0].device)
    return True
