"""The fusion loop: what is drawn, what stops it, what it writes."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_fusion import TINY, TINY_WARM, StubGuidance, grey_views

from imagedream_rt.engine.backends import Backends
from imagedream_rt.engine.cameras import orbit_cameras
from imagedream_rt.engine.checkpoint import config_from_json, config_to_json, read_tensors, write_tensors
from imagedream_rt.engine.config import DRAFT, OFFICIAL, PRESETS, FieldConfig
from imagedream_rt.engine.errors import Cancelled, FusionError, InputError
from imagedream_rt.engine.fuse import EMPTY_STEPS, Fusion
from imagedream_rt.engine.fused_field import FusedField
from imagedream_rt.engine.random_streams import DEVICE, HOST, RandomStreams, stream_seed

CPU = torch.device("cpu")


def test_stages_timesteps_and_colours_follow_the_settings():
    guidance = StubGuidance()
    config = replace(TINY, background_match="grey", random_background=1.0)
    Fusion(config, guidance, seed=0).run()
    assert guidance.pictures == [(8, 8, 8, 3)] * 4 + [(4, 12, 12, 3)] * 4
    assert all(0.2 * 1000 <= t <= 0.6 * 1000 for t in guidance.timesteps)
    assert len(set(guidance.timesteps)) > 1
    assert len(set(guidance.colours)) == 8
    assert all(red == green == blue for red, green, blue in guidance.colours)


def test_random_streams_do_not_depend_on_each_other():
    one, other = RandomStreams(7, CPU), RandomStreams(7, CPU)
    for name in DEVICE:
        torch.rand(5, generator=one[name])
    assert [one.uniform(name) for name in HOST] == [other.uniform(name) for name in HOST]
    assert len({stream_seed(7, name) for name in (*HOST, *DEVICE)}) == len(HOST + DEVICE)
    assert stream_seed(7, "noise") != stream_seed(8, "noise")


def test_parameter_groups_have_their_learning_rates():
    state = Fusion(OFFICIAL.changed(field=TINY.field), StubGuidance()).state
    rates = {
        name: group["lr"]
        for group in state.optimizer.param_groups
        for parameter in group["params"]
        for name, own in [*state.field.named_parameters(), *state.background.named_parameters()]
        if own is parameter
    }
    assert rates["grid.table"] == 0.01
    assert {rate for name, rate in rates.items() if name != "grid.table"} == {0.001}
    assert len(rates) == 8
    assert {group["weight_decay"] for group in state.optimizer.param_groups} == {0.01}
    assert {group["betas"] for group in state.optimizer.param_groups} == {(0.9, 0.99)}


def test_nan_stops_with_the_step_and_keeps_the_last_good_checkpoint(tmp_path):
    path = tmp_path / "c.safetensors"

    class Poisoned(StubGuidance):
        def target(self, latents, *rest):
            target = super().target(latents, *rest)
            return target * float("nan") if len(self.timesteps) == 6 else target

    config = replace(TINY, checkpoint_every=2)
    with pytest.raises(FusionError, match=r"not a finite number at step 5 of fuse.*step 4 of fuse"):
        Fusion(config, Poisoned()).run(checkpoint_path=path)
    resumed = Fusion(config, StubGuidance())
    resumed.resume(path)
    assert resumed.done == 4
    resumed.run()


def test_infinite_weights_are_not_saved(tmp_path):
    path = tmp_path / "c.safetensors"
    broken = Fusion(replace(TINY, checkpoint_every=2), StubGuidance())

    def break_weights(phase: str, done: int, values: dict[str, float]) -> None:
        if done == 4:
            next(broken.state.background.parameters()).data.fill_(float("inf"))

    with pytest.raises(FusionError, match=r"not finite after step 4 of fuse.*step 2 of fuse"):
        broken.run(checkpoint_path=path, on_metrics=break_weights)
    assert read_tensors(path, ("fusion checkpoint",))[1]["done"] == 2


def test_an_empty_field_stops():
    """A blob of negative strength holds no density anywhere."""
    config = replace(TINY, steps=50, field=replace(TINY.field, blob_strength=-40.0, blob_radius=1e6))
    with pytest.raises(
        FusionError, match=f"field is empty.*{EMPTY_STEPS} renders up to step {EMPTY_STEPS - 1}"
    ):
        Fusion(config, StubGuidance()).run()


def test_progress_and_metrics_are_reported():
    progress, metrics = [], []
    fusion = Fusion(TINY_WARM, StubGuidance(), views=grey_views(TINY_WARM))
    fusion.run(
        on_progress=lambda *event: progress.append(event),
        on_metrics=lambda phase, done, values: metrics.append((phase, done, values)),
    )
    assert progress == [("warm-start", k + 3, 8) for k in range(6)] + [("fuse", k + 1, 8) for k in range(8)]
    assert [done for phase, done, _ in metrics] == [*range(1, 7), *range(1, 9)]
    fused = metrics[-1][2]
    weighted = (
        fused["sds"] + TINY.lambda_orient.at(7) * fused["orient"] + TINY.lambda_sparsity * fused["sparsity"]
    )
    assert fused["loss"] == pytest.approx(weighted, rel=1e-5)
    assert "opaque" not in fused  # weight 0


def test_all_regularisers_can_be_on():
    values: dict[str, float] = {}
    config = replace(TINY, steps=1, lambda_opaque=0.5, lambda_z_variance=2.0)
    Fusion(config, StubGuidance()).run(on_metrics=lambda phase, done, held: values.update(held))
    expected = values["sds"] + values["orient"] + 0.1 * values["sparsity"]
    assert values["loss"] == pytest.approx(
        expected + 0.5 * values["opaque"] + 2 * values["z_variance"], rel=1e-5
    )


def test_runs_outside_the_main_thread(tmp_path):
    path = tmp_path / "c.safetensors"
    worker = threading.Thread(target=lambda: Fusion(TINY, StubGuidance()).run(checkpoint_path=path))
    worker.start()
    worker.join()
    assert read_tensors(path, ("fusion checkpoint",))[1]["done"] == TINY.steps


def test_cancel_without_a_checkpoint_path_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Cancelled):
        Fusion(TINY, StubGuidance()).run(cancel=lambda: True)
    assert list(tmp_path.iterdir()) == []


def test_warm_start_needs_views():
    with pytest.raises(InputError, match="preset draft starts from fitted views"):
        Fusion(DRAFT, StubGuidance())


def test_backends_that_are_not_there_are_one_error():
    with pytest.raises(InputError, match="unknown backend 'abacus' of volume; there are torch, nerfacc"):
        Fusion(TINY, StubGuidance(), backends=Backends(volume="abacus"))  # type: ignore[arg-type]


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_settings_survive_json(config):
    assert config_from_json(config_to_json(config)) == config


def test_settings_of_another_version_are_refused():
    held = config_to_json(DRAFT)
    with pytest.raises(InputError, match="wings"):
        config_from_json({**held, "wings": 2})
    del held["camera"]
    with pytest.raises(InputError, match="camera"):
        config_from_json(held)


@pytest.fixture(scope="module")
def fused() -> FusedField:
    return Fusion(TINY, StubGuidance()).run()


def test_field_survives_saving(tmp_path, fused):
    fused.save(tmp_path / "deep" / "f.safetensors")
    loaded = FusedField.load(tmp_path / "deep" / "f.safetensors")
    assert loaded.config == TINY
    cameras = orbit_cameras([0.0, 120.0], 10.0, 45.0, 2.0)
    before, after = fused.render(cameras, 9, (0.2, 0.4, 0.6)), loaded.render(cameras, 9, (0.2, 0.4, 0.6))
    for one, other in zip(vars(before).values(), vars(after).values(), strict=True):
        assert torch.equal(one, other)
    points = torch.rand(100, 3) * 2 - 1
    assert torch.equal(fused.density(points), loaded.density(points))
    assert torch.equal(fused.albedo(points), loaded.albedo(points))
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "f.safetensors"]


def test_field_loads_from_a_checkpoint_too(tmp_path):
    run = Fusion(TINY, StubGuidance())
    whole = run.run(checkpoint_path=tmp_path / "c.safetensors")
    loaded = FusedField.load(tmp_path / "c.safetensors")
    points = torch.rand(20, 3)
    assert torch.equal(whole.density(points), loaded.density(points))


def test_render_shapes_and_background(fused, monkeypatch):
    cameras = orbit_cameras([0.0, 90.0, 180.0], 0.0, 45.0, 2.0)
    whole = fused.render(cameras, 11)
    assert whole.rgb.shape == (3, 11, 11, 3)
    assert whole.opacity.shape == whole.depth.shape == (3, 11, 11, 1)
    corner = fused.render(cameras, 11, (0.25, 0.5, 1.0)).rgb[:, 0, 0]
    torch.testing.assert_close(corner, torch.tensor([[0.25, 0.5, 1.0]]).expand(3, 3))
    monkeypatch.setattr("imagedream_rt.engine.fused_field.RAYS_PER_CHUNK", 50)
    torch.testing.assert_close(fused.render(cameras, 11).rgb, whole.rgb)


@pytest.mark.parametrize(
    "damage", ["missing", "truncated", "text", "foreign", "other kind", "nan", "other shape"]
)
def test_bad_field_files_are_one_error(tmp_path, fused, damage):
    path = tmp_path / "f.safetensors"
    fused.save(path)
    tensors, header = read_tensors(path, ("fused field",))
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "text":
        path.write_text("hello")
    elif damage == "foreign":
        save_file(load_file(path), path)
    elif damage == "other kind":
        write_tensors(path, tensors, {**header, "kind": "recipe"})
    elif damage == "nan":
        tensors["field.grid.table"][0] = float("nan")
        write_tensors(path, tensors, header)
    else:
        write_tensors(path, tensors, {**header, "config": config_to_json(replace(TINY, field=FieldConfig()))})
    with pytest.raises(InputError) as caught:
        FusedField.load(path)
    assert str(path) in str(caught.value)


def test_unwritable_place_is_an_input_error_and_keeps_the_old_file(tmp_path, fused):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError):
        fused.save(tmp_path / "file" / "f.safetensors")
