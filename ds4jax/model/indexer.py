"""The lightning indexer: which compressed rows of a CSA layer a query attends to."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ds4jax.config import CSA_RATIO, ModelConfig
from ds4jax.formats.quant import linear, matmul
from ds4jax.model import rope
from ds4jax.model.weights import Indexer
from ds4jax.numerics import rows as num

Array = jax.Array


def queries(
    h: Array, r: Array, position: Array, w: Indexer, freq: np.ndarray, cfg: ModelConfig, numerics: num.Numerics
) -> tuple[Array, Array]:
    """h (B, T, E), r (B, T, Rq) → index queries (B, T, Hi, Di) and head weights (B, T, Hi)."""
    q = linear(r, w.q_b).reshape(*r.shape[:-1], cfg.index_heads, cfg.index_head_dim)
    q = num.index_rotation(rope.rotate(q, position, freq), numerics)
    fmt = num.index_row(cfg, numerics, q.dtype)
    weight = linear(h, w.proj) * (1 / math.sqrt(cfg.index_heads * cfg.index_head_dim))
    return fmt.decode(fmt.encode(q), q.dtype), weight


def scores(q: Array, weight: Array, keys: Array) -> Array:
    """score_i = Σ_heads weight_h · relu(q_h · κ_i): (B, T, Hi, Di), (B, T, Hi), (B, N, Di) → (B, T, N)."""
    dots = jax.nn.relu(matmul("bthd,bnd->bthn", q, keys))
    return matmul("bth,bthn->btn", weight, dots)


def visible(position: Array, rows: Array, ratio: int) -> Array:
    """Whether a query at `position` sees compressed row `rows`: its last token, (i + 1)·R - 1, is not in the future."""
    return (rows + 1) * ratio <= position + 1


def select(score: Array, position: Array, k: int) -> tuple[Array, Array]:
    """The k highest visible rows: score (B, T, N), position (B, T) → indices (B, T, k) and whether each is visible."""
    rows = jnp.arange(score.shape[-1], dtype=jnp.int32)
    score = jnp.where(visible(position[..., None], rows, CSA_RATIO), score, -jnp.inf)
    _, index = lax.top_k(score, k)
    return index, visible(position[..., None], index, CSA_RATIO)
