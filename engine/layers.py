"""What networks are made of beside PyTorch's own layers: layers on this package's kernels, and who computes them;
parameters that checkpoints have in pieces; convolutions whose bias costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kernels._triton import HALF, KernelBackend, use_triton
from ..kernels.bias_residual import bias_residual
from ..kernels.convolution import convolution, fits
from ..kernels.group_norm import group_norm
from ..kernels.layer_norm import add_layer_norm, layer_norm
from ..kernels.picture_convolution import fits as fits_pictures
from ..kernels.picture_convolution import picture_convolution


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


class Derived:
    """What is computed from frozen parameters, kept until one of them is another one or was written to.

    What CUDA graphs or ``parameter.data`` write goes unnoticed, so this is for weights in their final, half precision.
    """

    def __init__(self, compute: Callable[..., Any]) -> None:
        self.compute = compute
        self._of: tuple[tuple[int, ...], ...] | None = None

    def at(self, *parameters: Tensor) -> Any:
        """None where it cannot be kept: of parameters that are trained, or cannot tell whether they were written to.

        Nor while a CUDA graph is captured, in whose memory it would lie, or a network is compiled or exported.
        """
        if torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return None
        if any(parameter.requires_grad or parameter.is_inference() for parameter in parameters):
            return None
        of = tuple((id(parameter), parameter.data_ptr(), parameter._version) for parameter in parameters)
        if of != self._of:
            if parameters[0].is_cuda and torch.cuda.is_current_stream_capturing():
                return None
            with torch.inference_mode(False), torch.no_grad():
                self._value, self._of = self.compute(*parameters), of
        return self._value


class Convolution(KernelLayer, nn.Conv2d):
    """``nn.Conv2d`` with a residual sum behind it, if there is one.

    On CUDA, PyTorch adds a bias in a pass of its own and the residual in another: here one does both. The gradient by
    the input is a convolution too, with the weights turned around; of many channels cuDNN is the faster at that.
    """

    TURNED_FROM = 512
    """Channels on both sides from which the gradient of frozen weights in half precision is computed so."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.turned = Derived(turned_weight)

    @classmethod
    def taking_over(cls, convolution: nn.Conv2d) -> Convolution:
        """The same convolution with the very same parameters."""
        own = cls(
            convolution.in_channels,
            convolution.out_channels,
            convolution.kernel_size,
            convolution.stride,
            convolution.padding,
            device="meta",
        )
        own.weight, own.bias = convolution.weight, convolution.bias
        return own

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``x`` [N, C, H, W] -> [N, C', H', W'], as ``residual``."""
        if _on_kernel(self, self.backend, x, residual):
            return convolution(x, self.weight, self.bias, residual)
        if residual is None and _is_3x3(self) and fits_pictures(self.backend, x, self.weight, self.bias):
            return picture_convolution(x, self.weight, bias_of(self))
        if self.bias is None or not use_triton(self.backend, x):
            y = super().forward(x)
        elif self.kernel_size == (1, 1) and x.is_contiguous(memory_format=torch.channels_last):
            # A matrix product, which adds the bias as it writes.
            y = functional.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(
                0, 3, 1, 2
            )
        else:
            return bias_residual(self.without_bias(x), self.bias, residual, self.backend)
        return y if residual is None else y + residual

    def without_bias(self, x: Tensor) -> Tensor:
        """``x`` [N, C, H, W] -> [N, C', H', W']."""
        turned = self.turned.at(self.weight) if self._turns(x) else None
        if turned is None:
            return self._conv_forward(x, self.weight, None)
        return _TurnedGradient.apply(x, self.weight, turned)

    def _turns(self, x: Tensor) -> bool:
        many = min(self.in_channels, self.out_channels) >= self.TURNED_FROM
        wanted = torch.is_grad_enabled() and x.requires_grad
        halves = x.dtype == self.weight.dtype in HALF
        return many and wanted and halves and _is_3x3(self) and use_triton(self.backend, x)


class _TurnedGradient(torch.autograd.Function):
    """A 3x3 convolution without a gradient by its weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, turned: Tensor) -> Tensor:
        ctx.save_for_backward(turned)
        return functional.conv2d(x, weight, padding=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return functional.conv2d(grad, ctx.saved_tensors[0], padding=1), None, None


def turned_weight(weight: Tensor) -> Tensor:
    """[C', C, 3, 3] -> [C, C', 3, 3]: those of a gradient that a 3x3 convolution sends back."""
    return weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)


class StackedParameters(nn.Module):
    """A module some of whose parameters are several in state dicts, stacked along their first dimension here.

    So one product with the stack takes the place of many. As everywhere in PyTorch, what a state dict holds is
    the parameter's own memory.
    """

    def stacks(self) -> dict[str, dict[str, int]]:
        """Of each such parameter, by its name, the pieces' names in state dicts and their rows, in order."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, rows in self.stacks().items():
            pieces = destination.pop(prefix + name).split(list(rows.values()))
            destination.update((prefix + piece, x) for piece, x in zip(rows, pieces, strict=True))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # ``state_dict`` is for modules to modify: a piece that is gone is not unexpected to a module inside this one.
        for name, rows in self.stacks().items():
            own = getattr(self, name)
            unexpected_keys += [prefix + name] * (prefix + name in state_dict)
            pieces = []
            for piece, count in rows.items():
                given, shape = state_dict.pop(prefix + piece, None), [count, *own.shape[1:]]
                if given is None:
                    missing_keys.append(prefix + piece)
                elif list(given.shape) != shape:
                    error_msgs.append(f"{prefix}{piece} has shape {list(given.shape)}, not {shape}")
                else:
                    pieces.append(given)
            state_dict[prefix + name] = torch.cat(pieces) if len(pieces) == len(rows) else own
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _on_kernel(layer: nn.Conv2d, backend: KernelBackend, x: Tensor, residual: Tensor | None = None) -> bool:
    """Whether the kernel for 3x3 convolutions of small maps computes this one."""
    return _is_3x3(layer) and fits(backend, x, layer.weight, layer.bias, residual)


def _is_3x3(layer: nn.Conv2d) -> bool:
    form = layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups
    return form == ((3, 3), (1, 1), (1, 1), (1, 1), 1)


def normalised_convolution(
    layer: nn.Conv2d, norm: GroupNorm, x: Tensor, shift: Tensor | None = None
) -> Tensor:
    """``norm(layer(x))``; a ``shift`` [N, C'], if given, takes the place of the convolution's bias.

    On CUDA PyTorch adds a convolution's bias in a pass of its own: here the norm adds it as it reads.
    """
    if shift is None and not use_triton(norm.backend, x):
        return norm(layer(x))
    if _on_kernel(layer, norm.backend, x):
        h = convolution(x, layer.weight)
    elif isinstance(layer, Convolution):
        h = layer.without_bias(x)
    else:
        h = functional.conv2d(x, layer.weight, None, layer.stride, layer.padding)
    return norm(h, bias_of(layer).expand(h.shape[0], -1) if shift is None else shift)


def bias_of(convolution: nn.Conv2d) -> Tensor:
    """The bias of a convolution that has one."""
    assert convolution.bias is not None
    return convolution.bias


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
