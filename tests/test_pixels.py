"""Pictures as tensors, resized: Pillow's levels, one by one."""

import numpy as np
import pytest
import torch
from PIL import Image

from imagedream_rt.engine.errors import InputError
from imagedream_rt.engine.pixels import check_pictures, resize, unit

SIZES = {
    "prepared picture for CLIP": (512, 512, 224, 224),
    "prepared picture for the VAE": (512, 512, 256, 256),
    "odd sizes": (61, 47, 57, 13),
    "enlarged": (7, 9, 56, 65),
    "one side": (40, 61, 40, 33),
    "the other side": (61, 40, 33, 40),
    "from one pixel": (1, 1, 9, 17),
    "to one pixel": (33, 70, 1, 1),
}


def pictures(height: int, width: int, seed: int) -> np.ndarray:
    """Noise, and black and white alone, where bicubic overshoots: uint8 [2, H, W, 3]."""
    noise = np.random.default_rng(seed).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    noise[1] = np.where(noise[1] < 128, 0, 255)
    return noise


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_level_is_pillows(
    sizes: tuple[int, int, int, int], resample: Image.Resampling, device: str
) -> None:
    height, width, to_height, to_width = sizes
    given = pictures(height, width, seed=height + to_width)
    wanted = [np.asarray(Image.fromarray(one).resize((to_width, to_height), resample)) for one in given]
    planes = torch.from_numpy(given).to(device).permute(0, 3, 1, 2)
    found = resize(planes, to_height, to_width, resample)
    assert found.shape == (2, 3, to_height, to_width)
    assert np.array_equal(found.permute(0, 2, 3, 1).cpu().numpy(), np.stack(wanted))


def test_what_has_the_size_is_not_touched() -> None:
    given = torch.zeros(1, 3, 5, 6, dtype=torch.uint8)
    assert resize(given, 5, 6, Image.Resampling.BICUBIC) is given


def test_levels_to_units() -> None:
    levels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert unit(levels).tolist() == torch.tensor([0.0, 0.2, 1.0]).tolist()


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 4, 4, 4), (0, 3, 4, 4), (1, 3, 4, 0)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"uint8 \[N, 3, H, W\]"):
        check_pictures(torch.zeros(shape, dtype=torch.uint8))
