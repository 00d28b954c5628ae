"""How the repository is laid out and packed: what would otherwise rot without a sound."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import imagedream_rt

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
INSTALLED = Path(imagedream_rt.__file__).resolve().parent
SHIPPED = ("engine", "kernels", "export", "benchmarks")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SKIPPED_FOLDERS = {"build", "dist", "out", "__pycache__"}


def repository_files() -> list[Path]:
    """Files of the checkout, relative to it: what git tracks, or without git everything but leftovers."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        files = [Path(name) for name in listed.decode().split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        files = [path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file()]
    return sorted(
        path
        for path in files
        if (ROOT / path).is_file()
        and not any(part in SKIPPED_FOLDERS or part.startswith(".venv") for part in path.parts)
        and not any(part.endswith(".egg-info") or part == ".git" for part in path.parts)
    )


FILES = repository_files()
MODULES = [path for path in FILES if path.suffix == ".py" and path.parts[0] in SHIPPED]


def run_python(code: str, *path: Path) -> str:
    """What ``code`` prints in a fresh interpreter whose working directory is the checkout."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_only_one_init_and_only_setup_beside_it() -> None:
    assert [path for path in FILES if path.name == "__init__.py"] == [Path("__init__.py")]
    at_root = {path.name for path in FILES if path.suffix == ".py" and len(path.parts) == 1}
    assert at_root == {"__init__.py", "setup.py"}


def test_tests_are_flat() -> None:
    nested = [
        path for path in FILES if path.parts[0] == "tests" and path.suffix == ".py" and len(path.parts) > 2
    ]
    assert nested == []


def test_import_loads_neither_torch_nor_triton() -> None:
    code = "import sys, imagedream_rt; print(sorted({'torch', 'triton', 'numpy', 'PIL'} & set(sys.modules)))"
    assert run_python(code) == "[]"


def test_every_public_name_resolves() -> None:
    for name in imagedream_rt.__all__:
        assert getattr(imagedream_rt, name) is not None
    assert set(imagedream_rt.__all__) == set(dir(imagedream_rt))
    with pytest.raises(AttributeError, match="no_such_name"):
        imagedream_rt.no_such_name  # noqa: B018


def test_one_version() -> None:
    assert imagedream_rt.__version__ == PYPROJECT["project"]["version"] == metadata.version("imagedream-rt")


def test_package_list_is_the_folders_with_modules() -> None:
    folders = {".".join(("imagedream_rt", *path.parent.parts)) for path in MODULES} | {"imagedream_rt"}
    data = PYPROJECT["tool"]["setuptools"]["package-data"]
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    assert len(listed) == len(set(listed))
    assert set(listed) == folders | set(data)


def test_installed_package_is_complete_and_holds_nothing_else() -> None:
    """Everything the package folders track is installed, the embedded model included, and no other file."""
    if INSTALLED == ROOT:
        pytest.skip("editable install: there is no installed copy to compare")
    shipped = {
        path for path in FILES if path.parts[0] in SHIPPED and path.parts[:2] != ("benchmarks", "results")
    }
    expected = shipped | {Path("__init__.py"), Path("py.typed")}
    found = {path.relative_to(INSTALLED) for path in INSTALLED.rglob("*") if path.is_file()}
    found = {path for path in found if "__pycache__" not in path.parts}
    assert found == expected


def test_wheel_owns_one_top_level_name() -> None:
    owned = {Path(str(file)).parts[0] for file in metadata.files("imagedream-rt") or []}
    foreign = {
        name
        for name in owned
        if name != "imagedream_rt"
        and name != ".."  # the console script, beside site-packages
        and not name.startswith(("imagedream_rt-", "__editable__"))
        and name != "__pycache__"
    }
    assert foreign == set()


def test_embedded_data_stays_small() -> None:
    size = sum((ROOT / path).stat().st_size for path in FILES if path.parts[:2] == ("engine", "data"))
    assert size <= 30 * 2**20


def test_a_package_named_kernels_is_not_shadowed(tmp_path: Path) -> None:
    """Hugging Face has a package of that name; our folder has no ``__init__.py``, so it yields."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("who = 'the other one'\n", encoding="utf-8")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.who)"
    assert run_python(code) == "the other one"


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts)


NAMES = {module_name(path) for path in MODULES}
COMMAND_LINE = re.compile(r"engine\.cli(_\w+)?")


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def import_nodes(tree: ast.AST, late: bool) -> list[ast.Import | ast.ImportFrom]:
    """Import statements that run when the module is imported; with ``late`` also those inside functions."""
    found: list[ast.Import | ast.ImportFrom] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(node)
        elif isinstance(node, ast.stmt) and is_type_checking(node):
            continue
        elif late or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            found += import_nodes(node, late)
    return found


