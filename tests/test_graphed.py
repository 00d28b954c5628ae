"""Functions replayed from graphs: what counts as the same call, whose memory it is, and when they are just called."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from imagedream_rt.engine import graphed
from imagedream_rt.engine.graphed import GraphedStep, Replays


class Pair(NamedTuple):
    a: Tensor
    b: Tensor | None


class Recorded:
    """a + the sum of all other tensors; remembers what it was given."""

    def __init__(self) -> None:
        self.given: list[tuple[Any, ...]] = []

    def __call__(self, a: Tensor, *others: Any, **named: Any) -> Tensor:
        self.given.append((a, *others, named))
        return a + sum(float(x.sum()) for x in graphed._tensors([*others, *named.values()]))


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are taken for replayable off CUDA, where the graph's step is run as it is."""
    monkeypatch.setattr(graphed, "replayable", lambda tensors: True)


def test_arguments_are_copied_to_buffers_of_the_same_kind(everywhere: None) -> None:
    function = Recorded()
    replays = Replays(function)
    a, pair = torch.randn(2, 3), Pair(torch.ones(2), None)
    out = replays(a, [pair, pair], None, 2, keep=4, more=torch.full((5,), 2.0))
    assert torch.equal(out, a + 14.0)
    x, (first, second), nothing, two, named = function.given[0]
    assert x is not a
    assert torch.equal(x, a)
    assert isinstance(first, Pair)
    assert first.b is None
    assert first.a is not second.a
    assert (nothing, two, named["keep"]) == (None, 2, 4)
    assert named["more"].tolist() == [2.0] * 5


def test_later_calls_use_the_buffers_again_and_results_stay(everywhere: None) -> None:
    function = Recorded()
    replays = Replays(function)
    calls = [(torch.randn(4), torch.randn(3, 2).half()) for _ in range(3)]
    results = [replays(*call) for call in calls]
    for (a, b), out in zip(calls, results, strict=True):
        assert torch.equal(out, a + float(b.sum()))
    assert len(replays) == 1
    for position in range(2):
        assert len({given[position].data_ptr() for given in function.given}) == 1


@pytest.mark.parametrize(
    "other",
    [
        ((torch.zeros(2, 3), None, 1), {}),
        ((torch.zeros(3, 2).double(), None, 1), {}),
        ((torch.zeros(3, 2), torch.zeros(1), 1), {}),
        ((torch.zeros(3, 2), [], 1), {}),
        ((torch.zeros(3, 2), None, 2), {}),
        ((torch.zeros(3, 2), None, 1), {"keep": 1}),
        ((torch.zeros(3, 2), None), {"x": 1}),
        ((torch.zeros(3, 2), None, 1), {"also": "another scale"}),
    ],
    ids=["shape", "dtype", "tensor", "list", "number", "keyword", "name", "also"],
)
def test_another_call_has_another_graph(everywhere: None, other: tuple[tuple[Any, ...], Any]) -> None:
    replays = Replays(Recorded())
    replays(torch.zeros(3, 2), None, 1)
    replays(torch.ones(3, 2).T.contiguous().T, None, 1)  # strides do not matter
    assert len(replays) == 1
    replays(*other[0], **other[1])
    assert len(replays) == 2


def test_only_the_latest_are_kept(everywhere: None) -> None:
    function = Recorded()
    replays = Replays(function, most=2)

    def buffer(size: int) -> int:
        replays(torch.zeros(size))
        address: int = function.given[-1][0].data_ptr()
        return address

    first, second = buffer(1), buffer(2)
    kept = [given[0] for given in function.given]  # so that no address is used twice
    assert buffer(1) == first
    third = buffer(3)
    assert len(replays) == 2
    assert buffer(1) == first
    assert buffer(2) != second
    assert buffer(3) != third
    assert len(kept) == 2
    replays.forget()
    assert len(replays) == 0


def test_strides_and_inference_mode_of_the_first_caller_do_not_stay(everywhere: None) -> None:
    """Sampling runs in inference mode, a fusion's guidance does not: the buffers serve both."""
    replays = Replays(Recorded())
    with torch.inference_mode():
        one = replays(torch.ones(4, 2).T, torch.ones(1).expand(3))
    a, b = torch.randn(2, 4), torch.randn(3)
    other = replays(a, b)
    assert one.tolist() == [[4.0] * 4] * 2
    assert torch.equal(other, a + float(b.sum()))
    assert len(replays) == 1
    assert not other.is_inference()
    assert not other.requires_grad


