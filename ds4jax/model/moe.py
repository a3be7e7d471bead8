"""Mixture of experts: routing by token id or by score, the routed experts, and the shared one."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from ds4jax.config import ModelConfig
from ds4jax.formats.quant import linear, matmul, wide
from ds4jax.model.weights import FFN, SwiGLU, Weights
from ds4jax.sharding import RULES, partition_spec

Array = jax.Array


def route(h: Array, tokens: Array, w: Weights, layer: int, cfg: ModelConfig) -> tuple[Array, Array]:
    """h (S, E), token ids (S,) → expert ids (S, k) and weights (S, k), float32 at least.

    The bias decides who is chosen, not how much a choice counts.
    """
    s = jnp.sqrt(jax.nn.softplus(linear(h.astype(wide(h.dtype)), w.ffn.router[layer])))
    if layer < cfg.n_hash_layers:
        ids = w.hash.tid2eid[layer][tokens]
    else:
        _, ids = lax.top_k(s + w.route.bias[layer].astype(s.dtype), cfg.n_experts_used)
    weight = jnp.take_along_axis(s, ids, axis=-1)
    if cfg.route_norm:
        weight = weight / weight.sum(-1, keepdims=True)
    return ids, weight * cfg.route_scale


def activation(gate: Array, up: Array, clamp: float) -> Array:
    """silu(min(gate, c)) · clip(up, -c, c)."""
    return jax.nn.silu(jnp.minimum(gate, clamp)) * jnp.clip(up, -clamp, clamp)


def swiglu(x: Array, w: SwiGLU, clamp: float) -> Array:
    """x (..., E) → (..., E) through one expert."""
    return linear(activation(linear(x, w.gate), linear(x, w.up), clamp), w.down)


def experts(x: Array, ids: Array, weight: Array, w: SwiGLU, clamp: float, first: Array | int = 0) -> Array:
    """Σ_k weight_k · expert_{ids_k}(x) over the experts held in w, which are first, first + 1, …

    x (S, E); ids, weight (S, k) → (S, E). Few tokens read only the experts they need; many read each expert once.
    """
    S, k = ids.shape
    held = w.gate.shape[0]
    ids = ids - first
    weight = jnp.where((ids >= 0) & (ids < held), weight, 0).astype(x.dtype)
    if S * k <= held:
        e = jax.tree.map(lambda p: p[jnp.clip(ids, 0, held - 1)], w)
        gate, up = (matmul("se,skfe->skf", x, m.dequantize(x.dtype)) for m in (e.gate, e.up))
        act = activation(gate, up, clamp) * weight[..., None]
        return matmul("skf,skef->se", act, e.down.dequantize(x.dtype))

    def one(total: Array, expert: tuple[SwiGLU, Array]) -> tuple[Array, None]:
        e, i = expert
        share = jnp.where(ids == i, weight, 0).sum(-1, keepdims=True)
        return total + swiglu(x, e, clamp) * share, None

    total, _ = lax.scan(one, jnp.zeros_like(x), (w, jnp.arange(held, dtype=jnp.int32)))
    return total


def sharded_experts(x: Array, ids: Array, weight: Array, w: SwiGLU, clamp: float, mesh: Mesh) -> Array:
    """`experts` with the expert axis spread over the mesh: every device runs its own experts, then all add up."""
    axes = RULES["experts"]

    def local(x, ids, weight, w):
        first = lax.axis_index(axes) * w.gate.shape[0]
        return lax.psum(experts(x, ids, weight, w, clamp, first), axes)

    everywhere = PartitionSpec()
    by_expert = jax.tree.map(lambda _: partition_spec(("experts", None, None)), w)
    # A Pallas call inside cannot say how its outputs vary over the mesh, so that check is off.
    return jax.shard_map(
        local, mesh=mesh, in_specs=(everywhere, everywhere, everywhere, by_expert), out_specs=everywhere,
        check_vma=False,
    )(x, ids, weight, w)  # fmt: skip


def moe(h: Array, tokens: Array, w: Weights, layer: int, cfg: ModelConfig, mesh: Mesh | None) -> Array:
    """h (B, T, E), tokens (B, T) → (B, T, E): the routed experts and the shared one."""
    ffn: FFN = w.ffn.at(layer)
    clamp = cfg.clamp(layer)
    x = h.reshape(-1, h.shape[-1])
    ids, weight = route(x, tokens.reshape(-1), w, layer, cfg)
    run = experts if mesh is None else functools.partial(sharded_experts, mesh=mesh)
    return (run(x, ids, weight, ffn.experts, clamp) + swiglu(x, ffn.shared, clamp)).reshape(h.shape)
