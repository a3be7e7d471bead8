"""Routed experts: every token through its k experts, weighted and added up (DeepSeekMoE, arXiv:2401.06066).

    y = Σ_e weight_e · W_down,e SwiGLU(W_gate,e h, W_up,e h) + what else there is to add

Few tokens read only the experts that they need; many read each expert once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from ds4jax.implementation import Implementation
from ds4jax.numerics.precision import matmul, wide
from ds4jax.ops import tuned
from ds4jax.ops.linear import layers, swiglu
from ds4jax.ops.weight import Weight
from pallas_kernels import experts as few
from pallas_kernels import grouped_gemm

# With more activations than this, experts are taken one after the other.
DENSE_BYTES = 2**28


class Experts(NamedTuple):
    """gate, up: matrices (n_experts, F, E); down: (n_experts, E, F)."""

    gate: Weight
    up: Weight
    down: Weight


def packs(tokens: int, experts: Experts, implementation: Implementation) -> str | None:
    """The format that `experts` wants the activations packed for, or None: it takes them as they are."""
    packed = implementation != "xla" and tokens <= few.MAX_TOKENS and not _apart(experts)
    return experts.gate.format if packed else None


def _apart(w: Experts) -> bool:
    """Whether gate and up have a kernel each: they are of different types, or in stacks of different layers."""
    return (w.gate.format, w.gate.nth) != (w.up.format, w.up.nth)


def experts(
    h: Float[Array, "S E"],
    ids: Int32[Array, "S k"],
    weight: Float[Array, "S k"],
    w: Experts,
    plus: Float[Array, "S E"],
    *,
    clamp: float,
    packed: Int32[Array, "S words units"] | None = None,
    implementation: Implementation = "xla",
) -> Float[Array, "S E"]:
    """h through its experts, in h's dtype.

    ids: -1 where there is no token, or the expert is on another device. plus: added to the sum, float32 at least.
    packed: h as `route` packs it. The kernels for many tokens multiply in bfloat16, those for up to 32 in 16-bit fixed
    point; both add up in float32 and in a fixed order. Raises Unsupported.
    """
    if implementation == "xla":
        return (_formula(h, ids, weight, Experts(*(m.value for m in w)), clamp) + plus).astype(h.dtype)
    interpret, n = implementation == "pallas_interpret", w.gate.planes[0].shape[1]
    # A stack of layers of experts is a longer list of experts.
    gate, up, down = flat = [tuple(p.reshape(-1, *p.shape[2:]) for p in m.planes) for m in w]
    fmts, first = (w.gate.format, w.up.format, w.down.format), (w.gate.nth * n, w.up.nth * n, w.down.nth * n)
    if len(h) > few.MAX_TOKENS:
        routed = grouped_gemm.experts(
            h.astype(jnp.bfloat16), ids, weight, *flat, fmts=fmts, clamp=clamp, n_experts=n, first=first,
            config=tuned.tiles(grouped_gemm), interpret=interpret,
        )  # fmt: skip
        return (routed.astype(jnp.float32) + plus).astype(h.dtype)
    tiles = {"config": tuned.tiles(few), "interpret": interpret}
    if _apart(w):
        parts = zip((gate, up), fmts[:2], first[:2], strict=True)
        made = [_by_pair(h, ids, planes, fmt=fmt, first=layers(at), **tiles) for planes, fmt, at in parts]
        act = swiglu(made[0], made[1], clamp) * jnp.where(ids >= 0, weight, 0).reshape(-1, 1)
    else:
        act = few.gate_up(
            h if packed is None else packed, ids, weight, gate, up, fmt=fmts[0], clamp=clamp, first=layers(first[0]),
            **tiles,
        )  # fmt: skip
    return few.down(act, ids, down, plus, fmt=fmts[2], first=layers(first[2]), dtype=h.dtype, **tiles)


def _by_pair(h: Float[Array, "S E"], ids: Int32[Array, "S k"], planes: Any, **options: Any) -> Float[Array, "pairs F"]:
    """Each token times one matrix of each of its experts, by `few.down` as for a token with a single expert."""
    x, ids = jnp.repeat(h, ids.shape[1], axis=0), ids.reshape(-1, 1)
    parts = [slice(i, i + few.MAX_TOKENS) for i in range(0, len(x), few.MAX_TOKENS)]
    return jnp.concatenate([few.down(x[part], ids[part], planes, **options) for part in parts])


def _formula(x: Array, ids: Array, weight: Array, w: Any, clamp: float) -> Array:
    """Σ_k weight_k · expert_{ids_k}(x); (S, E), wide. w: `Experts` of the matrices themselves, not of `Weight`s."""
    (S, k), held, dtype = ids.shape, w.gate.shape[0], wide(x.dtype)
    weight = jnp.where(ids >= 0, weight, 0)
    if S * k <= held:
        e = jax.tree.map(lambda p: p[jnp.clip(ids, 0, held - 1)], w)
        gate, up = (matmul("se,skfe->skf", x, m.dequantize(x.dtype)) for m in (e.gate, e.up))
        act = swiglu(gate, up, clamp) * weight[..., None].astype(x.dtype)
        return matmul("skf,skef->se", act, e.down.dequantize(x.dtype), dtype)

    def shares(expert: Array) -> Array:
        """How much each of some experts counts for each token: (experts,) → (S, experts)."""
        return jnp.where(ids[..., None] == expert, weight[..., None], 0).sum(1).astype(x.dtype)

    if S * held * w.gate.shape[1] * x.dtype.itemsize <= DENSE_BYTES:
        gate, up = (matmul("se,xfe->sxf", x, m.dequantize(x.dtype)) for m in (w.gate, w.up))
        act = swiglu(gate, up, clamp) * shares(jnp.arange(held, dtype=jnp.int32))[..., None]
        return matmul("sxf,xef->se", act, w.down.dequantize(x.dtype), dtype)

    def one(total: Array, expert: tuple[Any, Array]) -> tuple[Array, None]:
        e, i = expert
        gate, up = (matmul("se,fe->sf", x, m.dequantize(x.dtype)) for m in (e.gate, e.up))
        act = swiglu(gate, up, clamp) * shares(i[None])
        return total + matmul("sf,ef->se", act, e.down.dequantize(x.dtype), dtype), None

    numbered = w, jnp.arange(held, dtype=jnp.int32)
    return lax.scan(one, jnp.zeros(x.shape, dtype), numbered)[0]
