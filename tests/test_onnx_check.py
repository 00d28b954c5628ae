"""The checker notices wrong numbers, NaN, and what float16 cannot hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exports import copied, exported, small_model
from torch import Tensor, nn

from imagedream_rt.engine.errors import InputError
from imagedream_rt.export.components import Component, TensorSpec, component
from imagedream_rt.export.job import export_onnx
from imagedream_rt.export.onnx_check import check_numerics, relative_l2
from imagedream_rt.export.onnx_graph import write_onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


class TwoLayers(nn.Module):
    """Widens by ``gain`` and narrows again: the end is small, whatever is reached between."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        with torch.no_grad():
            self.up.weight.copy_(torch.eye(16) * gain)
            self.down.weight.copy_(torch.eye(16) / gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


def two_layers(gain: float, dtype: torch.dtype) -> Component:
    spec = TensorSpec("x", (16,))
    return Component("two", TwoLayers(gain).to(dtype), (spec,), (TensorSpec("y", (16,)),), batch=2)


def test_overflow_inside_the_graph_fails_though_the_output_is_fine(tmp_path: Path) -> None:
    """onnxruntime computes these two products in float32 on the CPU; the peak is measured all the same."""
    part = two_layers(3e4, torch.float16)
    write_onnx(part, tmp_path / "two.onnx", {})
    with pytest.raises(
        InputError, match=r"two.onnx: \w+ reaches .*, beyond float16's 65504; try --dtype bfloat16"
    ):
        check_numerics(part, tmp_path / "two.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two.onnx", "two.onnx.data"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wider_dtypes_hold_it(dtype: torch.dtype, tmp_path: Path) -> None:
    part = two_layers(3e4, dtype)
    write_onnx(part, tmp_path / "two.onnx", {})
    assert check_numerics(part, tmp_path / "two.onnx").peak is None


def test_peak_is_that_of_the_tensors(tmp_path: Path) -> None:
    part = two_layers(100.0, torch.float16)
    write_onnx(part, tmp_path / "two.onnx", {})
    report = check_numerics(part, tmp_path / "two.onnx")
    assert report.peak is not None
    assert 200 < report.peak < 2500  # 48 normal numbers times 4 times 100
    assert report.worst < 5e-3
    assert [case.batch for case in report.cases] == [1, 2, 1]


def test_infinity_fails(tmp_path: Path) -> None:
    part = two_layers(1.0, torch.float32)
    write_onnx(part, tmp_path / "two.onnx", {})
    with torch.no_grad():
        part.module.up.weight[0, 0] = float("inf")  # type: ignore[union-attr,index,operator]
    with pytest.raises(InputError, match="relative L2 error inf of y on usual inputs"):
        check_numerics(part, tmp_path / "two.onnx")


def test_other_weights_fail() -> None:
    """The file of one model, compared with another."""
    model = small_model("local")
    part = component(model, "image_adaptor")
    assert part is not None
    changed = nn.utils.parameters_to_vector(part.module.parameters())
    nn.utils.vector_to_parameters(changed * 1.01, part.module.parameters())
    try:
        with pytest.raises(InputError, match=r"differs from PyTorch: relative L2 error .* of image_tokens"):
            check_numerics(part, exported("image_adaptor"))
    finally:
        nn.utils.vector_to_parameters(changed, part.module.parameters())


def test_nothing_stays_of_an_export_that_fails(tmp_path: Path) -> None:
    part = two_layers(3e4, torch.float16)
    model = replace(small_model("pixel", torch.float16))
    with pytest.raises(InputError, match="beyond float16"):
        export_onnx(model, [part], tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []


def test_the_module_is_left_in_its_dtype() -> None:
    part = component(small_model("pixel", torch.float16), "image_adaptor")
    assert part is not None
    before = [x.clone() for x in part.module.parameters()]
    check_numerics(part, exported("image_adaptor", dtype=torch.float16))
    assert all(torch.equal(a, b) for a, b in zip(before, part.module.parameters(), strict=True))


def test_relative_l2() -> None:
    assert relative_l2(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 5.0])) == pytest.approx(10**0.5 / 5)
    assert relative_l2(torch.tensor([float("nan")]), torch.tensor([1.0])) == float("inf")
    assert relative_l2(torch.tensor([float("inf")]), torch.tensor([1.0])) == float("inf")


def test_probe_files_are_removed(tmp_path: Path) -> None:
    path = copied(exported("image_adaptor", dtype=torch.float16), tmp_path)
    part = component(small_model("pixel", torch.float16), "image_adaptor")
    assert part is not None
    check_numerics(part, path)
    assert not list(tmp_path.glob(".*"))
