"""The trainer of the embedded model: data, losses, a run in miniature, resuming."""

import math

import pytest
import torch

from imagedream_rt.engine.cameras import orbit_cameras
from imagedream_rt.engine.errors import InputError
from imagedream_rt.engine.graphed import GraphedStep
from imagedream_rt.engine.schedule import alphas_cumprod
from imagedream_rt.engine.training import nano
from imagedream_rt.engine.training.codec_trainer import Averages, blurred, codec_loss
from imagedream_rt.engine.training.dataset import CAMERA, GroupSampler, look_at_origin, signed
from imagedream_rt.engine.training.denoiser_trainer import Denoiser, LatentPool, denoising_loss, learning_rate
from imagedream_rt.engine.training.objects import TEST_SEEDS
from imagedream_rt.engine.training.trainer import Trainer
from imagedream_rt.engine.weights import load_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def groups():
    return GroupSampler(32, CPU, torch.Generator().manual_seed(3), max_seed=TEST_SEEDS, chunk=2)


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    nano.write_tokenizer(folder)
    torch.manual_seed(0)
    return Denoiser(nano.new_unet(), nano.new_text(folder), nano.new_vision())


def test_batched_cameras_are_the_projects_cameras():
    azimuth, elevation = torch.tensor([0.0, 77.0, 200.0]), torch.tensor([0.0, 12.0, -4.0])
    ours = look_at_origin(azimuth, elevation, torch.full((3,), 1.7))
    theirs = orbit_cameras(azimuth.tolist(), elevation.tolist(), 45.0, 1.7).c2w
    assert (ours - theirs).abs().max() < 1e-6


def test_groups_share_their_background_and_follow_the_camera_ranges(groups):
    drawn = groups.sample()
    assert drawn.views.shape == (2, 4, 32, 32, 3)
    assert drawn.prompt.shape == (2, 32, 32, 3)
    corners = torch.cat((drawn.views[:, :, 0, 0], drawn.prompt[:, None, 0, 0]), 1)
    assert torch.equal(corners, corners[:, :1].expand_as(corners))
    position = drawn.camera.view(2, 4, 4, 4)[..., :3, 3]
    assert torch.allclose(position.norm(dim=-1), torch.ones(2, 4), atol=1e-5)
    elevation = torch.rad2deg(position[..., 2].asin())
    low, high = CAMERA.elevation_deg
    assert elevation.min() >= low - 1e-3
    assert elevation.max() <= high + 1e-3
    assert torch.allclose(
        position.sum(1)[:, :2], torch.zeros(2, 2), atol=1e-5
    )  # four sides, 90 degrees apart


def test_seeds_of_test_objects_are_never_drawn(groups):
    seen = torch.cat([groups._objects().seed for _ in range(20)])
    assert seen.max() < TEST_SEEDS
    assert len(seen.unique()) == len(seen)


def test_codec_loss_prefers_the_right_picture_and_reaches_every_parameter():
    torch.manual_seed(0)
    codec = nano.new_codec()
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    loss = codec_loss(codec, pictures)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in codec.parameters())
    decoded = codec.vae.decode(codec.vae.encode(pictures).latent_dist.mean).sample.detach()
    assert codec_loss(codec, decoded) < loss


def test_blurring_touches_a_quarter_of_the_batch():
    pictures = torch.rand(16, 3, 32, 32)
    mixed = blurred(pictures)
    assert mixed.shape == pictures.shape
    assert torch.equal(mixed[:12], pictures[4:])
    assert mixed[12:].diff(dim=-1).abs().mean() < 0.5 * pictures[:4].diff(dim=-1).abs().mean()


