"""The lightning indexer's scores: how much a query wants each compressed row (DeepSeek-V3.2, arXiv:2512.02556, eq. 1).

score_i = Σ_heads w_h · relu(qᴵ_h · κ_i),  w = W_proj h / √(Hi · Di)
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from ds4jax.implementation import Implementation
from ds4jax.numerics import rows as num
from ds4jax.numerics.precision import matmul, wide
from ds4jax.ops import tuned
from ds4jax.ops.blocks import in_blocks
from pallas_kernels import indexer as kernel
from pallas_kernels.common import Unsupported


def visible(position: Int32[Array, "..."], row: Int32[Array, "..."], ratio: int) -> Bool[Array, "..."]:
    """Whether a query at `position` sees compressed row `row`: its last token, (i + 1)·R - 1, is not in the future."""
    return (row + 1) * ratio <= position + 1


def query_dtype(implementation: Implementation, dtype):
    """The dtype that `scores` takes queries in: E2M1 values times powers of two are exact in bfloat16."""
    return dtype if implementation == "xla" else jnp.bfloat16


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
    """The scores of all stored keys of a layer, -inf for those that a query does not see; float32 at least.

    q: index queries. weight: W_proj h. keys: planes (L, B, rows, ·), of which layer `nth`'s are read. key: how keys are
    stored. query_blocks: see `in_blocks`. The kernel takes `official` keys, bfloat16 queries, and heads and dims that
    are powers of two from 32 on. Raises Unsupported.
    """
    scale = 1 / math.sqrt(q.shape[-2] * q.shape[-1])
    if implementation != "xla":
        if not isinstance(key, num.Fp4Row):
            raise Unsupported(f"index: keys are stored as {type(key).__name__}, expected Fp4Row (numerics official)")
        # Without the scale, which no choice depends on.
        return kernel.op(
            q, weight, keys["codes"], keys["exponents"], position, jnp.array([nth], jnp.int32), ratio=ratio,
            config=tuned.tiles(kernel), interpret=implementation == "pallas_interpret",
        )  # fmt: skip
    dtype = wide(q.dtype)
    decoded = key.decode(jax.tree.map(lambda x: x[nth], keys), q.dtype)
    row = jnp.arange(decoded.shape[1], dtype=jnp.int32)

    def block(queries: tuple[Array, ...], _) -> Array:
        q, weight, position = queries
        dots = jax.nn.relu(matmul("bthd,bnd->bthn", q, decoded, dtype))
        score = matmul("bth,bthn->btn", weight.astype(dtype) * scale, dots)
        return jnp.where(visible(position[..., None], row, ratio), score, -jnp.inf)

    return in_blocks(block, (q, weight, position), lambda _: (), query_blocks)
