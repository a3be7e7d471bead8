"""Mixture of experts: a router, the routed experts, and the shared one (DeepSeekMoE, arXiv:2401.06066)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from ds4jax.config import ModelConfig
from ds4jax.model.compute import Compute, Inputs, Tap
from ds4jax.model.residency import LayerHeld
from ds4jax.model.weights import Weights
from ds4jax.numerics.precision import wide
from ds4jax.ops.experts import Experts, experts, packs
from ds4jax.ops.linear import gated, product, products
from ds4jax.ops.route import route
from ds4jax.sharding import EXPERT, TENSOR, parts, place, total


def moe(
    h: Float[Array, "S E"], inputs: Inputs, w: Weights, layer: int, cfg: ModelConfig, compute: Compute, tap: Tap
) -> Float[Array, "S E"]:
    """The routed experts and the shared one, of the normed h."""
    f, clamp, kernels, accumulated = w.ffn.at(layer), cfg.clamp(layer), compute.implementations, wide(h.dtype)
    held = f.experts if isinstance(f.experts, LayerHeld) else None
    routed = held.in_slots if held else Experts(f.experts.gate, f.experts.up, f.experts.down)
    by_id = layer < cfg.n_hash_layers
    table = (w.hash.tid2eid if by_id else w.route.bias).at(layer)
    tap(layer, "ffn", h)

    # Calls of their own: the routed experts wait for the scores alone, and run side by side with the shared one.
    with jax.named_scope("router"):
        (logits,) = products(h, [product(f.router, accumulated, exact=True)], implementation=kernels["linear"])
    with jax.named_scope("shared_expert"):
        (act,) = products(h, [gated(f.shared.gate, f.shared.up, clamp)], implementation=kernels["linear"])
        (shared,) = products(act, [product(f.shared.down, accumulated)], implementation=kernels["linear"])
    tap(layer, "shared", act)

    with jax.named_scope("router"):
        fmt = packs(len(h), routed, kernels["experts"]) if kernels["route"] != "xla" else None
        routing = route(
            logits, table, inputs.ids if by_id else None, inputs.real, k=cfg.n_experts_used, norm=cfg.route_norm,
            scale=cfg.route_scale, pack=(h, fmt) if fmt else None, implementation=kernels["route"],
        )  # fmt: skip
    tap(layer, "routing", routing)
    with jax.named_scope("experts"):
        routed, ids = held.bring(routing.ids, h) if held else (routed, routing.ids)
        ids, shared = _here(ids, shared, routed, compute)
        y = experts(
            h, ids, routing.weight, routed, shared, clamp=clamp, packed=routing.packed,
            implementation=kernels["experts"],
        )  # fmt: skip
    return total(y, compute.mesh, EXPERT, TENSOR)


def _here(
    ids: Int32[Array, "S k"], shared: Float[Array, "S E"], routed: Experts, compute: Compute
) -> tuple[Int32[Array, "S k"], Float[Array, "S E"]]:
    """The ids' numbers among the experts of this device, -1 for those of others; and its part of the shared expert.

    Devices along ep have the same part, which is to be added once: the first one's stays, the others' are 0.
    """
    mesh = compute.mesh
    if parts(mesh, "experts") == 1:
        return ids, shared
    held = routed.gate.planes[0].shape[1]
    ids = ids - place(mesh, EXPERT, TENSOR) * held
    ids = jnp.where((ids >= 0) & (ids < held), ids, -1)
    return ids, jnp.where(place(mesh, EXPERT) == 0, shared, 0)
