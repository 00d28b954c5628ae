from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import trimesh
from analytic_field import BOX_HALF, GREEN, RED, AnalyticField
from PIL import Image

from imagedream_rt.engine import asset as asset_module
from imagedream_rt.engine.asset import Asset, write_views_png
from imagedream_rt.engine.cameras import orbit_cameras
from imagedream_rt.engine.errors import InputError
from imagedream_rt.engine.mesh import extract_mesh


@pytest.fixture(scope="module")
def asset() -> Asset:
    field = AnalyticField()
    result = extract_mesh(field, faces=2000, texture_px=128, resolution=48)
    views = np.stack([np.full((32, 32, 3), 40 * k, np.uint8) for k in range(4)])
    prompt = np.full((64, 48, 3), 200, np.uint8)
    return Asset(result.mesh, result.report, field, {"seed": 7}, views=views, prompt=prompt)


def gltf_tree(path: Path) -> dict:
    data = path.read_bytes()
    magic, version, length, chunk, kind = struct.unpack("<4sIIII", data[:20])
    assert (magic, version, length, kind) == (b"glTF", 2, len(data), 0x4E4F534A)
    return json.loads(data[20 : 20 + chunk])


def colour_facing(mesh: Any, side: tuple[int, int, int]) -> np.ndarray:
    """[N, 3] colour in 0 to 1 where the box's side that looks that way is, whichever way the file holds
    colour."""
    chosen = (mesh.face_normals @ np.array(side) > 0.99) & (mesh.triangles_center[:, 1] < 0.8 * BOX_HALF[2])
    assert chosen.sum() > 5
    if mesh.visual.kind == "vertex":
        return mesh.visual.vertex_colors[mesh.faces[chosen]][..., :3].mean(1) / 255
    material = mesh.visual.material
    image = getattr(material, "baseColorTexture", None) or material.image
    return trimesh.visual.color.uv_to_color(mesh.visual.uv[mesh.faces[chosen]].mean(1), image)[:, :3] / 255


@pytest.mark.parametrize("suffix", [".glb", ".obj", ".ply", ".GLB"])
def test_a_saved_mesh_is_read_back_with_its_front_to_z(asset: Asset, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"my asset{suffix}"
    asset.save(path)
    mesh: Any = trimesh.load(path, process=False)
    if isinstance(mesh, trimesh.Scene):
        (mesh,) = mesh.geometry.values()  # force="mesh" would compute other normals
    np.testing.assert_allclose(mesh.bounds, asset.report.bounds, atol=1e-4)
    assert len(mesh.faces) == asset.report.faces
    tolerance = 0.1 if suffix == ".ply" else 0.02
    for side, colour in (((0, 0, 1), RED), ((0, 0, -1), GREEN)):
        assert np.median(np.abs(colour_facing(mesh, side) - colour).max(1)) < tolerance
    # Shading shows no seams: copies of a vertex have one normal.
    _, first, copy_of = np.unique(mesh.vertices, axis=0, return_index=True, return_inverse=True)
    np.testing.assert_allclose(mesh.vertex_normals, mesh.vertex_normals[first][copy_of], atol=1e-4)
    mesh.merge_vertices(merge_tex=True, merge_norm=True)
    assert mesh.is_watertight
    assert not list(tmp_path.glob(".*"))


def test_the_glb_is_what_viewers_expect(asset: Asset, tmp_path: Path) -> None:
    asset.save(tmp_path / "a.glb")
    tree = gltf_tree(tmp_path / "a.glb")
    (mesh,), (material,), (sampler,) = tree["meshes"], tree["materials"], tree["samplers"]
    (primitive,) = mesh["primitives"]
    assert set(primitive["attributes"]) == {"POSITION", "NORMAL", "TEXCOORD_0"}
    assert material["pbrMetallicRoughness"] == {
        "baseColorTexture": {"index": 0},
        "roughnessFactor": 1.0,
        "metallicFactor": 0.0,
    }
    assert tree["images"][0]["mimeType"] == "image/png"
    assert tree["textures"][0]["sampler"] == 0
    assert sampler["wrapS"] == sampler["wrapT"] == 33071
    assert all("matrix" not in node and "rotation" not in node for node in tree["nodes"])


def test_the_obj_names_its_files_without_blanks_and_does_not_darken(asset: Asset, tmp_path: Path) -> None:
    (tmp_path / "my_asset.png").write_text("the picture it was made of")
    asset.save(tmp_path / "my asset.obj")
    assert {path.name for path in tmp_path.iterdir()} == {
        "my asset.obj",
        "my_asset.mtl",
        "my_asset_albedo.png",
        "my_asset.png",
    }
    assert (tmp_path / "my_asset.png").read_text() == "the picture it was made of"
    material = (tmp_path / "my_asset.mtl").read_text()
    assert "Kd 1.0" in material
    assert "map_Kd my_asset_albedo.png" in material
    assert "mtllib my_asset.mtl" in (tmp_path / "my asset.obj").read_text()


def test_the_ply_is_closed_and_has_no_seams(asset: Asset, tmp_path: Path) -> None:
    asset.save(tmp_path / "a.ply")
    mesh: Any = trimesh.load(tmp_path / "a.ply", process=False)
    assert len(mesh.vertices) == asset.report.vertices
    assert mesh.is_watertight


@pytest.mark.parametrize("name", ["a.stl", "a", "a.glb.zip"])
def test_an_unknown_suffix_is_refused_naming_the_known(asset: Asset, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"\.glb, \.obj, \.ply"):
        asset.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_metadata_says_how_the_mesh_came_out(asset: Asset) -> None:
    assert asset.metadata["seed"] == 7
    assert asset.metadata["mesh"]["watertight"] is True
    assert asset.metadata["mesh"]["faces"] == asset.report.faces
    assert json.loads(json.dumps(asset.metadata))["mesh"]["threshold"] == asset.report.threshold


def test_render_is_the_fields(asset: Asset) -> None:
    out = asset.render(orbit_cameras([0.0], 0.0, 40.0, 2.0), resolution=32, background=(0.0, 0.0, 0.0))
    assert out.rgb.shape == (1, 32, 32, 3)
    np.testing.assert_allclose(out.rgb[0, 18, 16], RED, atol=0.12)
    assert out.rgb[0, 0, 0].max() < 0.01


def test_the_turntable_turns_once_from_the_front(
    asset: Asset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[tuple[str, int, int]] = []
    asset.turntable(
        tmp_path / "t.mp4",
        seconds=1.0,
        fps=8,
        resolution=47,
        elevation_deg=0.0,
        on_progress=lambda *news: told.append(news),
    )
    assert told == [("files", k, 8) for k in range(1, 9)]
    assert not caplog.records  # as of a picture that is resized because its side is odd
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "t.mp4"))
    meta = next(reader)
    assert meta["size"] == (48, 48)
    assert meta["codec"] == "h264"
    assert meta["pix_fmt"].startswith("yuv420p")
    assert meta["fps"] == 8
    frames = [np.frombuffer(frame, np.uint8).reshape(48, 48, 3) / 255 for frame in reader]
    assert len(frames) == 8
    np.testing.assert_allclose(frames[0][28, 24], RED, atol=0.12)
    np.testing.assert_allclose(frames[4][28, 24], GREEN, atol=0.12)
    np.testing.assert_allclose(frames[0][1, 1], 1.0, atol=0.05)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("t.gif", {}), ("t.mp4", {"seconds": 0.0}), ("t.mp4", {"fps": -1}), ("t.mp4", {"resolution": 0})],
)
def test_an_impossible_film_is_refused(asset: Asset, tmp_path: Path, name: str, settings: dict) -> None:
    with pytest.raises(InputError, match="film"):
        asset.turntable(tmp_path / name, **settings)
    assert not list(tmp_path.iterdir())


