"""Verification: run drafted tokens of every sequence at once, and keep as many as turn out to be right.

How many of the tokens are accepted is known after the pass, which stores the rows of all. `commit` sets the length:
what a rejected token has left, in a ring or as a compressed row that it closed, is seen by no query before it is
written again (`ds4jax.ops.ring`).
"""

from __future__ import annotations

import dataclasses

from jaxtyping import Array, Float, Int32

from ds4jax.config import ModelConfig
from ds4jax.model.cache import Cache
from ds4jax.model.compute import Compute, Tap, no_tap
from ds4jax.model.transformer import head, run
from ds4jax.model.weights import Weights
from ds4jax.ops.ring import SPARE


def verify(
    w: Weights, cache: Cache, tokens: Int32[Array, "B T"], n: Int32[Array, "B"], cfg: ModelConfig, compute: Compute,
    tap: Tap = no_tap,
) -> tuple[Float[Array, "B T vocab"], Cache]:  # fmt: skip
    """Logits after each of up to SPARE tokens of every sequence, and the cache that `commit` takes.

    tokens: the newest one and its drafts, of which the first n are real; 0 for a sequence that takes no part.
    """
    assert tokens.shape[1] <= SPARE, f"{tokens.shape[1]} tokens at once, expected at most {SPARE}"
    s, moved = run(w, cache, tokens, n, cfg, compute, tap)
    return head(s, w.head, cfg, compute).reshape(*tokens.shape, -1), dataclasses.replace(moved, length=cache.length)


def commit(verified: Cache, accepted: Int32[Array, "B"]) -> Cache:
    """The cache after the first `accepted` tokens of each sequence, at most the n of `verify`."""
    return dataclasses.replace(verified, length=verified.length + accepted)
