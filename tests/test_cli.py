"""The command line: what it writes, prints and returns."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import trimesh
from command_line import TINY, CommandLine
from PIL import Image
from safetensors.torch import load_file

from imagedream_rt import __version__
from imagedream_rt.engine import _optional, cli, cli_output
from imagedream_rt.engine.config import PRESETS

COMMANDS = (
    "generate",
    "views",
    "fuse",
    "mesh",
    "info",
    "doctor",
    "warmup",
    "bench kernels",
    "bench loop",
    "bench quality",
    "bench schedule",
    "bench start",
    "bench views",
)
QUICK = (*TINY, "--preset", "seconds")
SMALL_MESH = ("--faces", 500, "--texture-px", 64)


def folder(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_help(run: CommandLine, command: str) -> None:
    ran = run(*command.split(), "--help")
    assert ran.code == 0
    assert "--json" in ran.out
    assert ran.err == ""


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_help_of_training(run: CommandLine, command: str) -> None:
    ran = run(command, "--help")
    assert ran.code == 0
    assert "--device" in ran.out


def test_version(run: CommandLine) -> None:
    assert run("--version").out == f"imagedream-rt {__version__}\n"


def test_help_loads_no_torch() -> None:
    code = (
        "import sys; from imagedream_rt.engine.cli import main;"
        "main(['--help']); main(['generate', '--help']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_generate(run: CommandLine, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    ran = run("generate", picture, "-o", out, *QUICK, *SMALL_MESH, "--seed", 7, "--prompt", "a ball")
    assert ran.code == 0, ran.err
    names = ["views.png", "turntable.mp4", "asset.glb", "metadata.json"]
    assert folder(out) == sorted(names)
    lines = ran.out.splitlines()
    assert [Path(line.split("  ")[0]).name for line in lines] == names
    assert all(line.startswith(f"{out}{os.sep}") for line in lines)
    assert "triangles" in lines[2]
    # That the small object is enlarged is told; bars are not shown without a terminal.
    assert [line.split(":")[0] for line in ran.err.splitlines()] == ["note"]

    scene = trimesh.load(out / "asset.glb")
    assert isinstance(scene, trimesh.Scene)
    assert 0 < sum(len(mesh.faces) for mesh in scene.geometry.values()) <= 500
    with Image.open(out / "views.png") as views:
        assert views.height == 64
        assert views.width >= 5 * 64
    record = json.loads((out / "metadata.json").read_text())
    assert record["seed"] == 7
    assert record["prompt"] == "a ball"
    assert record["model"]["controller"] == "pixel"
    assert record["model"]["controller_reason"]
    assert record["fusion"]["name"] == "seconds"
    assert record["mesh"]["faces"] <= 500
    assert isinstance(record["mesh"]["watertight"], bool)
    assert record["environment"]["imagedream_rt"] == __version__
    assert record["environment"]["device"] == "cpu"
    assert set(record["timings_s"]) == {"views", "fuse", "mesh"}
    assert all(seconds > 0 for seconds in record["timings_s"].values())


def test_generate_json(run: CommandLine, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = run("generate", picture, "-o", out, *QUICK, *SMALL_MESH, "--json")
    assert ran.code == 0, ran.err
    result = ran.json()
    assert [Path(file).name for file in result["files"]] == [
        "views.png",
        "turntable.mp4",
        "asset.glb",
        "metadata.json",
    ]
    record = json.loads((out / "metadata.json").read_text())
    assert {name: value for name, value in result.items() if name != "files"} == record


def test_views_follow_the_seed(run: CommandLine, picture: Path, tmp_path: Path) -> None:
    seeds = {"a": 1, "b": 1, "c": 2}
    for name, seed in seeds.items():
        ran = run("views", picture, "-o", tmp_path / name, *TINY, "--steps", 2, "--seed", seed)
        assert ran.code == 0, ran.err
        assert folder(tmp_path / name) == ["metadata.json", "views.png"]
    a, b, c = (np.asarray(Image.open(tmp_path / name / "views.png")) for name in seeds)
    assert (a == b).all()
    assert (a != c).any()


def test_options_of_views_arrive(run: CommandLine, picture: Path, tmp_path: Path) -> None:
    options = ["--guidance-scale", 1.5, "--scheduler", "EulerDiscreteScheduler", "--elevation-deg", 15]
    ran = run("views", picture, "-o", tmp_path / "out", *TINY, "--view-steps", 2, *options, "--json")
    settings = ran.json()["views"]
    assert settings["guidance_scale"] == 1.5
    assert settings["scheduler"] == "EulerDiscreteScheduler"
    assert settings["elevation_deg"] == 15.0
    assert settings["steps"] == 2


def test_fuse_then_mesh(run: CommandLine, picture: Path, tmp_path: Path) -> None:
    fused, meshed = tmp_path / "fused", tmp_path / "meshed"
    options = ["--steps", 2, "--guidance-scale", 3.0, "--seed", 5]
    ran = run("fuse", picture, "-o", fused, *QUICK, *options)
    assert ran.code == 0, ran.err
    assert folder(fused) == ["metadata.json", "nerf.safetensors", "preview.png"]
    record = json.loads((fused / "metadata.json").read_text())
    assert record["fusion"]["steps"] == 2
    assert record["fusion"]["guidance_scale"] == 3.0

    ran = run("mesh", fused / "nerf.safetensors", "-o", meshed, "--device", "cpu", *SMALL_MESH, "--json")
    assert ran.code == 0, ran.err
    assert folder(meshed) == ["asset.glb", "metadata.json", "turntable.mp4"]
    result = ran.json()
    # What fuse recorded goes on, and the mesh is added.
    assert result["seed"] == 5
    assert result["model"] == record["model"]
    assert set(result["timings_s"]) == {"fuse", "mesh"}
    assert result["mesh"]["texture_px"] == 64


@pytest.mark.parametrize("suffix", [".glb", ".obj", ".ply"])
def test_mesh_to_one_file(run: CommandLine, nerf: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "meshes" / f"ball{suffix}"
    ran = run("mesh", nerf, "-o", path, "--device", "cpu", *SMALL_MESH)
    assert ran.code == 0, ran.err
    beside = {".obj": ["ball.mtl", "ball.obj", "ball_albedo.png"]}
    assert folder(path.parent) == beside.get(suffix, [path.name])
    assert ran.out.startswith(f"{path}  textured mesh, ")


@pytest.fixture
def nerf(run: CommandLine, picture: Path, tmp_path: Path) -> Path:
    ran = run("fuse", picture, "-o", tmp_path / "nerf", *QUICK)
    assert ran.code == 0, ran.err
    return tmp_path / "nerf" / "nerf.safetensors"


def test_interrupt_then_resume(
    run: CommandLine, picture: Path, tmp_path: Path, nerf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C during the fusion leaves a checkpoint and says how to go on; resumed, the result is the same."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(cli_output.Stages, "__call__", interrupt_at("fuse", 2))
        patch.setattr(sys, "argv", ["imagedream-rt", "fuse", "a b.png"])
        ran = run("fuse", picture, "-o", out, *QUICK)
    assert ran.code == 1
    assert ran.out == ""
    last = ran.err.splitlines()[-1]
    assert last.startswith("error: interrupted")
    assert last.endswith("imagedream-rt fuse 'a b.png' --resume")
    assert str(out / "checkpoint.safetensors") in last
    assert folder(out) == ["checkpoint.safetensors"]

    ran = run("fuse", picture, "-o", out, *QUICK, "--resume")
    assert ran.code == 0, ran.err
    assert folder(out) == ["metadata.json", "nerf.safetensors", "preview.png"]
    uninterrupted, resumed = load_file(nerf), load_file(out / "nerf.safetensors")
    assert uninterrupted.keys() == resumed.keys()
    assert all((uninterrupted[name] == resumed[name]).all() for name in uninterrupted)


def interrupt_at(stage: str, step: int):  # type: ignore[no-untyped-def]
    def on_progress(self: cli_output.Stages, now: str, done: int, total: int) -> None:
        if (now, done) == (stage, step):
            os.kill(os.getpid(), signal.SIGINT)

    return on_progress


def test_interrupt_before_the_fusion(
    run: CommandLine, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_output.Stages, "__call__", interrupt_at("views", 1))
    ran = run("generate", picture, "-o", tmp_path / "out", *QUICK)
    assert ran.code == 1
    assert ran.err.splitlines()[-1] == "error: interrupted before there was anything to continue from"
    assert not (tmp_path / "out").exists()


def test_chosen_checkpoint_stays(run: CommandLine, picture: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    arguments = ("fuse", picture, "-o", tmp_path / "out", *QUICK, "--checkpoint", state)
    assert run(*arguments).code == 0
    assert state.is_file()
    again = run(*arguments)
    assert again.code == 0
    assert "starting anew" in again.err


def test_info(run: CommandLine) -> None:
    ran = run("info", "random:tiny", "--controller", "local")
    assert ran.code == 0, ran.err
    for word in ("family", "imagedream", "controller", "local (", "frames", "unet", "vae", "text", "vision"):
        assert word in ran.out
    found = run("info", "random:tiny", "--json").json()
    assert found["card"]["controller"] == "pixel"
    assert found["frames"] == 5
    assert {part["name"]: part["parameters"] for part in found["parts"]}["unet"] > 10**6


def test_doctor(run: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_optional, "installed", lambda module: module == "diffusers")
    found = run("doctor", "--json").json()
    packages = {package["package"]: package for package in found["packages"]}
    assert list(packages) == [package.module for package in _optional.PACKAGES]
    assert packages["diffusers"]["state"] == "active"
    assert packages["rembg"]["state"] == "missing"
    assert "--keep-background" in packages["rembg"]["says"]
    assert 'pip install "imagedream-rt[rembg]"' in packages["rembg"]["says"]
    assert found["default_device"] in {device["device"] for device in found["devices"]}
    assert found["versions"]["imagedream_rt"] == __version__
    text = run("doctor")
    assert text.code == 0
    assert all(name in text.out for name in [*packages, *found["kernels"], "Python".lower()])


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "a.png", "--no-such-option"),
        ("views", "a.png", "--seed", "seven"),
        ("no-such-command",),
        ("mesh",),
    ],
)
def test_wrong_usage(run: CommandLine, arguments: tuple[str, ...]) -> None:
    ran = run(*arguments)
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("error: ")
    assert len(ran.err.splitlines()) == 1
    as_json = run(*arguments, "--json")
    assert as_json.code == 2
    assert as_json.json()["exit_code"] == 2


def test_faults_of_the_program(run: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything unforeseen: exit code 1 and one sentence; the traceback only where it is asked for."""

    def fail() -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("imagedream_rt.engine.doctor.report", fail)
    ran = run("doctor")
    assert ran.code == 1
    assert ran.err == "error: RuntimeError: two lines (a fault of this program; --debug shows where)\n"
    assert run("doctor", "--json").json() == {"error": ran.err[len("error: ") : -1], "exit_code": 1}
    assert "Traceback" in run("doctor", "--debug").err
    monkeypatch.setenv("IMAGEDREAM_RT_DEBUG", "1")
    assert "Traceback" in run("doctor").err


