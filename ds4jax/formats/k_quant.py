"""What the K formats share: x ≈ (d·sc)·q − (dmin·m), in super-blocks of 256 weights.

d and dmin are float16, one pair per super-block; sc and m small integers, one pair per group; q the codes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.formats.base import bits, mean_square, random_scales, scaled
from ds4jax.formats.search import error_weights, half, level, normalized, ratio, search, super_scale

Array = jax.Array


def decode(dm: Array, sc: Array, m: Array, q: Array) -> Array:
    """The formula: dm float16 (..., blocks, 2); sc, m integers (..., blocks, groups); q (..., blocks, weights).

    → float32 (..., blocks, groups, group).
    """
    d, dmin = dm[..., :1], dm[..., 1:].astype(jnp.float32)
    return scaled(d, sc, q) - (dmin * m.astype(jnp.float32))[..., None]


def scales_and_minima(words: Array) -> tuple[Array, Array]:
    """The 6-bit sc and m, (..., 8) uint32, of the eight groups of Q4_K and Q5_K, from their three words.

    Bytes 0-3 hold sc[0:4] and, on top, the high two bits of sc[4:8]; bytes 4-7 the same of m; bytes 8-11 the low
    nibbles of sc[4:8] and, on top, of m[4:8].
    """
    low_sc, low_m, rest = (bits(words[..., i], 8) for i in range(3))
    sc = jnp.concatenate([low_sc & 63, (rest & 15) | (low_sc >> 2 & 48)], axis=-1)
    m = jnp.concatenate([low_m & 63, (rest >> 4) | (low_m >> 2 & 48)], axis=-1)
    return sc, m


def scales_of_two(words: list[Array], run: Array) -> tuple[Array, Array]:
    """In kernels, of the same three words: words whose two low bytes are the sc, and the m, of groups 2 run, 2 run + 1.

    words: uint32, of the super-block of each run. run: int32, 0 to 3.
    """
    # This run's two groups come into the low two bytes. In late runs, the bits of a number lie in two words.
    sc, m, low = (word >> ((run & 1) * 16).astype(jnp.uint32) for word in words)
    late, six = run >= 2, jnp.uint32(0x3F3F)
    sc = jnp.where(late, low & jnp.uint32(0x0F0F) | sc >> jnp.uint32(2) & jnp.uint32(0x3030), sc & six)
    low = low >> jnp.uint32(4)
    m = jnp.where(late, low & jnp.uint32(0x0F0F) | m >> jnp.uint32(2) & jnp.uint32(0x3030), m & six)
    return sc, m


def random_dm(key: Array, shape: tuple[int, ...], std: float, top: int, top_scale: int) -> Array:
    """The plane dm, float16 of `shape`, for uniform codes 0 … top, and sc and m 0 … top_scale: weights of mean 0."""
    # w / d = sc·q − (top/2)·m, of which both terms have the same mean.
    mean = top_scale / 2 * top / 2
    variance = mean_square(top_scale + 1) * (mean_square(top + 1) + (top / 2) ** 2) - 2 * mean**2
    d = random_scales(key, (*shape[:-1], shape[-1] // 2, 1), std / variance**0.5)
    return (d * jnp.array([1, top / 2], jnp.float32)).reshape(shape).astype(jnp.float16)


def quantize_blocks(x: Array, importance: Array, group: int, top: int, top_scale: int) -> tuple[Array, ...]:
    """x, importance (blocks, 256) → codes q in 0..top, sc and m in 0..top_scale for each `group` of a block.

    Returns d and dmin, float16 (blocks,); sc and m, uint32 (blocks, groups); q, uint32 (blocks, groups, group).
    """
    x, unit = normalized(x)
    x, w = (v.reshape(len(x), -1, group) for v in (x, error_weights(x, importance)))

    # Every group's own scale and min: some number of steps over its range, counted from the lowest weight (code 0) or
    # from the highest (code `top`), then two rounds of least squares.
    lowest = jnp.minimum(jnp.min(x, axis=-1), 0.0)
    extent = jnp.maximum(jnp.max(x, axis=-1), lowest) - lowest

    def error(q, scale, low):
        return jnp.sum(w * (scale[..., None] * q - low[..., None] - x) ** 2, axis=-1)

    def fit(candidate):
        steps, from_highest = candidate
        scale = extent / steps
        low = from_highest * (top * scale - extent) - lowest
        for _ in range(2):
            q = _codes(x, scale, low, top)
            scale, low = _affine(x, w, q)
        # Of fits that are about as good the finest: then groups of alike weights agree on their scale.
        return error(q, scale, low) + 1e-3 * jnp.sum(w, axis=-1) * scale**2, scale, low

    starts = [(top + extra, end) for extra in np.linspace(-0.9, 1.2, 10) for end in (0, 1)]
    scale, low = search(fit, np.array(starts, np.float32))
    q = _codes(x, scale, low, top)

    # The two scales of the block, and for each group the best of the numbers next to the rounded ones.
    d_half, d = half(super_scale(scale, jnp.sum(w * q * q, axis=-1), top_scale), unit)
    dmin_half, dmin = half(super_scale(low, jnp.sum(w, axis=-1), top_scale), unit)
    sc, m = level(scale, d, top_scale), level(low, dmin, top_scale)

    def move(by):
        sc1, m1 = jnp.clip(sc + by[0], 0, top_scale), jnp.clip(m + by[1], 0, top_scale)
        scale, low = d[..., None] * sc1, dmin[..., None] * m1
        return error(_codes(x, scale, low, top), scale, low), sc1, m1

    sc, m = search(move, np.array([(i, j) for i in (0, -1, 1) for j in (0, -1, 1)], np.float32))
    q = _codes(x, d[..., None] * sc, dmin[..., None] * m, top)
    return d_half, dmin_half, *(v.astype(jnp.uint32) for v in (sc, m, q))


def _affine(x: Array, w: Array, q: Array) -> tuple[Array, Array]:
    """The scale and low (...), both ≥ 0, that minimise Σ w (scale·q − low − x)² over the last axis, for codes q ≥ 0."""
    total = jnp.sum(w, axis=-1)
    q_mean, x_mean = (ratio(jnp.sum(w * v, axis=-1), total) for v in (q, x))
    dq, dx = q - q_mean[..., None], x - x_mean[..., None]
    covariance, variance = jnp.sum(w * dq * dx, axis=-1), jnp.sum(w * dq * dq, axis=-1)
    # Codes that are all equal have no slope but that of rounding errors; with slope 0, the line is their mean.
    scale = jnp.where(variance > 1e-9 * total, jnp.maximum(ratio(covariance, variance), 0.0), 0.0)
    low = scale * q_mean - x_mean
    through_zero = jnp.maximum(ratio(jnp.sum(w * q * x, axis=-1), jnp.sum(w * q * q, axis=-1)), 0.0)
    return jnp.where(low > 0, scale, through_zero), jnp.maximum(low, 0.0)


def _codes(x: Array, scale: Array, low: Array, top: int) -> Array:
    """Nearest codes 0..top, as float32, of x (..., n) under scale·q − low, both (...)."""
    return jnp.clip(jnp.round((x + low[..., None]) * ratio(1.0, scale)[..., None]), 0, top)
