"""The noise schedule of Stable Diffusion 2.1 as the released ImageDream code sets it up, and its DDIM steps.

The forward process is x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps with abar the cumulative product of
1 - beta (DDPM, arXiv 2006.11239); the reverse step is DDIM's deterministic one (arXiv 2010.02502, eta 0).
"""

from __future__ import annotations

import torch

from .errors import InputError

TRAIN_STEPS = 1000


def betas() -> torch.Tensor:
    """beta_t as float32 [1000]: the square of a straight line from sqrt(0.00085) to sqrt(0.0120)."""
    return _betas64().float()


def alphas_cumprod() -> torch.Tensor:
    """abar_t as float32 [1000]; the product runs in float64, as in the released code."""
    return torch.cumprod(1.0 - _betas64(), dim=0).float()


def _betas64() -> torch.Tensor:
    return torch.linspace(0.00085**0.5, 0.0120**0.5, TRAIN_STEPS, dtype=torch.float64) ** 2


def q_sample(
    x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor, alphas_cumprod: torch.Tensor
) -> torch.Tensor:
    """Noise clean latents: sqrt(abar_t) x0 + sqrt(1 - abar_t) noise.

    ``x0``, ``noise`` [N, ...]; ``t`` integer tensor, [] for one step or [N] for one a row; ``alphas_cumprod``
    float32 [1000] on the same device. Returns float32 [N, ...], differentiable in ``x0`` and ``noise``.
    """
    alpha = _gather(alphas_cumprod, t, x0.ndim)
    return alpha.sqrt() * x0 + (1.0 - alpha).sqrt() * noise


def predict_x0(
    x_t: torch.Tensor, eps: torch.Tensor, t: torch.Tensor, alphas_cumprod: torch.Tensor
) -> torch.Tensor:
    """The clean latents that ``x_t`` holds if its noise is ``eps``: the inverse of :func:`q_sample`.

    Shapes as there. Returns float32 [N, ...].
    """
    alpha = _gather(alphas_cumprod, t, x_t.ndim)
    return (x_t - (1.0 - alpha).sqrt() * eps) / alpha.sqrt()


def ddim_step(
    x_t: torch.Tensor, eps: torch.Tensor, alpha: torch.Tensor, alpha_prev: torch.Tensor
) -> torch.Tensor:
    """One deterministic DDIM step: sqrt(abar_prev) x0 + sqrt(1 - abar_prev) eps, x0 as in :func:`predict_x0`.

    ``x_t``, ``eps`` [N, ...] float32; ``alpha``, ``alpha_prev`` [] (of this step and of the one it goes to).
    """
    x0 = (x_t - (1.0 - alpha).sqrt() * eps) / alpha.sqrt()
    return alpha_prev.sqrt() * x0 + (1.0 - alpha_prev).sqrt() * eps


def ddim_timesteps(steps: int) -> list[int]:
    """The training steps that DDIM visits, ascending: 1, 1 + c, 1 + 2c, ... with c = 1000 // steps.

    This is the released rule, so 30 steps give 31 (1, 34, ..., 991) and very few start low (2 give 1 and
    501). Where that rule would leave the table (for example with 3, 9, 27 or 37 steps, which crash there),
    the last step is 999 instead of 1000. Raises :class:`InputError` unless 1 <= steps <= 1000.

    >>> ddim_timesteps(4)
    [1, 251, 501, 751]
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= TRAIN_STEPS:
        raise InputError(f"steps is {steps!r}; it must be a whole number from 1 to {TRAIN_STEPS}")
    visited = range(0, TRAIN_STEPS, TRAIN_STEPS // steps)
    return sorted({min(t + 1, TRAIN_STEPS - 1) for t in visited})


def ddim_table(steps: int, alphas_cumprod: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a DDIM loop needs, in the order it runs (noisiest first), on the device of ``alphas_cumprod``.

    Returns timesteps int64 [S], abar of each float32 [S], and abar of the step it goes to float32 [S]; the
    last one goes to abar_0 and not to 1, so the final latents keep a trace of noise, as in the released code.
    """
    ascending = torch.tensor(ddim_timesteps(steps), device=alphas_cumprod.device)
    alpha = alphas_cumprod[ascending]
    alpha_prev = torch.cat([alphas_cumprod[:1], alpha[:-1]])
    return ascending.flip(0), alpha.flip(0), alpha_prev.flip(0)


def _gather(table: torch.Tensor, t: torch.Tensor, ndim: int) -> torch.Tensor:
    """``table[t]`` shaped to broadcast over rows of ``ndim``-dimensional tensors.

    index_select, because indexing with a tensor without dimensions reads it back to the host.
    """
    return table.index_select(0, t.reshape(-1)).reshape(-1, *(1,) * (ndim - 1))
