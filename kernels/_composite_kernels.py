"""The compositing kernels: along each ray, shade and sum up samples; see ``composite`` for the formulas.

A program walks along RAYS rays together, CHUNK samples of each at a time: forward from the first sample to the
last, backward from the last to the first. What only depends on the ray is loaded once. Rows that belong to no ray
are neither read nor written.
"""

from __future__ import annotations

from ._field_network import load_vectors
from ._transmittance import absorbed, load_intervals, load_rays, optical_depth
from ._triton import jit, tl


@jit
def _load_columns(p, ray, m_ray):
    """Vectors of rays, three [RAYS, 1], that broadcast over their samples."""
    x, y, z = load_vectors(p, ray, m_ray)
    return x[:, None], y[:, None], z[:, None]


@jit
def _store_vectors(p, o, x, y, z, m):
    tl.store(p + o * 3, x, mask=m)
    tl.store(p + o * 3 + 1, y, mask=m)
    tl.store(p + o * 3 + 2, z, mask=m)


@jit
def _dot(ax, ay, az, bx, by, bz):
    return ax * bx + ay * by + az * bz


@jit
def _towards(ex, ey, ez, dx, dy, dz, middle):
    """Unit vectors [RAYS, CHUNK] towards the lights, from samples at distances ``middle`` on rays with directions d;
    e [RAYS, 1] lead from the rays' origins to the lights."""
    x, y, z = ex - dx * middle, ey - dy * middle, ez - dz * middle
    inverse = tl.rsqrt(tl.maximum(_dot(x, y, z, x, y, z), 1e-24))
    return x * inverse, y * inverse, z * inverse


@jit
def _load_lights(p_lights, p_origins, ray, m_ray):
    """From the rays' origins to their lights: three [RAYS, 1]."""
    lx, ly, lz = _load_columns(p_lights, ray, m_ray)
    ox, oy, oz = _load_columns(p_origins, ray, m_ray)
    return lx - ox, ly - oy, lz - oz


