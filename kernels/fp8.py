"""Matrix products in fp8, and the norms and gates that write their inputs in fp8.

    y = scale_x * scale_weight * x @ weight^T + bias,    x [..., K] and weight [N, K] in e4m3, sums in float32,

where x is the result of a layer norm or a GEGLU, rounded to e4m3 by the very kernel that computes it: that adds no
pass over memory and saves half of the bytes. e4m3 has four exponent and three mantissa bits: its numbers reach
448, with a rounding error of at most 1/16 down to 2^-6 and steps of 2^-9 below. What is larger becomes 448.
Nothing here is differentiable.

Source: Micikevicius et al., "FP8 formats for deep learning" (arXiv 2209.05433).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ._triton import KernelBackend, obstacle, use_triton
from .geglu import check as check_gate
from .geglu import gate, geglu_reference
from .layer_norm import check as check_norm
from .layer_norm import fits, layer_norm_reference, normalise

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
OLDEST_CAPABILITY = (8, 9)
"""Ada, the first generation that multiplies fp8; Hopper is 9.0."""


def fp8_obstacle(device: torch.device | None) -> str | None:
    """Why fp8 does not run on a device (None: there is no CUDA device); None where it does."""
    if reason := obstacle(device):
        return reason
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        needed, found = (".".join(map(str, number)) for number in (OLDEST_CAPABILITY, capability))
        return f"compute capability {found}, fp8 needs {needed}"
    return None


@torch.compiler.assume_constant_result
def _runs_on(device: torch.device) -> bool:
    return fp8_obstacle(device) is None


def to_e4m3(x: Tensor) -> Tensor:
    """Each number rounded to the nearest of e4m3, which reaches from -448 to 448; NaN stays."""
    return x.clamp(-LARGEST, LARGEST).to(E4M3)


def layer_norm_e4m3_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Shapes as :func:`layer_norm_e4m3`."""
    return to_e4m3(layer_norm_reference(_wide(x), weight, bias, eps))


def add_layer_norm_e4m3_reference(
    x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Shapes as :func:`add_layer_norm_e4m3`."""
    total = x + delta
    return total, layer_norm_e4m3_reference(total, weight, bias, eps)


def geglu_e4m3_reference(projected: Tensor) -> Tensor:
    """Shapes as :func:`geglu_e4m3`."""
    return to_e4m3(geglu_reference(_wide(projected)))


def linear_e4m3_reference(
    x: Tensor,
    weight: Tensor,
    scale_x: Tensor,
    scale_weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Shapes as :func:`linear_e4m3`; products are exact, their sums in float32."""
    y = functional.linear(x.float(), weight.float()) * (scale_x * scale_weight)
    return (y if bias is None else y + bias.float()).to(dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("imagedream_rt::layer_norm_e4m3", mutates_args=())
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return normalise(x, None, weight, bias, eps, E4M3)[1]


@torch.library.custom_op("imagedream_rt::add_layer_norm_e4m3", mutates_args=())
def _add_layer_norm(
    x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return normalise(x, delta, weight, bias, eps, E4M3)


@torch.library.custom_op("imagedream_rt::geglu_e4m3", mutates_args=())
def _geglu(projected: Tensor) -> Tensor:
    return gate(projected, E4M3)


@_layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, dtype=E4M3, memory_format=torch.contiguous_format)


@_add_layer_norm.register_fake
def _(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    return total, torch.empty_like(total, dtype=E4M3)


@_geglu.register_fake
def _(projected: Tensor) -> Tensor:
    return projected.new_empty(*projected.shape[:-1], projected.shape[-1] // 2, dtype=E4M3)


def layer_norm_e4m3(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, backend: KernelBackend = "auto"
) -> Tensor:
    """:func:`~.layer_norm.layer_norm` with its result [..., C] in e4m3, to whose range the weight brings it.

    Arguments and errors are those of ``layer_norm``, here and below.

    Example:
        >>> x, weight = torch.tensor([1.0, 3.0]), torch.tensor([8.3, 500.0])
        >>> layer_norm_e4m3(x, weight, torch.zeros(2), eps=0.0).tolist()
        [-8.0, 448.0]
    """
    check_norm(x, weight, bias)
    if _use_triton(backend, x, weight, bias) and fits(x, backend):
        return _layer_norm(x, weight, bias, eps)
    return layer_norm_e4m3_reference(x, weight, bias, eps)


def add_layer_norm_e4m3(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    backend: KernelBackend = "auto",
) -> tuple[Tensor, Tensor]:
    """:func:`~.layer_norm.add_layer_norm`: the sum in the dtype of ``x``, and its norm in e4m3."""
    check_norm(x, weight, bias, delta)
    if _use_triton(backend, x, delta, weight, bias) and fits(x, backend):
        return _add_layer_norm(x, delta, weight, bias, eps)
    return add_layer_norm_e4m3_reference(x, delta, weight, bias, eps)


def geglu_e4m3(projected: Tensor, backend: KernelBackend = "auto") -> Tensor:
    """:func:`~.geglu.geglu` with its result [..., C] in e4m3.

    Example:
        >>> geglu_e4m3(torch.tensor([1.03, 9.0, 1.0, 100.0])).tolist()  # 0.867 and 900
        [0.875, 448.0]
    """
    check_gate(projected)
    if _use_triton(backend, projected):
        return _geglu(projected)
    return geglu_e4m3_reference(projected)


def linear_e4m3(
    x: Tensor,
    weight: Tensor,
    scale_x: Tensor,
    scale_weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    backend: KernelBackend = "auto",
) -> Tensor:
    """The product above, by the tensor cores of devices that multiply fp8.

    Args:
        x: [..., K] in e4m3.
        weight: [N, K] in e4m3; for the tensor cores K and N are multiples of 16.
        scale_x, scale_weight: float32, one number each.
        bias: [N] in ``dtype``, or None.
        dtype: of the result; for the tensor cores float16 or bfloat16.
        backend: ``"torch"`` computes in float32, as the others do where the device has no fp8.

    Returns:
        [..., N] in ``dtype``.

    Raises:
        ValueError: a shape or dtype does not fit.

    Example:
        >>> x, weight = to_e4m3(torch.ones(16)), to_e4m3(torch.full((2, 16), 3.0))
        >>> linear_e4m3(x, weight, torch.tensor(1.0), torch.tensor(0.5), None, torch.float32).tolist()
        [24.0, 24.0]
    """
    if x.ndim == 0 or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must be [..., K] and weight [N, K], got {list(x.shape)} and {list(weight.shape)}"
        )
    if x.dtype != E4M3 or weight.dtype != E4M3:
        raise ValueError(f"x and weight must be in {E4M3}, got {x.dtype} and {weight.dtype}")
    if backend == "torch" or not _runs_on(x.device):
        return linear_e4m3_reference(x, weight, scale_x, scale_weight, bias, dtype)
    # Fast accumulation loses bits, but far fewer than the factors have lost by their rounding.
    y = torch._scaled_mm(
        x.reshape(-1, x.shape[-1]),
        weight.mT,
        scale_a=scale_x,
        scale_b=scale_weight,
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=True,
    )
    return y.reshape(*x.shape[:-1], len(weight))


def _use_triton(backend: KernelBackend, *tensors: Tensor) -> bool:
    """As :func:`use_triton`, but ``auto`` says no where the device has no fp8."""
    return use_triton(backend, *tensors) and (backend == "triton" or _runs_on(tensors[0].device))
