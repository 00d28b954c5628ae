"""Hub ids, without a network: the cache, what would be downloaded, and what the errors say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import State, official_state, refused, tiny
from huggingface_hub import errors

from imagedream_rt.engine import official_layout
from imagedream_rt.engine.hub import fetch
from imagedream_rt.engine.model import Controller
from imagedream_rt.engine.random_model import ByteTokenizer
from imagedream_rt.engine.weights import inspect


@pytest.fixture(autouse=True)
def _no_clip_vocabulary_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Official checkpoints take CLIP's tokenizer, whose package has no wheel for every Python version."""
    monkeypatch.setattr(official_layout, "ClipTokenizer", ByteTokenizer)


@pytest.fixture(scope="module")
def state() -> State:
    return official_state(tiny("pixel"))


def test_hub_id_without_network(tmp_path: Path) -> None:
    """In a fresh process, since huggingface_hub reads the environment once."""
    code = """
from imagedream_rt.engine.errors import InputError
from imagedream_rt.engine.hub import fetch

try:
    fetch("Peng-Wang/ImageDream", None)
except InputError as error:
    print(error)
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    said = run.stdout
    assert said.startswith("Peng-Wang/ImageDream: not on this machine")
    assert "https://huggingface.co/Peng-Wang/ImageDream" in said
    assert str(tmp_path / "hub") in said
    assert said.count("\n") == 1


@pytest.fixture
def hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache; the network is off for all tests (conftest)."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_hub_cache_serves_offline(state: State, hub_cache: Path) -> None:
    """As huggingface_hub lays its cache out, after one of the repository's files was downloaded."""
    store = hub_cache / "models--Peng-Wang--ImageDream"
    snapshot = store / "snapshots" / "0123abcd"
    (store / "refs").mkdir(parents=True)
    (store / "refs" / "main").write_text("0123abcd")
    snapshot.mkdir(parents=True)
    torch.save(state, snapshot / "sd-v2.1-base-4view-ipmv-local.pt")
    card = inspect("Peng-Wang/ImageDream").card
    assert (card.name, card.controller) == ("Peng-Wang/ImageDream", "local")
    assert (
        inspect("Peng-Wang/ImageDream/sd-v2.1-base-4view-ipmv-local.pt", "pixel").card.controller == "pixel"
    )
    absent = refused(lambda: inspect("Peng-Wang/ImageDream/sd-v2.1-base-4view-ipmv.pt"))
    assert "hf download Peng-Wang/ImageDream sd-v2.1-base-4view-ipmv.pt" in absent


def test_no_network_is_noticed_at_once(monkeypatch: pytest.MonkeyPatch, hub_cache: Path) -> None:
    """Without retries: the client is not even asked."""

    def unknown(*_: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("imagedream_rt.engine.hub.getproxies", dict)
    monkeypatch.setattr("socket.getaddrinfo", unknown)
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    assert "cannot be reached (its name cannot be resolved)" in refused(lambda: fetch("owner/name", None))


class FakeHub:
    """What the Hub holds and what was downloaded of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, names: list[str], folder: Path) -> None:
        self.names, self.folder = names, folder
        self.downloads: list[Any] = []
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: self)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", self.download)
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.download)

    def list_repo_files(self, repo: str) -> list[str]:
        return self.names

    def download(self, repo: str, file: str = "", allow_patterns: Any = None) -> str:
        self.downloads.append(allow_patterns or file)
        return str(self.folder / file)


@pytest.mark.parametrize(("controller", "suffix"), [(None, ""), ("pixel", ""), ("local", "-local")])
def test_hub_repository_of_checkpoint_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, controller: Controller | None, suffix: str
) -> None:
    names = ["README.md", "sd-v2.1-base-4view-ipmv.pt", "sd-v2.1-base-4view-ipmv-local.pt", "assets/x.pt"]
    fake = FakeHub(monkeypatch, names, tmp_path)
    assert fetch("Peng-Wang/ImageDream", controller) == tmp_path / f"sd-v2.1-base-4view-ipmv{suffix}.pt"
    assert fake.downloads == [f"sd-v2.1-base-4view-ipmv{suffix}.pt"]


def test_hub_repository_of_a_model_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needed = ["model_index.json", "unet/config.json", "vae/config.json", "tokenizer/vocab.json"]
    needed += ["unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors"]
    rest = ["unet/diffusion_pytorch_model.bin", "README.md", "pipeline.py", "unet/mv_unet.py"]
    fake = FakeHub(monkeypatch, needed + rest, tmp_path)
    assert fetch("ashawkey/imagedream-ipmv-diffusers", None) == tmp_path
    assert sorted(fake.downloads[0]) == sorted(needed)


def test_hub_repository_with_too_many_checkpoints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    FakeHub(monkeypatch, ["sd-v1.5-4view.pt", "sd-v2.1-base-4view.pt"], tmp_path)
    message = refused(lambda: fetch("MVDream/MVDream", None))
    assert "MVDream/MVDream/sd-v1.5-4view.pt" in message
    assert "sd-v2.1-base-4view.pt" in message


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("RepositoryNotFoundError", "no such model"),
        ("GatedRepoError", "HF_TOKEN"),
        ("RemoteEntryNotFoundError", "has no file"),
        ("LocalEntryNotFoundError", "cannot be reached"),
    ],
)
def test_hub_errors(monkeypatch: pytest.MonkeyPatch, hub_cache: Path, error: str, words: str) -> None:
    kind = getattr(errors, error, errors.EntryNotFoundError)  # hub versions below 1 have one kind for both

    def fail(*_: Any, **__: Any) -> None:
        raise kind.__new__(kind)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    message = refused(lambda: fetch("owner/name/file.pt", None))
    assert words in message
    assert message.startswith("owner/name/file.pt: ")
