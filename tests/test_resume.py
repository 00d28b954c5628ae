"""A fusion that was stopped and resumed on the CPU equals one that was not, bit by bit."""

from __future__ import annotations

import signal
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_fusion import TINY, TINY_WARM, StubGuidance, grey_views

from imagedream_rt.engine.checkpoint import read_tensors, write_tensors
from imagedream_rt.engine.conditioning import Conditioner
from imagedream_rt.engine.config import FusionConfig
from imagedream_rt.engine.distill import Guidance, MultiViewGuidance
from imagedream_rt.engine.errors import Cancelled, InputError
from imagedream_rt.engine.fuse import Fusion
from imagedream_rt.engine.weights import load_model


def fusion(config: FusionConfig = TINY, guidance: Guidance | None = None, seed: int = 3) -> Fusion:
    return Fusion(config, guidance or StubGuidance(), seed=seed, views=grey_views(config))


def stop_after(steps: int):
    """A ``cancel`` that says yes when it is asked for the (steps + 1)-th time."""
    asked = iter(range(steps + 1))
    return lambda: next(asked) == steps


def assert_same_state(one: Fusion, other: Fusion) -> None:
    """Parameters, moments, step counts, occupancy and generators."""
    left, right = one.state.tensors(), other.state.tensors()
    assert left.keys() == right.keys()
    assert any(name.startswith("optimizer.") for name in left)
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_stopped_and_resumed_is_bit_identical(tmp_path, stop):
    whole = fusion()
    whole.run()
    first = fusion()
    with pytest.raises(Cancelled, match=f"step {stop} of fuse; the last good checkpoint is .*c.safetensors"):
        first.run(cancel=stop_after(stop), checkpoint_path=tmp_path / "c.safetensors")
    second = fusion()
    second.resume(tmp_path / "c.safetensors")
    second.run()
    assert_same_state(whole, second)


@pytest.mark.parametrize("stop", [2, 6, 9])
def test_the_same_through_a_warm_start(tmp_path, stop):
    """Stopped while fitting, between the phases, and while distilling."""
    whole = fusion(TINY_WARM)
    whole.run()
    first = fusion(TINY_WARM)
    with pytest.raises(Cancelled):
        first.run(cancel=stop_after(stop), checkpoint_path=tmp_path / "c.safetensors")
    second = Fusion(TINY_WARM, StubGuidance(), seed=3, views=no_more_views)
    second.resume(tmp_path / "c.safetensors")
    second.run()
    assert_same_state(whole, second)


def no_more_views(*_):
    raise AssertionError("the checkpoint holds the views")


def test_the_same_with_a_diffusion_model(tmp_path):
    model = load_model("random:tiny", device="cpu", controller="none")
    config = replace(TINY, steps=3, stages=TINY.stages[:1])

    def guided() -> Fusion:
        return fusion(config, MultiViewGuidance(model, Conditioner(model, None, "a robot"), config))

    whole = guided()
    whole.run()
    first = guided()
    with pytest.raises(Cancelled):
        first.run(cancel=stop_after(2), checkpoint_path=tmp_path / "c.safetensors")
    second = guided()
    second.resume(tmp_path / "c.safetensors")
    second.run()
    assert_same_state(whole, second)


def test_interrupt_finishes_the_step_and_saves(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    path = tmp_path / "c.safetensors"
    interrupted = fusion(
        guidance=StubGuidance(lambda step: signal.raise_signal(signal.SIGINT) if step == 4 else None)
    )
    with pytest.raises(KeyboardInterrupt):
        interrupted.run(checkpoint_path=path)
    assert signal.getsignal(signal.SIGINT) is before
    assert interrupted.done == 5
    whole, second = fusion(), fusion()
    whole.run()
    second.resume(path)
    assert second.done == 5
    second.run()
    assert_same_state(whole, second)


def test_second_interrupt_does_not_wait():
    def twice(step: int) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    impatient = fusion(guidance=StubGuidance(twice))
    with pytest.raises(KeyboardInterrupt):
        impatient.run()
    assert impatient.done == 0


def test_interrupt_while_views_are_made():
    def source(views, on_progress, cancel):
        signal.raise_signal(signal.SIGINT)
        assert cancel()
        raise Cancelled("by the sampler")

    with pytest.raises(KeyboardInterrupt):
        Fusion(TINY_WARM, StubGuidance(), views=source).run()


def test_checkpoint_that_lacks_tensors_is_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    fusion().run(checkpoint_path=path)
    tensors, header = read_tensors(path, ("fusion checkpoint",))
    del tensors["random.noise"]
    write_tensors(path, tensors, header)
    with pytest.raises(InputError, match="lacks what a checkpoint of this version holds: 'noise'"):
        fusion().resume(path)


def test_finished_checkpoint_resumes_to_the_end(tmp_path):
    path = tmp_path / "c.safetensors"
    whole = fusion()
    whole.run(checkpoint_path=path)
    second = fusion()
    second.resume(path)
    second.run(cancel=lambda: pytest.fail("there is nothing left to do"))
    assert_same_state(whole, second)


def test_seeds_differ():
    one, other = fusion(seed=0), fusion(seed=1)
    tables = [run.state.tensors()["field.grid.table"] for run in (one, other)]
    assert not torch.equal(*tables)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"seed": 4}, "seed: 3 in the checkpoint, 4 now"),
        (
            {"config": replace(TINY, guidance_scale=9.0)},
            "config.guidance_scale: 2.0 in the checkpoint, 9.0 now",
        ),
        ({"guidance": StubGuidance(name="else")}, "guidance.teacher: stub in the checkpoint, else now"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, other, said):
    path = tmp_path / "c.safetensors"
    fusion().run(checkpoint_path=path)
    with pytest.raises(InputError) as caught:
        fusion(**other).resume(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_deterministic_mode_is_restored():
    torch.use_deterministic_algorithms(False)
    seen = []
    fusion(guidance=StubGuidance(lambda _: seen.append(torch.are_deterministic_algorithms_enabled()))).run()
    assert all(seen)
    assert not torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic
    assert settings.fill_uninitialized_memory
