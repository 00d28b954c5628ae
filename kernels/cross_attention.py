"""Decoupled cross-attention: text and image prompt, each with its own softmax, over shared queries.

    out = softmax(Q K_text^T / sqrt(D)) V_text + image_scale * softmax(Q K_image^T / sqrt(D)) V_image

Source: IP-Adapter (arXiv 2308.06721, equation 5), as ImageDream uses it (arXiv 2312.02201, section 3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def decoupled_cross_attention_reference(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_image: Tensor | None = None,
    v_image: Tensor | None = None,
    image_scale: float = 1.0,
) -> Tensor:
    """The formula above with repeated keys and an explicit softmax in float32 or wider; the tests' oracle.

    Shapes as :func:`decoupled_cross_attention`.
    """
    wide = torch.promote_types(q.dtype, torch.float32)

    def branch(k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.to(wide).repeat_interleave(q.shape[0] // x.shape[0], dim=0) for x in (k, v))
        scores = torch.einsum("nthd,nlhd->nhtl", q.to(wide), k) * q.shape[-1] ** -0.5
        return torch.einsum("nhtl,nlhd->nthd", torch.softmax(scores, dim=-1), v)

    out = branch(k_text, v_text)
    if k_image is not None and v_image is not None:
        out = out + image_scale * branch(k_image, v_image)
    return out.flatten(2).to(q.dtype)


def decoupled_cross_attention(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_image: Tensor | None = None,
    v_image: Tensor | None = None,
    image_scale: float = 1.0,
) -> Tensor:
    """Text attention plus ``image_scale`` times image attention; softmax scale 1/sqrt(D); differentiable.

    N counts frames. A key/value row serves N / rows consecutive frames: with N = B*F frames, B rows hold one
    prompt per group of F views, and N rows one per view. The image may have more or fewer rows than the text.

    Args:
        q: [N, T, H, D].
        k_text, v_text: [B, Lt, H, D], B divides N.
        k_image, v_image: [B', Li, H, D], B' divides N; both None for text only.
        image_scale: weight of the image branch, 1 as trained.

    Returns:
        [N, T, H*D] in the dtype of ``q``, contiguous.

    Raises:
        ValueError: a shape does not fit, or only one of ``k_image`` and ``v_image`` is given.

    Example:
        >>> q, k = torch.zeros(2, 1, 1, 1), torch.zeros(1, 2, 1, 1)  # equal scores: each branch is a mean
        >>> v = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)
        >>> decoupled_cross_attention(q, k, v, k, 10 * v, image_scale=0.5).flatten().tolist()
        [12.0, 12.0]
    """
    if (k_image is None) != (v_image is None):
        raise ValueError("k_image and v_image must be given together")
    out = _attend(q, k_text, v_text, "text")
    if k_image is not None and v_image is not None:
        out = out + image_scale * _attend(q, k_image, v_image, "image")
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, name: str) -> Tensor:
    fits = q.ndim == 4 and k.ndim == 4 and k.shape == v.shape and k.shape[2:] == q.shape[2:]
    if not fits or 0 in k.shape or q.shape[0] % k.shape[0]:
        raise ValueError(
            f"q must be [N, T, H, D] and k_{name}, v_{name} [B, L, H, D] with B dividing N, "
            f"got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    n, t, h, d = q.shape
    # Queries do not see each other, so the frames that share a key/value row are one longer row of queries.
    rows = q.reshape(k.shape[0], -1, h, d).transpose(1, 2)
    out = functional.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).reshape(n, t, h * d)
