"""Verification: run drafted tokens of every sequence at once, and keep as many as turn out to be right.

How many of the tokens are accepted is known after the pass. So the pass leaves windows and compressors as they are, and
takes note of the tokens' rows, values and gates; `commit` then moves both by the accepted tokens, as if only these had
been run. Compressed rows and index keys are stored at once: one that closes with a rejected token is seen by no query
before it is written again. Nothing is computed twice.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int32

from ds4jax.config import CSA_RATIO, HCA_RATIO, ModelConfig
from ds4jax.model.cache import Cache
from ds4jax.model.compute import Compute, Tap, no_tap
from ds4jax.model.transformer import head, run
from ds4jax.model.weights import Weights
from ds4jax.numerics import rows as num
from ds4jax.ops import compress, latent

RATIOS = {"csa": CSA_RATIO, "index": CSA_RATIO, "hca": HCA_RATIO}


@struct.dataclass
class Pending:
    """Between `verify` and `commit`.

    cache: as before the tokens, but for the compressed rows. window: the tokens' rows, planes (L, B, T, ·). compressed:
    z and g (L', B, T, ·), by the compressors' name in the cache; those that no layer has are missing.
    """

    cache: Cache
    window: num.Rows
    compressed: dict[str, tuple[Float[Array, "L B T c*D"], Float[Array, "L B T c*D"]]]


def verify(
    w: Weights, cache: Cache, tokens: Int32[Array, "B T"], n: Int32[Array, "B"], cfg: ModelConfig, compute: Compute,
    tap: Tap = no_tap,
) -> tuple[Float[Array, "B T vocab"], Pending]:  # fmt: skip
    """Logits after each of T > 1 tokens of every sequence, and what `commit` takes.

    tokens: the newest one and its drafts, of which the first n are real; 0 for a sequence that takes no part.
    """
    assert tokens.shape[1] > 1
    seen: dict[str, list[Any]] = {}

    def note(layer: int, name: str, value: Any) -> None:
        if name == "rows" or name in RATIOS:
            seen.setdefault(name, []).append(value())
        tap(layer, name, value)

    s, moved = run(w, cache, tokens, n, cfg, compute, note, _rows_only)
    noted = {name: jax.tree.map(lambda *layers: jnp.stack(layers), *values) for name, values in seen.items()}
    pending = Pending(dataclasses.replace(moved, length=cache.length), noted.pop("rows"), noted)
    return head(s, w.head, cfg, compute).reshape(*tokens.shape, -1), pending


def _rows_only(before: Cache, moved: Cache) -> Cache:
    """The cache as it was, but with the new compressed rows."""
    rows = {name: dataclasses.replace(getattr(before, name), rows=getattr(moved, name).rows) for name in RATIOS}
    return dataclasses.replace(before, **rows)


def commit(pending: Pending, accepted: Int32[Array, "B"]) -> Cache:
    """The cache after the first `accepted` tokens of each sequence, at most the n of `verify`."""
    cache, layers = pending.cache, slice(len(next(iter(pending.window.values()))))
    moved = {
        name: compress.keep(getattr(cache, name), slice(None), z, g, cache.length, accepted, RATIOS[name])
        for name, (z, g) in pending.compressed.items()
    }
    return dataclasses.replace(
        cache,
        length=cache.length + accepted,
        window=latent.store(pending.window, cache.window, layers, cache.length, accepted),
        **moved,
    )
