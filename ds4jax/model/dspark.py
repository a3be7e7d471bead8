"""The DSpark drafter: from what the model's last layers say of the context, a block of drafts in one pass.

Its stages are blocks like the model's, of ratio 0, one after the other, each with a window of its own in the cache.
They read the context as rows made of *features*: what the streams after some of the model's layers are in the mean.

    m = rms(main_proj · features) · main_norm                one of each position, for all stages
    row = rope(rms(W_kv m) · kv_norm)                        stored in a stage's window: `write`
    [anchor, noise, …, noise] ─► stages ─► h ─► U            `draft`: every place sees the window and the whole block
    L_j = U_j + w2 · w1[x_j-1],  x_j from L_j                left to right, x_-1 = anchor
    c_j = sigmoid(w · [h_j; w1[x_j-1]])                      how sure x_j is to be accepted, if all before it are

The anchor is the newest token, chosen but not yet run; x_j is the draft of the (1 + j)-th token after it. The window
must have a row of every position before the anchor, and of nothing else: `write` follows each run of the model, and
takes in no token that was rejected. The DSpark drafter of DeepSeek-V4-Flash-0731.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from ds4jax.config import ModelConfig
from ds4jax.model.attention import row_formats
from ds4jax.model.cache import Cache
from ds4jax.model.compute import Compute, Tap, inputs, no_tap
from ds4jax.model.transformer import block, streams
from ds4jax.model.weights import Dspark, Weights
from ds4jax.numerics import rows as num
from ds4jax.numerics.precision import wide
from ds4jax.ops import latent, mhc, ring, rope
from ds4jax.ops.linear import linear, product, products
from ds4jax.ops.norm import Norm, rms_norm
from ds4jax.ops.weight import single
from ds4jax.sharding import TENSOR, gathered

Choose = Callable[[Float[Array, "B vocab"], int], Int32[Array, "B"]]
"""Called with logits and the number of the slot; returns the tokens drafted there."""


class Drafts(NamedTuple):
    """What `draft` proposes. logits: what each token was chosen from. confidence: how likely it is to be accepted if
    all before it are."""

    tokens: Int32[Array, "B slots"]
    logits: Float[Array, "B slots vocab"]
    confidence: Float[Array, "B slots"]


class Taps:
    """The `tap` of a pass of the model that takes the features out of it."""

    def __init__(self, cfg: ModelConfig):
        assert cfg.drafter is not None
        self._means: dict[int, Any] = dict.fromkeys(cfg.drafter.target_layers)

    def __call__(self, layer: int, name: str, value: Any) -> None:
        if name == "streams" and layer in self._means:
            X = value()
            self._means[layer] = jnp.mean(X.astype(wide(X.dtype)), axis=-2).astype(X.dtype)

    def features(self, batch: int) -> Float[Array, "B T K"]:
        """Of the tokens of `batch` sequences: the tapped layers side by side, K = E for each."""
        x = jnp.concatenate([*self._means.values()], axis=-1)
        return x.reshape(batch, -1, x.shape[-1])


def joined(
    d: Dspark, features: Float[Array, "*s K"], cfg: ModelConfig, compute: Compute
) -> Float[Array, "*s E"]:  # fmt: skip
    """m: what the stages' rows of the context are made of."""
    kernel, given = compute.implementations["linear"], features.reshape(-1, features.shape[-1])
    (m,) = products(given, [product(single(d.main_proj))], implementation=kernel)
    return rms_norm(m, cfg.norm_eps, d.main_norm).reshape(*features.shape[:-1], -1)


def context(
    d: Dspark, features: Float[Array, "B T K"], start: Int32[Array, "B"], cfg: ModelConfig, compute: Compute
) -> num.Rows:
    """The rows of positions start … start + T - 1 in all stages: planes (stages, B, T, ·), as windows store them."""
    B, T, _ = features.shape
    kernel, dtype = compute.implementations["linear"], wide(features.dtype)
    row, _ = row_formats(cfg, compute, features.dtype)
    angles = rope.angles(cfg, start, T, dtype)[0]
    m = joined(d, features, cfg, compute).reshape(B * T, -1)
    made = []
    for layer in cfg.stages:
        a = d.attn.at(layer)
        (kv,) = products(m, [product(a.kv, dtype)], implementation=kernel)
        made.append(latent.rows(kv, Norm(a.kv_norm, cfg.norm_eps), angles, row))
    return jax.tree.map(lambda *planes: jnp.stack(planes), *made)


def write(
    d: Dspark, cache: Cache, features: Float[Array, "B T K"], start: Int32[Array, "B"], n: Int32[Array, "B"],
    cfg: ModelConfig, compute: Compute,
) -> Cache:  # fmt: skip
    """The cache with the rows of positions start … start + n - 1 in the stages' windows.

    features: of T positions, of which the first n are the sequence's: after verification, those accepted.
    """
    if features.shape[1] > (stay := cfg.window + ring.SPARE):
        (features,), skipped = newest(stay, n, features)
        start, n = start + skipped, n - skipped
    new, stages = context(d, features, start, cfg, compute), slice(cfg.stages.start, cfg.stages.stop)
    return dataclasses.replace(cache, window=ring.store(new, cache.window, stages, start, n))