def test_libraries_cannot_spoil_the_json(run: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def chatty() -> dict[str, object]:
        print("Warp 9.9 initialised")
        return {}

    monkeypatch.setattr("imagedream_rt.engine.doctor.report", chatty)
    ran = run("doctor", "--json")
    assert ran.json() == {}
    assert "Warp" in ran.err


def test_bars_on_a_terminal(picture: Path, tmp_path: Path) -> None:
    """On a terminal stderr shows the stages; stdout is the same as without."""
    controller, terminal = pty.openpty()
    program = "import sys; from imagedream_rt.engine.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["views", str(picture), "-o", str(tmp_path / "out"), *TINY, "--steps", "3"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, stderr=terminal, env=environment
    ) as process:
        os.close(terminal)
        shown = b""
        while True:
            try:
                block = os.read(controller, 4096)
            except OSError:  # Linux reports the end of a terminal as an input/output error
                break
            if not block:
                break
            shown += block
        assert process.stdout is not None
        out = process.stdout.read().decode()
    os.close(controller)
    assert process.returncode == 0, shown.decode()
    assert "diffuse four views" in shown.decode()
    assert [Path(line.split("  ")[0]).name for line in out.splitlines()] == ["views.png", "metadata.json"]


def test_presets_are_named_in_help(run: CommandLine) -> None:
    said = " ".join(run("generate", "--help").out.split())
    released = [name for name in PRESETS if name != "seconds"]
    assert all(name in said for name in released)


def test_main_reads_the_arguments_of_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["imagedream-rt", "--version"])
    assert cli.main() == 0
    assert __version__ in capsys.readouterr().out
