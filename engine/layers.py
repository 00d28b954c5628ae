"""PyTorch's normalisation layers computed by this package's kernels, and who computes them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kernels._triton import KernelBackend
from ..kernels.group_norm import group_norm
from ..kernels.layer_norm import add_layer_norm, layer_norm


class KernelLayer(nn.Module):
    """A layer of which a kernel computes something; see :func:`use_kernels`."""

    backend: KernelBackend = "auto"


class GroupNorm(KernelLayer, nn.GroupNorm):
    """``nn.GroupNorm`` in float32 inside, with a shift before it and, if ``silu``, SiLU behind it."""

    def __init__(self, groups: int, channels: int, eps: float, *, silu: bool = False) -> None:
        super().__init__(groups, channels, eps=eps)
        self.silu = silu

    @classmethod
    def taking_over(cls, norm: nn.GroupNorm, *, silu: bool = False) -> GroupNorm:
        """The same normalisation with the very same parameters."""
        own = cls(norm.num_groups, norm.num_channels, norm.eps, silu=silu)
        own.weight, own.bias = norm.weight, norm.bias
        return own

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """``x`` [N, C, H, W] or [N, C, T], ``shift`` [N, C] -> the shape and dtype of ``x``."""
        if x.ndim == 3:
            return self(x.unsqueeze(-1), shift).squeeze(-1)
        return group_norm(
            x,
            self.weight,
            self.bias,
            groups=self.num_groups,
            eps=self.eps,
            silu=self.silu,
            shift=shift,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, silu={self.silu}"


class LayerNorm(KernelLayer, nn.LayerNorm):
    """``nn.LayerNorm`` over the last dimension, in float32 inside; alone or after a residual sum."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return layer_norm(x, self.weight, self.bias, self.eps, self.backend)

    def after_sum(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """``x + delta`` and its norm, all [..., C]."""
        return add_layer_norm(x, delta, self.weight, self.bias, self.eps, self.backend)


def normalised_convolution(
    convolution: nn.Conv2d, norm: GroupNorm, x: Tensor, shift: Tensor | None = None
) -> Tensor:
    """``norm(convolution(x) + shift)``, ``shift`` [N, C'].

    On CUDA PyTorch adds a convolution's bias in a pass of its own: it goes with the shift, which the norm adds
    as it reads.
    """
    if shift is None and not x.is_cuda:
        return norm(convolution(x))
    h = functional.conv2d(x, convolution.weight, None, convolution.stride, convolution.padding)
    bias = convolution.bias
    assert bias is not None
    return norm(h, bias.expand(h.shape[0], -1) if shift is None else shift + bias)


def use_kernels(network: nn.Module, backend: KernelBackend) -> None:
    """Choose what computes every layer of ``network`` that has a kernel.

    ``"auto"``: Triton on CUDA devices, else plain PyTorch; ``"torch"`` and ``"triton"`` force one of the two.
    """
    for module in network.modules():
        if isinstance(module, KernelLayer):
            module.backend = backend


def fast_memory_format(network: nn.Module) -> None:
    """Channels-last convolution weights on CUDA, where maps then flow through kernels and cuDNN without transposes.

    On the CPU they stay as they are: PyTorch's convolutions pick their own blocked layout there.
    """
    if next(network.parameters()).is_cuda:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