def newest(W: int, n: Int32[Array, "B"], *arrays: Array) -> tuple[list[Array], Int32[Array, "B"]]:
    """Of the first n of more than W tokens, in arrays (B, T, …), the last W, and how many come before these."""
    skipped = jnp.maximum(n - W, 0)
    last = skipped[:, None] + jnp.arange(W, dtype=jnp.int32)
    return [jnp.take_along_axis(x, last.reshape(*last.shape, *[1] * (x.ndim - 2)), axis=1) for x in arrays], skipped


def hidden(
    w: Weights, d: Dspark, cache: Cache, anchor: Int32[Array, "B"], n: Int32[Array, "B"], cfg: ModelConfig,
    compute: Compute, tap: Tap = no_tap,
) -> Float[Array, "B slots E"]:  # fmt: skip
    """What the stages make of a block after `cache.length` tokens: the head's input, before its norm.

    n: the block's length, or 0 for a sequence that takes no part.
    """
    assert cfg.drafter is not None and cfg.drafter.block_size > 1
    noise = jnp.full((len(anchor), cfg.drafter.block_size - 1), cfg.drafter.noise_token, jnp.int32)
    given = inputs(
        jnp.concatenate([anchor[:, None], noise], axis=1), n, cache.length, cfg, compute.dtype, causal=False
    )  # fmt: skip
    staged = dataclasses.replace(w, attn=d.attn, ffn=d.ffn, route=d.route)
    s = streams(w.embed[given.ids].dequantize(jnp.dtype(compute.dtype)), cfg)
    for layer in cfg.stages:  # the block's own rows pass: of the windows that are returned nothing is kept
        s, _ = block(s, given, staged, cache, layer, cfg, compute, tap)
    hc = d.head.single().hc
    h = mhc.collapse(s, mhc.Connection(hc.fn, hc.base, hc.scale), eps=cfg.hc_eps, norm_eps=cfg.norm_eps)
    return h.reshape(*given.shape, -1)


def base(
    w: Weights, d: Dspark, h: Float[Array, "*s E"], cfg: ModelConfig, compute: Compute
) -> Float[Array, "*s vocab"]:  # fmt: skip
    """The logits U of each place by itself: the drafter's norm, the model's output matrix."""
    norm, out = Norm(d.head.single().norm, cfg.norm_eps), w.head.single().out
    (U,) = products(
        norm(h.reshape(-1, h.shape[-1])), [product(out, wide(h.dtype))],
        implementation=compute.implementations["linear"],
    )  # fmt: skip
    return gathered(U, compute.mesh, TENSOR).reshape(*h.shape[:-1], -1)


def after(
    d: Dspark, U: Float[Array, "*s vocab"], h: Float[Array, "*s E"], previous: Int32[Array, "*s"], compute: Compute
) -> tuple[Float[Array, "*s vocab"], Float[Array, "*s"]]:
    """Logits L and the logit of the confidence of places that follow the tokens `previous`."""
    dtype = wide(h.dtype)
    e = d.markov.w1[previous].dequantize(h.dtype)
    (bias,) = products(
        e.reshape(-1, e.shape[-1]), [product(single(d.markov.w2), dtype)],
        implementation=compute.implementations["linear"],
    )  # fmt: skip
    sure = linear(jnp.concatenate([h, e], axis=-1).astype(dtype), single(d.confidence))
    return U + bias.reshape(U.shape), sure[..., 0]


def greedy(logits: Float[Array, "B vocab"], slot: int) -> Int32[Array, "B"]:
    """The likeliest token."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def draft(
    w: Weights, d: Dspark, cache: Cache, anchor: Int32[Array, "B"], active: Bool[Array, "B"], cfg: ModelConfig,
    compute: Compute, choose: Choose = greedy, count: int | None = None,
) -> Drafts:  # fmt: skip
    """Draft the tokens after the anchors, which come after the `cache.length` tokens that the model has run.

    count: how many of the block's slots to choose a token in, the first ones; by default all. The block is computed
    whole: its places see each other. The cache stays as it is. Where a sequence is not active the drafts mean nothing.
    """
    assert cfg.drafter is not None
    count = cfg.drafter.block_size if count is None else count
    h = hidden(w, d, cache, anchor, jnp.where(active, cfg.drafter.block_size, 0), cfg, compute)[:, :count]
    U, previous, drafted = base(w, d, h, cfg, compute), anchor, []
    for slot in range(count):
        logits, sure = after(d, U[:, slot], h[:, slot], previous, compute)
        previous = choose(logits, slot)
        drafted.append((previous, logits, jax.nn.sigmoid(sure)))
    return Drafts(*(jnp.stack(parts, axis=1) for parts in zip(*drafted, strict=True)))
