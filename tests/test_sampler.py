"""Guided denoising and the sampling loop, against the released code's batches and trajectory."""

from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from imagedream_rt.engine import sampler as module
from imagedream_rt.engine.cameras import Cameras, official_views
from imagedream_rt.engine.conditioning import Conditioner, Conditioning
from imagedream_rt.engine.errors import Cancelled, ImageDreamError, InputError
from imagedream_rt.engine.model import Controller, ModelCard, MultiViewModel
from imagedream_rt.engine.picture import PreparedPicture
from imagedream_rt.engine.sampler import decode_views, denoise, denoise_guided, sample_views
from imagedream_rt.engine.schedule import alphas_cumprod
from imagedream_rt.engine.schedulers import SHORT_NAMES, DdimScheduler
from imagedream_rt.engine.weights import load_model

FIXTURES = Path(__file__).parent / "fixtures"
BATCH = load_file(FIXTURES / "denoise_batch.safetensors")
DDIM = load_file(FIXTURES / "ddim.safetensors")


@cache
def tiny(controller: Controller) -> MultiViewModel:
    return load_model("random:tiny", controller=controller, device="cpu")


@cache
def conditioner(controller: Controller) -> Conditioner:
    rgba = np.random.default_rng(0).integers(0, 256, (48, 48, 4), dtype=np.uint8)
    return Conditioner(tiny(controller), None if controller == "none" else PreparedPicture(rgba), "a cat")


@dataclass
class StubUNet:
    """Stands in for the UNet: remembers what it is given, answers with ``answer(latents, context, t)``."""

    answer: Any = None
    takes_key_values: bool = False
    calls: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, latents, timesteps, context, **rest):
        self.calls.append({"latents": latents, "timesteps": timesteps, "context": context, **rest})
        noise = latents if self.answer is None else self.answer(latents, context, timesteps)
        return noise[:, : rest["keep"]]

    def parameters(self):
        yield torch.zeros(1)


@dataclass
class StubConditioner:
    """Always the same conditioning."""

    conditioning: Conditioning

    def at_grey(self, grey: float) -> Conditioning:
        return self.conditioning


def stub_model(unet: StubUNet, controller: Controller = "local", latent_px: int = 8) -> MultiViewModel:
    @dataclass
    class Codec:
        downscale: int = 8

        def sample(self, mean, std, noise):
            return mean + std * noise

        def decode(self, latents):
            return latents[:, :3]

    card = ModelCard("stub", "imagedream", "random", controller, "", 8 * latent_px, "")
    parts: Any = {"unet": unet, "vae": Codec(), "text": None, "vision": None}
    return MultiViewModel(card=card, alphas_cumprod=alphas_cumprod(), **parts)


def relative_l2(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def text_rows(cond: torch.Tensor, uncond: torch.Tensor) -> Conditioning:
    return Conditioning(torch.stack([cond, uncond]), None, None, None)


@pytest.mark.parametrize(("controller", "frames"), [("pixel", 5), ("local", 4)])
def test_the_batch_of_two_groups_is_the_released_one(controller, frames):
    """Recorded in the released guidance with eight views; it repeats prompt rows over frames, we do not."""
    recorded = {key.split(".", 1)[1]: value for key, value in BATCH.items() if key.startswith(controller)}
    context = torch.cat([recorded["text_embeddings"], recorded["uncond_text_embeddings"]])
    tokens = torch.cat([recorded["image_embeddings"], torch.zeros_like(recorded["image_embeddings"])])
    image_latent = None
    if controller == "pixel":
        scaled = 0.18215 * recorded["prompt_latent"]
        image_latent = torch.cat([scaled, torch.zeros_like(scaled)])
    unet = StubUNet()
    eps_cond, eps_uncond = denoise_guided(
        stub_model(unet, controller, latent_px=4),
        recorded["latents_noisy"],
        recorded["t"][0],
        Cameras(recorded["c2w"], torch.ones(8)).embedding(),
        Conditioning(context, tokens, None, None),
        image_latent,
    )
    (call,) = unet.calls
    assert torch.equal(call["latents"].flatten(0, 1), recorded["x"])
    assert torch.equal(call["timesteps"][:, None].expand(-1, frames).flatten(), recorded["t"])
    assert (call["camera"].flatten(0, 1) - recorded["camera"]).abs().max() <= 1e-6
    assert torch.equal(call["context"].repeat_interleave(frames, 0), recorded["context"])
    assert torch.equal(call["image_tokens"].repeat_interleave(frames, 0), recorded["ip"])
    if controller == "pixel":
        assert torch.allclose(call["image_latent"], recorded["ip_img"], rtol=1e-6)
    else:
        assert call["image_latent"] is None
    assert torch.equal(eps_cond, recorded["latents_noisy"])
    assert torch.equal(eps_uncond, recorded["latents_noisy"])


def test_rows_keep_their_own_predictions():
    unet = StubUNet(lambda latents, context, t: latents + context.mean((1, 2))[:, None, None, None, None])
    latents = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    rows = text_rows(torch.full((77, 3), 2.0), torch.full((77, 3), -5.0))
    eps = denoise(stub_model(unet), latents, torch.tensor(3), torch.zeros(8, 16), rows, None)
    assert torch.equal(eps, torch.stack([latents + 2.0, latents - 5.0]))


def test_ten_step_trajectory_of_the_released_sampler(monkeypatch):
    matrix, x_t = DDIM["run10.M"], DDIM["run10.x_T"]

    def answer(latents, context, t):
        mixed = torch.einsum("oc,bfchw->bfohw", matrix, latents)
        return mixed + (t / 1000)[:, None, None, None, None] * context[:, :4, :, None, None]

    class FromRecordedNoise(DdimScheduler):
        def start(self, noise):
            assert noise.shape == x_t[:4].shape
            return x_t[:4]

        def step(self, step, latents, eps, generator):
            after = super().step(step, latents, eps, generator)
            assert relative_l2(after, DDIM["run10.x_steps"][step, :4]) < 1e-5
            return after

    monkeypatch.setattr(module, "named_scheduler", lambda name, *rest: FromRecordedNoise(*rest))
    rows = text_rows(DDIM["run10.bias_cond"], DDIM["run10.bias_uncond"])
    unet = StubUNet(answer)
    latents = sample_views(stub_model(unet), StubConditioner(rows), steps=10, guidance_scale=5.0)  # type: ignore[arg-type]
    assert relative_l2(latents, DDIM["run10.final"][:4]) < 1e-5
    assert [int(call["timesteps"][0]) for call in unet.calls] == DDIM["run10.t_called"][:, 0].tolist()


@pytest.mark.parametrize("controller", ["pixel", "local", "local-linear", "global", "none"])
def test_every_controller_gives_views_that_follow_the_seed_alone(controller):
    model = tiny(controller)
    torch.manual_seed(1)
    first = sample_views(model, conditioner(controller), steps=3, seed=5)
    torch.manual_seed(2)
    again = sample_views(model, conditioner(controller), steps=3, seed=5)
    other = sample_views(model, conditioner(controller), steps=3, seed=6)
    assert first.shape == (4, 4, 8, 8)
    assert first.dtype == torch.float32
    assert not first.is_inference()
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.1)
    pictures = decode_views(model, first)
    assert pictures.shape == (4, 64, 64, 3)
    assert pictures.dtype == np.uint8


