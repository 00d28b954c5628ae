"""Variants of an exported file that say more about it than the file itself: tensor peaks, and a widened graph.

They stand beside the file, whose weights they share, for as long as they are needed.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .onnx_graph import require_onnx

PEAK = "peak of "
_MOVES = frozenset(
    ("Reshape", "Transpose", "Slice", "Unsqueeze", "Squeeze", "Expand", "Split", "Concat", "Gather", "Where")
)
"""Operators that copy numbers as they are: their peaks are known from where the numbers come from."""


@contextmanager
def peaks_model(path: Path) -> Iterator[tuple[Path, list[str]]]:
    """A file with the greatest magnitude of every float16 tensor as further outputs, and their names."""
    onnx = require_onnx()
    helper, types = onnx.helper, onnx.TensorProto
    model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
    graph = model.graph
    known = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    names, added = [], []
    for node in graph.node:
        for output in () if node.op_type in _MOVES else node.output:
            if known.get(output) != types.FLOAT16:
                continue
            # Only scalars are made of a tensor here: some of them take gigabytes.
            wide, least, most, ends = (f"{output} {word}" for word in ("wide", "least", "most", "ends"))
            names.append(PEAK + output)
            added += [
                helper.make_node("Cast", [output], [wide], to=types.FLOAT),
                helper.make_node("ReduceMin", [wide], [least], keepdims=0),
                helper.make_node("ReduceMax", [wide], [most], keepdims=0),
                helper.make_node("Neg", [least], [ends]),
                helper.make_node("Max", [ends, most], [names[-1]]),
            ]
    graph.node.extend(added)
    graph.output.extend(helper.make_tensor_value_info(name, types.FLOAT, []) for name in names)
    with _beside(path) as probe:
        onnx.save(model, probe)
        yield probe, names


@contextmanager
def widened_model(path: Path) -> Iterator[Path]:
    """The file with float32 in place of bfloat16: the same weights, exactly, in wider arithmetic."""
    onnx = require_onnx()
    types = onnx.TensorProto
    model = onnx.load(path)
    graph = model.graph

    def wide(tensor: Any) -> None:
        if tensor.data_type == types.BFLOAT16:
            array = onnx.numpy_helper.to_array(tensor).astype("float32")
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))

    for tensor in graph.initializer:
        wide(tensor)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == types.BFLOAT16:
            value.type.tensor_type.elem_type = types.FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == types.BFLOAT16:
                attribute.i = types.FLOAT
            elif attribute.type == onnx.AttributeProto.TENSOR:
                wide(attribute.t)
    with _beside(path) as probe:
        onnx.save(model, probe, save_as_external_data=True, location=f"{probe.name}.data")
        yield probe


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    # In the same folder, where the weights are: the format allows no other place.
    probe = path.parent / f".{secrets.token_hex(8)}.probe.onnx"
    try:
        yield probe
    finally:
        probe.unlink(missing_ok=True)
        probe.with_name(probe.name + ".data").unlink(missing_ok=True)