def targets(path: Path, node: ast.Import | ast.ImportFrom) -> set[str]:
    """Our modules, as ``engine.unet``, that the statement names; outside packages are left out."""
    if isinstance(node, ast.Import):
        return {
            alias.name.removeprefix("imagedream_rt.") for alias in node.names if "imagedream_rt" in alias.name
        }
    if node.level == 0:
        base = (node.module or "").split(".")
        if base[0] != "imagedream_rt":
            return set()
        base = base[1:]
    else:
        folder = path.parts[:-1]
        base = [*folder[: len(folder) - node.level + 1], *(node.module.split(".") if node.module else ())]
    whole = ".".join(base)
    return {whole} if whole in NAMES else {".".join([*base, alias.name]) for alias in node.names}


def imports(path: Path, late: bool) -> set[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=str(path))
    return {name for node in import_nodes(tree, late) for name in targets(path, node)}


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """One import circle of ``graph`` as the names along it, or an empty list."""
    done: set[str] = set()

    def visit(name: str, road: list[str]) -> list[str]:
        if name in road:
            return [*road[road.index(name) :], name]
        if name in done:
            return []
        for following in sorted(graph.get(name, set())):
            if circle := visit(following, [*road, name]):
                return circle
        done.add(name)
        return []

    for name in sorted(graph):
        if circle := visit(name, []):
            return circle
    return []


def test_find_circle() -> None:
    assert find_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_no_import_circle() -> None:
    assert find_circle({module_name(path): imports(path, late=False) for path in MODULES}) == []


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_floors(path: Path) -> None:
    """kernels <- engine <- export, benchmarks: nothing points up, not even inside a function.

    Only the command line, the top of the house, reaches all floors: inside functions, when a command runs.
    """
    below = {
        "kernels": {"kernels"},
        "engine": {"kernels", "engine"},
        "export": {"kernels", "engine", "export", "imagedream_rt"},
        "benchmarks": set(SHIPPED),
    }[path.parts[0]]
    command_line = COMMAND_LINE.fullmatch(module_name(path)) is not None
    reached = {name.split(".")[0] for name in imports(path, late=not command_line)}
    # The root __init__ holds only the version and lazy names: engine may ask it for its version.
    allowed = below | ({"__version__"} if path.parts[0] == "engine" else set())
    assert reached <= allowed
    if path.parts[0] == "engine" and not command_line:
        assert not {name for name in imports(path, late=True) if COMMAND_LINE.fullmatch(name)}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_module_is_short_and_imports_between_folders_are_relative(path: Path) -> None:
    source = (ROOT / path).read_text(encoding="utf-8")
    assert len(source.splitlines()) < 400
    assert not re.search(
        r"^\s*(from|import) (imagedream_rt|engine|kernels|export|benchmarks)\b", source, re.M
    )


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_no_optional_package_at_import(path: Path) -> None:
    optional = {
        "triton",
        "xformers",
        "nerfacc",
        "tinycudann",
        "cupy",
        "rembg",
        "onnxruntime",
        "onnxscript",
        "onnx_ir",
        "tensorrt",
        "tensorrt_rtx",
        "onnx",
    }
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    named = set()
    for node in import_nodes(tree, late=False):
        if isinstance(node, ast.Import):
            named |= {alias.name.split(".")[0] for alias in node.names}
        elif node.level == 0:
            named.add((node.module or "").split(".")[0])
    # Kernels are decorated when their module is imported: this one module asks whether Triton is there.
    allowed = {"triton"} if path == Path("kernels", "_triton.py") else set()
    assert named & optional == allowed


@pytest.mark.parametrize("path", [path for path in MODULES if path.parts[0] == "kernels"], ids=str)
def test_every_kernel_has_its_tests(path: Path) -> None:
    if not path.name.startswith("_"):
        assert Path("tests") / f"test_{path.name}" in FILES


def test_no_machine_path_in_the_repository() -> None:
    """Nothing of the machine it was written on: absolute home folders, or files beside the checkout."""
    pattern = re.compile(rb"\.\./shared|(?<![\w.~])/(?:work|root|home|Users)/")
    this = Path(__file__).resolve().relative_to(ROOT)
    binary = {".png", ".jpg", ".safetensors", ".pt", ".glb", ".mp4", ".gz"}
    guilty = [
        f"{path}:{number}"
        for path in FILES
        if path.suffix not in binary and path != this
        for number, line in enumerate((ROOT / path).read_bytes().splitlines(), start=1)
        if pattern.search(line)
    ]
    assert guilty == []


def test_fixtures_stay_small() -> None:
    size = sum((ROOT / path).stat().st_size for path in FILES if path.parts[:2] == ("tests", "fixtures"))
    assert size <= 40 * 2**20
