"""Plans on the GPU: loaded after their manifest was checked, bound to device memory as it is, with shared activations.

Written to TensorRT's interface and tested with a stand-in for it: no GPU that TensorRT supports was at hand.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.errors import ImageDreamError, InputError
from .flavours import TensorRT, load_tensorrt, local_architecture, pick_flavour
from .manifest import PlanManifest, check_plan, read_manifest
from .onnx_graph import named_weight

DEVICE = "cuda"


class Workspace:
    """Activation memory and a stream that plans share. They run one after the other, so one buffer serves all.

    TensorRT synchronizes on the default stream, so work asked for there goes to a stream of our own, before and
    after which the two wait for each other. On any other stream, a capturing one too, plans run where they are asked.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = torch.device(DEVICE) if device is None else device
        self.stream = torch.cuda.Stream(self.device)
        self.memory = torch.empty(0, dtype=torch.uint8, device=self.device)

    def reserve(self, size: int) -> None:
        """Make the buffer at least ``size`` bytes; before any graph is captured."""
        if size > self.memory.numel():
            self.memory = torch.empty(size, dtype=torch.uint8, device=self.device)


class Plan:
    """A plan that is called like a function of tensors."""

    def __init__(
        self, path: Path, tensorrt: TensorRT | None = None, workspace: Workspace | None = None
    ) -> None:
        """Load ``path``.

        Raises:
            InputError: the manifest says that it does not belong here (other GPU, version, bytes), or that it holds
                no weights.
            MissingDependency: its TensorRT is missing.
            ImageDreamError: TensorRT could not load it.
        """
        self.path = path
        self.manifest, self.tensorrt, engine = open_engine(path, tensorrt)
        if self.manifest.stripped:
            raise InputError(f"{path} holds no weights; give it some: imagedream-rt refit {path} CHECKPOINT")
        self.workspace = workspace or Workspace()
        trt = self.tensorrt.module
        self._engine = engine
        self._context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self.workspace.reserve(engine.device_memory_size_v2)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs for ``inputs`` in the manifest's order; no input is copied, so each must be contiguous, on the GPU
        and of the plan's dtype.

        Raises :class:`InputError` for any other, and for a batch outside the profile.
        """
        batch = self.check(inputs)
        outputs = tuple(
            torch.empty((batch, *spec["shape"][1:]), dtype=_dtype(spec), device=self.workspace.device)
            for spec in self.manifest.outputs
        )
        current = torch.cuda.current_stream(self.workspace.device)
        if current == torch.cuda.default_stream(self.workspace.device):
            self.workspace.stream.wait_stream(current)
            self._enqueue(inputs, outputs, self.workspace.stream)
            current.wait_stream(self.workspace.stream)
        else:
            self._enqueue(inputs, outputs, current)
        return outputs

    def check(self, inputs: Sequence[Tensor]) -> int:
        """The batch of ``inputs``. Raises :class:`InputError` if the plan cannot take them."""
        specs = self.manifest.inputs
        if len(inputs) != len(specs):
            raise InputError(
                f"{self.path.name} takes {', '.join(spec['name'] for spec in specs)}; {len(inputs)} tensors were given"
            )
        batch = len(inputs[0])
        least, _, most = self.manifest.profile
        if not least <= batch <= most:
            raise InputError(
                f"{self.path.name} was built for batches of {least} to {most}, and got {batch}; build it with "
                f"--profile: {self.manifest.rebuild}"
            )
        for spec, x in zip(specs, inputs, strict=True):
            wanted = [batch, *spec["shape"][1:]]
            if list(x.shape) != wanted or x.dtype != _dtype(spec):
                raise InputError(
                    f"{spec['name']} is {x.dtype} {list(x.shape)}; {self.path.name} takes {_dtype(spec)} {wanted}"
                )
            if not x.is_contiguous() or x.device.type != DEVICE:
                raise InputError(f"{spec['name']} must be contiguous and on the GPU, where plans read it")
        return batch

    def _enqueue(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], stream: Any) -> None:
        memory = self.workspace.memory
        self._context.set_device_memory(memory.data_ptr(), memory.numel())
        for spec, x in zip(self.manifest.inputs, inputs, strict=True):
            self._context.set_input_shape(spec["name"], tuple(x.shape))
        for spec, x in zip((*self.manifest.inputs, *self.manifest.outputs), (*inputs, *outputs), strict=True):
            self._context.set_tensor_address(spec["name"], x.data_ptr())
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise ImageDreamError(f"{self.path.name}: TensorRT did not run it; its log on stderr says why")


class CapturedPlan:
    """A plan as one CUDA graph, with input and output memory of its own: a call copies in and replays."""

    def __init__(self, plan: Plan, inputs: Sequence[Tensor]) -> None:
        self.inputs = tuple(x.clone() for x in inputs)
        stream = torch.cuda.Stream(plan.workspace.device)
        stream.wait_stream(torch.cuda.current_stream(plan.workspace.device))
        with torch.cuda.stream(stream):
            # The first runs choose kernels and set sizes, which a capture must not do.
            for _ in range(2):
                plan(*self.inputs)
        stream.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.outputs = plan(*self.inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs, overwritten by the next call."""
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given)
        self.graph.replay()
        return self.outputs


