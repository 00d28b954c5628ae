"""The captured step against the plain loop: the same draws, the same mathematics, the same field."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_fusion import TINY, StubGuidance

from imagedream_rt.engine import captured
from imagedream_rt.engine.backends import Backends
from imagedream_rt.engine.captured import CapturedDistillation
from imagedream_rt.engine.condition_bank import GreyBank, MatchedColour
from imagedream_rt.engine.conditioning import Conditioner
from imagedream_rt.engine.config import FusionConfig, Ramp
from imagedream_rt.engine.distill import MultiViewGuidance
from imagedream_rt.engine.errors import Cancelled, InputError
from imagedream_rt.engine.field_state import FieldState
from imagedream_rt.engine.fuse import Fusion
from imagedream_rt.engine.picture import PreparedPicture
from imagedream_rt.engine.weights import load_model

CPU = torch.device("cpu")
# Draws of the later occupancy updates differ, so the warm-up lasts; all losses take part.
CONFIG = replace(
    TINY,
    background_match="grey",
    guidance_scale=3.0,
    render=replace(TINY.render, occupancy_warmup_steps=100),
    lambda_orient=Ramp(1.0, 10.0, 8),
    lambda_opaque=0.1,
    lambda_z_variance=0.1,
)


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain PyTorch computes every row of a buffer."""
    monkeypatch.setattr(captured, "GRAIN", 64)
    monkeypatch.setattr(captured, "MOST_CANDIDATES", 2**13)


def teacher(config: FusionConfig, device: torch.device = CPU) -> MultiViewGuidance:
    rgba = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    model = load_model("random:tiny", device=str(device), controller="pixel", dtype=torch.float32)
    return MultiViewGuidance(model, Conditioner(model, PreparedPicture(rgba), "a robot"), config)


def run_captured(config: FusionConfig, guidance: MultiViewGuidance, device: torch.device) -> FieldState:
    state = FieldState(config, 5, device)
    steps = CapturedDistillation(config, state, guidance, GreyBank(guidance.conditioner))
    losses = [float(steps.advance(step).values["loss"]) for step in range(config.steps)]
    assert all(np.isfinite(losses))
    return state


def assert_same_fields(one: FieldState, other: FieldState, tolerance: float) -> None:
    for name in ("field", "background"):
        parameters = zip(
            getattr(one, name).named_parameters(), getattr(other, name).parameters(), strict=True
        )
        for (which, found), wanted in parameters:
            error = (found - wanted).norm() / wanted.norm()
            assert error < tolerance, f"{name}.{which}: {error:.1e}"


def test_captured_steps_fit_the_same_field_as_the_plain_loop():
    guidance = teacher(CONFIG)
    plain = Fusion(CONFIG, guidance, seed=5)
    plain.run()
    found = run_captured(CONFIG, guidance, CPU)
    # The bank encodes in batches, which rounds otherwise; and an entry of the table that hardly has a gradient takes
    # Adam's whole step to the side that rounding turns it to.
    assert_same_fields(found, plain.state, 5e-3)
    untrained = FieldState(CONFIG, 5, CPU)
    with pytest.raises(AssertionError):
        assert_same_fields(untrained, plain.state, 1e-2)
    # Both have drawn as much from every stream.
    one, other = found.streams.state(), plain.state.streams.state()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_too_many_samples_warn_once_they_are_looked_at(monkeypatch):
    monkeypatch.setattr(captured, "MOST_CANDIDATES", 300)
    monkeypatch.setattr(captured, "LOOK_EVERY", 4)
    config = replace(CONFIG, steps=4)
    with pytest.warns(UserWarning, match=r"worth a gradient of \d+, and buffers for"):
        run_captured(config, teacher(config), CPU)


def test_capacity_follows_the_counts(monkeypatch):
    monkeypatch.setattr(captured, "LOOK_EVERY", 2)
    config = replace(CONFIG, steps=4)
    guidance, state = teacher(config), FieldState(config, 5, CPU)
    steps = CapturedDistillation(config, state, guidance, GreyBank(guidance.conditioner))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps.advance(0)
        first = steps._capacity
        assert first is not None
        assert steps._most_found[0] > 0
        assert all(n <= rows for n, rows in zip(steps._most_found.tolist(), first, strict=True))
        # Nothing is left to see: the buffers shrink.
        state.occupancy.occupied.zero_()
        state.occupancy.values.zero_()
        steps._most_found.zero_()
        steps.advance(1)
    assert steps._capacity is not None
    assert steps._capacity.candidates < first.candidates


def test_matched_colours_too():
    config = replace(CONFIG, background_match="colour", steps=4)
    guidance = teacher(config)
    plain = Fusion(config, guidance, seed=5)
    plain.run()
    state = FieldState(config, 5, CPU)
    steps = CapturedDistillation(config, state, guidance, MatchedColour(guidance.conditioner))
    for step in range(config.steps):
        steps.advance(step)
    assert_same_fields(state, plain.state, 1e-3)


def test_what_cannot_be_captured():
    asked = Backends(loop="graph")
    with pytest.raises(InputError, match="the teacher is not the diffusion model"):
        Fusion(TINY, StubGuidance(), backends=asked).run()
    with pytest.raises(InputError, match="needs a CUDA device and Triton: take 'eager' or 'auto'"):
        Fusion(CONFIG, teacher(CONFIG), backends=asked).run()


@pytest.mark.gpu
@pytest.mark.parametrize("match", ["grey", "colour"])
def test_replays_equal_the_plain_loop(match: str):
    device = torch.device("cuda")
    config = replace(CONFIG, background_match=match)
    plain = Fusion(config, teacher(config, device), seed=5, device=device, backends=Backends(loop="eager"))
    plain.run()
    replayed = Fusion(config, teacher(config, device), seed=5, device=device, backends=Backends(loop="graph"))
    replayed.run()
    assert_same_fields(replayed.state, plain.state, 2e-2)


@pytest.mark.gpu
def test_a_checkpoint_of_replayed_steps_resumes(tmp_path):
    device = torch.device("cuda")
    whole = Fusion(CONFIG, teacher(CONFIG, device), seed=5, device=device)
    whole.run()
    first = Fusion(replace(CONFIG, checkpoint_every=3), teacher(CONFIG, device), seed=5, device=device)
    calls = iter(range(100))
    with pytest.raises(Cancelled):
        first.run(checkpoint_path=tmp_path / "state", cancel=lambda: next(calls) == 5)
    rest = Fusion(replace(CONFIG, checkpoint_every=3), teacher(CONFIG, device), seed=5, device=device)
    rest.resume(tmp_path / "state")
    rest.run()
    assert_same_fields(rest.state, whole.state, 2e-2)