def test_random_numbers_come_in_the_released_order():
    generator = torch.Generator().manual_seed(23)
    prompt_noise = torch.randn(1, 4, 8, 8, generator=generator)
    frame_noise = torch.randn(5, 4, 8, 8, generator=generator)
    one = torch.ones(1, 4, 8, 8)
    rows = Conditioning(torch.zeros(2, 77, 3), None, 3 * one, 2 * one)
    unet = StubUNet()
    sample_views(stub_model(unet, "pixel"), StubConditioner(rows), steps=1, seed=23)  # type: ignore[arg-type]
    (call,) = unet.calls
    assert torch.equal(call["latents"][0, :4], frame_noise[:4])
    assert torch.equal(call["image_latent"][:1], 3 + 2 * prompt_noise)
    assert (call["image_latent"][1] == 0).all()
    assert (call["camera"][:, 4] == 0).all()


def test_views_do_not_depend_on_what_stood_in_the_fifth_frame():
    model, conditioning = tiny("pixel"), conditioner("pixel").at_grey(0.5)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 4, 8, 8, generator=generator)
    image_latent = conditioning.image_latent(torch.randn(1, 4, 8, 8, generator=generator), model.vae)
    assert image_latent is not None
    camera, t = official_views(), torch.tensor(400)
    eps = denoise(model, latents, t, camera, conditioning, image_latent)
    five = torch.cat([latents, 100 * torch.randn(1, 4, 8, 8, generator=generator)])[None].expand(
        2, -1, -1, -1, -1
    )
    cameras = torch.cat([camera, torch.zeros(1, 16)])[None].expand(2, -1, -1)
    direct = model.unet(
        five,
        t.expand(2),
        conditioning.context,
        camera=cameras,
        image_latent=image_latent,
        image_tokens=conditioning.image_tokens,
    )
    assert torch.equal(eps, direct[:, :4])
    moved = denoise(model, latents, t, camera, conditioning, image_latent + 1.0)
    assert not torch.allclose(eps, moved, atol=1e-3)  # while the prompt in it does count


@pytest.mark.parametrize("controller", ["pixel", "local", "none"])
def test_groups_do_not_see_each_other(controller):
    model, conditioning = tiny(controller), conditioner(controller).at_grey(0.5)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(8, 4, 8, 8, generator=generator)
    camera = torch.cat([official_views(0.0), official_views(20.0, (10, 100, 190, 280))])
    image_latent = conditioning.image_latent(torch.randn(1, 4, 8, 8, generator=generator), model.vae)
    t = torch.tensor(700)
    together = denoise(model, latents, t, camera, conditioning, image_latent)
    for group in (slice(0, 4), slice(4, 8)):
        alone = denoise(model, latents[group], t, camera[group], conditioning, image_latent)
        assert relative_l2(alone, together[:, group]) < 1e-5