def test_denoising_loss_starts_at_its_expectation_and_trains_what_inference_runs(groups, denoiser):
    """A UNet that predicts zero has the loss E[min(SNR, 5) / SNR]; later every used parameter gets a gradient."""
    big = GroupSampler(nano.PICTURE_PX, CPU, torch.Generator().manual_seed(4), max_seed=TEST_SEEDS, chunk=1)
    pool = LatentPool(big, nano.new_codec().eval(), denoiser.text, 2)
    abar = alphas_cumprod()
    snr = abar / (1 - abar)
    weight = snr.clamp_max(5.0) / snr
    torch.manual_seed(1)
    batch = pool.draw(2)
    with torch.no_grad():
        losses = torch.stack([denoising_loss(denoiser, batch, pool.empty, abar) for _ in range(6)])
    error = weight.std().item() / math.sqrt(12)
    assert abs(losses.mean().item() - weight.mean().item()) < 5 * error + 0.05
    for parameter in denoiser.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    denoising_loss(denoiser, batch, pool.empty, abar).backward()
    unused = {name for name, p in denoiser.named_parameters() if p.grad is None}
    assert {n.split(".layers.")[-1].split(".")[0] for n in unused if ".layers." in n} <= {
        "3"
    }  # the block not run
    assert all(n.startswith("vision.") for n in unused)


def test_learning_rate_warms_up_and_anneals():
    assert learning_rate(0, 0.0) < learning_rate(200, 0.0) < learning_rate(400, 0.0)
    assert learning_rate(10_000, 0.0) > learning_rate(10_000, 0.5) > learning_rate(10_000, 1.0) > 0


def test_averages_follow_the_parameters():
    layer = torch.nn.Linear(3, 3)
    averages = Averages(layer, 0.9)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    for step in range(200):
        averages.update(layer, step)
    assert torch.allclose(averages.module.weight, layer.weight, atol=1e-4)
    assert not averages.module.weight.requires_grad


def test_graphed_step_runs_every_call():
    total = torch.zeros(())
    step = GraphedStep(lambda: total.add_(1), CPU)
    for _ in range(9):
        step()
    assert total.item() == 9


@pytest.mark.gpu
def test_graphed_step_replays_the_same_training():
    def run(graphed: bool) -> torch.Tensor:
        torch.manual_seed(0)
        layer = torch.nn.Linear(8, 8).cuda()
        rate = torch.full((), 0.01, device="cuda")
        optimizer = torch.optim.AdamW(layer.parameters(), lr=rate, fused=True, capturable=True)
        data = torch.randn(32, 8, device="cuda")

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            (layer(data) - data).square().mean().backward()
            optimizer.step()

        call = GraphedStep(step, torch.device("cuda")) if graphed else step
        for _ in range(30):
            call()
        return layer.weight.detach().cpu()

    assert torch.allclose(run(True), run(False), atol=1e-6)


@pytest.mark.slow
def test_a_training_in_miniature_resumes_and_leaves_a_model_that_loads(tmp_path):
    lines = []
    trainer = Trainer(tmp_path, minutes=0.05, device=CPU, batch=1)
    folder = trainer.run(lambda line, used: lines.append(used))
    assert trainer.used_seconds > 0
    resumed = Trainer(tmp_path, minutes=trainer.used_seconds / 60 + 0.25, device=CPU, batch=1)
    resumed.resume()
    assert resumed.codec is not None
    assert resumed.step == trainer.step
    first, second = trainer.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    resumed.run(lambda line, used: lines.append(used))
    assert resumed.step > trainer.step
    model = load_model(folder, device="cpu")
    assert model.card.family == "nano"
    assert model.frames == 5
    assert sum(p.numel() for p in model.unet.parameters()) == 11_690_308


def test_nothing_to_resume_or_to_do_is_bad_input(tmp_path):
    with pytest.raises(InputError, match="minutes"):
        Trainer(tmp_path, minutes=0, device=CPU, batch=1)
    with pytest.raises(InputError, match="batch"):
        Trainer(tmp_path, minutes=1, device=CPU, batch=0)
    with pytest.raises(InputError, match="no file"):
        Trainer(tmp_path, minutes=1, device=CPU, batch=1).resume()


def test_signed_pictures_are_the_codecs_input():
    assert signed(torch.tensor([[[[0, 255, 51]]]], dtype=torch.uint8)).flatten().tolist() == pytest.approx(
        [-1, 1, -0.6]
    )