@jit
def forward_kernel(
    p_sigma,
    p_albedo,
    p_normal,
    p_t_starts,
    p_t_ends,
    p_packed_info,
    p_origins,
    p_directions,
    p_lights,
    p_ambient,
    p_diffuse,
    p_textureless,
    p_weights,
    p_passed,
    p_colour,
    p_normal_sum,
    p_opacity,
    p_depth,
    p_z_variance,
    p_facing_away,
    n_rays,
    RAYS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """p_normal, p_normal_sum, p_facing_away: None without normals; p_lights: None without a diffuse part."""
    ray, m_ray, begin, count = load_rays(tl.program_id(0), p_packed_info, n_rays, RAYS)
    ambient, diffuse, textureless = tl.load(p_ambient), tl.load(p_diffuse), tl.load(p_textureless)
    dx, dy, dz = _load_columns(p_directions, ray, m_ray)
    if p_lights is not None:
        ex, ey, ez = _load_lights(p_lights, p_origins, ray, m_ray)
    depth_before = tl.zeros((RAYS,), dtype=tl.float32)
    opacity = tl.zeros((RAYS,), dtype=tl.float32)
    # Of the midpoints under the weights: the mean and the sum of squares around it, which keeps the digits
    # that the sum of squares around zero would lose.
    mean = tl.zeros((RAYS,), dtype=tl.float32)
    around = tl.zeros((RAYS,), dtype=tl.float32)
    red = tl.zeros((RAYS,), dtype=tl.float32)
    green = tl.zeros((RAYS,), dtype=tl.float32)
    blue = tl.zeros((RAYS,), dtype=tl.float32)
    if p_normal is not None:
        sum_x = tl.zeros((RAYS,), dtype=tl.float32)
        sum_y = tl.zeros((RAYS,), dtype=tl.float32)
        sum_z = tl.zeros((RAYS,), dtype=tl.float32)
        facing_away = tl.zeros((RAYS,), dtype=tl.float32)
    longest = tl.max(count)
    done = 0
    while done < longest:
        place = done + tl.arange(0, CHUNK)
        m = place[None, :] < count[:, None]
        row = (begin[:, None] + place[None, :]).to(tl.int64)
        middle, length = load_intervals(p_t_starts, p_t_ends, row, m)
        depth = optical_depth(p_sigma, length, row, m)
        r, g, b = load_vectors(p_albedo, row, m)
        depth_behind = depth_before[:, None] + tl.cumsum(depth, axis=1)
        weight = tl.exp(depth - depth_behind) * absorbed(depth)
        tl.store(p_weights + row, weight, mask=m)
        tl.store(p_passed + row, tl.exp(-depth_behind), mask=m)

        lit = weight * ambient
        if p_normal is not None:
            nx, ny, nz = load_vectors(p_normal, row, m)
            if p_lights is not None:
                tx, ty, tz = _towards(ex, ey, ez, dx, dy, dz, middle)
                lit += weight * diffuse * tl.maximum(_dot(nx, ny, nz, tx, ty, tz), 0.0)
            away = tl.maximum(_dot(nx, ny, nz, dx, dy, dz), 0.0)
            facing_away += tl.sum(weight * away * away, axis=1)
            sum_x += tl.sum(weight * nx, axis=1)
            sum_y += tl.sum(weight * ny, axis=1)
            sum_z += tl.sum(weight * nz, axis=1)
        red += tl.sum(lit * (r * (1.0 - textureless) + textureless), axis=1)
        green += tl.sum(lit * (g * (1.0 - textureless) + textureless), axis=1)
        blue += tl.sum(lit * (b * (1.0 - textureless) + textureless), axis=1)

        new = tl.sum(weight, axis=1)
        total = opacity + new
        new_mean = tl.sum(weight * middle, axis=1) / tl.maximum(new, 1e-30)
        part = new / tl.maximum(total, 1e-30)
        off = middle - new_mean[:, None]
        shift = new_mean - mean
        around += tl.sum(weight * off * off, axis=1) + shift * shift * opacity * part
        mean += shift * part
        opacity = total
        depth_before += tl.sum(depth, axis=1)
        done += CHUNK
    _store_vectors(p_colour, ray, red, green, blue, m_ray)
    if p_normal is not None:
        _store_vectors(p_normal_sum, ray, sum_x, sum_y, sum_z, m_ray)
        tl.store(p_facing_away + ray, facing_away, mask=m_ray)
    depth = opacity * mean
    tl.store(p_opacity + ray, opacity, mask=m_ray)
    tl.store(p_depth + ray, depth, mask=m_ray)
    tl.store(p_z_variance + ray, around + opacity * (mean - depth) * (mean - depth), mask=m_ray)


@jit
def backward_kernel(
    p_albedo,
    p_normal,
    p_t_starts,
    p_t_ends,
    p_packed_info,
    p_origins,
    p_directions,
    p_lights,
    p_ambient,
    p_diffuse,
    p_textureless,
    p_weights,
    p_passed,
    p_opacity,
    p_depth,
    p_grad_colour,
    p_grad_normal_sum,
    p_grad_opacity,
    p_grad_depth,
    p_grad_z_variance,
    p_grad_facing_away,
    p_grad_sigma,
    p_grad_albedo,
    p_grad_normal,
    n_rays,
    RAYS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Gradients of outputs are given, or None for zero; p_grad_albedo, p_grad_normal: None where they are not asked
    for or zero."""
    ray, m_ray, begin, count = load_rays(tl.program_id(0), p_packed_info, n_rays, RAYS)
    dx, dy, dz = _load_columns(p_directions, ray, m_ray)
    if p_grad_colour is not None:
        ambient, diffuse, textureless = tl.load(p_ambient), tl.load(p_diffuse), tl.load(p_textureless)
        grad_r, grad_g, grad_b = _load_columns(p_grad_colour, ray, m_ray)
    if p_lights is not None:
        ex, ey, ez = _load_lights(p_lights, p_origins, ray, m_ray)
    if p_grad_normal_sum is not None:
        grad_x, grad_y, grad_z = _load_columns(p_grad_normal_sum, ray, m_ray)
    if p_grad_opacity is not None:
        grad_opacity = tl.load(p_grad_opacity + ray, mask=m_ray, other=0.0)
    if p_grad_depth is not None:
        grad_depth = tl.load(p_grad_depth + ray, mask=m_ray, other=0.0)
    if p_grad_z_variance is not None:
        grad_z_variance = tl.load(p_grad_z_variance + ray, mask=m_ray, other=0.0)
        depth = tl.load(p_depth + ray, mask=m_ray, other=0.0)
        see_through = 1.0 - tl.load(p_opacity + ray, mask=m_ray, other=0.0)
    if p_grad_facing_away is not None:
        grad_facing_away = tl.load(p_grad_facing_away + ray, mask=m_ray, other=0.0)
    # From the last sample to the first: of the samples behind, the sum of weight times gradient by it.
    behind = tl.zeros((RAYS,), dtype=tl.float32)
    left = tl.cdiv(tl.max(count), CHUNK) * CHUNK
    while left > 0:
        left -= CHUNK
        place = left + tl.arange(0, CHUNK)
        m = place[None, :] < count[:, None]
        row = (begin[:, None] + place[None, :]).to(tl.int64)
        middle, length = load_intervals(p_t_starts, p_t_ends, row, m)
        weight = tl.load(p_weights + row, mask=m, other=0.0)
        passed = tl.load(p_passed + row, mask=m, other=0.0)
        grad = tl.zeros((RAYS, CHUNK), dtype=tl.float32)
        if p_grad_opacity is not None:
            grad += grad_opacity[:, None]
        if p_grad_depth is not None:
            grad += grad_depth[:, None] * middle
        if p_grad_z_variance is not None:
            off = middle - depth[:, None]
            grad += grad_z_variance[:, None] * (off * off - 2.0 * middle * (depth * see_through)[:, None])
        if p_normal is not None:
            nx, ny, nz = load_vectors(p_normal, row, m)
            by_x = tl.zeros((RAYS, CHUNK), dtype=tl.float32)
            by_y = tl.zeros((RAYS, CHUNK), dtype=tl.float32)
            by_z = tl.zeros((RAYS, CHUNK), dtype=tl.float32)
        if p_grad_normal_sum is not None:
            grad += _dot(nx, ny, nz, grad_x, grad_y, grad_z)
            by_x, by_y, by_z = by_x + grad_x, by_y + grad_y, by_z + grad_z
        if p_grad_facing_away is not None:
            # The weights of this sum are constants.
            by_away = 2.0 * grad_facing_away[:, None] * tl.maximum(_dot(nx, ny, nz, dx, dy, dz), 0.0)
            by_x, by_y, by_z = by_x + by_away * dx, by_y + by_away * dy, by_z + by_away * dz
        if p_grad_colour is not None:
            r, g, b = load_vectors(p_albedo, row, m)
            by_light = _dot(
                r * (1.0 - textureless) + textureless,
                g * (1.0 - textureless) + textureless,
                b * (1.0 - textureless) + textureless,
                grad_r,
                grad_g,
                grad_b,
            )
            light = tl.zeros((RAYS, CHUNK), dtype=tl.float32) + ambient
            if p_lights is not None:
                tx, ty, tz = _towards(ex, ey, ez, dx, dy, dz, middle)
                facing = _dot(nx, ny, nz, tx, ty, tz)
                light += diffuse * tl.maximum(facing, 0.0)
                by_facing = tl.where(facing >= 0.0, diffuse * by_light, 0.0)
                by_x, by_y, by_z = by_x + by_facing * tx, by_y + by_facing * ty, by_z + by_facing * tz
            grad += light * by_light
            if p_grad_albedo is not None:
                by_albedo = weight * light * (1.0 - textureless)
                _store_vectors(
                    p_grad_albedo, row, by_albedo * grad_r, by_albedo * grad_g, by_albedo * grad_b, m
                )
        if p_grad_normal is not None:
            _store_vectors(p_grad_normal, row, weight * by_x, weight * by_y, weight * by_z, m)
        share = tl.where(m, grad * weight, 0.0)
        later = behind[:, None] + tl.cumsum(share, axis=1, reverse=True) - share
        tl.store(p_grad_sigma + row, length * (grad * passed - later), mask=m)
        behind += tl.sum(share, axis=1)