def test_a_failed_call_leaves_nothing_half_made(everywhere: None) -> None:
    def refuse(x: Tensor) -> Tensor:
        if len(x) > 2:
            raise ValueError("too long")
        return x

    replays = Replays(refuse)
    with pytest.raises(ValueError, match="too long"):
        replays(torch.zeros(3))
    assert len(replays) == 0
    assert torch.equal(replays(torch.ones(2)), torch.ones(2))


def test_results_may_be_several_and_each_has_memory_of_its_own(everywhere: None) -> None:
    held = torch.zeros(2)

    def function(x: Tensor) -> list[Any]:
        held.copy_(x)
        return [Pair(held, None), (x.sum(), 3)]

    replays = Replays(function)
    for value in (1.0, 2.0):
        x = torch.full((2,), value)
        (pair, (total, number)) = replays(x)
        assert isinstance(pair, Pair)
        assert torch.equal(pair.a, x)
        assert pair.a.data_ptr() != held.data_ptr()
        assert (pair.b, float(total), number) == (None, 2 * value, 3)


def test_an_object_forgets_the_graphs_of_its_methods(everywhere: None) -> None:
    network = Recorded()
    network.one, network.other = Replays(network), Replays(network)  # type: ignore[attr-defined]
    for replays in (network.one, network.other, network.one):  # type: ignore[attr-defined]
        replays(torch.zeros(1))
    graphed.forget_graphs(network)
    assert (len(network.one), len(network.other)) == (0, 0)  # type: ignore[attr-defined]
    assert network.given


def test_off_cuda_the_function_is_called_with_the_very_arguments() -> None:
    function = Recorded()
    replays = Replays(function)
    a, b = torch.randn(2, requires_grad=True), torch.randn(3)
    out = replays(a, b, keep=1)
    assert out.requires_grad
    assert function.given[0][0] is a
    assert function.given[0][1] is b
    assert len(replays) == 0


class OnCuda:
    """As much of a CUDA tensor as the question takes."""

    is_cuda = True

    def __init__(self, requires_grad: bool = False) -> None:
        self.requires_grad = requires_grad


def test_what_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    frozen, trained = OnCuda(), OnCuda(requires_grad=True)
    assert graphed.replayable([frozen])  # type: ignore[list-item]
    assert not graphed.replayable([frozen, torch.zeros(1)])  # type: ignore[list-item]
    assert not graphed.replayable([])
    assert not graphed.replayable([frozen, trained])  # type: ignore[list-item]
    with torch.no_grad():
        assert graphed.replayable([frozen, trained])  # type: ignore[list-item]
    within = []
    step = GraphedStep(lambda: within.append(graphed.replayable([frozen])), torch.device("cpu"))  # type: ignore[list-item]
    step()
    assert within == [False]
    assert graphed.replayable([frozen])  # type: ignore[list-item]
    capturing = True
    assert not graphed.replayable([frozen])  # type: ignore[list-item]


@pytest.mark.gpu
def test_replays_on_the_gpu() -> None:
    """The first call runs as it is, the second is captured; a step that contains the call is captured with it."""
    weight, calls = torch.randn(8, 8, device="cuda"), []

    def function(x: Tensor, factor: float) -> Tensor:
        calls.append(len(x))
        return factor * (x @ weight).relu()

    replays = Replays(function)
    xs = [torch.randn(4, 8, device="cuda") for _ in range(4)]
    with torch.inference_mode():
        found = [replays(x, 2.0) for x in xs]
    assert calls == [4, 4]
    for x, out in zip(xs, found, strict=True):
        assert torch.equal(out, 2.0 * (x @ weight).relu())
    assert torch.equal(replays(xs[0], 2.0), found[0])
    assert calls == [4, 4]
    out = replays(xs[0].clone().requires_grad_(), 2.0)
    assert out.requires_grad
    assert calls == [4, 4, 4]

    target = torch.zeros(4, 8, device="cuda")
    static = xs[1].clone()
    step = GraphedStep(lambda: target.copy_(replays(static, 3.0)), torch.device("cuda"), warmup=1)
    for _ in range(3):
        step()
    static.copy_(xs[2])
    step()
    assert torch.equal(target, 3.0 * (xs[2] @ weight).relu())
    assert calls == [4] * 5
    assert len(replays) == 1
