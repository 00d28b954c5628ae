"""Comparing an operator with its reference: error bounds in rounding steps, and inputs to compare them on."""

from __future__ import annotations

import torch
from torch import Tensor

# Allowed relative L2 error in rounding steps of the dtype. Half precision accumulates in float32, so only the
# output's rounding counts; float64 is judged by a reference that rounds as much as the operator itself.
ROUNDING_STEPS = {torch.float64: 16, torch.float32: 8, torch.bfloat16: 2, torch.float16: 2}
DTYPES = list(ROUNDING_STEPS)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative_error(value: Tensor, truth: Tensor) -> float:
    value, truth = value.double(), truth.double()
    return ((value - truth).norm() / truth.norm()).item()


def assert_close(value: Tensor, truth: Tensor) -> None:
    """Relative L2 error against float64, in units of the rounding step of ``value``'s dtype."""
    assert value.shape == truth.shape
    assert relative_error(value, truth) <= ROUNDING_STEPS[value.dtype] * torch.finfo(value.dtype).eps


def leaf(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).requires_grad_()