def test_save_all_writes_everything(asset: Asset, tmp_path: Path) -> None:
    written = asset.save_all(tmp_path / "out", turntable_seconds=0.1, turntable_px=32)
    assert [path.name for path in written] == ["views.png", "turntable.mp4", "asset.glb", "metadata.json"]
    assert sorted((tmp_path / "out").iterdir()) == sorted(written)
    assert json.loads((tmp_path / "out" / "metadata.json").read_text())["mesh"]["watertight"] is True
    sheet = np.asarray(Image.open(tmp_path / "out" / "views.png"))
    assert sheet.shape == (32, 24 + 8 + 4 * 32 + 3 * 8, 3)
    assert (sheet[:, :24] == 200).all()
    assert (sheet[:, 24:32] == 255).all()
    assert (sheet[:, 24 + 8 + 2 * 40 :][:, :32] == 80).all()


def test_a_film_from_a_cpu_is_small_unless_asked_for(asset: Asset, tmp_path: Path) -> None:
    asset.turntable(tmp_path / "t.mp4", seconds=1 / 24)
    assert next(imageio_ffmpeg.read_frames(str(tmp_path / "t.mp4")))["size"] == (160, 160)


def test_without_views_there_is_no_views_png(asset: Asset, tmp_path: Path) -> None:
    bare = Asset(asset.mesh, asset.report, asset.fused)
    written = bare.save_all(tmp_path, turntable_seconds=0.1, turntable_px=32)
    assert [path.name for path in written] == ["turntable.mp4", "asset.glb", "metadata.json"]
    assert sorted(tmp_path.iterdir()) == sorted(written)


def test_if_one_file_fails_none_is_written(
    asset: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "asset.glb").write_text("of an earlier run")

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(AnalyticField, "render", broken)
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(RuntimeError, match="out of memory"):
            asset.save_all(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["asset.glb"]
    assert (tmp_path / "asset.glb").read_text() == "of an earlier run"


def test_a_place_that_cannot_be_written_to_is_an_input_error(asset: Asset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        asset.save(tmp_path / "file" / "a.glb")
    with pytest.raises(InputError, match="cannot write"):
        asset.save_all(tmp_path / "file")
    with pytest.raises(InputError, match="cannot write"):
        write_views_png(tmp_path / "file" / "v.png", None, np.zeros((4, 8, 8, 3), np.uint8))


def test_no_ffmpeg_is_a_sentence(asset: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise RuntimeError("No ffmpeg exe could be found")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", missing)
    with pytest.raises(asset_module.MissingDependency, match="IMAGEIO_FFMPEG_EXE"):
        asset.turntable(tmp_path / "t.mp4")
    assert not list(tmp_path.iterdir())
