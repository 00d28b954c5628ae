"""A stand-in for TensorRT's runtime that notes what it is told and multiplies by two, on any device."""

from __future__ import annotations

import ctypes
import json
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from imagedream_rt.export.flavours import TensorRT

VERSION = "10.13.3"
SCRATCH = 1 << 20


class Context:
    def __init__(self, engine: Engine, strategy: str) -> None:
        self.engine, self.strategy = engine, strategy
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory = (0, 0)
        self.streams: list[int] = []
        self.works = True

    def set_device_memory(self, memory: int, size: int) -> None:
        self.memory = (memory, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream: int) -> bool:
        """Writes twice the first input to every output, through the addresses alone."""
        self.streams.append(stream)
        first, shape = next(iter(self.shapes.items()))
        count = torch.Size(shape).numel()
        source = (ctypes.c_float * count).from_address(self.addresses[first])
        for name, address in self.addresses.items():
            if name not in self.shapes:
                target = (ctypes.c_float * count).from_address(address)
                for at in range(count):
                    target[at] = 2 * source[at]
        return self.works


class Engine:
    """What the plan's bytes, JSON here, describe."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content
        self.device_memory_size_v2 = content["scratch"]
        self.contexts: list[Context] = []
        self.serialization = SimpleNamespace(flags=set())
        self.serialization.clear_flag = self.serialization.flags.discard
        self.serialization.set_flag = self.serialization.flags.add

    def create_execution_context(self, strategy: str) -> Context:
        self.contexts.append(Context(self, strategy))
        return self.contexts[-1]

    def create_serialization_config(self) -> Any:
        self.serialization.flags.add("EXCLUDE_WEIGHTS")
        return self.serialization

    def serialize_with_config(self, config: Any) -> bytes:
        return json.dumps({**self.content, "flags": sorted(config.flags)}).encode()


class Refitter:
    made: Refitter

    def __init__(self, engine: Engine, logger: Any) -> None:
        self.engine, self.done = engine, False
        self.values: dict[str, list[float]] = {}
        Refitter.made = self

    def set_named_weights(self, name: str, weights: tuple[str, int, int]) -> bool:
        _, address, count = weights
        if self.engine.content["weights"].get(name) != count:
            return False
        self.values[name] = list((ctypes.c_float * count).from_address(address))
        return True

    def get_missing_weights(self) -> list[str]:
        return [name for name in self.engine.content["weights"] if name not in self.values]

    def refit_cuda_engine(self) -> bool:
        self.done = True
        return True


class Runtime:
    engines: ClassVar[list[Engine]] = []

    def __init__(self, logger: Any) -> None: ...

    def deserialize_cuda_engine(self, content: bytes) -> Engine | None:
        found = json.loads(content)
        if found.get("broken"):
            return None
        self.engines.append(Engine(found))
        return self.engines[-1]


class Logger:
    WARNING = 1

    def __init__(self, level: int) -> None: ...


def fake_tensorrt() -> TensorRT:
    """The package as far as running and refitting plans goes."""
    Runtime.engines = []
    module = SimpleNamespace(
        __version__=VERSION,
        Logger=Logger,
        Runtime=Runtime,
        Refitter=Refitter,
        Weights=lambda kind, address, count: (kind, address, count),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
        SerializationFlag=SimpleNamespace(EXCLUDE_WEIGHTS="EXCLUDE_WEIGHTS", INCLUDE_REFIT="INCLUDE_REFIT"),
        float32="float32",
    )
    return TensorRT("tensorrt", module)
