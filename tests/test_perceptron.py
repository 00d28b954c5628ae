"""The perceptron and its slope against autograd's second derivatives."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import Tensor

from imagedream_rt.kernels import perceptron as module
from imagedream_rt.kernels.perceptron import perceptron, perceptron_slope


def parts(n: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(  # type: ignore[return-value]
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in ((n, 5), (7, 5), (outputs, 7))
    )


def plain(x: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    return torch.relu(x @ inner.t()) @ outer.t()


@pytest.mark.parametrize("block", [4, 8192], ids="block={}".format)
@pytest.mark.parametrize("outputs", [1, 3], ids="O={}".format)
def test_value_and_gradients(outputs: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_BLOCK", block)
    inputs = parts(11, outputs)
    got, wanted = perceptron(*inputs), plain(*inputs)
    torch.testing.assert_close(got, wanted)
    cotangent = torch.randn_like(wanted)
    for one, other in zip(
        torch.autograd.grad(got, inputs, cotangent),
        torch.autograd.grad(wanted, inputs, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("block", [4, 8192], ids="block={}".format)
@pytest.mark.parametrize("with_value", [True, False], ids=["value and slope", "slope"])
def test_slope_and_its_gradients(with_value: bool, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_BLOCK", block)
    inputs = parts(11, 1)
    y, slope = perceptron_slope(*inputs)
    plain_y = plain(*inputs)
    (plain_slope,) = torch.autograd.grad(plain_y.sum(), inputs[0], create_graph=True)
    torch.testing.assert_close(y, plain_y)
    torch.testing.assert_close(slope, plain_slope)
    cotangent = torch.randn_like(slope)

    def gradients(value: Tensor, derivative: Tensor) -> tuple[Tensor, ...]:
        loss = (derivative * cotangent).tanh().sum() + with_value * value.square().sum()
        return torch.autograd.grad(loss, inputs, materialize_grads=True)

    for got, wanted in zip(gradients(y, slope), gradients(plain_y, plain_slope), strict=True):
        torch.testing.assert_close(got, wanted)


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(perceptron_slope, parts(4, 1))


def test_no_samples() -> None:
    inputs = parts(0, 1)
    y, slope = perceptron_slope(*inputs)
    (y.sum() + slope.sum()).backward()
    assert y.shape == (0, 1)
    assert slope.shape == (0, 5)
    assert inputs[1].grad is not None
    assert inputs[1].grad.abs().max() == 0


def test_errors() -> None:
    x, inner, outer = parts(4, 3)
    with pytest.raises(ValueError, match=r"must be \[N, I\], \[H, I\], \[O, H\]"):
        perceptron(x, inner.t(), outer)
    with pytest.raises(ValueError, match="one output"):
        perceptron_slope(x, inner, outer)


def test_examples() -> None:
    assert doctest.testmod(module).failed == 0
