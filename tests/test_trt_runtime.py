"""Running and refitting plans, on a stand-in for TensorRT: what is bound, shared, checked and refused."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import object_picture
from exports import small_model
from fake_tensorrt import SCRATCH, VERSION, Refitter, Runtime, fake_tensorrt
from test_manifest import make_manifest

from imagedream_rt.engine import backends
from imagedream_rt.engine.backends import Backends
from imagedream_rt.engine.conditioning import Conditioner
from imagedream_rt.engine.errors import ImageDreamError, InputError
from imagedream_rt.engine.picture import prepare
from imagedream_rt.engine.pipeline import ImageTo3D
from imagedream_rt.engine.sampler import denoise, sample_views
from imagedream_rt.export import plan_model, refit, trt_runtime
from imagedream_rt.export.components import component
from imagedream_rt.export.manifest import PlanManifest, Source, read_manifest
from imagedream_rt.export.plan_model import PlanUNet, plans_in, with_plans
from imagedream_rt.export.refit import refit_plan
from imagedream_rt.export.trt_plan import this_platform, weights_map
from imagedream_rt.export.trt_runtime import Plan, Workspace

ANY: dict[str, None] = defaultdict(lambda: None)
"""A survey in which everything can be used."""
SPEC = {"name": "sample", "shape": ["batch", 3], "dtype": "float32"}
OUT = {"name": "latent", "shape": ["batch", 3], "dtype": "float32"}


class Stream:
    """A CUDA stream that notes whom it waited for."""

    def __init__(self, name: str, number: int) -> None:
        self.name, self.cuda_stream, self.waited = name, number, []  # type: ignore[var-annotated]

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other.name)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An A100 whose memory is the CPU's."""
    small_model("pixel")  # libraries are imported with PyTorch as it is
    streams = SimpleNamespace(default=Stream("default", 0), own=Stream("own", 7))
    streams.current = streams.default
    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: streams.own)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: streams.current)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: streams.default)
    for module in (trt_runtime, plan_model):
        monkeypatch.setattr(module, "local_architecture", lambda: "sm80")
    monkeypatch.setattr(trt_runtime, "DEVICE", "cpu")
    monkeypatch.setattr(trt_runtime, "load_tensorrt", lambda flavour: fake_tensorrt())
    return streams


