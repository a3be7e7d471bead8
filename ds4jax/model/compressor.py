"""Compressors: pool every window of R tokens into one row, by a softmax over the tokens, per channel.

R = 128: the 128 tokens of the window. R = 4 overlaps: a token has two halves, a and b; row i pools the a-halves of
window i - 1 and the b-halves of window i. The indexer has a compressor of its own, of the same kind.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ds4jax.config import CSA_RATIO, HCA_RATIO, ModelConfig
from ds4jax.formats.quant import linear, lookup
from ds4jax.model import rope
from ds4jax.model.cache import Cache, Compressed
from ds4jax.model.norm import rms_norm
from ds4jax.model.weights import Compressor, Weights
from ds4jax.numerics import rows as num

Array = jax.Array


def _at(x: Array, start: Array, n: int) -> Array:
    """x (B, S, ·)[b, start[b] : start[b] + n]."""
    return jax.vmap(lambda row, s: lax.dynamic_slice_in_dim(row, s, n))(x, start)


def pool(z: Array, g: Array) -> Array:
    """Σ over slots of softmax(g) ⊙ z: (..., slots, D) → (..., D)."""
    return jnp.sum(z * jax.nn.softmax(g, axis=-2), axis=-2)


def project_tokens(h: Array, w: Compressor, dtype) -> tuple[Array, Array]:
    """New tokens h (B, T, E), normed → their values z and gates g (B, T, c·D), before the gates' position bias."""
    return linear(h, w.kv, dtype), linear(h, w.gate, dtype)


def compress(
    z: Array,  # (B, T, c·D) values of new tokens, see `project_tokens`
    g: Array,  # (B, T, c·D) their gates
    length: Array,  # (B,) tokens seen before
    n: Array,  # (B,) how many of the T are real
    w: Compressor,
    kept: Compressed,
    layer: int,  # index among the layers of this kind
    ratio: int,
    fmt: num.RowFormat,
    freq: np.ndarray,
    cfg: ModelConfig,
    finish=lambda row: row,  # applied to rows after RoPE, before they are stored
) -> Compressed:
    """Append T tokens: store the rows of the windows that they close, and keep the window left open."""
    B, T, _ = z.shape
    R, dtype = ratio, kept.z.dtype
    position = length[:, None] + jnp.arange(T, dtype=jnp.int32)
    g = g + lookup(w.ape.dequantize(dtype), lax.rem(position, np.int32(R)))

    # Lay the open window and the new tokens out from the window's start: slot j is the token at position first·R + j.
    first, filled = lax.div(length, np.int32(R)), lax.rem(length, np.int32(R))
    windows = -(-T // R)  # at most this many can close

    def lay_out(state: Array, new: Array) -> Array:
        slots = jnp.pad(state[layer], ((0, 0), (0, windows * R), (0, 0)))
        return jax.vmap(lambda s, x, at: lax.dynamic_update_slice_in_dim(s, x, at, axis=0))(slots, new, filled)

    z, g = lay_out(kept.z, z), lay_out(kept.g, g)
    closed = lax.div(filled + n, np.int32(R))  # windows that these tokens close, per sequence
    open_window = {"z": z, "g": g}

    def split(x: Array) -> Array:
        return x[:, : windows * R].reshape(B, windows, R, -1)

    if ratio == CSA_RATIO:
        D = fmt.dim
        prev_z = jnp.concatenate([kept.prev_z[layer], z[..., :D]], axis=1)
        prev_g = jnp.concatenate([kept.prev_g[layer], g[..., :D]], axis=1)
        open_window |= {"prev_z": prev_z, "prev_g": prev_g}
        slots_z = jnp.concatenate([split(prev_z), split(z[..., D:])], axis=2)
        slots_g = jnp.concatenate([split(prev_g), split(g[..., D:])], axis=2)
    else:
        slots_z, slots_g = split(z), split(g)

    row = rms_norm(pool(slots_z, slots_g), cfg.norm_eps, w.norm)
    nth = jnp.arange(windows, dtype=jnp.int32)
    index = first[:, None] + nth
    row = rope.rotate(row[:, :, None], index * R, freq)[:, :, 0]

    capacity = next(iter(kept.rows.values())).shape[2]
    target = jnp.where(nth < closed[:, None], index, capacity + nth)  # out of range: dropped
    at = layer, jnp.arange(B, dtype=jnp.int32)[:, None], target
    rows = jax.tree.map(
        lambda kept, new: kept.at[at].set(new, mode="drop", unique_indices=True), kept.rows, fmt.encode(finish(row))
    )
    # Whatever comes next starts in the window after the last closed one.
    update = {
        name: lax.dynamic_update_index_in_dim(getattr(kept, name), _at(x, closed * R, R), layer, axis=0)
        for name, x in open_window.items()
    }
    return kept.replace(rows=rows, **update)


def compressors(w: Weights, ratio: int) -> dict[str, Compressor]:
    """The compressors of layers of a ratio, by what of the cache they fill: rows and, with ratio 4, index keys."""
    if ratio == HCA_RATIO:
        return {"hca": w.hca.compressor}
    return {"csa": w.csa.compressor, "index": w.csa.indexer.compressor}


def append(
    projected: Sequence[tuple[Array, Array]],
    n: Array,
    w: Weights,
    cache: Cache,
    layer: int,
    cfg: ModelConfig,
    numerics: num.Numerics,
    dtype,
) -> Cache:
    """Append n (B,) tokens to each of a layer's `compressors`, of which `projected` has the values and gates."""
    ratio = cfg.ratio(layer)
    freq, nth = rope.frequencies(cfg, ratio), cfg.layers_of_ratio(ratio).index(layer)
    for (kind, family), (z, g) in zip(compressors(w, ratio).items(), projected, strict=True):
        row_format = num.index_row if kind == "index" else num.kv_row
        finish = functools.partial(num.index_rotation, numerics=numerics) if kind == "index" else lambda row: row
        fmt, kept = row_format(cfg, numerics, dtype), getattr(cache, kind)
        moved = compress(z, g, cache.length, n, family.at(layer), kept, nth, ratio, fmt, freq, cfg, finish)
        cache = cache.replace(**{kind: moved})
    return cache
