"""Training: a differentiable forward pass over whole sequences, the losses, and how experts are kept in balance.

The pass is the model's own, layer by layer, with an empty cache and ``straight_through`` numerics. The activations of a
layer are computed again in the backward pass instead of being kept.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import logsumexp
from jax.typing import ArrayLike

from ds4jax.config import CSA_RATIO, ModelConfig
from ds4jax.formats import Quantized
from ds4jax.formats.quantize import quantize
from ds4jax.io.recipes import RECIPES
from ds4jax.model import attention, dspark, mtp, transformer, weights
from ds4jax.model import cache as kv
from ds4jax.model.compute import Compute, inputs
from ds4jax.model.weights import Dspark, Route, Stack, SwiGLU, Weights, WeightSpec
from ds4jax.numerics.precision import lookup, matmul, wide
from ds4jax.ops import index, mhc
from ds4jax.ops.ring import SPARE, positions

Array = jax.Array

MTP_WEIGHT = 0.3  # of the MTP head's loss; DeepSeek-V3 starts with this value (arXiv:2412.19437, 4.2)
BALANCE_RATE = 1e-3  # how far a step moves the routing biases; likewise

# The indexer's loss is taken on one of this many sequences: its target needs every query's scores for every token.
INDEX_SHARE = 8


# ---- initial weights -------------------------------------------------------------------------------------------------
def init(cfg: ModelConfig, seed: int, tid2eid: ArrayLike) -> Weights:
    """Initial float32 weights. tid2eid: int32 (vocab, n_experts_used), the experts of each token in all hashed layers.

    Matrices have deviation 1/√in; those that add to the streams are smaller, by √(2·layers). Hyper-connections start
    near a plain residual: a sub-layer reads the mean of the streams and adds to each, and the streams hardly mix.
    """
    return _init(weights.abstract(cfg, RECIPES["f32"]), cfg, seed, tid2eid)


def init_drafter(cfg: ModelConfig, seed: int) -> Dspark:
    """Initial float32 weights of the drafter `cfg.drafter`, as those of a model are."""
    return _init(weights.abstract_drafter(cfg, RECIPES["f32"]), cfg, seed, None)


def _init(tree: Any, cfg: ModelConfig, seed: int, tid2eid: ArrayLike | None) -> Any:
    specs, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(specs))
    leaves = [_init_leaf(spec, key, cfg, tid2eid) for spec, key in zip(specs, keys, strict=True)]
    return jax.tree.unflatten(treedef, leaves)


def _init_leaf(spec: WeightSpec, key: Array, cfg: ModelConfig, tid2eid: ArrayLike | None):
    family, shape, N = spec.tensors[0].role, spec.shape, cfg.n_streams
    leaf = family.rsplit(".", 1)[-1]
    noise = jax.random.normal(key, shape, jnp.float32)
    if leaf == "tid2eid":
        return jnp.broadcast_to(jnp.asarray(tid2eid, jnp.int32), shape)
    if leaf == "base":
        streams = jnp.full(N, -math.log(N - 1))  # sigmoid: 1/N
        mixing = jnp.concatenate([streams, jnp.zeros(N), 4 * jnp.eye(N).reshape(-1)])
        return 0.3 * noise + mixing[: shape[-1]]
    if leaf.endswith("norm"):
        return jnp.ones(shape, jnp.float32)
    if leaf in ("scale", "sinks", "bias"):
        return jnp.full(shape, 0.1 if leaf == "scale" else 0.0, jnp.float32)
    std = 0.5 if leaf == "embed" else shape[-1] ** -0.5
    if family in ("attn.o_b", "ffn.shared.down", "ffn.experts.down"):
        std /= math.sqrt(2 * cfg.n_layers)
    fmt: Any = spec.format  # of plain values, as the recipe of training has it
    return fmt(values=noise * (0.1 if leaf == "ape" else std))


# ---- forward pass ----------------------------------------------------------------------------------------------------
@functools.partial(jax.checkpoint, static_argnums=(3, 4, 5))
def block(
    s: mhc.Streams, tokens: Array, w: Weights, layer: int, cfg: ModelConfig, compute: Compute
) -> tuple[mhc.Streams, tuple[Array, Array]]:
    """`transformer.block` over whole sequences: tokens (B, T) → the streams, `index_loss` and the experts' loads.

    A load is the part of the tokens that chose an expert, (n_experts,).
    """
    B, T = tokens.shape
    cache = kv.zeros(cfg, compute.numerics, compute.dtype, B, T)
    given = inputs(tokens, jnp.full((B,), T, jnp.int32), cache.length, cfg, compute.dtype)
    seen: dict[str, Any] = {}
    s, _ = transformer.block(s, given, w, cache, layer, cfg, compute, lambda _, name, x: seen.update({name: x}))
    load = jax.nn.one_hot(seen["routing"].ids, cfg.n_experts, dtype=wide(s.X.dtype)).sum(1).mean(0)
    if cfg.ratio(layer) != CSA_RATIO:
        return s, (jnp.zeros(()), load)
    some = max(1, B // INDEX_SHARE)
    return s, (index_loss(seen["attention"].reshape(B, T, -1)[:some], w, layer, cfg, compute), load)


def index_loss(h: Array, w: Weights, layer: int, cfg: ModelConfig, compute: Compute) -> Array:
    """How far the indexer is from ranking rows by the attention they get, in nats: a gradient for the indexer alone.

    The divergence of softmax(index scores) from the attention that all heads together pay to the compressed rows, in
    the mean over the queries that see two or more (DeepSeek-V3.2's recipe, arXiv:2512.02556). h (B, T, E), normed.
    """
    paid, scores = paid_and_scored(h, w, layer, cfg, compute)
    counts = jnp.arange(h.shape[1]) >= 2 * CSA_RATIO - 1
    target = paid / jnp.where(counts, paid.sum(-1), 1)[..., None]
    found = jax.nn.log_softmax(jnp.where(scores > -jnp.inf, scores, -1e30), axis=-1)
    divergence = target * (jnp.log(jnp.maximum(target, 1e-30)) - jnp.maximum(found, -1e3))
    return divergence.sum(-1).mean(where=jnp.broadcast_to(counts, paid.shape[:2]))


def paid_and_scored(h: Array, w: Weights, layer: int, cfg: ModelConfig, compute: Compute) -> tuple[Array, Array]:
    """The attention paid to each compressed row if a query reads all that it sees, and the indexer's scores of them.

    h (B, T, E): the normed inputs of a layer of ratio 4, whole sequences. Both are (B, T, rows); attention is summed
    over the heads, without gradient, and 0 where the score is -inf: for rows that a query does not see.
    """
    B, T, _ = h.shape
    h, fixed = lax.stop_gradient((h, w))
    learned = dataclasses.replace(fixed, csa=dataclasses.replace(fixed.csa, indexer=w.csa.indexer))
    cache = kv.zeros(cfg, compute.numerics, compute.dtype, B, T)
    given = inputs(jnp.zeros((B, T), jnp.int32), jnp.full((B,), T, jnp.int32), cache.length, cfg, compute.dtype)
    made, cache = attention.prepare(
        h.reshape(B * T, -1), given, learned, cache, layer, cfg, compute, choose=True
    )  # fmt: skip
    nth, dtype = attention.nth_of_ratio(cfg, layer), wide(h.dtype)
    row, key = attention.row_formats(cfg, compute, h.dtype)
    q, near = made.latent.queries, row.decode(made.latent.near, h.dtype)[:, cfg.window :]
    rows = row.decode(jax.tree.map(lambda x: x[nth], cache.csa.rows), h.dtype)
    position = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    visible = index.visible(position[..., None], jnp.arange(rows.shape[1], dtype=jnp.int32), CSA_RATIO)
    age = position[:, :, None] - position[:, None]

    def score(rows: Array, mask: Array) -> Array:
        s = matmul("bthd,bkd->bthk", q, rows, dtype) / math.sqrt(cfg.head_dim)
        return jnp.where(mask[:, :, None], s, -jnp.inf)

    far = score(rows, visible)
    sink = jnp.broadcast_to(fixed.attn.sinks[layer].astype(dtype)[:, None], (*q.shape[:3], 1))
    total = logsumexp(jnp.concatenate([far, score(near, (age >= 0) & (age < cfg.window)), sink], -1), axis=-1)
    paid = lax.stop_gradient(jnp.exp(far - total[..., None]).sum(2))
    assert made.index_queries is not None and made.index_weight is not None
    scores = index.scores(
        made.index_queries, made.index_weight, cache.index.rows, nth, position, key=key, ratio=CSA_RATIO
    )
    return paid, scores


def forward(w: Weights, tokens: Array, cfg: ModelConfig, compute: Compute) -> tuple[Array, Array, Array, Array]:
    """tokens (B, T + 1), T at most 128 or a multiple of it → what the model and its MTP head say after the first T.

    Returns the model's logits (B, T, vocab) of each next token, the head's (B, T, vocab) of the one after it, the sum
    of `index_loss` over the layers, and the expert loads (layers routed by score, n_experts).
    """
    assert w.mtp is not None
    given, following = tokens[:, :-1], tokens[:, 1:]
    x = lookup(w.embed.dequantize(jnp.dtype(compute.dtype)), tokens)
    here, after = (x.reshape(-1, x.shape[-1]) for x in (x[:, :-1], x[:, 1:]))
    s, extras = transformer.streams(here, cfg), []
    for layer in range(cfg.n_layers):
        s, extra = block(s, given, w, layer, cfg, compute)
        extras.append(extra)
    z = mhc.Streams(mtp.join(s.added(), after, w.mtp, cfg))
    z, extra = block(z, following, w, cfg.n_layers, cfg, compute)
    index_losses, loads = zip(*extras, extra, strict=True)
    said = (transformer.head(s, w.head, cfg, compute), transformer.head(z, mtp.head(w), cfg, compute))
    main, drafted = (y.reshape(*given.shape, -1) for y in said)
    return main, drafted, sum(index_losses, start=jnp.zeros(())), jnp.stack(loads[cfg.n_hash_layers :])


def as_stored(w: Weights, formats: SwiGLU, importance: SwiGLU) -> Weights:
    """w with the routed experts as they would be after quantizing; the gradient passes as if they were not.

    formats: the class of `formats` of gate, up and down. importance: of their columns (layers, experts, in), for
    the quantizer. Training through this is quantization-aware.
    """

    def rounded(stack: Stack, fmt: type[Quantized], importance: Array) -> Stack:
        (group,) = stack.groups
        x = group.values
        error = lax.stop_gradient(quantize(x, fmt, importance).dequantize() - x)
        return dataclasses.replace(stack, groups=(dataclasses.replace(group, values=x + error),))

    experts = jax.tree.map(rounded, w.ffn.experts, formats, importance, is_leaf=lambda x: isinstance(x, Stack))
    return dataclasses.replace(w, ffn=dataclasses.replace(w.ffn, experts=experts))


# ---- losses ----------------------------------------------------------------------------------------------------------
def loss(w: Weights, tokens: Array, mask: Array, cfg: ModelConfig, compute: Compute) -> tuple[Array, dict[str, Array]]:
    """The training loss of tokens (B, T + 1), of which those marked in mask are to be predicted, and its parts.

    The head learns to predict what the model predicts: as a drafter it has to agree with the model, not to be right.
    Returns the loss and: ``main`` and ``mtp`` (nats per token), ``index`` (nats), ``agreement`` (the part of the tokens
    for which model and head have the same first choice), ``loads`` (see `forward`).
    """
    main, drafted, index, loads = forward(w, tokens, cfg, compute)
    mask = mask.astype(main.dtype)
    log_p, log_q = jax.nn.log_softmax(main), jax.nn.log_softmax(drafted)

    def mean(values: Array, mask: Array) -> Array:
        return jnp.sum(values * mask) / jnp.maximum(mask.sum(), 1)

    main_loss = mean(-jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0], mask[:, 1:])
    taught = jnp.exp(lax.stop_gradient(log_p[:, 1:]))
    mtp_loss = mean(-jnp.sum(taught * log_q[:, :-1], axis=-1), mask[:, 2:])
    same = jnp.argmax(main[:, 1:], axis=-1) == jnp.argmax(drafted[:, :-1], axis=-1)
    parts = {"main": main_loss, "mtp": mtp_loss, "index": index, "loads": loads}
    parts["agreement"] = mean(same.astype(main.dtype), mask[:, 2:])
    return main_loss + MTP_WEIGHT * mtp_loss + index, parts


def balance(w: Weights, loads: Array) -> Weights:
    """Move every routing bias by BALANCE_RATE against its expert's load (arXiv:2408.15664). loads: see `forward`."""
    return dataclasses.replace(w, route=balanced(w.route, loads))


def balanced(route: Route, loads: Array) -> Route:
    """`balance`, of the biases alone."""
    (bias,) = route.bias.groups
    bias = bias + BALANCE_RATE * jnp.sign(loads.mean(-1, keepdims=True) - loads)
    return dataclasses.replace(route, bias=dataclasses.replace(route.bias, groups=(bias,)))


# ---- the drafter -----------------------------------------------------------------------------------------------------
def taught(w: Weights, tokens: Array, cfg: ModelConfig, compute: Compute) -> tuple[Array, Array]:
    """What a drafter learns from: of tokens (B, T), the features (B, T, K) and the model's logits (B, T, vocab)."""
    B, T = tokens.shape
    cache = kv.zeros(cfg, compute.numerics, compute.dtype, B, T)
    taps = dspark.Taps(cfg)
    s, _ = transformer.run(w, cache, tokens, jnp.full((B,), T, jnp.int32), cfg, compute, taps)
    said = transformer.head(s, w.head, cfg, compute).reshape(B, T, -1)
    return lax.stop_gradient((taps.features(B), said))


def drafter_loss(
    d: Dspark, w: Weights, tokens: Array, mask: Array, anchors: Array, cfg: ModelConfig, compute: Compute
) -> tuple[Array, dict[str, Array]]:
    """The training loss of a drafter whose model w stays as it is, and its parts.

    tokens (B, T + 1): texts, of which those marked in mask are to be predicted. anchors (B, A): positions of a block's
    first token, from 1 to T - slots. Slot k is taught the model's distribution p of the token k + 1 after the anchor,
    with the true tokens before it; q is the drafter's:

        Σ_k exp(-k / slots) [0.1 · CE + 0.9 · |q - p|₁ + BCE(confidence, 1 - |q - p|₁ / 2)] / Σ_k exp(-k / slots)

    over the slots up to the first that is not to be predicted (DeepSpec). Returns the loss and ``accepted`` (slots),
    the probability 1 - |q - p|₁ / 2 that a sampled draft is accepted; ``agreement`` (slots), how often q and p have the
    same first choice; ``loads`` (stages, n_experts).
    """
    assert cfg.drafter is not None
    (B, A), slots = anchors.shape, cfg.drafter.block_size
    given = tokens[:, :-1]
    features, said = taught(w, given, cfg, compute)
    row = jnp.arange(B, dtype=jnp.int32)[:, None, None]
    ahead = anchors[..., None] + jnp.arange(slots, dtype=jnp.int32)
    taught_logits, true, counts = said[row, ahead], tokens[row, ahead + 1], mask[row, ahead + 1]
    counts = jnp.cumprod(counts.astype(jnp.float32), axis=-1).reshape(B * A, slots)

    # The window of each anchor.
    context, n = dspark.context(d, features, jnp.zeros((B,), jnp.int32), cfg, compute), cfg.window + SPARE
    at = jnp.maximum(positions(anchors.reshape(-1) - 1, n), 0).reshape(B, A, n)
    cache = kv.zeros(cfg, compute.numerics, compute.dtype, B * A, 1)

    def ring(empty: Array, rows: Array) -> Array:
        rows = rows.astype(wide(rows.dtype))[:, row, at]  # of many anchors: their gradients add up
        rows = rows.reshape(len(cfg.stages), B * A, n, -1)
        return jnp.concatenate([empty[: cfg.stages.start], rows.astype(empty.dtype)])

    cache = dataclasses.replace(
        cache, length=anchors.reshape(-1), window=jax.tree.map(ring, cache.window, context)
    )  # fmt: skip
    chosen: list[Array] = []

    def tap(_, name: str, value: Any) -> None:
        if name == "routing":
            chosen.append(value.ids)

    before = given[row, ahead].reshape(B * A, slots)
    h = dspark.hidden(w, d, cache, before[:, 0], jnp.full((B * A,), slots, jnp.int32), cfg, compute, tap)
    logits, sure = dspark.after(d, dspark.base(w, d, h, cfg, compute), h, before, compute)

    p, log_q = jax.nn.softmax(taught_logits.reshape(logits.shape)), jax.nn.log_softmax(logits)
    apart = jnp.abs(jnp.exp(log_q) - p).sum(-1)
    accepted = lax.stop_gradient(1 - apart / 2)
    cross_entropy = -jnp.take_along_axis(log_q, true.reshape(B * A, slots, 1), axis=-1)[..., 0]
    confidence = jax.nn.softplus(sure) - accepted * sure
    weight = counts * jnp.exp(-jnp.arange(slots) / slots)
    total = jnp.sum(weight * (0.1 * cross_entropy + 0.9 * apart + confidence)) / jnp.maximum(weight.sum(), 1)

    def by_slot(x: Array) -> Array:
        return (x * counts).sum(0) / jnp.maximum(counts.sum(0), 1)

    same = (jnp.argmax(logits, -1) == jnp.argmax(p, -1)).astype(jnp.float32)
    loads = [jax.nn.one_hot(ids, cfg.n_experts).sum(1).mean(0) for ids in chosen]
    return total, {"accepted": by_slot(accepted), "agreement": by_slot(same), "loads": jnp.stack(loads)}
