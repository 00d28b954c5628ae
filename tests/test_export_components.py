"""Which parts of a model are exported, and that they are the engine's own functions."""

from __future__ import annotations

import pytest
import torch
from exports import small_model

from imagedream_rt.engine.errors import InputError
from imagedream_rt.engine.model import Controller
from imagedream_rt.export.components import COMPONENTS, chosen, component, draw


@pytest.mark.parametrize("controller", ["pixel", "local", "local-linear", "global", "none"])
def test_every_component_computes_the_shapes_it_promises(controller: Controller) -> None:
    for part in chosen((), small_model(controller)):
        inputs = part.example(3, torch.Generator().manual_seed(0))
        with torch.no_grad():
            found = part(*inputs)
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


def test_cached_unet_is_the_full_one() -> None:
    """Keys and values from one component into the other: the same noise as from context and tokens."""
    model = small_model("pixel")
    full, cached, keys = (component(model, name) for name in ("unet", "unet_cached", "key_values"))
    assert full is not None
    assert cached is not None
    assert keys is not None
    inputs = full.example(2, torch.Generator().manual_seed(3))
    given = {spec.name: x for spec, x in zip(full.inputs, inputs, strict=True)}
    with torch.no_grad():
        made = keys(given["encoder_hidden_states"], given["image_tokens"])
        given |= {spec.name: x for spec, x in zip(keys.outputs, made, strict=True)}
        (found,) = cached(*(given[spec.name] for spec in cached.inputs))
        (wanted,) = full(*inputs)
    assert torch.allclose(found, wanted, atol=1e-5)
    names = [spec.name for spec in cached.inputs]
    assert names[:4] == ["sample", "timestep", "camera", "image_latent"]
    assert names[4:8] == ["key_text_00", "value_text_00", "key_text_01", "value_text_01"]
    assert names[-1] == "value_image_03"
