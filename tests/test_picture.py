"""Prompt pictures: read from everything a user may give, prepared, and put over a colour."""

import io
import struct
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from imagedream_rt.engine import picture as module
from imagedream_rt.engine.errors import InputError, MissingDependency
from imagedream_rt.engine.picture import OBJECT_FRACTION, composite, load_picture, prepare

RECORDED = load_file(Path(__file__).parent / "fixtures" / "background.safetensors")
RED = (200, 30, 40)


def cut_out(height: int = 60, width: int = 80, under: tuple[int, int, int] = (0, 255, 0)) -> np.ndarray:
    """A soft-edged red ellipse in the upper left part; ``under`` is the colour where alpha is 0."""
    y, x = np.mgrid[:height, :width] + 0.5
    radius = np.hypot((x - 0.35 * width) / (0.3 * width), (y - 0.3 * height) / (0.25 * height))
    alpha = np.clip((1.1 - radius) / 0.2, 0.0, 1.0)
    rgba = np.full((height, width, 4), (*RED, 0), np.uint8)
    rgba[..., 3] = np.rint(alpha * 255)
    rgba[rgba[..., 3] == 0, :3] = under
    return rgba


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(64)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def visible_box(rgba: np.ndarray) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the half-covered pixels."""
    rows, columns = np.nonzero(rgba[..., 3] > 127)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def over(rgba: np.ndarray, *colour: float) -> np.ndarray:
    """uint8 [H, W, 3]."""
    return composite(torch.from_numpy(rgba), torch.tensor([colour]))[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("case", range(len(RECORDED["greys"])))
def test_composite_equals_the_released_code_bit_for_bit(case):
    grey = float(RECORDED["greys"][case])
    assert np.array_equal(over(RECORDED["rgba"], grey, grey, grey), RECORDED["composites"][case])


@pytest.mark.parametrize("grey", ["200.0", "37.25"])
def test_composite_of_a_recorded_prompt(grey):
    level = float(grey)
    assert np.array_equal(over(RECORDED["prompt"], level, level, level), RECORDED[f"bg{grey}.composite"])


def test_composite_takes_a_colour_and_truncates():
    rgba = np.array([[[10, 20, 30, 128], [1, 2, 3, 0], [7, 8, 9, 255]]], np.uint8)
    # 10 * 128/255 + 255 * 127/255 = 132.02; 20 * 128/255 = 10.04; 30 * 128/255 + 100 * 127/255 = 64.86
    assert over(rgba, 255.0, 0.0, 100.9).tolist() == [[[132, 10, 65], [255, 0, 100], [7, 8, 9]]]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_composite_over_every_grey_is_numpys_float32_to_the_bit(device):
    """Each level before each alpha, over each grey: all that can happen."""
    colour, alpha = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    rgba = np.stack([colour, colour[:, ::-1], colour[::-1], alpha], axis=-1)
    greys = torch.arange(256.0, device=device)[:, None].expand(-1, 3)
    got = composite(torch.from_numpy(rgba).to(device), greys).cpu().numpy()
    share = alpha.astype(np.float32) / 255.0
    front = rgba[..., :3] * share[..., None]
    for grey, found in enumerate(got):
        want = (front + np.float32(grey) * (1 - share)[..., None]).astype(np.uint8)
        assert np.array_equal(found, want.transpose(2, 0, 1))


@pytest.mark.parametrize("form", ["path", "str", "bytes", "pil", "hwc", "chw", "float", "tensor", "half"])
def test_every_form_of_source_gives_the_same_picture(form, tmp_path):
    rgba = cut_out()
    picture = Image.fromarray(rgba)
    path = tmp_path / "picture.png"
    picture.save(path)
    unit = torch.from_numpy(rgba).permute(2, 0, 1) / 255
    source = {
        "path": path,
        "str": str(path),
        "bytes": path.read_bytes(),
        "pil": picture,
        "hwc": rgba,
        "chw": rgba.transpose(2, 0, 1),
        "float": rgba.astype(np.float64) / 255,
        "tensor": unit.requires_grad_(),
        "half": unit.detach().half(),
    }[form]
    loaded = load_picture(source)
    assert loaded.mode == "RGBA"
    assert np.array_equal(np.asarray(loaded), rgba)


def test_ambiguous_shapes_are_channels_first_for_tensors_and_last_for_arrays():
    levels = np.arange(4 * 20 * 4, dtype=np.uint8).reshape(4, 20, 4)
    with pytest.raises(InputError, match="20 x 4 pixels"):
        load_picture(levels)
    with pytest.raises(InputError, match="4 x 20 pixels"):
        load_picture(torch.from_numpy(levels))
    grey = np.arange(100, dtype=np.uint8).reshape(10, 10)
    assert np.asarray(load_picture(grey))[3, 4].tolist() == [34, 34, 34]
    assert np.array_equal(np.asarray(load_picture(torch.from_numpy(grey)[None])), np.stack([grey] * 3, -1))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "RGB", "I;16", "I", "F"])
def test_opaque_modes_become_rgb(mode):
    ramp = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (12, 1))
    if mode == "I;16":
        picture = Image.fromarray(ramp.astype(np.uint16) * 257)
    elif mode == "I":
        picture = Image.fromarray(ramp.astype(np.int32) * 257)
    elif mode == "F":
        picture = Image.fromarray(ramp.astype(np.float32) / 255)
    else:
        picture = Image.fromarray(ramp).convert(mode)
    assert picture.mode == mode
    loaded = load_picture(picture)
    assert loaded.mode == "RGB"
    expected = (ramp > 127) * 255 if mode == "1" else ramp
    if mode == "1":
        assert np.asarray(loaded)[:, [0, -1]].mean(axis=(0, 2)).tolist() == [0.0, 255.0]
    else:
        assert np.abs(np.asarray(loaded).astype(int) - expected[..., None]).max() <= 2


def test_modes_with_transparency_become_rgba():
    rgba = cut_out()
    grey = Image.fromarray(rgba).convert("LA")
    assert np.array_equal(np.asarray(load_picture(encoded(grey, "PNG")))[..., 3], rgba[..., 3])
    palette = Image.new("P", (10, 10), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((5, 5), 1)
    loaded = np.asarray(load_picture(encoded(palette, "GIF", transparency=0)))
    assert loaded[5, 5].tolist() == [0, 255, 0, 255]
    assert loaded[0, 0, 3] == 0
    keyed = Image.new("RGB", (10, 10), RED)
    keyed.putpixel((5, 5), (1, 2, 3))
    loaded = np.asarray(load_picture(encoded(keyed, "PNG", transparency=(1, 2, 3))))
    assert loaded[5, 5, 3] == 0
    assert loaded[0, 0].tolist() == [*RED, 255]


def test_exif_orientation_is_applied():
    picture = Image.new("RGB", (40, 20), (0, 0, 255))
    picture.paste(RED, (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    loaded = load_picture(encoded(picture, "JPEG", exif=exif, quality=95, subsampling=0))
    assert loaded.size == (20, 40)
    top, bottom = np.asarray(loaded)[5, 10].astype(int), np.asarray(loaded)[35, 10].astype(int)
    assert np.abs(top - RED).max() < 8
    assert np.abs(bottom - (0, 0, 255)).max() < 8


PNG = encoded(Image.fromarray(cut_out()), "PNG")
BAD_BYTES = {
    "empty": (b"", "empty"),
    "text": (b"this is a shopping list\n" * 20, "not a picture"),
    "noise": (bytes(range(256)) * 4, "not a picture"),
    "truncated": (PNG[: len(PNG) // 2], "damaged"),
    "broken pixels": (PNG[:60] + bytes(40) + PNG[100:], "damaged"),
    "header only": (PNG[:20], "not a picture"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n", "not a picture"),
    "1x1": (encoded(Image.new("RGB", (1, 1)), "PNG"), "1 x 1 pixels are too few"),
    "7 high": (encoded(Image.new("RGB", (300, 7)), "PNG"), "300 x 7 pixels are too few"),
    "20000x20000": (png_header(20_000, 20_000), "too large"),
    "12000x12000": (png_header(12_000, 12_000), "12000 x 12000 pixels; at most 64 million"),
    "8001x8000": (png_header(8_001, 8_000), "too large"),
    "fully transparent": (encoded(Image.new("RGBA", (32, 32), (9, 9, 9, 0)), "PNG"), "fully transparent"),
    "faint haze": (encoded(Image.new("RGBA", (32, 32), (9, 9, 9, 8)), "PNG"), "fully transparent"),
}


@pytest.mark.parametrize("name", BAD_BYTES)
@pytest.mark.filterwarnings("error")
def test_bad_files_are_one_clear_error(name, tmp_path):
    content, says = BAD_BYTES[name]
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        prepare(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=says):
        prepare(content)


def test_the_size_is_judged_before_anything_is_decoded(monkeypatch):
    def decode(_self):
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", decode)
    with pytest.raises(InputError, match="too large"):
        load_picture(png_header(9_000, 9_000))
    with pytest.raises(InputError, match="too large"):
        load_picture(Image.new("1", (9_000, 9_000)))
    with pytest.raises(InputError, match="too large"):
        load_picture(np.broadcast_to(np.zeros((1, 1, 3)), (9_000, 9_000, 3)))


def test_bad_places_and_types_are_one_clear_error(tmp_path):
    for place, says in (
        (tmp_path / "missing.png", "No such file"),
        (tmp_path, "directory"),
        ("a\0b", "null"),
    ):
        with pytest.raises(InputError, match=says):
            load_picture(place)
    with pytest.raises(InputError, match="download it first"):
        load_picture("https://example.org/cat.png")
    with pytest.raises(InputError, match="cannot be a dict"):
        load_picture({})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((20, 20, 2), np.uint8), "C = 1, 3 or 4"),
        (np.zeros((2, 3, 20, 20), np.uint8), "C = 1, 3 or 4"),
        (np.zeros((0, 20, 3), np.uint8), "too few"),
        (np.zeros((20, 20, 3), np.int64), "int64"),
        (np.zeros((20, 20, 3), bool), "bool"),
        (np.full((20, 20, 3), 200.0), r"lie in \[0, 1\]"),
        (np.full((20, 20, 3), -1.0), r"lie in \[0, 1\]"),
        (np.full((20, 20, 3), np.nan), "finite"),
        (torch.full((3, 20, 20), torch.inf), "finite"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arrays_are_one_clear_error(array, says):
    with pytest.raises(InputError, match=says):
        load_picture(array)


@pytest.mark.parametrize("shape", [(60, 80), (300, 200), (37, 53), (1400, 900)])
def test_the_object_is_centred_and_its_longer_side_fills_four_fifths(shape):
    size = 128
    prepared = prepare(cut_out(*shape), size=size)
    assert prepared.rgba.shape == (size, size, 4)
    assert prepared.rgba.dtype == np.uint8
    left, top, right, bottom = visible_box(prepared.rgba)
    before = visible_box(cut_out(*shape))
    rows, columns = np.nonzero(cut_out(*shape)[..., 3] > 8)
    longer = max(np.ptp(rows), np.ptp(columns)) + 1
    scale = OBJECT_FRACTION * size / longer
    assert right - left == pytest.approx((before[2] - before[0]) * scale, abs=3)
    assert bottom - top == pytest.approx((before[3] - before[1]) * scale, abs=3)
    assert (left + right) / 2 == pytest.approx(size / 2, abs=1)
    assert (top + bottom) / 2 == pytest.approx(size / 2, abs=1)


def test_haze_outside_the_object_does_not_count():
    rgba = cut_out()
    hazy = rgba.copy()
    hazy[-3:, -3:, 3] = 8
    assert np.array_equal(prepare(hazy).rgba, prepare(rgba).rgba)
    hazy[-3:, -3:, 3] = 9
    assert not np.array_equal(prepare(hazy).rgba, prepare(rgba).rgba)


@pytest.mark.parametrize("size", [32, 128, 512])
@pytest.mark.parametrize("shape", [(60, 80), (1400, 900)])
def test_no_fringes(size, shape):
    prepared = prepare(cut_out(shape[0], shape[1], (0, 255, 0)), size=size).rgba
    assert np.array_equal(prepared, prepare(cut_out(shape[0], shape[1], (255, 255, 255)), size=size).rgba)
    visible = prepared[..., 3] > 0
    assert np.abs(prepared[visible][:, :3].astype(int) - RED).max() <= 1
    assert (prepared[~visible] == 0).all()
    assert 0 < (prepared[visible][:, 3] < 255).mean() < 0.6  # the soft edge is still there
    edge = over(prepared, *RED)
    assert np.abs(edge.astype(int) - RED).max() <= 2


def test_recentre_false_keeps_the_frame():
    rgba = cut_out(64, 64)
    prepared = prepare(rgba, recentre=False, size=64).rgba
    assert np.array_equal(prepared[..., 3], rgba[..., 3])
    wide = prepare(cut_out(60, 120), recentre=False, size=120).rgba
    assert (wide[:29, :, 3] == 0).all()
    assert np.array_equal(wide[30:90, :, 3], cut_out(60, 120)[..., 3])


def test_a_long_object_keeps_its_proportions_and_a_thread_is_refused():
    rgba = np.full((20, 1100, 4), 255, np.uint8)
    rgba[:, :100, 3] = 0
    left, top, right, bottom = visible_box(prepare(rgba, size=100).rgba)
    assert right - left == pytest.approx(80, abs=1)
    assert 1 <= bottom - top <= 2
    for options in ({}, {"recentre": False}, {"keep_background": True}):
        thread = np.full((8, 200_000, 4), 255, np.uint8)
        thread[:, 0, 3] = 255 if "keep_background" in options else 0
        with pytest.raises(InputError, match="too long and thin"):
            prepare(thread, **options)


@pytest.mark.parametrize(
    "picture", [cut_out()[..., :3], np.dstack([cut_out()[..., :3], np.full((60, 80), 255)])]
)
def test_without_alpha_and_without_rembg_the_error_names_all_three_mends(picture, monkeypatch):
    monkeypatch.setattr(module, "installed", lambda _name: False)
    with pytest.raises(MissingDependency, match=r"RGBA.*imagedream-rt\[rembg\].*--keep-background"):
        prepare(picture.astype(np.uint8))


def fake_rembg(monkeypatch: pytest.MonkeyPatch, remove: object) -> None:
    fake = types.ModuleType("rembg")
    fake.new_session = lambda name: f"session of {name}"  # type: ignore[attr-defined]
    fake.remove = remove  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rembg", fake)
    monkeypatch.setattr(module, "installed", lambda _name: True)
    monkeypatch.setattr(module, "require", lambda *_: fake)
    module._rembg_session.cache_clear()


def test_rembg_cuts_out_a_picture_without_alpha(monkeypatch):
    def remove(picture, session):
        assert session == "session of u2net"
        assert picture.mode == "RGB"
        return Image.fromarray(cut_out())

    fake_rembg(monkeypatch, remove)
    prepared = prepare(cut_out()[..., :3])
    assert np.array_equal(prepared.rgba, prepare(cut_out()).rgba)
    assert any("rembg" in note for note in prepared.notes)
    assert not any("rembg" in note for note in prepare(cut_out()).notes)


def test_rembg_that_fails_or_finds_nothing_is_one_clear_error(monkeypatch):
    def remove(_picture, session):
        raise ConnectionError("no route\nto host")

    fake_rembg(monkeypatch, remove)
    with pytest.raises(InputError, match=r"no route to host.*--keep-background"):
        prepare(cut_out()[..., :3])
    fake_rembg(monkeypatch, lambda picture, session: Image.new("RGBA", picture.size))
    with pytest.raises(InputError, match="fully transparent"):
        prepare(cut_out()[..., :3])


def test_keep_background_pads_without_squashing():
    rgb = np.full((40, 80, 3), (10, 200, 30), np.uint8)
    rgb[10:30, 20:40] = RED
    prepared = prepare(rgb, keep_background=True, size=80)
    assert (prepared.rgba[..., 3] == 255).all()
    assert np.array_equal(prepared.rgba[20:60, :, :3], rgb)
    assert (prepared.rgba[:19, :, :3] == (10, 200, 30)).all()
    assert (prepared.rgba[61:, :, :3] == (10, 200, 30)).all()
    assert any("10, 200, 30" in note for note in prepared.notes)
    square = prepare(rgb[:, :40], keep_background=True, size=40)
    assert np.array_equal(square.rgba[..., :3], rgb[:, :40])
    assert square.notes == ()


def test_keep_background_has_nothing_to_keep_of_a_cut_out():
    prepared = prepare(cut_out(), keep_background=True)
    assert np.array_equal(prepared.rgba, prepare(cut_out()).rgba)
    assert any("no background to keep" in note for note in prepared.notes)


def test_small_objects_are_refused_or_told():
    rgba = np.zeros((200, 200, 4), np.uint8)
    rgba[50:55, 60:67] = 255
    with pytest.raises(InputError, match="7 x 5 pixels"):
        prepare(rgba)
    rgba[50:70, 60:80] = 255
    assert any("20 x 20 pixels and was enlarged" in note for note in prepare(rgba).notes)
    with pytest.raises(InputError, match="at least 8"):
        prepare(rgba, size=4)
