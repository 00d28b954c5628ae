"""ONNX files: names, symbolic batch, metadata, weights by their names, and the numbers of every controller."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from exports import copied, exported, small_model
from torch.nn import functional

from imagedream_rt.engine.errors import InputError
from imagedream_rt.engine.model import Controller
from imagedream_rt.export.components import component
from imagedream_rt.export.onnx_check import check_file, relative_l2, session
from imagedream_rt.export.onnx_graph import (
    HIDDEN,
    OPSET,
    named_weight,
    parameter_of,
    parameters_of,
    read_metadata,
)
from imagedream_rt.export.onnx_report import OnnxReport

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

INPUTS = ["sample", "timestep", "encoder_hidden_states", "camera"]


def dims(value: object) -> list[int | str]:
    shape = value.type.tensor_type.shape.dim  # type: ignore[attr-defined]
    return [size.dim_param or size.dim_value for size in shape]


@pytest.mark.parametrize(
    ("controller", "more", "frames"),
    [
        ("pixel", ["image_tokens", "image_latent"], 5),
        ("local", ["image_tokens"], 4),
        ("local-linear", ["image_tokens"], 4),
        ("global", ["image_tokens"], 4),
        ("none", [], 4),
    ],
)
def test_unet_of_every_controller(controller: Controller, more: list[str], frames: int) -> None:
    """Exporting compares with PyTorch and fails beyond 1e-4; here the names, the shapes, and another batch."""
    path = exported("unet", controller)
    graph = onnx.load(path, load_external_data=False).graph
    assert [value.name for value in graph.input] == INPUTS + more
    assert [value.name for value in graph.output] == ["latent"]
    assert all(dims(value)[0] == "batch" for value in (*graph.input, *graph.output))
    assert dims(graph.output[0]) == ["batch", frames, 4, 8, 8]
    assert OnnxReport.read(path).check["worst"] <= 1e-4
    part = component(small_model(controller), "unet")
    assert part is not None
    inputs = part.example(7, torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted = part.module(*inputs)
    assert relative_l2(session(path)(inputs)[0], wanted) <= 1e-4


def test_cached_form_takes_keys_and_values() -> None:
    graph = onnx.load(exported("unet_cached"), load_external_data=False).graph
    shapes = {value.name: dims(value) for value in graph.input}
    assert list(shapes)[:4] == ["sample", "timestep", "camera", "image_latent"]
    assert shapes["key_text_00"] == shapes["value_text_03"] == ["batch", 77, 64]
    assert shapes["key_image_00"] == shapes["value_image_03"] == ["batch", 4, 64]
    assert len(shapes) == 4 + 16
    assert OnnxReport.read(exported("unet_cached")).check["worst"] <= 1e-4


def test_no_size_but_those_of_the_model_is_baked_in() -> None:
    """The batch of the example is in no shape of the graph: a row more changes only the rows."""
    path = exported("unet")
    part = component(small_model("pixel"), "unet")
    assert part is not None
    inputs = part.example(3, torch.Generator().manual_seed(6))
    run = session(path)
    whole = run(inputs)[0]
    alone = torch.cat([run([x[row : row + 1] for x in inputs])[0] for row in range(3)])
    assert relative_l2(alone, whole) < 1e-6


def test_attention_is_the_pattern_that_tensorrt_fuses() -> None:
    """Q scaled, MatMul, Softmax, MatMul: three attentions in each of four transformers, and no Attention operator."""
    nodes = OnnxReport.read(exported("unet")).nodes
    assert nodes["Softmax"] == 12
    assert "Attention" not in nodes
    assert not {"ScatterND", "ScatterElements", "Loop", "If"} & set(nodes)


def test_metadata() -> None:
    found = read_metadata(exported("unet", "local"))
    assert {
        name: found[name] for name in ("component", "controller", "frames", "dtype", "opset", "model")
    } == {
        "component": "unet",
        "controller": "local",
        "frames": "4",
        "dtype": "float32",
        "opset": str(OPSET),
        "model": "random:tiny",
    }
    assert found["inputs"][0] == {"name": "sample", "shape": ["batch", 4, 4, 8, 8], "dtype": "float32"}
    assert set(found["versions"]) == {"imagedream-rt", "torch", "onnx", "onnxscript"}


def test_weights_have_their_names_and_values() -> None:
    """Every parameter that the UNet reads is in the graph under its name, and nothing else is called so."""
    path = exported("unet", dtype=torch.float16)
    part = component(small_model("pixel", torch.float16), "unet")
    assert part is not None
    parameters = parameters_of(part.module)
    names = read_metadata(path)["weights"]
    held = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    assert set(names) <= set(held)
    assert any(name.endswith(".T") for name in names)
    for name in names:
        wanted = named_weight(name, parameters)
        assert wanted is not None
        assert torch.equal(torch.from_numpy(onnx.numpy_helper.to_array(held[name]).copy()), wanted)
    read = {name for name in parameters if not name.startswith("unet.image_embed.")}
    assert {parameter_of(name)[0] for name in names} == read


def test_weights_lie_in_one_file() -> None:
    path = exported("unet")
    places = set()
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        places |= {entry.value for entry in tensor.external_data if entry.key == "location"}
    assert places == {"unet.onnx.data"}


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("image_adaptor", "image_tokens"),
        ("vae_encoder", "mean"),
        ("vae_decoder", "images"),
        ("image_encoder", "image_hidden"),
        ("text_encoder", "text_embeddings"),
    ],
)
def test_other_components_in_float16(name: str, output: str) -> None:
    report = OnnxReport.read(exported(name, dtype=torch.float16))
    assert report.check["worst"] <= 5e-3
    assert output in report.check["cases"][0]["error"]
    assert 0 < report.check["peak"] < 65504


def test_global_controller_has_a_pooled_feature() -> None:
    graph = onnx.load(exported("image_encoder", "global"), load_external_data=False).graph
    assert dims(graph.output[0]) == ["batch", 48]


def test_bfloat16_is_checked_widened() -> None:
    report = OnnxReport.read(exported("image_adaptor", dtype=torch.bfloat16))
    assert report.check["widened"] is True
    assert report.check["worst"] <= 1e-2
    graph = onnx.load(exported("image_adaptor", dtype=torch.bfloat16), load_external_data=False).graph
    assert graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16


def test_text_attention_is_causal() -> None:
    """A later token changes no earlier context, and the hidden score is beyond all others."""
    path = exported("text_encoder", dtype=torch.float16)
    run = session(path)
    ids = torch.arange(77)[None]
    later = ids.clone()
    later[0, 40] = 999
    a, b = run([ids])[0], run([later])[0]
    assert torch.equal(a[:, :40], b[:, :40])
    assert not torch.equal(a[:, 40:], b[:, 40:])
    assert functional.softmax(torch.tensor([0.0, HIDDEN]), dim=0)[1] == 0


def test_truncated_weights(tmp_path: Path) -> None:
    path = copied(exported("image_adaptor"), tmp_path)
    data = path.with_name(path.name + ".data")
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(
        InputError, match=r"image_adaptor.onnx.data is truncated: 1000 of \d+ bytes; export it again"
    ):
        check_file(path)


def test_truncated_graph(tmp_path: Path) -> None:
    path = copied(exported("image_adaptor"), tmp_path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(InputError, match="is no whole ONNX file"):
        check_file(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not there"):
        check_file(tmp_path / "unet.onnx")


def test_invalid_graph(tmp_path: Path) -> None:
    path = copied(exported("image_adaptor"), tmp_path)
    model = onnx.load(path, load_external_data=False)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, path)
    with pytest.raises(InputError, match="is not valid ONNX"):
        check_file(path)


def test_file_of_another_origin_has_no_metadata(tmp_path: Path) -> None:
    helper = onnx.helper
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = helper.make_graph([], "empty", [value], [value])
    onnx.save(helper.make_model(graph), tmp_path / "x.onnx")
    assert read_metadata(tmp_path / "x.onnx") == {}


def test_report_is_json_and_notices_changes(tmp_path: Path) -> None:
    path = copied(exported("image_adaptor"), tmp_path)
    report = OnnxReport.read(path)
    report.check_unchanged(path)
    data = bytearray((tmp_path / "image_adaptor.onnx.data").read_bytes())
    data[10] ^= 1
    (tmp_path / "image_adaptor.onnx.data").write_bytes(data)
    with pytest.raises(InputError, match="is not what its report was written for"):
        report.check_unchanged(path)
    place = tmp_path / "image_adaptor.onnx.json"
    broken = json.loads(place.read_text())
    del broken["sha256"]
    place.write_text(json.dumps(broken))
    with pytest.raises(InputError, match="is damaged"):
        OnnxReport.read(path)
    place.unlink()
    with pytest.raises(InputError, match="has no report"):
        OnnxReport.read(path)
