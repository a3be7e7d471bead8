"""Rotary position embedding (RoPE, arXiv:2104.09864) on the last `rope_dim` dims of a head, in adjacent pairs."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from ds4jax.config import CSA_RATIO, HCA_RATIO, ModelConfig
from ds4jax.numerics.precision import wide
from pallas_kernels.numerics.rope import rotate as rotate_adjacent


def frequencies(cfg: ModelConfig, ratio: int) -> Float32[np.ndarray, "P"]:
    """Radians per position of each pair, for a layer of the given compression ratio.

    Layers without compression use `rope_base` as it is. All others use `compress_rope_base` with YaRN
    (arXiv:2309.00071), for queries, window keys, compressed rows and the indexer alike: pairs that turn more than
    `beta_fast` times over the original context keep their frequency, those that turn less than `beta_slow` times are
    slowed by `yarn_factor`, with a linear ramp between. YaRN's magnitude factor is not applied.
    """
    pairs = cfg.rope_dim // 2
    base = cfg.compress_rope_base if ratio else cfg.rope_base
    freq = 1.0 / base ** (np.arange(pairs, dtype=np.float64) * 2 / cfg.rope_dim)
    if not ratio:
        return freq.astype(np.float32)

    def pair_that_turns(times: float) -> float:
        return cfg.rope_dim * math.log(cfg.yarn_original_ctx / (times * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(cfg.yarn_beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(cfg.yarn_beta_slow)), cfg.rope_dim - 1)
    slowed = np.clip((np.arange(pairs) - low) / max(high - low, 1e-3), 0, 1)
    return (freq * (1 - slowed) + freq / cfg.yarn_factor * slowed).astype(np.float32)


def cos_sin(
    positions: Int32[Array, "*s"], freq: Float32[np.ndarray, "P"], dtype=jnp.float32
) -> tuple[Float[Array, "*s P"], Float[Array, "*s P"]]:
    """Cosine and sine of the angles of positions."""
    angle = positions[..., None].astype(dtype) * jnp.asarray(freq, dtype)
    return jnp.cos(angle), jnp.sin(angle)


class Angles(NamedTuple):
    """RoPE of one step, in layers of one compression ratio. P = rope_dim / 2.

    cos, sin: of the new tokens' positions. row_cos, row_sin: of the compressed rows that T new tokens may close, from
    the one that the first goes into: ⌈T / ratio⌉. A row has the position of its first token.
    """

    cos: Float[Array, "B T P"]
    sin: Float[Array, "B T P"]
    row_cos: Float[Array, "B rows P"]
    row_sin: Float[Array, "B rows P"]


def angles(cfg: ModelConfig, length: Int32[Array, "B"], T: int, dtype=jnp.float32) -> dict[int, Angles]:
    """The angles of T new tokens after `length` of each sequence, by the layers' ratio: 0, 4 and 128."""
    position = length[:, None] + jnp.arange(T, dtype=jnp.int32)
    # Layers that compress share their base.
    compressing = cos_sin(position, frequencies(cfg, CSA_RATIO), dtype)
    out = {}
    for ratio in (0, CSA_RATIO, HCA_RATIO):
        freq, every = frequencies(cfg, ratio), max(1, ratio)
        row = length[:, None] // every + jnp.arange(-(-T // every) if ratio else 1, dtype=jnp.int32)
        new = compressing if ratio else cos_sin(position, freq, dtype)
        out[ratio] = Angles(*new, *cos_sin(row * ratio, freq, dtype))
    return out


def turn(x: Float[Array, "*s D"], cos: Float[Array, "*#s P"], sin: Float[Array, "*#s P"]) -> Float[Array, "*s D"]:
    """Rotate adjacent pairs of the last 2 P dims of x by the angles of cos and sin."""
    nope, rope = jnp.split(x, [x.shape[-1] - 2 * cos.shape[-1]], axis=-1)
    turned = rotate_adjacent(rope.astype(cos.dtype), cos, sin)
    return jnp.concatenate([nope, turned.astype(x.dtype)], axis=-1)


def rotate(
    x: Float[Array, "*s H D"], positions: Int32[Array, "*s"], freq: Float32[np.ndarray, "P"], *, inverse: bool = False
) -> Float[Array, "*s H D"]:
    """Rotate the last 2 P dims of x by the angles of positions; `inverse` turns back."""
    cos, sin = cos_sin(positions[..., None], freq, wide(x.dtype))
    return turn(x, cos, -sin if inverse else sin)
