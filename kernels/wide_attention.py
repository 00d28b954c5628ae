"""Self-attention with one head as wide as the feature map, by matrix products.

    O = P V,   P = softmax(Q K^T / sqrt(C))

for queries, keys and values [N, T, C]. Flash kernels end at heads of 256; PyTorch's other one takes twenty times as
long for the gradient as its products do. So the scores are written out: in float32, of which a kernel makes P
in half precision, the only thing of T^2 numbers that is kept. In the backward pass

    dV = P^T dO,   dP = dO V^T,   dS = P * (dP - sum(P * dP)),   dQ = dS K / sqrt(C),   dK = dS^T Q / sqrt(C),

dP is in float32, too, since dS is a difference, and the factor 1 / sqrt(C) comes last, since dS is small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ._triton import KernelBackend, constant, jit, tl, triton, use_triton

LONGEST = 4096
"""Most tokens that are attended to this way: P takes as much memory then as a few of the encoder's feature maps."""
LOG2_E = constant(1.4426950408889634)


def wide_attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula by PyTorch: [N, T, C] each -> [N, T, C]."""
    q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).squeeze(1)


@jit
def _softmax_kernel(scores, p, scale, tokens, WIDTH: tl.constexpr):
    """One row of P; the scores are not scaled yet."""
    row = tl.program_id(0).to(tl.int64) * tokens
    o_t = tl.arange(0, WIDTH)
    mask = o_t < tokens
    b_s = tl.load(scores + row + o_t, mask, other=-float("inf"))
    b_p = tl.exp2((b_s - tl.max(b_s, axis=0)) * (scale * LOG2_E))
    tl.store(p + row + o_t, (b_p / tl.sum(b_p, axis=0)).to(p.dtype.element_ty), mask)


@jit
def _softmax_gradient_kernel(p, grad_p, grad_scores, tokens, WIDTH: tl.constexpr):
    """One row of dS."""
    row = tl.program_id(0).to(tl.int64) * tokens
    o_t = tl.arange(0, WIDTH)
    mask = o_t < tokens
    b_p = tl.load(p + row + o_t, mask, other=0.0).to(tl.float32)
    b_grad = tl.load(grad_p + row + o_t, mask, other=0.0)
    # Rounded, a row of P does not quite add up to one, which would show where one token has almost all of it.
    b_mean = tl.sum(b_p * b_grad, axis=0) / tl.sum(b_p, axis=0)
    b_grad = b_p * (b_grad - b_mean)
    tl.store(grad_scores + row + o_t, b_grad.to(grad_scores.dtype.element_ty), mask)


def _each_row(kernel: Any, *given: Any) -> None:
    """Run a kernel on all rows of T numbers of its first tensor [N, T, T]."""
    samples, _, tokens = given[0].shape
    width = triton.next_power_of_2(tokens)
    kernel[(samples * tokens,)](*given, tokens, WIDTH=width, num_warps=max(1, min(8, width // 256)))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` [N, ., .] in float32."""
    if a.dtype != torch.float32 and a.is_cuda and "dtype" in torch.ops.aten.bmm.overloads():
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())  # PyTorch before 2.8, and the CPU


@torch.library.custom_op("imagedream_rt::wide_attention", mutates_args=())
def _wide_attention(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """O and P."""
    q, k, v = qkv.chunk(3, dim=-1)
    scores = _product(q, k.mT)
    p = torch.empty_like(scores, dtype=qkv.dtype)
    _each_row(_softmax_kernel, scores, p, q.shape[-1] ** -0.5)
    return torch.bmm(p, v), p


@torch.library.custom_op("imagedream_rt::wide_attention_gradient", mutates_args=())
def _gradient(grad: Tensor, qkv: Tensor, p: Tensor) -> Tensor:
    q, k, v = qkv.chunk(3, dim=-1)
    grad_p, grad_scores = _product(grad, v.mT), torch.empty_like(p)
    _each_row(_softmax_gradient_kernel, p, grad_p, grad_scores)
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    grad_q, grad_k, grad_v = grad_qkv.chunk(3, dim=-1)
    scale = q.shape[-1] ** -0.5
    torch.baddbmm(q, grad_scores, k, beta=0, alpha=scale, out=grad_q)
    torch.baddbmm(k, grad_scores.mT, q, beta=0, alpha=scale, out=grad_k)
    torch.bmm(p.mT, grad, out=grad_v)
    return grad_qkv


@_wide_attention.register_fake
def _(qkv: Tensor) -> tuple[Tensor, Tensor]:
    samples, tokens, channels = qkv.shape
    return qkv.new_empty(samples, tokens, channels // 3), qkv.new_empty(samples, tokens, tokens)


@_gradient.register_fake
def _(grad: Tensor, qkv: Tensor, p: Tensor) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _remember(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor, _: None) -> Tensor:
    return _gradient(grad, *ctx.saved_tensors)


_wide_attention.register_autograd(_differentiate, setup_context=_remember)


def wide_attention(qkv: Tensor, backend: KernelBackend = "auto") -> Tensor:
    """Attention of one head, differentiable.

    ``qkv`` [N, T, 3C]: queries, keys and values side by side. Returns [N, T, C] in its dtype. Under ``auto``, more than
    4096 tokens go to PyTorch's attention.

    Raises ``ValueError`` for another shape, or if ``triton`` is asked for tensors that it does not take.

    >>> wide_attention(torch.tensor([[[1.0, 2.0, 3.0]]])).tolist()  # one token attends to itself: its value
    [[[3.0]]]
    """
    if qkv.dim() != 3 or qkv.shape[-1] % 3:
        raise ValueError(f"qkv must be [N, T, 3C], got {[*qkv.shape]}")
    fits = qkv.shape[1] <= LONGEST or backend == "triton"
    if qkv.numel() and fits and use_triton(backend, qkv):
        return _wide_attention(qkv)[0]
    return wide_attention_reference(*qkv.chunk(3, dim=-1))
