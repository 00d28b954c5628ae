"""How light is absorbed along rays, inside Triton kernels: device functions for packed samples.

A program takes blocks of RAYS rays and walks along all of them together, CHUNK samples of each at a time.
"""

from __future__ import annotations

from ._triton import constant, jit, tl

DARK = constant(80.0)
"""Optical depth behind which float32 knows no light; more of it would only cost digits in sums of depths."""


@jit
def load_rays(block, p_packed_info, n_rays, RAYS: tl.constexpr):
    """A block's rays, which of them exist, where their samples begin and how many they are."""
    ray = block * RAYS + tl.arange(0, RAYS)
    m_ray = ray < n_rays
    begin = tl.load(p_packed_info + ray * 2, mask=m_ray, other=0).to(tl.int32)
    count = tl.load(p_packed_info + ray * 2 + 1, mask=m_ray, other=0).to(tl.int32)
    return ray, m_ray, begin, count


@jit
def load_intervals(p_t_starts, p_t_ends, row, m):
    """Midpoints and lengths of samples; zero where not ``m``."""
    start = tl.load(p_t_starts + row, mask=m, other=0.0)
    end = tl.load(p_t_ends + row, mask=m, other=0.0)
    return (start + end) * 0.5, end - start


@jit
def optical_depth(p_sigma, length, row, m):
    """sigma times length; zero where not ``m``."""
    return tl.minimum(tl.load(p_sigma + row, mask=m, other=0.0).to(tl.float32) * length, DARK)


@jit
def absorbed(depth):
    """1 - exp(-depth), with all its digits also for thin matter."""
    series = depth * 0.0 + 1.0
    for n in tl.static_range(5):
        series = 1.0 - depth * series * (1.0 / (6 - n))
    return tl.where(depth < 0.25, depth * series, 1.0 - tl.exp(-depth))
