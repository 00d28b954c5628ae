"""Which parts of a model are exported, and that they are the engine's own functions."""

from __future__ import annotations

import pytest
import torch
from exports import small_model

from imagedream_rt.engine.errors import InputError
from imagedream_rt.engine.model import Controller
from imagedream_rt.export.wrappers import COMPONENTS, chosen, component, draw


@pytest.mark.parametrize("controller", ["pixel", "local", "local-linear", "global", "none"])
def test_every_component_computes_the_shapes_it_promises(controller: Controller) -> None:
    for part in chosen((), small_model(controller)):
        inputs = part.example(3, torch.Generator().manual_seed(0))
        with torch.no_grad():
            found = part.module(*inputs)
        found = found if isinstance(found, tuple) else (found,)
        assert [list(x.shape) for x in found] == [spec.dims(3) for spec in part.outputs]


def test_text_only_models_have_no_picture_parts() -> None:
    model = small_model("none")
    names = [part.name for part in chosen((), model)]
    assert set(COMPONENTS) - set(names) == {"image_adaptor", "image_encoder"}
    with pytest.raises(InputError, match="is conditioned on text alone and has no image_adaptor"):
        chosen(["image_adaptor"], model)


def test_unknown_component() -> None:
    with pytest.raises(InputError, match="unknown component 'no'; the components are unet"):
        component(small_model("pixel"), "no")


def test_unet_is_the_engines() -> None:
    model = small_model("pixel")
    part = component(model, "unet")
    assert part is not None
    sample, timestep, context, camera, tokens, latent = part.example(2, torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model.unet(
            sample, timestep, context, camera=camera, image_tokens=tokens, image_latent=latent
        )
        assert torch.equal(part.module(sample, timestep, context, camera, tokens, latent), wanted)


def test_examples_have_the_range_in_use() -> None:
    part = component(small_model("pixel", torch.float16), "unet")
    assert part is not None
    generator = torch.Generator().manual_seed(2)
    drawn = {spec.name: draw(spec, 32, torch.float16, generator) for spec in part.inputs}
    assert drawn["timestep"].dtype == torch.int64
    assert 0 <= int(drawn["timestep"].min()) < 200 < 800 < int(drawn["timestep"].max()) < 1000
    assert drawn["sample"].dtype == torch.float16
    assert 0.9 < float(drawn["sample"].float().std()) < 1.1