def open_engine(path: Path, tensorrt: TensorRT | None = None) -> tuple[PlanManifest, TensorRT, Any]:
    """Check the manifest against the file and this machine, then deserialize. Raises as :class:`Plan`."""
    manifest = read_manifest(path)
    tensorrt = tensorrt or load_tensorrt(pick_flavour(manifest.flavour))
    check_plan(
        path,
        manifest,
        flavour=tensorrt.flavour,
        version=tensorrt.version,
        architecture=local_architecture(),
        platform=f"{platform.system()} {platform.machine()}",
    )
    trt = tensorrt.module
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise ImageDreamError(f"{path}: TensorRT could not load it; rebuild it here: {manifest.rebuild}")
    return manifest, tensorrt, engine


def refit_engine(
    engine: Any, tensorrt: TensorRT, manifest: PlanManifest, parameters: dict[str, Tensor]
) -> bytes:
    """Give the engine's weights the values of ``parameters`` (of the component's module) and serialize it.

    Raises:
        InputError: a parameter is missing or has another shape.
        ImageDreamError: TensorRT refused.
    """
    trt = tensorrt.module
    refitter = trt.Refitter(engine, trt.Logger(trt.Logger.WARNING))
    held = []  # until the refit is done, TensorRT reads the memory of these
    for name in manifest.weights:
        tensor = named_weight(name, parameters)
        if tensor is None:
            raise InputError(
                f"the checkpoint has no tensor for {name}; a refit needs one of the same architecture and controller"
            )
        held.append(tensor)
        kind = getattr(trt, str(tensor.dtype).removeprefix("torch."))
        if not refitter.set_named_weights(name, trt.Weights(kind, tensor.data_ptr(), tensor.numel())):
            raise InputError(
                f"TensorRT refuses {name} as {tensor.dtype} {list(tensor.shape)}; a refit needs a checkpoint of the "
                "same sizes, in the plan's dtype"
            )
    missing = refitter.get_missing_weights()
    if missing:
        raise ImageDreamError(
            f"the plan also needs the weights {', '.join(missing[:5])}, which no checkpoint has"
        )
    if not refitter.refit_cuda_engine():
        raise ImageDreamError("TensorRT could not refit the plan; its log on stderr says why")
    config = engine.create_serialization_config()
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    if hasattr(trt.SerializationFlag, "INCLUDE_REFIT"):  # since 10.14; before, it is always so
        config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    return bytes(memoryview(engine.serialize_with_config(config)))


def _dtype(spec: dict[str, Any]) -> torch.dtype:
    return getattr(torch, spec["dtype"])
