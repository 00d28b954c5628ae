"""A component to ONNX: one graph file and one file of weights beside it.

PyTorch's own exporter (dynamo) at opset 22, with two things decided here.

Attention is written out as ``softmax((Q D^(-1/2)) K^T) V``; for 64 channels the factor is exact. TensorRT fuses this
pattern into one kernel (``_gemm_mha_v2`` in the build's layer list, ``_v1`` for small sizes), in every version that is
supported. The standard ``Attention`` operator of opset 23 becomes the very same kernel, but TensorRT before 10.14 does
not read it, and TensorRT-RTX 1.7 crashes when two of them share a query, as text and image attention do here.

Weights keep their names in the checkpoint. Where a graph holds a weight transposed or widened, the name says so:
``unet.out.0.weight.float32``, ``unet.time_embed.0.weight.T``. So a refit finds the tensor for each name.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine._optional import require, version
from .components import BATCH, MAX_BATCH, Component

OPSET = 22
PREFIX = "imagedream_rt."
"""Of our keys in the file's metadata."""
HIDDEN = -3e4
"""The score of a token that must not be seen: beyond all others, and float16 holds it."""
_JSON = ("inputs", "outputs", "versions", "weights")
TRANSPOSED, WIDENED = ".T", ".float32"


def require_onnx() -> Any:
    """The package onnx, with what the exporter needs. Raises :class:`MissingDependency`."""
    require("onnxscript", "export", "to export to ONNX")
    return require("onnx", "export", "to export to ONNX")


def write_onnx(component: Component, path: Path, metadata: Mapping[str, str]) -> None:
    """Write ``path`` (``*.onnx``) and ``path`` + ``.data``.

    ``metadata`` goes into the file beside what is told here: inputs and outputs, dtype, opset, versions.
    Raises :class:`MissingDependency`.
    """
    require_onnx()
    import onnx_ir as ir

    generator = torch.Generator().manual_seed(0)
    # Two rows: a size of one would be taken for a constant.
    arguments = tuple(component.arguments(component.example(2, generator)))
    shapes = torch.export.ShapesCollection()
    batch = torch.export.Dim(BATCH, min=1, max=MAX_BATCH)
    for argument in arguments:
        shapes[argument] = {0: batch}
    module = component.module.eval()
    with _quiet(), torch.no_grad():
        program = torch.export.export(
            module, arguments, dynamic_shapes=shapes.dynamic_shapes(module, arguments), strict=False
        )
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=[f"input {at}" for at in range(len(arguments))],
            output_names=[spec.name for spec in component.outputs],
            custom_translation_table=_attention_table(),
            optimize=False,
            verbose=False,
        )
        assert exported is not None
        graph = exported.model.graph
        fold_weights(exported.model)
        with _weights_hidden(graph):
            exported.optimize()
    name_inputs(graph, component)
    for value, spec in zip(
        (*graph.inputs, *graph.outputs), (*component.inputs, *component.outputs), strict=True
    ):
        value.shape = ir.Shape(spec.dims(BATCH))
    parameters = parameters_of(module)
    weights = [name for name in graph.initializers if parameter_of(name)[0] in parameters]
    about = {**_about(component), "weights": json.dumps(weights), **metadata}
    exported.model.metadata_props.update({PREFIX + name: value for name, value in about.items()})
    exported.save(path, external_data=True)


def _about(component: Component) -> dict[str, str]:
    def described(specs: Any) -> list[dict[str, Any]]:
        return [
            {
                "name": spec.name,
                "shape": spec.dims(BATCH),
                "dtype": str(spec.dtype(component.dtype)).removeprefix("torch."),
            }
            for spec in specs
        ]

    return {
        "component": component.name,
        "dtype": str(component.dtype).removeprefix("torch."),
        "opset": str(OPSET),
        "batch": str(component.batch),
        "inputs": json.dumps(described(component.inputs)),
        "outputs": json.dumps(described(component.outputs)),
        "versions": json.dumps(
            {name: version(name) for name in ("imagedream-rt", "torch", "onnx", "onnxscript")}
        ),
    }


def read_metadata(path: Path) -> dict[str, Any]:
    """Our metadata of an exported file, JSON values parsed. Empty for a file of another origin."""
    onnx = require_onnx()
    found: dict[str, Any] = {}
    for entry in onnx.load(path, load_external_data=False).metadata_props:
        if entry.key.startswith(PREFIX):
            name = entry.key.removeprefix(PREFIX)
            found[name] = json.loads(entry.value) if name in _JSON else entry.value
    return found


