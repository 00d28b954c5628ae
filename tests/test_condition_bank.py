"""The bank of all grey levels gives what the conditioner gives."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch

from imagedream_rt.engine.condition_bank import LEVELS, GreyBank, MatchedColour
from imagedream_rt.engine.conditioning import Conditioner
from imagedream_rt.engine.distill import matched_colour
from imagedream_rt.engine.model import Controller
from imagedream_rt.engine.picture import PreparedPicture
from imagedream_rt.engine.weights import load_model


@cache
def pair(controller: Controller) -> tuple[Conditioner, GreyBank]:
    model = load_model("random:tiny", controller=controller, device="cpu")
    rgba = np.random.default_rng(0).integers(0, 256, (48, 48, 4), dtype=np.uint8)
    picture = None if controller == "none" else PreparedPicture(rgba)
    conditioner = Conditioner(model, picture, "a cat", "ugly")
    return conditioner, GreyBank(conditioner)


@pytest.mark.parametrize("controller", ["pixel", "local"])
@pytest.mark.parametrize("grey", [0.0, 0.4999, 0.7, 1.0])
def test_bank_equals_conditioner(controller: Controller, grey: float):
    conditioner, bank = pair(controller)
    background = (grey + 0.1 * (torch.rand(4, 8, 8, 3) - 0.5)).clamp(0, 1) if 0 < grey < 1 else grey
    background = torch.as_tensor(background).expand(4, 8, 8, 3)
    expected = conditioner.at(matched_colour(background, "grey"))
    found = bank.at(background)
    for name in ("context", "image_mean", "image_std"):
        one, other = getattr(found, name), getattr(expected, name)
        if other is None:
            assert one is None
        else:
            torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("controller", ["pixel", "local", "none"])
def test_keys_and_values_are_those_of_the_conditions(controller: Controller):
    conditioner, bank = pair(controller)
    for level in (0, 200, 31):
        found = bank.at_level(torch.tensor([level]))
        assert found.key_values is not None
        assert found.image_tokens is None  # nobody reads them then
        given = conditioner.encode((level,) * 3)
        expected = conditioner.model.unet.prompt_key_values(given.context, given.image_tokens)
        for one, other in zip(found.key_values, expected, strict=True):
            for x, y in zip(one, other, strict=True):
                assert (x is None) == (y is None)
                if x is not None and y is not None:
                    torch.testing.assert_close(x, y, atol=2e-5, rtol=2e-4)
        alone = found.conditional().key_values
        assert alone is not None
        assert torch.equal(alone[0].k_text, found.key_values[0].k_text[:1])


def test_levels_differ_and_progress_is_told():
    conditioner, bank = pair("pixel")
    means = [bank.at_level(torch.tensor([level])).image_mean for level in (0, 1, 128, 255)]
    assert all((one - other).abs().max() > 1e-6 for one, other in pairwise(means))
    told: list[tuple[str, int, int]] = []
    GreyBank(conditioner, lambda *progress: told.append(progress))
    assert told[-1] == ("condition", LEVELS, LEVELS)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


@pytest.mark.parametrize("controller", ["pixel", "local"])
def test_matched_colour_is_the_conditioner_s_in_place(controller: Controller):
    conditioner, _ = pair(controller)
    conditions = MatchedColour(conditioner)
    background = torch.rand(4, 8, 8, 3)
    held = conditions.at(background)
    conditions.prepare(lambda: background)
    expected = conditioner.at(matched_colour(background, "colour"))
    for name in ("context", "image_tokens", "image_mean", "image_std"):
        assert getattr(conditions.at(background), name) is getattr(held, name)
        if getattr(expected, name) is not None:
            assert torch.equal(getattr(held, name), getattr(expected, name))
