"""Drafters behind one interface: what the engine's steps ask of a DSpark drafter and of an MTP head alike.

Every pass of the model over tokens that stay is followed by the drafter, which thereby knows the context:

    seen = drafter.tap(cfg)                      the `tap` of the pass
    …                                            the pass: a chunk of a prompt, a decoded token, a verification
    cache = drafter.follow(w, cache, seen, …)    the drafter's rows of the tokens that are kept
    drafter.draft(w, cache, anchor, …)           tokens after the anchor, which the model has not run yet
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from ds4jax.config import ModelConfig
from ds4jax.model import dspark, mtp
from ds4jax.model.cache import Cache
from ds4jax.model.compute import Compute
from ds4jax.model.dspark import Choose, newest
from ds4jax.model.weights import Weights


class Drafter(Protocol):
    """A drafter, as a static argument of a jitted step: hashable, without weights or state."""

    def tap(self, cfg: ModelConfig) -> Any:
        """A `Tap` for one pass of the model, which takes note of what `follow` needs."""
        ...

    def follow(
        self, w: Weights, cache: Cache, seen: Any, tokens: Int32[Array, "B T"], start: Int32[Array, "B"],
        n: Int32[Array, "B"], cfg: ModelConfig, compute: Compute,
    ) -> Cache:  # fmt: skip
        """The cache with what the drafter keeps of a pass over tokens at positions start …, of which the first n stay.

        cache: as the model leaves it. seen: the tap of the pass. n: 0 for a sequence that took no part.
        """
        ...

    def draft(
        self, w: Weights, cache: Cache, anchor: Int32[Array, "B"], active: Bool[Array, "B"], count: int,
        choose: Choose, cfg: ModelConfig, compute: Compute,
    ) -> Int32[Array, "B count"]:  # fmt: skip
        """Tokens after the anchors, which come after the `cache.length` tokens of each sequence.

        choose: draws each of them. The cache stays as it is. Where a sequence is not active they mean nothing.
        """
        ...


@dataclasses.dataclass(frozen=True)
class DsparkDrafter:
    """`model.dspark`: one pass over a block of as many tokens as it was trained for; its rows lie in windows."""

    def tap(self, cfg: ModelConfig) -> dspark.Taps:
        return dspark.Taps(cfg)

    def follow(
        self, w: Weights, cache: Cache, seen: dspark.Taps, tokens: Int32[Array, "B T"], start: Int32[Array, "B"],
        n: Int32[Array, "B"], cfg: ModelConfig, compute: Compute,
    ) -> Cache:  # fmt: skip
        assert w.dspark is not None
        return dspark.write(w.dspark, cache, seen.features(len(n)), start, n, cfg, compute)

    def draft(
        self, w: Weights, cache: Cache, anchor: Int32[Array, "B"], active: Bool[Array, "B"], count: int,
        choose: Choose, cfg: ModelConfig, compute: Compute,
    ) -> Int32[Array, "B count"]:  # fmt: skip
        assert w.dspark is not None
        return dspark.draft(w, w.dspark, cache, anchor, active, cfg, compute, choose, count).tokens


def drafter_of(cfg: ModelConfig) -> Drafter | None:
    """The drafter that a model has: a DSpark drafter before an MTP head."""
    return DsparkDrafter() if cfg.drafter else MtpDrafter() if cfg.n_mtp else None


class LastStreams:
    """The `tap` that keeps the streams after the model's last layer."""

    def __init__(self, cfg: ModelConfig):
        self._last, self._X = cfg.n_layers - 1, None

    def __call__(self, layer: int, name: str, value: Any) -> None:
        if name == "streams" and layer == self._last:
            self._X = value()

    def streams(self, batch: int) -> Float[Array, "B T N E"]:
        """Of the tokens of `batch` sequences."""
        assert self._X is not None
        return self._X.reshape(batch, -1, *self._X.shape[1:])


@dataclasses.dataclass(frozen=True)
class MtpDrafter:
    """`model.mtp`: a head that drafts one token; for a further one it reads what it made of the one before.

    It runs one token behind the model: its row of position t is made of the streams of t and the token of t + 1. So the
    streams of the last token wait in the cache, as `carry`, for the token that follows.
    """

    def tap(self, cfg: ModelConfig) -> LastStreams:
        return LastStreams(cfg)

    def follow(
        self, w: Weights, cache: Cache, seen: LastStreams, tokens: Int32[Array, "B T"], start: Int32[Array, "B"],
        n: Int32[Array, "B"], cfg: ModelConfig, compute: Compute,
    ) -> Cache:  # fmt: skip
        assert cache.carry is not None
        B = len(n)
        X = seen.streams(B)
        last = jnp.take_along_axis(X, jnp.maximum(n - 1, 0)[:, None, None, None], axis=1)
        # Rows of start - 1 … start + n - 2; at the beginning of a sequence there is none before the first token's.
        behind = start > 0
        X = jnp.where(behind[:, None, None, None], jnp.concatenate([_carry(cache, cfg), X[:, :-1]], axis=1), X)
        following = jnp.where(behind[:, None], tokens, jnp.roll(tokens, -1, axis=1))
        rows = jnp.where(n > 0, n - 1 + behind.astype(jnp.int32), 0)
        first = start - behind.astype(jnp.int32)
        if tokens.shape[1] > cfg.window:  # no more stay
            (X, following), skipped = newest(cfg.window, rows, X, following)
            first, rows = first + skipped, rows - skipped
        _, _, moved = mtp.draft(w, cache, X, following, first, rows, cfg, compute)
        carry = jnp.where((n > 0)[:, None], last.reshape(B, -1), cache.carry)
        return dataclasses.replace(moved, carry=carry)

    def draft(
        self, w: Weights, cache: Cache, anchor: Int32[Array, "B"], active: Bool[Array, "B"], count: int,
        choose: Choose, cfg: ModelConfig, compute: Compute,
    ) -> Int32[Array, "B count"]:  # fmt: skip
        X, previous, drafted = _carry(cache, cfg), anchor, []
        for slot in range(count):  # the rows of drafts stay in this cache, which nobody keeps
            at = cache.length - 1 + slot
            logits, X, cache = mtp.draft(
                w, cache, X, previous[:, None], at, active.astype(jnp.int32), cfg, compute
            )  # fmt: skip
            previous = choose(logits[:, 0], slot)
            drafted.append(previous)
        return jnp.stack(drafted, axis=1)


def _carry(cache: Cache, cfg: ModelConfig) -> Float[Array, "B 1 N E"]:
    assert cache.carry is not None
    return cache.carry[0][:, None].reshape(-1, 1, cfg.n_streams, cfg.embed_dim)