def test_denoising_never_reads_a_value_back():
    """On the meta device there are no values: a branch or a copy to the host would raise."""
    model = load_model("random:tiny", controller="pixel", device="cpu")
    model = replace(model, unet=model.unet.to("meta"))
    found = conditioner("pixel").at_grey(0.5)
    assert found.image_tokens is not None
    conditioning = Conditioning(found.context.to("meta"), found.image_tokens.to("meta"), None, None)
    latents = torch.empty(8, 4, 8, 8, device="meta")
    eps_cond, _ = denoise_guided(
        model,
        latents,
        torch.tensor(5, device="meta"),
        torch.empty(8, 16, device="meta"),
        conditioning,
        torch.empty(2, 4, 8, 8, device="meta"),
    )
    assert eps_cond.shape == latents.shape


def test_guidance_of_one_skips_the_unconditional_half():
    rows = text_rows(torch.full((77, 3), 0.5), torch.full((77, 3), float("nan")))
    unet = StubUNet(lambda latents, context, t: context.mean((1, 2))[:, None, None, None, None] + 0 * latents)
    sample_views(stub_model(unet), StubConditioner(rows), steps=3, guidance_scale=1.0)  # type: ignore[arg-type]
    assert [len(call["latents"]) for call in unet.calls] == [1] * 4
    skipped = sample_views(tiny("pixel"), conditioner("pixel"), steps=4, guidance_scale=1.0)
    nearly = sample_views(tiny("pixel"), conditioner("pixel"), steps=4, guidance_scale=1.0 + 1e-9)
    assert relative_l2(skipped, nearly) < 1e-4


def test_cameras_and_grey_reach_the_model():
    model, prompt = tiny("local"), conditioner("local")
    base = sample_views(model, prompt, steps=2)
    assert torch.equal(base, sample_views(model, prompt, steps=2, camera=official_views(), grey=0.5))
    assert not torch.equal(base, sample_views(model, prompt, steps=2, camera=official_views(20.0)))
    assert not torch.equal(base, sample_views(model, prompt, steps=2, grey=0.1))


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers with numpy 2
def test_other_schedulers_run_with_the_model():
    views = sample_views(tiny("pixel"), conditioner("pixel"), steps=3, scheduler="euler-a", seed=4)
    again = sample_views(tiny("pixel"), conditioner("pixel"), steps=3, scheduler="euler-a", seed=4)
    assert torch.equal(views, again)
    assert not torch.equal(views, sample_views(tiny("pixel"), conditioner("pixel"), steps=3, seed=4))


def test_progress_counts_every_step_and_cancel_stops_between_them():
    reports = []
    sample_views(
        tiny("none"), conditioner("none"), steps=30, on_progress=lambda *report: reports.append(report)
    )
    assert reports == [("views", done, 31) for done in range(1, 32)]
    reports.clear()
    with pytest.raises(Cancelled, match="after 2 of 5"):
        sample_views(
            tiny("none"),
            conditioner("none"),
            steps=5,
            on_progress=lambda *report: reports.append(report),
            cancel=lambda: len(reports) == 2,
        )


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
@pytest.mark.parametrize("scheduler", ["ddim", *SHORT_NAMES])
def test_a_seed_gives_the_same_views_on_the_gpu(scheduler):
    model = load_model("random:tiny", controller="pixel", device="cuda", dtype=torch.float32)
    prompt = conditioner("pixel")
    settings: dict[str, Any] = {"steps": 3, "seed": 3, "guidance_scale": 1.5, "scheduler": scheduler}
    there = sample_views(model, Conditioner(model, prompt.picture, "a cat"), **settings)
    assert there.device.type == "cuda"
    assert relative_l2(there.cpu(), sample_views(tiny("pixel"), prompt, **settings)) < 1e-2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": -2}, "steps is -2"),
        ({"guidance_scale": -0.1}, "guidance_scale is -0.1"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"grey": 1.5}, "grey is 1.5"),
        ({"grey": float("nan")}, "grey is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"scheduler": "fastest"}, "unknown scheduler 'fastest'"),
        ({"camera": torch.zeros(3, 16)}, "four views"),
    ],
)
def test_settings_out_of_range_are_refused(settings, says):
    with pytest.raises(InputError, match=says):
        sample_views(tiny("none"), conditioner("none"), **settings)


def test_views_that_are_not_finite_are_an_error():
    unet = StubUNet(lambda latents, context, t: latents * float("inf"))
    rows = text_rows(torch.zeros(77, 3), torch.zeros(77, 3))
    with pytest.raises(ImageDreamError, match="not finite after 2 steps of scheduler ddim"):
        sample_views(stub_model(unet), StubConditioner(rows), steps=2)  # type: ignore[arg-type]


def test_decoding_clamps_and_truncates():
    values = torch.tensor([-3.0, -1.0, 0.0, 0.9999, 1.0, 7.0])
    latents = values[:, None, None, None].expand(-1, 4, 8, 8)
    pictures = decode_views(stub_model(StubUNet()), latents)
    assert pictures.shape == (6, 8, 8, 3)
    assert pictures[:, 2, 3, 1].tolist() == [0, 0, 127, 254, 255, 255]
