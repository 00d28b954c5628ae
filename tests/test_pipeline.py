"""ImageTo3D: the same job from Python."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import tiny
from command_line import SECONDS, object_picture

from imagedream_rt import Asset, ImageTo3D, InputError
from imagedream_rt.engine import pipeline
from imagedream_rt.engine.cameras import orbit_cameras
from imagedream_rt.engine.cli_job import fusion_config
from imagedream_rt.engine.config import DRAFT, OFFICIAL, PRESETS
from imagedream_rt.engine.errors import Cancelled
from imagedream_rt.engine.model import Controller
from imagedream_rt.engine.picture import PreparedPicture, prepare
from imagedream_rt.engine.results import load_fused, make_asset

MESH = {"faces": 500, "texture_px": 64}


@pytest.fixture(scope="module")
def pipe() -> ImageTo3D:
    return ImageTo3D(tiny("pixel"))


def test_from_pretrained() -> None:
    pipe = ImageTo3D.from_pretrained("random:tiny", device="cpu", dtype=torch.bfloat16, controller="local")
    assert pipe.model.card.controller == "local"
    assert pipe.model.dtype == torch.bfloat16


def test_every_kind_of_picture_gives_the_same_views(pipe: ImageTo3D, picture: Path) -> None:
    image = object_picture()
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    kinds: list[Any] = [picture, str(picture), picture.read_bytes(), image, array, tensor, tensor / 255]
    kinds.append(prepare(image))
    results = [pipe.views(kind, steps=1).images for kind in kinds]
    assert results[0].shape == (4, 64, 64, 3)
    assert results[0].dtype == np.uint8
    assert all((result == results[0]).all() for result in results)


def test_views_keep_what_the_model_saw(pipe: ImageTo3D, tmp_path: Path) -> None:
    views = pipe.views(object_picture(), "a ball", seed=3, steps=2, guidance_scale=4.0, grey=0.25)
    assert views.prompt is not None
    assert (views.prompt[0, 0] == 63).all()  # 255 * 0.25, truncated
    assert views.metadata["views"]["guidance_scale"] == 4.0
    assert views.metadata["seed"] == 3
    assert views.metadata["picture"]["side_px"] == views.prompt.shape[0]
    assert set(views.metadata["timings_s"]) == {"prepare", "views"}
    json.dumps(views.metadata, allow_nan=False)
    views.save(tmp_path / "v.png")
    assert (tmp_path / "v.png").is_file()


def test_keep_background(pipe: ImageTo3D) -> None:
    opaque = object_picture().convert("RGB")
    views = pipe.views(opaque, steps=1, keep_background=True)
    assert views.prompt is not None
    assert (views.prompt[0, 0] == 0).all()


def prompts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The (prompt, negative prompt) of every conditioner made from now on."""
    seen = []

    class Noted(pipeline.Conditioner):
        def __init__(self, model: Any, picture: PreparedPicture | None, prompt: str, negative: str) -> None:
            seen.append((prompt, negative))
            super().__init__(model, picture, prompt, negative)

    monkeypatch.setattr(pipeline, "Conditioner", Noted)
    return seen


def test_released_prompts(pipe: ImageTo3D, monkeypatch: pytest.MonkeyPatch) -> None:
    """The suffix goes to the views only, and views and fusion each have their own negative prompt."""
    seen = prompts(monkeypatch)
    pipe.generate(object_picture(), "a ball", SECONDS, view_steps=1, **MESH)
    assert [prompt for prompt, _ in seen] == ["a ball, 3d asset", "a ball"]
    assert [negative.split(",")[0] for _, negative in seen] == ["uniform low no texture ugly", "ugly"]
    seen.clear()
    pipe.views(object_picture(), negative_prompt="dull", steps=1)
    assert seen == [(", 3d asset", "dull")]


def test_embedded_family_has_its_own_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("pixel")
    small = ImageTo3D(replace(model, card=replace(model.card, family="nano")))
    assert small.default_preset == "draft"
    assert ImageTo3D(model).default_preset == "official"
    seen = prompts(monkeypatch)
    small.views(object_picture(), "a ball", steps=1)
    assert seen == [("a ball", "")]


def test_presets_for_every_model_follow_the_embedded_one() -> None:
    model = tiny("pixel")
    small = ImageTo3D(replace(model, card=replace(model.card, family="nano")))
    for name in ("fast", "turbo"):
        config = small._config(name)
        assert (config.guidance_scale, config.camera) == (DRAFT.guidance_scale, DRAFT.camera)
        assert replace(config, guidance_scale=5.0, camera=OFFICIAL.camera) == PRESETS[name]
        assert ImageTo3D(model)._config(name) == PRESETS[name]
    assert small._config("official") == OFFICIAL
    changed = PRESETS["turbo"].changed(steps=3)
    assert small._config(changed) == changed
    assert fusion_config(small, "turbo", 7, None) == small._config("turbo").changed(steps=7)


