"""Group normalisation with SiLU at the start of a residual path: its gradient together with that of the path.

Bytes: in the forward pass x read and y written; in the backward pass x and both gradients read, and x's written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..kernels.forked_group_norm import forked_group_norm
from ..kernels.group_norm import group_norm, group_norm_reference
from .group_norm import ENCODER, EPS, TOLERANCE
from .harness import OURS, Case, random_maps

Norm = Callable[[Tensor], tuple[Tensor, Tensor]]


def cases() -> Iterator[Case]:
    for samples, channels, side in ENCODER:
        x, *grads = (random_maps(samples, channels, side, side) for _ in range(3))
        yield _case(x.requires_grad_(), grads)


def _case(x: Tensor, grads: list[Tensor]) -> Case:
    weight, bias = (torch.ones(x.shape[1], device="cuda", dtype=torch.float16) for _ in range(2))
    wide = x.detach().float().requires_grad_()

    def gradient(norm: Norm, of: Tensor) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.enable_grad():
                results = norm(of)
            return torch.autograd.grad(results, of, [grad.to(of.dtype) for grad in grads])[0]

        return run

    return Case(
        "forked_group_norm",
        f"{'x'.join(map(str, x.shape))} + SiLU, with input gradient",
        {
            OURS: gradient(lambda of: forked_group_norm(of, weight, bias, eps=EPS, silu=True), x),
            "group_norm": gradient(lambda of: (group_norm(of, weight, bias, eps=EPS, silu=True), of), x),
        },
        gradient(lambda of: (group_norm_reference(of, weight, bias, eps=EPS, silu=True), of), wide),
        TOLERANCE,
        6 * x.nbytes,
        "TB/s",
    )
