"""Backends by component: which there are, what ``auto`` comes to, and that all of them compute the same."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import tiny
from command_line import SECONDS, CommandLine, object_picture
from rounding import relative_error
from torch import nn

from imagedream_rt import ImageTo3D
from imagedream_rt.engine import backends as module
from imagedream_rt.engine import fp8, graphed
from imagedream_rt.engine.backends import OWN, Backends, choices, compiled, decided, survey
from imagedream_rt.engine.conditioning import Conditioner
from imagedream_rt.engine.errors import Cancelled, InputError
from imagedream_rt.engine.graphed_networks import (
    FEW,
    GraphedCodec,
    GraphedText,
    GraphedUNet,
    GraphedVision,
    share,
)
from imagedream_rt.engine.model import Controller, MultiViewModel
from imagedream_rt.engine.picture import prepare
from imagedream_rt.engine.sampler import sample_views
from imagedream_rt.engine.unet import MultiViewUNet
from imagedream_rt.engine.vae import LatentCodec
from imagedream_rt.engine.weights import load_model
from imagedream_rt.kernels import _triton, _tuning

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, as far as questions go."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are taken for replayable off CUDA, where the graph's step is run as it is."""
    monkeypatch.setattr(graphed, "replayable", lambda tensors: True)


def test_from_words() -> None:
    assert Backends.parse([]) == OWN
    assert Backends.parse(["unet=compiled", " loop = eager"]) == Backends(unet="compiled", loop="eager")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["unet"],
            "backend 'unet': give COMPONENT=NAME, such as unet=compiled; the components are attention,",
        ),
        (["unet="], "backend 'unet=': give COMPONENT=NAME"),
        (
            ["painter=eager"],
            "the components are attention, encoding, volume, unet, vae, clip, loop, precision",
        ),
        (["unet=fast"], "unknown backend 'fast' of unet; there are auto, eager, graph, compiled, tensorrt"),
        (["clip=compiled"], "unknown backend 'compiled' of clip; there are auto, eager, graph"),
        (["unet=graph", "unet=eager"], "'unet=eager': unet was given as 'graph' before"),
    ],
)
def test_words_that_are_none(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Backends.parse(words)


def test_every_backend_is_surveyed() -> None:
    for component, offered in survey(CPU).items():
        assert {*offered} == {*choices()[component]} - {"auto"}
        assert None in offered.values()  # one always works
    assert {*survey(CPU)} == {*choices()}


def test_survey_without_a_gpu() -> None:
    found = survey(CPU)
    assert found["unet"] == {
        "eager": None,
        "graph": "no CUDA device",
        "compiled": None,
        "tensorrt": "no CUDA device",
    }
    assert found["precision"]["fp8"] == "no CUDA device"


def test_survey_of_a_gpu(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(
        reason is None for name in ("unet", "vae", "clip", "loop") for reason in survey(CUDA)[name].values()
    )
    monkeypatch.setattr(_triton, "triton", None)
    found = survey(CUDA)
    assert found["unet"]["graph"] is None
    assert found["unet"]["compiled"] == found["loop"]["graph"] == "triton is not installed"


def test_what_auto_comes_to(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = {"attention": "torch", "unet": "eager", "vae": "eager", "clip": "eager", "loop": "eager"}
    assert decided(OWN, CPU, torch.float32) == replace(OWN, **eager)  # type: ignore[arg-type]
    there = decided(OWN, CUDA, torch.float16)
    assert there == Backends(attention="triton", unet="graph", vae="graph", clip="graph", loop="graph")
    assert decided(OWN, CUDA, torch.float32).attention == "torch"
    planned = decided(OWN, CUDA, torch.float16, plans=("unet", "vae"))
    assert (planned.unet, planned.vae) == ("tensorrt", "tensorrt")
    asked = Backends(attention="torch", unet="eager", vae="compiled", clip="eager", loop="eager")
    assert decided(asked, CUDA, torch.float16, plans=("unet", "vae")) == asked
    # A captured step has this package's renderer in it.
    assert decided(Backends(volume="nerfacc"), CUDA, torch.float16).loop == "eager"
    monkeypatch.setattr(_triton, "triton", None)
    without = Backends("torch", unet="graph", vae="graph", clip="graph", loop="eager")
    assert decided(OWN, CUDA, torch.float16) == without


def with_stand_ins(model: MultiViewModel, codec: bool = False) -> MultiViewModel:
    """As plans would be put in; they compute the same here."""

    class Plan(MultiViewUNet):
        pass

    class PlanCodec(LatentCodec):
        pass

    def changed(network: Any, kind: type) -> Any:
        planned: Any = object.__new__(kind)
        share(planned, network)
        return planned

    vae = changed(model.vae, PlanCodec) if codec else model.vae
    return replace(model, unet=changed(model.unet, Plan), vae=vae)


def test_plans_are_taken_where_nothing_else_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    offered = {
        **survey(CPU),
        "unet": {"eager": None, "tensorrt": None},
        "vae": {"eager": None, "tensorrt": None},
    }
    monkeypatch.setattr(module, "survey", lambda device: offered)
    model = tiny("pixel")
    pipe = ImageTo3D(model, plans=with_stand_ins)
    assert type(pipe.model.unet).__name__ == "Plan"
    assert (pipe.used.unet, pipe.used.vae) == ("tensorrt", "eager")
    both = ImageTo3D(model, backends=Backends(unet="eager"), plans=lambda m: with_stand_ins(m, codec=True))
    assert both.model.unet is model.unet
    assert type(both.model.vae).__name__ == "PlanCodec"
    for backends, message in (
        (Backends(unet="eager"), "there are plans, and unet=eager, vae=eager use none"),
        (Backends(vae="tensorrt"), "backend vae=tensorrt: the folder of plans has none of it"),
    ):
        with pytest.raises(InputError, match=message):
            ImageTo3D(model, backends=backends, plans=with_stand_ins)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Backends(unet="graph"), "backend unet=graph cannot be used here: no CUDA device"),
        (Backends(unet="tensorrt"), r"backend unet=tensorrt needs a folder of plans \(--plans DIR"),
        (Backends(vae="tensorrt"), "backend vae=tensorrt needs a folder of plans"),
        (Backends(precision="fp8"), "backend precision=fp8 cannot be used here: no CUDA device"),
        (Backends(loop="graph"), "loop 'graph' cannot be used here, it needs a CUDA device and Triton"),
    ],
)
def test_what_cannot_be_used_is_refused_before_any_work(asked: Backends, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ImageTo3D(tiny("pixel"), backends=asked)


def test_the_record_says_what_was_asked_and_used() -> None:
    pipe = ImageTo3D(tiny("pixel"), backends=Backends(loop="eager"))
    found = pipe.views(object_picture(), steps=1).metadata["backends"]
    assert found["asked"] == asdict(Backends(loop="eager"))
    assert found["used"] == {
        "attention": "torch",
        "encoding": "torch",
        "volume": "torch",
        "unet": "eager",
        "vae": "eager",
        "clip": "eager",
        "loop": "eager",
        "precision": "native",
    }


def conditioner(model: MultiViewModel) -> Conditioner:
    return Conditioner(model, prepare(object_picture()), "a ball")


def test_a_replayed_network_is_the_same_network(everywhere: None) -> None:
    model = tiny("pixel")
    unet = GraphedUNet(model.unet)
    assert isinstance(unet, MultiViewUNet)
    assert not isinstance(model.unet, GraphedUNet)
    assert list(unet.state_dict()) == list(model.unet.state_dict())
    assert all(a is b for a, b in zip(unet.parameters(), model.unet.parameters(), strict=True))
    assert unet.config is model.unet.config
    plain = sample_views(model, conditioner(model), steps=3, seed=2)
    replayed = replace(model, unet=unet)
    for scale, graphs in ((5.0, 1), (1.0, 2)):
        plain = sample_views(model, conditioner(model), steps=3, seed=2, guidance_scale=scale)
        for _ in range(2):
            found = sample_views(replayed, conditioner(model), steps=3, seed=2, guidance_scale=scale)
            # Rounding: with several threads sums are split by where a tensor lies.
            assert relative_error(found, plain) < 1e-5
        assert len(unet._replays) == graphs


def test_keys_and_values_are_made_once_for_all_steps(
    everywhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model("random:tiny", device="cpu", controller="pixel")
    made, given = [], []
    make, forward = model.unet.prompt_key_values, MultiViewUNet.forward

    def noted(*arguments: Any) -> Any:
        made.append(1)
        return make(*arguments)

    def watched(*arguments: Any, **named: Any) -> torch.Tensor:
        given.append((arguments[3], named["image_tokens"], len(named["key_values"])))
        return forward(*arguments, **named)

    monkeypatch.setattr(model.unet, "prompt_key_values", noted)
    monkeypatch.setattr(MultiViewUNet, "forward", watched)
    sample_views(model, conditioner(model), steps=4)
    assert len(made) == 1
    assert given == [(None, None, given[0][2])] * 4


@pytest.mark.parametrize("controller", ["pixel", "global", "none"])
def test_replayed_encoders_are_the_same_encoders(
    everywhere: None, monkeypatch: pytest.MonkeyPatch, controller: Controller
) -> None:
    model = tiny(controller)
    monkeypatch.setattr(
        module, "survey", lambda device: {**survey(CPU), "vae": {"graph": None}, "clip": {"graph": None}}
    )
    used = ImageTo3D(model, backends=Backends(vae="graph", clip="graph")).model
    assert isinstance(used.vae, GraphedCodec)
    assert isinstance(used.text, GraphedText)
    assert (used.vision is None) == (model.vision is None)
    for own, other in ((used.vae, model.vae), (used.text, model.text), (used.vision, model.vision)):
        if own is not None and other is not None:
            assert list(own.state_dict()) == list(other.state_dict())
            assert all(a is b for a, b in zip(own.parameters(), other.parameters(), strict=True))
    picture = None if controller == "none" else prepare(object_picture())
    for prompt in ("a ball", "a cube"):
        found, wanted = (Conditioner(one, picture, prompt).at_grey(0.3) for one in (used, model))
        for name in ("context", "image_tokens", "image_mean", "image_std"):
            one, other = getattr(found, name), getattr(wanted, name)
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other)
                assert not one.is_inference()
    latents = torch.randn(4, 4, 4, 4)
    torch.testing.assert_close(used.vae.decode(latents), model.vae.decode(latents))
    assert len(used.text._replays) == len(used.vae._decode_replays) == 1
    if controller == "pixel":
        assert isinstance(used.vision, GraphedVision)
        assert len(used.vision._hidden_replays) == len(used.vae._moments_replays) == 1


def test_large_batches_and_training_are_not_replayed(everywhere: None) -> None:
    model = load_model("random:tiny", device="cpu", controller="pixel")
    codec = GraphedCodec(model.vae)
    pictures = torch.rand(FEW + 1, 3, 16, 16)
    codec.moments(pictures)
    assert len(codec._moments_replays) == 0
    codec.requires_grad_(True)
    assert codec.decode(torch.zeros(1, 4, 2, 2)).requires_grad
    assert len(codec._decode_replays) == 0
    with torch.no_grad():
        codec.decode(torch.zeros(1, 4, 2, 2))
        codec.moments(pictures[:FEW])
    assert (len(codec._decode_replays), len(codec._moments_replays)) == (1, 1)


def small_inputs(unet: MultiViewUNet) -> dict[str, Any]:
    width = unet.config.context_dim
    return {
        "latents": torch.randn(1, 5, 4, 8, 8),
        "timesteps": torch.tensor([7]),
        "context": torch.randn(1, 77, width),
        "image_tokens": torch.randn(1, 4, width),
    }


def test_what_a_graph_depends_on_besides_its_inputs(everywhere: None) -> None:
    model = load_model("random:tiny", device="cpu", controller="pixel")
    unet = GraphedUNet(model.unet)
    given = small_inputs(unet)
    one = unet(**given)
    unet.image_scale = 0.5
    other = unet(**given)
    assert not torch.allclose(one, other)
    assert len(unet._replays) == 2
    unet.use_attention_backend("torch")
    assert len(unet._replays) == 0
    unet.image_scale = 1.0
    assert torch.equal(unet(**given), one)
    # Weights that get gradients are trained, not replayed.
    unet.requires_grad_(True)
    unet.use_attention_backend("torch")
    assert unet(**given).requires_grad
    assert len(unet._replays) == 0
    with torch.no_grad():
        unet(**given)
    assert len(unet._replays) == 1


def test_wrong_inputs_are_refused_as_by_the_network_itself(everywhere: None) -> None:
    unet = GraphedUNet(tiny("pixel").unet)
    with pytest.raises(InputError, match="latents have shape"):
        unet(**{**small_inputs(unet), "latents": torch.randn(1, 5, 3, 8, 8)})
    assert len(unet._replays) == 0


def test_another_choice_for_the_same_model_starts_from_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = tiny("pixel")
    first = ImageTo3D(model, backends=Backends(unet="compiled", vae="compiled"))
    assert isinstance(first.model.unet, GraphedUNet)
    assert isinstance(first.model.vae, GraphedCodec)
    second = ImageTo3D(first.model)
    assert second.model.unet is model.unet
    assert second.model.vae is model.vae
    assert ImageTo3D(model).model is model


@pytest.fixture
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder, and nothing said about those of others; restored whatever is set meanwhile."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("IMAGEDREAM_RT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_compiled_networks(own_environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile's own part is left out here: it takes minutes."""
    asked = []

    def compile(function: Any, **settings: Any) -> Any:
        asked.append(settings)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    model = tiny("pixel")
    plain = ImageTo3D(model).views(object_picture(), steps=1)
    pipe = ImageTo3D(model, backends=Backends(unet="compiled", vae="compiled"))
    assert (pipe.views(object_picture(), steps=1).images == plain.images).all()
    assert asked == [{"dynamic": False, "options": {"fx_graph_cache": True}}] * 3
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(own_environment / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == str(_tuning.compiled_folder())


def test_the_codec_is_traced_as_a_whole(own_environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoder, and encoder with the gradient by its pictures; the network itself is traced in its own tests."""
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: compile(function, backend="eager", fullgraph=True)
    )
    codec = tiny("pixel").vae
    traced = GraphedCodec(codec, compiled(codec.moments), compiled(codec.decode))
    latents, images = torch.randn(1, 4, 2, 2), torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.inference_mode():
        assert torch.equal(traced.decode(latents), codec.decode(latents))
    results = []
    for one in (traced, codec):
        given = images.clone().requires_grad_()
        encoded = one.encode(given, latents)
        encoded.square().sum().backward()
        results.append((encoded, given.grad))
    for found, wanted in zip(*results, strict=True):
        assert torch.equal(found, wanted)
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_files_are_found_again(own_environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes' worth: what the first one built is in our folder, and the second builds nothing."""
    from torch._dynamo.utils import counters

    def function(x: torch.Tensor) -> torch.Tensor:
        return (x * 1.25 + 0.5).sin()

    found = []
    x = torch.randn(64)
    for _ in range(2):
        torch._dynamo.reset()
        counters.clear()
        torch.testing.assert_close(compiled(function)(x), function(x))
        inductor = counters["inductor"]
        found.append((inductor["fxgraph_cache_miss"], inductor["fxgraph_cache_hit"]))
    torch._dynamo.reset()
    assert any((own_environment / "inductor").iterdir())
    misses, hits = zip(*found, strict=True)
    assert misses == (1, 0)
    assert hits[0] == 0


def test_the_users_own_folders_stay(own_environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine too")
    module.use_cache_folder()
    assert (os.environ["TORCHINDUCTOR_CACHE_DIR"], os.environ["TRITON_CACHE_DIR"]) == ("mine", "mine too")


def test_a_folder_that_cannot_be_made_stops_nobody(own_environment: Path) -> None:
    own_environment.write_text("a file in its place")
    module.use_cache_folder()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_fp8_changes_the_network_that_is_then_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model("random:tiny", device="cpu", controller="pixel")
    monkeypatch.setattr(
        module, "survey", lambda device: {**survey(CPU), "precision": {"native": None, "fp8": None}}
    )
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(fp8, "use_fp8", partial(fp8.use_fp8, emulate=True))
    pipe = ImageTo3D(model, backends=Backends(unet="compiled", precision="fp8"))
    assert pipe.used.precision == "fp8"
    for unet in (model.unet, pipe.model.unet):
        assert any(isinstance(layer, fp8.Fp8Linear) for layer in unet.modules())
    given = small_inputs(model.unet)
    assert torch.equal(pipe.model.unet(**given), model.unet(**given))


class Moved(nn.Module):
    """A network that notes where it is moved to."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def to(self, place: Any) -> Moved:  # type: ignore[override]
        self.places.append(str(place))
        return self


@pytest.mark.parametrize("vision", [True, False])
def test_encoders_are_parked_and_come_back(
    everywhere: None, monkeypatch: pytest.MonkeyPatch, vision: bool
) -> None:
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    unet = GraphedUNet(tiny("pixel").unet)
    unet(**small_inputs(unet))
    model = replace(tiny("pixel"), unet=unet, text=Moved(), vision=Moved())
    with model.encoders_parked(vision=vision):
        pass
    assert model.text.places == []
    monkeypatch.setattr(MultiViewModel, "device", CUDA)

    def stopped_halfway() -> None:
        assert len(unet._replays) == 1
        with model.encoders_parked(vision=vision):
            assert model.text.places == ["cpu"]
            assert len(unet._replays) == 0
            raise Cancelled("halfway")

    with pytest.raises(Cancelled, match="halfway"):
        stopped_halfway()
    assert emptied == [1]
    assert model.text.places == ["cpu", "cuda:0"]
    assert model.vision.places == (["cpu", "cuda:0"] if vision else [])


def test_options_of_the_command_line(run: CommandLine, picture: Path, tmp_path: Path) -> None:
    options = ("--model", "random:tiny", "--device", "cpu", "--steps", 1)
    words = ("--backend", "unet=eager", "--backend", "attention=torch")
    ran = run("views", picture, "-o", tmp_path, *options, *words, "--json")
    assert ran.code == 0, ran.err
    assert ran.json()["backends"]["asked"] == asdict(Backends(unet="eager", attention="torch"))


gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize("controller", ["pixel", "global", "none"])
def test_replayed_conditions_equal_eager_ones(untuned: None, controller: Controller) -> None:
    model = load_model("random:tiny", device="cuda", controller=controller)
    eager = ImageTo3D(model, backends=Backends(unet="eager", vae="eager", clip="eager")).model
    replayed = ImageTo3D(model).model
    picture = None if controller == "none" else prepare(object_picture())
    for prompt in ("a ball", "a cube", "a robot"):  # as it is, captured, replayed
        found, wanted = (Conditioner(one, picture, prompt).at_grey(0.3) for one in (replayed, eager))
        for name in ("context", "image_tokens", "image_mean", "image_std"):
            one, other = getattr(found, name), getattr(wanted, name)
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
    latents = torch.randn(4, 4, 4, 4, device="cuda")
    for _ in range(3):
        assert torch.equal(replayed.vae.decode(latents), eager.vae.decode(latents))


@gpu
@pytest.mark.parametrize("scale", [5.0, 1.0])
def test_replayed_views_equal_eager_ones(untuned: None, scale: float) -> None:
    model = load_model("random:tiny", device="cuda", controller="pixel")
    eager, replayed = (ImageTo3D(model, backends=Backends(unet=unet)) for unet in ("eager", "graph"))
    unet = replayed.model.unet
    assert isinstance(unet, GraphedUNet)
    for seed in range(2):  # the second job finds the graph of the first
        settings: dict[str, Any] = {"seed": seed, "steps": 4, "guidance_scale": scale}
        wanted = eager.views(object_picture(), "a ball", **settings).images
        found = replayed.views(object_picture(), "a ball", **settings).images
        assert np.array_equal(found, wanted)
        assert len(unet._replays) == 1
        latents = [
            sample_views(pipe.model, conditioner(pipe.model), **settings) for pipe in (eager, replayed)
        ]
        assert torch.equal(*latents)


@gpu
@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_steps_of_the_views_never_wait_for_the_device(untuned: None, scheduler: str) -> None:
    model = ImageTo3D(load_model("random:tiny", device="cuda", controller="pixel")).model
    settings: dict[str, Any] = {"steps": 5, "scheduler": scheduler}
    sample_views(model, conditioner(model), **settings)
    modes = {1: "error", 4: "default"}

    def watch(stage: str, done: int, total: int) -> None:
        if done in modes:
            torch.cuda.set_sync_debug_mode(modes[done])

    try:
        sample_views(model, conditioner(model), **settings, on_progress=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_compiled_views_are_near_eager_ones(untuned: None, own_environment: Path) -> None:
    model = load_model("random:tiny", device="cuda", controller="pixel")
    settings: dict[str, Any] = {"seed": 1, "steps": 3}
    wanted = sample_views(model, conditioner(model), **settings)
    pipe = ImageTo3D(model, backends=Backends(unet="compiled"))
    found = sample_views(pipe.model, conditioner(model), **settings)
    assert (found - wanted).norm() / wanted.norm() < 2e-2
    assert pipe.views(object_picture(), steps=1).images.shape == (4, 64, 64, 3)


@gpu
def test_views_in_fp8_are_near_native_ones(untuned: None) -> None:
    if reason := survey(CUDA)["precision"]["fp8"]:
        pytest.skip(reason)
    model = load_model("random:tiny", device="cuda", controller="pixel")
    settings: dict[str, Any] = {"seed": 1, "steps": 3, "guidance_scale": 1.0}
    wanted = sample_views(model, conditioner(model), **settings)
    changed = ImageTo3D(model, backends=Backends(precision="fp8")).model
    found = [sample_views(changed, conditioner(changed), **settings) for _ in range(2)]
    assert torch.equal(*found)
    error = (found[0] - wanted).norm() / wanted.norm()
    assert 1e-4 < error < 0.2


@gpu
def test_a_fusion_leaves_the_encoders_out_and_brings_them_back(untuned: None) -> None:
    pipe = ImageTo3D(load_model("random:tiny", device="cuda", controller="pixel"))
    config = replace(SECONDS, warm_start=None, background_match="grey")
    places = []
    model = pipe.model
    assert model.vision is not None

    def look(stage: str, done: int, total: int) -> None:
        if stage == "fuse":
            places.append({next(network.parameters()).device.type for network in (model.text, model.vision)})

    pipe.fuse(object_picture(), "a ball", config, on_progress=look)
    assert places == [{"cpu"}] * config.steps
    assert next(model.text.parameters()).is_cuda
    assert len(model.unet._replays) == 0  # the step's own graph holds the network
    assert pipe.views(object_picture(), steps=1).images.shape == (4, 64, 64, 3)