def write_plan(path: Path, *, scratch: int = SCRATCH, **changes: Any) -> Path:
    content = json.dumps({"scratch": scratch, **changes.pop("content", {})}).encode()
    path.write_bytes(content)
    manifest: PlanManifest = replace(
        make_manifest(content),
        version=VERSION,
        platform=this_platform(),
        inputs=[SPEC],
        outputs=[OUT],
        profile=(1, 2, 4),
        size_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    replace(manifest, **changes).save(path)
    return path


@pytest.fixture
def workspace() -> Workspace:
    return Workspace(torch.device("cpu"))


@pytest.fixture
def plan(tmp_path: Path, workspace: Workspace) -> Plan:
    return Plan(write_plan(tmp_path / "unet.sm80.plan"), fake_tensorrt(), workspace)


def context(number: int = -1) -> Any:
    return Runtime.engines[number].contexts[0]


def test_memory_is_bound_as_it_is(plan: Plan, workspace: Workspace) -> None:
    x = torch.randn(2, 3)
    (y,) = plan(x)
    assert torch.equal(y, 2 * x)
    assert context().addresses == {"sample": x.data_ptr(), "latent": y.data_ptr()}
    assert context().shapes == {"sample": (2, 3)}
    assert context().strategy == "user managed"
    assert context().memory == (workspace.memory.data_ptr(), SCRATCH)


def test_plans_share_the_greatest_activation_memory(tmp_path: Path, workspace: Workspace) -> None:
    tensorrt = fake_tensorrt()
    small = Plan(write_plan(tmp_path / "a.sm80.plan", scratch=100), tensorrt, workspace)
    large = Plan(write_plan(tmp_path / "b.sm80.plan", scratch=5000), tensorrt, workspace)
    small(torch.ones(1, 3))
    large(torch.ones(1, 3))
    assert workspace.memory.numel() == 5000
    assert context(0).memory == context(1).memory == (workspace.memory.data_ptr(), 5000)


def test_default_stream_is_left_for_one_of_our_own(plan: Plan, machine: SimpleNamespace) -> None:
    plan(torch.ones(1, 3))
    assert context().streams == [7]
    assert machine.own.waited == ["default"]
    assert machine.default.waited == ["own"]


def test_other_streams_are_used_as_they_are(plan: Plan, machine: SimpleNamespace) -> None:
    """A capturing stream, for example: waiting for another one would leave the graph."""
    machine.current = Stream("capturing", 3)
    plan(torch.ones(1, 3))
    assert context().streams == [3]
    assert machine.own.waited == machine.current.waited == []


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.ones(5, 3),), "was built for batches of 1 to 4, and got 5; build it with --profile"),
        ((torch.ones(2, 4),), r"sample is torch.float32 \[2, 4\]; .* takes torch.float32 \[2, 3\]"),
        ((torch.ones(2, 3).half(),), r"sample is torch.float16"),
        ((torch.ones(3, 2).T,), "must be contiguous and on the GPU"),
        ((torch.ones(2, 3), torch.ones(2, 3)), "takes sample; 2 tensors were given"),
    ],
)
def test_inputs_that_do_not_fit(plan: Plan, inputs: tuple[torch.Tensor, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(*inputs)


def test_a_failed_run_is_an_error(plan: Plan) -> None:
    context().works = False
    with pytest.raises(ImageDreamError, match="TensorRT did not run it"):
        plan(torch.ones(1, 3))


def test_refuses_before_deserializing(tmp_path: Path, workspace: Workspace) -> None:
    tensorrt = fake_tensorrt()
    for change, message in (
        ({"architecture": "sm89"}, "was built for sm89, and this GPU is sm80"),
        ({"sha256": "0"}, "its SHA-256 differs"),
        ({"version": "10.14"}, "here is tensorrt 10.13.3"),
    ):
        with pytest.raises(InputError, match=message):
            Plan(write_plan(tmp_path / "x.plan", **change), tensorrt, workspace)
    assert Runtime.engines == []


def test_a_plan_without_weights_is_refused(tmp_path: Path, workspace: Workspace) -> None:
    path = write_plan(tmp_path / "x.plan", refit=True, stripped=True)
    with pytest.raises(InputError, match="holds no weights; give it some: imagedream-rt refit"):
        Plan(path, fake_tensorrt(), workspace)


def test_a_plan_that_tensorrt_refuses(tmp_path: Path, workspace: Workspace) -> None:
    path = write_plan(tmp_path / "x.plan", content={"broken": True})
    with pytest.raises(ImageDreamError, match="TensorRT could not load it; rebuild it here"):
        Plan(path, fake_tensorrt(), workspace)


def unet_plan(folder: Path, name: str = "unet", **changes: Any) -> Path:
    """A stand-in that answers with twice the latents."""
    part = component(small_model("pixel"), name)
    assert part is not None
    described = [
        {"name": spec.name, "shape": spec.dims("batch"), "dtype": str(spec.dtype(part.dtype))[6:]}
        for spec in (*part.inputs, *part.outputs)
    ]
    given = {
        "inputs": described[:-1],
        "outputs": described[-1:],
        "source": Source("random:tiny", "", "pixel", 5),
        "dtype": "float32",
        "component": name,
    }
    return write_plan(folder / f"{name}.sm80.plan", **{**given, **changes})


def test_model_with_plans_denoises(tmp_path: Path) -> None:
    """The sampler's own call: every input in its place, the answer of the first four frames."""
    unet_plan(tmp_path)
    model = with_plans(small_model("pixel"), tmp_path)
    assert isinstance(model.unet, PlanUNet)
    assert model.device.type == "cpu"
    latents = torch.randn(4, 4, 8, 8)
    conditioning = SimpleNamespace(
        context=torch.randn(2, 77, 64),
        image_tokens=model.unet.embed_image(torch.randn(2, 17, 80)),
        key_values=None,
    )
    eps = denoise(
        model,
        latents,
        torch.tensor(500),
        torch.randn(4, 16),
        conditioning,
        torch.randn(2, 4, 8, 8),  # type: ignore[arg-type]
    )
    assert torch.equal(eps, (2 * latents).expand(2, -1, -1, -1, -1))
    assert list(context().shapes) == [
        "sample",
        "timestep",
        "encoder_hidden_states",
        "camera",
        "image_tokens",
        "image_latent",
    ]
    with pytest.raises(InputError, match="needs image_latent"):
        denoise(model, latents, torch.tensor(500), torch.randn(4, 16), conditioning, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("known", [True, False])
def test_cached_plan_gets_keys_and_values_of_every_group(tmp_path: Path, known: bool) -> None:
    """Two groups of views: each of the two rows of keys and values serves two rows of the batch."""
    unet_plan(tmp_path, "unet_cached")
    model = with_plans(small_model("pixel"), tmp_path)
    text, tokens = torch.randn(2, 77, 64), torch.randn(2, 4, 64)
    made = model.unet.prompt_key_values(text, tokens)
    conditioning = SimpleNamespace(context=text, image_tokens=tokens, key_values=made if known else None)
    latents = torch.randn(8, 4, 8, 8)
    eps = denoise(
        *(model, latents, torch.tensor(500), torch.randn(8, 16), conditioning),  # type: ignore[arg-type]
        torch.randn(2, 4, 8, 8),
    )
    assert torch.equal(eps, (2 * latents).expand(2, -1, -1, -1, -1))
    assert context_shapes()["key_text_03"] == (4, 77, 64)
    assert context_shapes()["value_image_00"] == (4, 4, 64)


def context_shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = context().shapes
    return found


def test_full_plan_refuses_keys_and_values(tmp_path: Path) -> None:
    unet_plan(tmp_path)
    model = with_plans(small_model("pixel"), tmp_path)
    made = model.unet.prompt_key_values(torch.randn(2, 77, 64), torch.randn(2, 4, 64))
    with pytest.raises(InputError, match="export the component unet_cached"):
        model.unet(torch.randn(2, 5, 4, 8, 8), torch.tensor([1, 2]), None, key_values=made)


def test_pipeline_with_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet_plan(tmp_path, "unet_cached")
    monkeypatch.setattr(
        backends, "survey", lambda device: dict.fromkeys(("unet", "vae", "clip", "precision"), ANY)
    )
    pipe = ImageTo3D(small_model("pixel"), plans=plans_in(tmp_path))
    assert isinstance(pipe.model.unet, PlanUNet)
    assert (pipe.used.unet, pipe.used.vae) == ("tensorrt", "eager")
    images = pipe.views(object_picture(), "a ball", steps=2).images
    assert images.shape == (4, 64, 64, 3)
    assert context_shapes()["key_text_03"] == (2, 77, 64)
    for asked, message in (
        (Backends(attention="torch"), "attention 'torch' cannot be chosen with plans"),
        (Backends(unet="eager"), "there are plans, and unet=eager, vae=eager use none"),
        (Backends(precision="fp8"), "precision=fp8 cannot be used with a plan of the UNet"),
    ):
        with pytest.raises(InputError, match=message):
            ImageTo3D(small_model("pixel"), backends=asked, plans=plans_in(tmp_path))


@pytest.mark.parametrize("name", ["unet", "unet_cached"])
def test_keys_and_values_of_all_steps_are_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Outside of the plan, if the plan has inputs for them."""
    unet_plan(tmp_path, name)
    model = with_plans(small_model("pixel"), tmp_path)
    made, make = [], PlanUNet.prompt_key_values
    monkeypatch.setattr(
        PlanUNet,
        "prompt_key_values",
        lambda *given: made.append(1) or make(*given),  # type: ignore[func-returns-value]
    )
    sample_views(model, Conditioner(model, prepare(object_picture()), "a ball"), steps=4)
    assert len(made) == (name == "unet_cached")


def test_model_with_plans_of_another_checkpoint(tmp_path: Path) -> None:
    unet_plan(tmp_path, source=Source("other", "123", "pixel", 5))
    with pytest.raises(InputError, match="was made of other, and not of random:tiny"):
        with_plans(small_model("pixel"), tmp_path)


def test_model_without_plans(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"has no unet_cached.sm80.plan; make it: imagedream-rt export random:tiny"
    ):
        with_plans(small_model("pixel"), tmp_path)


def adaptor_plan(folder: Path, **changes: Any) -> Path:
    """A stand-in whose weights are those of the image adaptor."""
    part = component(small_model("pixel"), "image_adaptor")
    assert part is not None
    sizes = {}
    for name, x in part.module.named_parameters():
        sizes[name + (".T" if name.endswith("proj_in.weight") else "")] = x.numel()
    given = {
        "component": "image_adaptor",
        "source": Source("random:tiny", "", "pixel", 5),
        "dtype": "float32",
        "refit": True,
        "stripped": True,
        "weights": weights_map(tuple(sizes)),
        "content": {"weights": sizes},
    }
    return write_plan(folder / "image_adaptor.sm80.plan", **{**given, **changes})


def test_refit_sets_every_weight(tmp_path: Path) -> None:
    model = small_model("pixel")
    path = adaptor_plan(tmp_path)
    written = refit_plan(path, model, tmp_path / "new.sm80.plan")
    weights = model.unet.image_embed.proj_in.weight
    assert Refitter.made.done
    assert Refitter.made.values["image_embed.proj_in.weight.T"] == weights.T.flatten().tolist()
    assert Refitter.made.get_missing_weights() == []
    manifest = read_manifest(written)
    assert manifest.stripped is False
    assert manifest.sha256 == hashlib.sha256(written.read_bytes()).hexdigest()
    assert json.loads(written.read_bytes())["flags"] == ["INCLUDE_REFIT"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"refit": False}, "was not built to be refitted"),
        ({"source": Source("x", "", "local", 4)}, "has controller pixel, and .* was built for local"),
        ({"dtype": "float16"}, "computes in float16, and the model was loaded as torch.float32"),
        ({"weights": {"no.such": {}}}, "the checkpoint has no tensor for no.such"),
        ({"content": {"weights": {}}}, "TensorRT refuses image_embed.latents as torch.float32"),
    ],
)
def test_refit_refuses(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = adaptor_plan(tmp_path, **changes)
    before = path.read_bytes()
    with pytest.raises(InputError, match=message):
        refit_plan(path, small_model("pixel"), path)
    assert path.read_bytes() == before


def test_refit_that_misses_weights(tmp_path: Path) -> None:
    path = adaptor_plan(tmp_path, weights={})
    with pytest.raises(ImageDreamError, match=r"the plan also needs the weights image_embed\.\w+"):
        refit_plan(path, small_model("pixel"), path)


def test_refit_from_checkpoint_loads_in_the_plans_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def load(model: str, **given: Any) -> Any:
        asked.update(given, model=model)
        return small_model("pixel")

    monkeypatch.setattr(refit, "load_model", load)
    path = adaptor_plan(tmp_path)
    with contextlib.suppress(InputError):
        refit.refit_from_checkpoint(path, "random:tiny", path)
    assert asked == {"model": "random:tiny", "device": "cpu", "dtype": torch.float32, "controller": "pixel"}
