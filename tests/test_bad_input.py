"""Bad input to the command line: one clear sentence, exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import official_state, tiny
from command_line import TINY, CommandLine, Ran, object_picture
from PIL import Image
from safetensors.torch import save_file

from imagedream_rt.engine import _optional, pipeline

QUICK = (*TINY, "--preset", "seconds")


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below, with its content; folders with a slash at the end."""
    paths = sorted(folder.rglob("*"))
    content = {f"{path.relative_to(folder)}/": b"" for path in paths if path.is_dir()}
    return content | {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file()}


def refused(run: CommandLine, folder: Path, *arguments: object) -> str:
    """The sentence with which the command refuses, as text and as JSON; the folder stays as it was."""
    before = snapshot(folder)
    ran: Ran = run(*arguments)
    assert ran.code == 2, ran
    assert ran.out == ""
    lines = [line for line in ran.err.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1, ran.err
    assert lines[0].startswith("error: ")
    message = lines[0].removeprefix("error: ")
    ran = run(*arguments, "--json")
    assert ran.code == 2
    assert json.loads(ran.out) == {"error": message, "exit_code": 2}
    assert snapshot(folder) == before
    return message


def huge_png(side: int) -> bytes:
    """A valid black-and-white PNG of ``side`` x ``side`` pixels, a few ten kilobytes small."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes((side + 7) // 8 + 1) * side, 9)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def png(image: Image.Image, folder: Path) -> bytes:
    path = folder / "made.png"
    image.save(path)
    content = path.read_bytes()
    path.unlink()
    return content


PICTURES: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "truncated": (lambda folder: png(object_picture(), folder)[:200], "damaged"),
    "corrupt": (lambda folder: png(object_picture(), folder)[:8] + bytes(500), "picture"),
    "empty": (lambda folder: b"", "empty"),
    "one pixel": (lambda folder: png(Image.new("RGBA", (1, 1), "red"), folder), "1 x 1 pixels"),
    "huge": (lambda folder: huge_png(20_000), "too large"),
    "transparent": (lambda folder: png(Image.new("RGBA", (64, 64)), folder), "transparent"),
    "text": (lambda folder: b"Dear Sir or Madam,\n", "not a picture"),
    "opaque": (lambda folder: png(Image.new("RGB", (64, 64), "red"), folder), "--keep-background"),
}


@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.parametrize("command", ["generate", "views", "fuse"])
def test_pictures(
    run: CommandLine, tmp_path: Path, kind: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagedream_rt.engine.picture.installed", lambda module: False)  # rembg
    make, words = PICTURES[kind]
    picture = tmp_path / "given.png"
    picture.write_bytes(make(tmp_path))
    # No model is loaded for it: one that does not exist is not noticed.
    message = refused(run, tmp_path, command, picture, "-o", tmp_path / "out", "--model", "builtin:no-such")
    assert words in message
    assert str(picture) in message


def test_huge_png_is_a_real_picture(tmp_path: Path) -> None:
    (tmp_path / "small.png").write_bytes(huge_png(100))
    with Image.open(tmp_path / "small.png") as image:
        assert image.convert("L").getextrema() == (0, 0)
        assert image.size == (100, 100)


@pytest.mark.parametrize("name", ["missing.png", "."])
def test_no_such_picture(run: CommandLine, tmp_path: Path, name: str) -> None:
    assert name in refused(run, tmp_path, "generate", tmp_path / name, "-o", tmp_path / "out", *QUICK) + "."


def test_no_picture_at_all(run: CommandLine, tmp_path: Path) -> None:
    assert "needs a prompt picture" in refused(run, tmp_path, "views", "-o", tmp_path / "out", *TINY)


def test_picture_for_a_text_only_model(run: CommandLine, picture: Path, tmp_path: Path) -> None:
    arguments = ("-o", tmp_path / "out", *TINY, "--controller", "none")
    assert "text alone" in refused(run, tmp_path, "views", picture, *arguments, "--prompt", "a ball")
    assert "prompt is empty" in refused(run, tmp_path, "views", *arguments)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("builtin:giant", "builtin:nano"),
        ("no-such-file.pt", "no such file"),
        ("nobody/nothing", "cannot be reached"),
        ("", "no such file"),
    ],
)
@pytest.mark.parametrize("command", ["views", "info"])
def test_unknown_model(
    run: CommandLine, picture: Path, tmp_path: Path, model: str, words: str, command: str
) -> None:
    arguments = (model,) if command == "info" else (picture, "-o", tmp_path / "out", "--model", model)
    assert words in refused(run, tmp_path, command, *arguments)


class Payload:
    """A pickle of it makes a folder when it is loaded by a reader that trusts it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_malicious_pickle(run: CommandLine, picture: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    with (tmp_path / "bare.pt").open("wb") as file:
        pickle.dump({"model.diffusion_model.out.0.weight": Payload(trap)}, file)
    torch.save({"state_dict": Payload(trap)}, tmp_path / "zipped.pt")
    for name in ("bare.pt", "zipped.pt"):
        arguments = (picture, "-o", tmp_path / "out", "--model", tmp_path / name)
        message = refused(run, tmp_path, "generate", *arguments)
        assert name in message
        assert "pickle" in message
        assert not trap.exists()


def test_truncated_safetensors(run: CommandLine, picture: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file(official_state(tiny("pixel")), whole)
    path = tmp_path / "cut.safetensors"
    path.write_bytes(whole.read_bytes()[:100_000])
    message = refused(run, tmp_path, "views", picture, "-o", tmp_path / "out", "--model", path)
    assert str(path) in message
    assert "truncated" in message


def test_nan_weights(run: CommandLine, picture: Path, tmp_path: Path) -> None:
    state = official_state(tiny("pixel"))
    name = "model.diffusion_model.input_blocks.0.0.weight"
    state[name] = state[name].clone()
    state[name].view(-1)[3] = float("nan")
    path = tmp_path / "nan.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    message = refused(run, tmp_path, "views", picture, "-o", tmp_path / "out", "--model", path)
    assert name in message
    assert "NaN" in message


def unwritable_folders() -> list[str]:
    # To root every folder is writable, but for the ones that the kernel makes up.
    return ["file/out", *(["/proc/out"] if Path("/proc").is_dir() else [])]


@pytest.mark.parametrize("folder", unwritable_folders())
@pytest.mark.parametrize("command", ["generate", "views", "fuse"])
def test_unwritable_output(
    run: CommandLine, picture: Path, tmp_path: Path, folder: str, command: str
) -> None:
    (tmp_path / "file").write_text("kept")
    # Noticed before any work: the model does not even exist.
    arguments = (picture, "-o", tmp_path / folder, "--model", "builtin:no-such")
    message = refused(run, tmp_path, command, *arguments)
    assert message.startswith("output folder")
    assert folder in message


def test_unwritable_output_of_mesh(run: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for output in ("file/out", "file/ball.glb"):
        message = refused(run, tmp_path, "mesh", tmp_path / "no-such", "-o", tmp_path / output)
        assert message.startswith("output folder")


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ("generate", ("--preset", "grand"), "unknown preset 'grand'"),
        ("fuse", ("--preset", "grand"), "draft"),
        ("generate", ("--preset", "draft", "--steps", 0), "steps is 0"),
        ("fuse", ("--preset", "draft", "--steps", -5), "steps is -5"),
        ("views", ("--view-steps", 0), "steps"),
        ("views", ("--view-steps", -1), "steps"),
        ("generate", ("--preset", "seconds", "--view-steps", 0), "steps"),
        ("views", ("--steps", 1001), "1000"),
        ("views", ("--guidance-scale", "nan"), "guidance_scale is nan"),
        ("fuse", ("--guidance-scale", -1), "guidance_scale is -1"),
        ("views", ("--seed", -1), "seed is -1"),
        ("fuse", ("--preset", "official", "--seed", 2**63), "seed is"),
        (
            "views",
            ("--backend", "attention=paper"),
            "unknown backend 'paper' of attention; there are auto, triton",
        ),
        (
            "fuse",
            ("--preset", "seconds", "--backend", "paper=torch"),
            "the components are attention, encoding",
        ),
        ("generate", ("--preset", "seconds", "--backend", "volume"), "backend 'volume': give COMPONENT=NAME"),
        (
            "views",
            ("--backend", "unet=tensorrt"),
            "backend unet=tensorrt needs a folder of plans (--plans DIR",
        ),
        ("fuse", ("--preset", "seconds", "--seed", -1), "seed is -1"),
        ("views", ("--elevation-deg", 91), "elevation_deg is 91"),
        ("views", ("--scheduler", "NoSuchScheduler"), "NoSuchScheduler"),
        ("views", ("--dtype", "int8"), "float32"),
        ("views", ("--device", "abacus"), "abacus"),
        ("views", ("--controller", "joystick"), "pixel"),
        ("generate", ("--preset", "seconds", "--faces", 0), "faces is 0"),
        ("generate", ("--preset", "seconds", "--texture-px", 10**6), "texture_px is 1000000"),
        ("fuse", ("--preset", "seconds", "--resume"), "checkpoint.safetensors"),
    ],
)
def test_settings(
    run: CommandLine, picture: Path, tmp_path: Path, command: str, options: tuple[object, ...], words: str
) -> None:
    assert words in refused(run, tmp_path, command, picture, "-o", tmp_path / "out", *TINY, *options)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no file"), (b"", "damaged"), (b"not tensors at all", "damaged")],
)
def test_mesh_of_what_is_no_nerf(run: CommandLine, tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "nerf.safetensors"
    if content is not None:
        path.write_bytes(content)
    message = refused(run, tmp_path, "mesh", path, "-o", tmp_path / "out")
    assert words in message
    assert str(path) in message


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ("train", ("--minutes", 0), "minutes is 0"),
        ("train", ("--batch", 0), "batch is 0"),
        ("train", ("--resume",), "no file"),
        ("evaluate", ("--objects", 0), "objects"),
        ("evaluate", ("--preset", "grand"), "unknown preset 'grand'"),
        ("evaluate", ("--steps", 0), "steps is 0"),
        ("evaluate", ("--backend", "precision=int4"), "unknown backend 'int4'"),
        ("evaluate", ("--model", "builtin:giant"), "builtin:nano"),
    ],
)
def test_settings_of_training(
    run: CommandLine, tmp_path: Path, command: str, options: tuple[object, ...], words: str
) -> None:
    if command == "train":
        ran = run(command, "-o", tmp_path / "out", "--device", "cpu", *options)
    else:
        ran = run(command, "-o", tmp_path / "out", *TINY, *options, "--json")
        assert ran.json()["exit_code"] == 2
    assert ran.code == 2, ran
    assert words in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [("--faces", 5), ("--texture-px", 0), ("--device", "cuda:99")])
