"""The lightning indexer: how much a query wants each compressed row (DeepSeek-V4 report, section 2.3.1).

qᴵ       RoPE, Hadamard, rounding to E2M1
score_i  Σ_heads w_h · relu(qᴵ_h · κ_i),  w = W_proj h / √(Hi · Di)

Equations 13 to 17 of the report, top-k of them in `topk`; DeepSeek-V3.2, arXiv:2512.02556, eq. 1, for all rows.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from ds4jax.implementation import Implementation
from ds4jax.numerics import rows as num
from ds4jax.numerics.precision import matmul, wide
from ds4jax.ops import rope, tuned
from ds4jax.ops.blocks import in_blocks
from pallas_kernels import indexer as kernel
from pallas_kernels import queries as query_kernel
from pallas_kernels.common import Unsupported


def seen(position: Int32[Array, "..."], ratio: int) -> Int32[Array, "..."]:
    """How many compressed rows a query at `position` sees, the first ones: those whose last token, (i + 1)·R - 1, is
    not in the future."""
    return (position + 1) // ratio


def visible(position: Int32[Array, "..."], row: Int32[Array, "..."], ratio: int) -> Bool[Array, "..."]:
    """Whether a query at `position` sees compressed row `row`."""
    return row < seen(position, ratio)


def queries(
    q: Float[Array, "S HiDi"],
    angles: rope.Angles,
    *,
    key: num.RowFormat,
    numerics: num.Numerics,
    implementation: Implementation = "xla",
) -> Float[Array, "B T Hi Di"]:
    """Index queries from their projection, float32 at least; but bfloat16 from the kernel, which is exact.

    key: how keys are stored, as queries are rounded likewise. The kernel takes `official` keys, of a power of two from
    64 on. Raises Unsupported.
    """
    B, T, _ = angles.cos.shape
    if implementation != "xla":
        _only_official(key)
        flat = (x.reshape(B * T, -1) for x in (angles.cos, angles.sin))
        made = query_kernel.op(
            q, *flat, kind="index", dim=key.dim, config=tuned.tiles(query_kernel),
            interpret=implementation == "pallas_interpret",
        )  # fmt: skip
        return made.reshape(B, T, -1, key.dim)
    q = q.reshape(B, T, -1, key.dim).astype(wide(q.dtype))
    rotated = num.index_rotation(rope.turn(q, angles.cos[:, :, None], angles.sin[:, :, None]), numerics)
    return key.decode(key.encode(rotated), rotated.dtype)


def _only_official(key: num.RowFormat) -> None:
    if not isinstance(key, num.Fp4Row):
        raise Unsupported(f"index: keys are stored as {type(key).__name__}, expected Fp4Row (numerics official)")


def scores(
    q: Float[Array, "B T Hi Di"],
    weight: Float[Array, "B T Hi"],
    keys: num.Rows,
    nth: int | Array,
    position: Int32[Array, "B T"],
    *,
    key: num.RowFormat,
    ratio: int,
    query_blocks: int | None = None,
    implementation: Implementation = "xla",
) -> Float[Array, "B T rows"]:
    """The scores of the stored keys of a layer that a query sees; what is in place of the others means nothing.

    q: index queries. weight: W_proj h. keys: planes (L, B, rows, ·), of which layer `nth`'s are read. key: how keys are
    stored. query_blocks: see `in_blocks`. The kernel takes `official` keys, bfloat16 queries, and heads and dims that
    are powers of two from 32 on. Raises Unsupported.
    """
    scale = 1 / math.sqrt(q.shape[-2] * q.shape[-1])
    if implementation != "xla":
        _only_official(key)
        # Without the scale, which no choice depends on.
        return kernel.op(
            q, weight, keys["codes"], keys["exponents"], position, jnp.array([nth], jnp.int32), ratio=ratio,
            config=tuned.tiles(kernel), interpret=implementation == "pallas_interpret",
        )  # fmt: skip
    dtype = wide(q.dtype)
    decoded = key.decode(jax.tree.map(lambda x: x[nth], keys), q.dtype)

    def block(queries: tuple[Array, ...], _) -> Array:
        q, weight = queries
        dots = jax.nn.relu(matmul("bthd,bnd->bthn", q, decoded, dtype))
        return matmul("bth,bthn->btn", weight.astype(dtype) * scale, dots)

    return in_blocks(block, (q, weight), lambda _: (), query_blocks)