def test_generate(pipe: ImageTo3D, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    asset = pipe.generate(
        object_picture(),
        "a ball",
        SECONDS,
        seed=11,
        view_steps=2,
        on_progress=lambda *call: calls.append(call),
        **MESH,
    )
    assert isinstance(asset, Asset)
    stages = list(dict.fromkeys(stage for stage, _, _ in calls))
    assert stages == ["prepare", "views", "warm-start", "fuse", "mesh"]
    for stage in stages:
        last = [call for call in calls if call[0] == stage][-1]
        assert last[1] == last[2], last
    assert all(0 <= done <= total for _, done, total in calls)

    assert asset.views is not None
    assert asset.views.shape == (4, 64, 64, 3)
    assert asset.metadata["fusion"]["name"] == "seconds"
    assert asset.metadata["views"]["guidance_scale"] == SECONDS.guidance_scale
    assert asset.metadata["backends"] == {"asked": asdict(pipe.backends), "used": asdict(pipe.used)}
    assert asset.metadata["mesh"]["faces"] == asset.report.faces
    assert set(asset.metadata["timings_s"]) == {"prepare", "views", "fuse", "mesh"}
    rendered = asset.render(orbit_cameras([0.0, 90.0], 0.0, 40.0, 2.0), 16)
    assert rendered.rgb.shape == (2, 16, 16, 3)
    asset.save(tmp_path / "x.ply")
    assert (tmp_path / "x.ply").stat().st_size > 0


def test_same_seed_same_asset(pipe: ImageTo3D) -> None:
    first, second = (
        pipe.generate(object_picture(), "", SECONDS, 5, view_steps=1, **MESH).mesh for _ in range(2)
    )
    assert (first.vertices == second.vertices).all()
    assert (first.faces == second.faces).all()
    textures = [np.asarray(mesh.visual.material.baseColorTexture) for mesh in (first, second)]
    assert (textures[0] == textures[1]).all()


@pytest.mark.parametrize("stage", ["prepare", "views", "warm-start", "fuse", "mesh"])
def test_cancel(pipe: ImageTo3D, tmp_path: Path, stage: str) -> None:
    """Each stage stops when it is asked to; from the fitted views on there is something to continue from."""
    reached: list[str] = []
    state = tmp_path / "state.safetensors"
    with pytest.raises(Cancelled):
        pipe.generate(
            object_picture(),
            "",
            SECONDS,
            view_steps=2,
            checkpoint=state,
            on_progress=lambda now, done, total: reached.append(now),
            cancel=lambda: stage in reached,
            **MESH,
        )
    assert reached[-1] == stage
    assert state.is_file() == (stage in ("fuse", "mesh"))


def test_resume_needs_a_checkpoint(pipe: ImageTo3D) -> None:
    with pytest.raises(InputError, match="checkpoint"):
        pipe.fuse(object_picture(), "", SECONDS, resume=True)


@pytest.mark.parametrize("controller", ["none", "global", "local-linear", "local"])
def test_every_controller(controller: Controller) -> None:
    pipe = ImageTo3D(tiny(controller))
    picture = None if controller == "none" else object_picture()
    views = pipe.views(picture, "a ball", steps=1)
    assert views.images.shape == (4, 64, 64, 3)
    assert (views.prompt is None) == (controller == "none")
    fused = pipe.fuse(picture, "a ball", SECONDS.changed(steps=1))
    assert fused.metadata["model"]["controller"] == controller


def test_saved_nerf_keeps_its_record(pipe: ImageTo3D, tmp_path: Path) -> None:
    fused = pipe.fuse(object_picture(), "", SECONDS, seed=9)
    paths = fused.save_all(tmp_path)
    assert [path.name for path in paths] == ["nerf.safetensors", "preview.png", "metadata.json"]
    assert all(path.is_file() for path in paths)
    asset = make_asset(load_fused(paths[0], "cpu"), **MESH)
    assert asset.metadata["seed"] == 9
    assert set(asset.metadata["timings_s"]) == {"prepare", "fuse", "mesh"}

    # The record of another fusion is not taken for this one's.
    other = json.loads(paths[2].read_text())
    other["fusion"]["steps"] += 1
    for text in (json.dumps(other), "[]", "not JSON"):
        paths[2].write_text(text)
        assert set(load_fused(paths[0], "cpu").metadata) == {"fusion"}


@pytest.mark.gpu
def test_generate_on_the_gpu() -> None:
    pipe = ImageTo3D.from_pretrained("random:tiny", device="cuda")
    assert pipe.model.dtype == torch.float16
    asset = pipe.generate(object_picture(), "", SECONDS, view_steps=2, **MESH)
    assert asset.metadata["environment"]["device"].startswith("cuda")
    assert asset.report.faces > 0