def test_settings_of_mesh(
    run: CommandLine, picture: Path, tmp_path: Path, options: tuple[object, ...]
) -> None:
    assert run("fuse", picture, "-o", tmp_path / "nerf", *QUICK).code == 0
    nerf = tmp_path / "nerf" / "nerf.safetensors"
    assert str(options[1]) in refused(run, tmp_path, "mesh", nerf, "-o", tmp_path / "out", *options)


@pytest.mark.parametrize(
    ("component", "package"),
    [("attention", "xformers"), ("encoding", "tinycudann"), ("volume", "nerfacc")],
)
def test_backend_that_is_not_installed(
    run: CommandLine, picture: Path, tmp_path: Path, component: str, package: str
) -> None:
    if _optional.installed(package):
        pytest.skip(f"{package} is installed")
    arguments = (picture, "-o", tmp_path / "out", *QUICK, "--backend", f"{component}={package}")
    message = refused(run, tmp_path, "generate", *arguments)
    assert package in message
    assert "pip install" in message


def test_mesh_of_other_tensors(run: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "nerf.safetensors"
    save_file({"x": torch.zeros(3)}, path)
    assert "was not written by the fusion" in refused(run, tmp_path, "mesh", path, "-o", tmp_path / "out")


def test_checkpoint_of_another_run(run: CommandLine, picture: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    arguments = ("fuse", picture, "-o", tmp_path / "out", *QUICK, "--checkpoint", state)
    assert run(*arguments, "--seed", 1).code == 0
    message = refused(run, tmp_path, *arguments, "--seed", 2, "--resume")
    assert "seed: 1 in the checkpoint, 2 now" in message


def test_nan_during_fusion(
    run: CommandLine, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says at which step, and the last good checkpoint remains and can be continued from."""
    sound = pipeline.MultiViewGuidance.target
    calls = []

    def broken(self: pipeline.MultiViewGuidance, latents: torch.Tensor, *rest: object) -> torch.Tensor:
        calls.append(1)
        target = sound(self, latents, *rest)  # type: ignore[arg-type]
        return target * float("nan") if len(calls) == 3 else target

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.MultiViewGuidance, "target", broken)
        ran = run("generate", picture, "-o", out, *QUICK, "--json")
    assert ran.code == 1
    failure = ran.json()
    assert failure["exit_code"] == 1
    assert "step 2" in failure["error"]
    assert str(out / "checkpoint.safetensors") in failure["error"]
    assert [path.name for path in out.iterdir()] == ["checkpoint.safetensors"]
    ran = run("fuse", picture, "-o", out, *QUICK, "--resume")
    assert ran.code == 0, ran.err


def test_files_of_an_earlier_run_survive_a_failure(run: CommandLine, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("views", picture, "-o", out, *TINY, "--steps", 1).code == 0
    refused(run, tmp_path, "views", picture, "-o", out, *TINY, "--steps", 0)
