"""Shared by all tests: no network, the installed package first, GPU tests only where there is a GPU."""

from __future__ import annotations

import os

# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

# Also before pytest visits the checkout's own __init__.py: in a checkout that is named imagedream_rt it would
# otherwise be imported under that name, in place of the installed package.
import pytest
import torch

import imagedream_rt


def pytest_report_header() -> list[str]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return [
        f"imagedream_rt {imagedream_rt.__version__} from {os.path.dirname(imagedream_rt.__file__)}",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, gpu: {gpu}",
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