def name_inputs(graph: Any, component: Component) -> None:
    """Give the inputs their names; those that were joined for tracing come apart."""
    import onnx_ir as ir

    specs = {spec.name: spec for spec in component.inputs}
    grouped = {name for group in component.together for name in group}
    plain = [name for name in specs if name not in grouped]
    for value, name in zip(list(graph.inputs), (*plain, *component.together), strict=True):
        if isinstance(name, str):
            value.name = name
            continue
        (split,) = (use.node for use in value.uses())
        assert split.op_type == "Split"
        for output, part in zip(split.outputs, name, strict=True):
            apart = ir.Value(name=part, type=value.type, shape=ir.Shape(specs[part].dims(BATCH)))
            ir.convenience.replace_all_uses_with(output, apart)
            graph.inputs.append(apart)
        graph.remove(split, safe=True)
        graph.inputs.remove(value)


def fold_weights(model: Any) -> None:
    """Replace a transposed or widened weight by an initializer of its own, whose name says what was done.

    The exporter's constant folding would do the same under a name of its own making.
    """
    import onnx_ir as ir

    graph = model.graph
    for node in list(graph):
        weight = node.inputs[0] if node.inputs else None
        if weight is None or weight.name not in graph.initializers or len(node.outputs) != 1:
            continue
        if node.op_type == "Transpose" and weight.const_value.shape.rank() == 2:
            name, change = weight.name + TRANSPOSED, _transposed
        elif node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
            name, change = weight.name + WIDENED, _widened
        else:
            continue
        if name not in graph.initializers:
            tensor = change(weight.const_value, name)
            value = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
            )
            graph.initializers[name] = value
        ir.convenience.replace_all_uses_with(node.outputs[0], graph.initializers[name])
        graph.remove(node, safe=True)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]


@contextmanager
def _weights_hidden(graph: Any) -> Iterator[None]:
    """Take the values off the weights for a while: PyTorch's optimizer would merge equal ones, such as two biases of
    zeros, and a refit could no longer tell them apart."""
    held = {
        name: value.const_value
        for name, value in graph.initializers.items()
        if value.const_value.dtype.is_floating_point()
    }
    for name in held:
        graph.initializers[name].const_value = None
    try:
        yield
    finally:
        for name, tensor in held.items():
            if name in graph.initializers:
                graph.initializers[name].const_value = tensor


def _transposed(tensor: Any, name: str) -> Any:
    import onnx_ir as ir

    def make() -> Any:
        return ir.Tensor(tensor.numpy().T.copy(), dtype=tensor.dtype)

    return ir.LazyTensor(make, dtype=tensor.dtype, shape=ir.Shape(tensor.shape[::-1]), name=name)


def _widened(tensor: Any, name: str) -> Any:
    import onnx_ir as ir

    def make() -> Any:
        return ir.Tensor(tensor.numpy().astype("float32"))

    return ir.LazyTensor(make, dtype=ir.DataType.FLOAT, shape=ir.Shape(tensor.shape), name=name)


def parameters_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and floating buffers, by the names that graphs have for them."""
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor for name, tensor in held.items() if tensor.is_floating_point()}


def parameter_of(name: str) -> tuple[str, bool]:
    """The parameter that an initializer holds, and whether it is transposed."""
    return name.removesuffix(WIDENED).removesuffix(TRANSPOSED), name.endswith(TRANSPOSED)


def named_weight(name: str, parameters: Mapping[str, Tensor]) -> Tensor | None:
    """What the initializer ``name`` holds, made from a module's ``parameters``; None if it is no weight."""
    parameter, transposed = parameter_of(name)
    if parameter not in parameters:
        return None
    tensor = parameters[parameter]
    if name.endswith(WIDENED):
        tensor = tensor.float()
    return tensor.T.contiguous() if transposed else tensor.contiguous()


def _attention_table() -> dict[Any, Any]:
    import onnx_ir as ir
    from onnxscript import opset22

    op: Any = opset22  # its annotations know no dtype that is found out while translating

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        factor = op.Constant(value_float=query.shape[-1] ** -0.5 if scale is None else scale)
        scaled = op.Mul(query, op.CastLike(factor, query))
        scores = op.MatMul(scaled, op.Transpose(key, perm=[0, 1, 3, 2]))
        if is_causal:
            mask = op.Constant(value=_causal_mask(query.shape[-2], key.shape[-2]))
            scores = op.Add(scores, op.CastLike(mask, scores))
        elif attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL:
            scores = op.Where(attn_mask, scores, op.CastLike(op.Constant(value_float=HIDDEN), scores))
        elif attn_mask is not None:
            scores = op.Add(scores, attn_mask)
        return op.MatMul(op.Softmax(scores, axis=-1), value)

    return {torch.ops.aten.scaled_dot_product_attention.default: attention}


def _causal_mask(rows: int, columns: int) -> Any:
    """What to add to the scores, zero where a row may look."""
    import onnx_ir as ir

    return ir.tensor(torch.full((rows, columns), HIDDEN).triu(columns - rows + 1).numpy())


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's advice is for those who wrote the model."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
