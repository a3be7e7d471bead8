"""Training: a differentiable forward pass over whole sequences, the losses, and how experts are kept in balance.

The pass is made of the model's own functions, with an empty cache and ``straight_through`` numerics. It differs in two
things: every expert sees every token, in one product over all experts instead of a loop; and the layers' activations
are computed again in the backward pass instead of being kept.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import logsumexp

from ds4jax.config import CSA_RATIO, ModelConfig
from ds4jax.formats.quant import Quantized, lookup, matmul, wide
from ds4jax.formats.quantize import quantize
from ds4jax.io.recipes import RECIPES
from ds4jax.model import cache as kv
from ds4jax.model import hyper, indexer, moe, mtp, rope, weights
from ds4jax.model.attention import attention, compressed_rows, project
from ds4jax.model.transformer import Compute, logits
from ds4jax.model.weights import Stack, SwiGLU, Weights, WeightSpec
from ds4jax.numerics import rows as num

Array = jax.Array

MTP_WEIGHT = 0.3  # of the MTP head's loss; DeepSeek-V3 starts with this value (arXiv:2412.19437, 4.2)
BALANCE_RATE = 1e-3  # how far a step moves the routing biases; likewise

# The indexer's loss is taken on one of this many sequences: its target needs every query's scores for every token.
INDEX_SHARE = 8


# ---- initial weights -------------------------------------------------------------------------------------------------
def init(cfg: ModelConfig, seed: int, tid2eid: np.ndarray) -> Weights:
    """Initial float32 weights. tid2eid: int32 (vocab, n_experts_used), the experts of each token in all hashed layers.

    Matrices have deviation 1/√in; those that add to the streams are smaller, by √(2·layers). Hyper-connections start
    near a plain residual: a sub-layer reads the mean of the streams and adds to each, and the streams hardly mix.
    """
    tree = weights.abstract(cfg, RECIPES["f32"])
    specs, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(specs))
    leaves = [_init_leaf(spec, key, cfg, tid2eid) for spec, key in zip(specs, keys, strict=True)]
    return jax.tree.unflatten(treedef, leaves)


def _init_leaf(spec: WeightSpec, key: Array, cfg: ModelConfig, tid2eid: np.ndarray):
    family, shape, N = spec.tensors[0].family.removeprefix("mtp."), spec.shape, cfg.n_streams
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
    return spec.format(values=noise * (0.1 if leaf == "ape" else std))


# ---- forward pass ----------------------------------------------------------------------------------------------------
@functools.partial(jax.checkpoint, static_argnums=(3, 4, 5))
def block(
    X: Array, tokens: Array, w: Weights, layer: int, cfg: ModelConfig, compute: Compute
) -> tuple[Array, tuple[Array, Array]]:
    """`transformer.block` over whole sequences. X (B, T, N, E), tokens (B, T) → X, `index_loss` and expert loads."""
    B, T = tokens.shape
    n = jnp.full((B,), T, jnp.int32)
    cache = kv.zeros(cfg, compute.numerics, compute.dtype, B, T)

    def attend(h: Array) -> tuple[Array, Array]:
        y, _ = attention(h, n, w, cache, layer, cfg, compute.numerics, compute.query_blocks)
        if cfg.ratio(layer) != CSA_RATIO:
            return y, jnp.zeros(())
        return y, index_loss(h[: max(1, B // INDEX_SHARE)], w, layer, cfg, compute)

    def feed_forward(h: Array) -> tuple[Array, Array]:
        return _all_experts(h, tokens, w, layer, cfg)

    X, index = hyper.connect(X, w.attn.hc.at(layer), w.attn.norm[layer], attend, cfg)
    X, load = hyper.connect(X, w.ffn.hc.at(layer), w.ffn.norm[layer], feed_forward, cfg)
    return X, (index, load)


def _all_experts(h: Array, tokens: Array, w: Weights, layer: int, cfg: ModelConfig) -> tuple[Array, Array]:
    """`moe.moe`, and the part of the tokens that chose each expert (n_experts,)."""
    ffn, clamp = w.ffn.at(layer), cfg.clamp(layer)
    x = h.reshape(-1, h.shape[-1])
    ids, weight = moe.route(x, tokens.reshape(-1), w, layer, cfg)
    chosen = jax.nn.one_hot(ids, cfg.n_experts, dtype=weight.dtype)  # (S, k, experts)
    share = (chosen * weight[..., None]).sum(1)[..., None].astype(x.dtype)
    gate, up = (matmul("se,xfe->sxf", x, m.dequantize(x.dtype)) for m in (ffn.experts.gate, ffn.experts.up))
    act = moe.activation(gate, up, clamp) * share
    y = matmul("sxf,xef->se", act, ffn.experts.down.dequantize(x.dtype))
    return (y + moe.swiglu(x, ffn.shared, clamp)).reshape(h.shape), chosen.sum(1).mean(0)


def index_loss(h: Array, w: Weights, layer: int, cfg: ModelConfig, compute: Compute) -> Array:
    """How far the indexer is from ranking rows by the attention they get, in nats: a gradient for the indexer alone.

    The divergence of softmax(index scores) from the attention that all heads together pay to the compressed rows, in
    the mean over the queries that see two or more (DeepSeek-V3.2's recipe, arXiv:2512.02556). h (B, T, E), normed.
    """
    B, T, _ = h.shape
    h, fixed = lax.stop_gradient((h, w))
    learned = fixed.replace(csa=fixed.csa.replace(indexer=w.csa.indexer))
    freq, dtype = rope.frequencies(cfg, CSA_RATIO), wide(h.dtype)
    n = jnp.full((B,), T, jnp.int32)
    cache = kv.zeros(cfg, compute.numerics, compute.dtype, B, T)
    position = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    fmt, a = num.kv_row(cfg, compute.numerics, h.dtype), fixed.attn.at(layer)
    r, q, new = project(h, position, a, freq, cfg)
    _, stored, keys = compressed_rows(h, n, learned, cache, layer, cfg, compute.numerics)
    rows, near = (fmt.decode(planes, h.dtype) for planes in (stored, fmt.encode(new)))

    visible = indexer.visible(position[..., None], jnp.arange(rows.shape[1], dtype=jnp.int32), CSA_RATIO)
    age = position[:, :, None] - position[:, None]

    def score(rows: Array, mask: Array) -> Array:
        s = matmul("bthd,bkd->bthk", q, rows, dtype) / math.sqrt(cfg.head_dim)
        return jnp.where(mask[:, :, None], s, -jnp.inf)

    far = score(rows, visible)
    sink = jnp.broadcast_to(a.sinks.astype(dtype)[:, None], (*q.shape[:3], 1))
    total = logsumexp(jnp.concatenate([far, score(near, (age >= 0) & (age < cfg.window)), sink], -1), axis=-1)
    paid = lax.stop_gradient(jnp.exp(far - total[..., None]).sum(2))
    counts = position >= 2 * CSA_RATIO - 1
    target = paid / jnp.where(counts, paid.sum(-1), 1)[..., None]

    iq, weight = indexer.queries(h, r, position, learned.csa.at(layer).indexer, freq, cfg, compute.numerics)
    found = indexer.scores(iq, weight, keys).astype(dtype)
    found = jax.nn.log_softmax(jnp.where(visible, found, -1e30), axis=-1)
    divergence = target * (jnp.log(jnp.maximum(target, 1e-30)) - jnp.maximum(found, -1e3))
    return divergence.sum(-1).mean(where=counts)


def forward(w: Weights, tokens: Array, cfg: ModelConfig, compute: Compute) -> tuple[Array, Array, Array, Array]:
    """tokens (B, T + 1), T at most 128 or a multiple of it → what the model and its MTP head say after the first T.

    Returns the model's logits (B, T, vocab) of each next token, the head's (B, T, vocab) of the one after it, the sum
    of `index_loss` over the layers, and the expert loads (layers routed by score, n_experts).
    """
    inputs, following = tokens[:, :-1], tokens[:, 1:]
    x = lookup(w.embed.dequantize(jnp.dtype(compute.dtype)), tokens)
    X = jnp.broadcast_to(x[:, :-1, None], (*inputs.shape, cfg.n_streams, cfg.embed_dim))
    extras = []
    for layer in range(cfg.n_layers):
        X, extra = block(X, inputs, w, layer, cfg, compute)
        extras.append(extra)
    Z, extra = block(mtp.join(X, x[:, 1:], w.mtp, cfg), following, w, cfg.n_layers, cfg, compute)
    index, loads = zip(*extras, extra, strict=True)
    return logits(w, X, cfg), mtp.head(w, Z, cfg), sum(index), jnp.stack(loads[cfg.n_hash_layers :])


def as_stored(w: Weights, formats: SwiGLU, importance: SwiGLU) -> Weights:
    """w with the routed experts as they would be after quantizing; the gradient passes as if they were not.

    formats: the class of `formats` of gate, up and down. importance: of their columns (layers, experts, in), for
    the quantizer. Training through this is quantization-aware.
    """

    def rounded(stack: Stack, fmt: type[Quantized], importance: Array) -> Stack:
        (group,) = stack.groups
        x = group.values
        error = lax.stop_gradient(quantize(x, fmt, importance).dequantize() - x)
        return stack.replace(groups=(group.replace(values=x + error),))

    experts = jax.tree.map(rounded, w.ffn.experts, formats, importance, is_leaf=lambda x: isinstance(x, Stack))
    return w.replace(ffn=w.ffn.replace(experts=experts))


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
    (bias,) = w.route.bias.groups
    bias = bias + BALANCE_RATE * jnp.sign(loads.mean(-1, keepdims=True) - loads)
    return w.replace(route=w.route.replace(bias=dataclasses.replace(w.route.bias, groups=(bias,))))
