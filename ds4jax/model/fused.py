"""The forward pass through `pallas_kernels`: the mathematics of `transformer.forward`, in fewer and larger steps.

What shares an input is one product, norms and activations are part of the products beside them, one step takes the
streams from a sub-layer to the next, and stored rows are read as they are stored. Up to 32 tokens at once, in decoding
say, products read the quantized weights; more, and tiles or whole matrices are dequantized for the tensor cores.

    boundary ── h ──► attention ── y ──► boundary ── h ──► experts ── y ──► boundary ── …

Everything else is as in the other files of this folder, whose functions are used where they are not in the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from ds4jax.config import CSA_RATIO, HCA_RATIO, ModelConfig
from ds4jax.errors import ConfigError
from ds4jax.formats.quant import Quantized
from ds4jax.model import attention as plain
from ds4jax.model import moe, rope
from ds4jax.model.cache import Cache
from ds4jax.model.compressor import append, compressors
from ds4jax.model.norm import rms_norm
from ds4jax.model.weights import Compressor, HyperConnection, Stack, Weights
from ds4jax.numerics import rows as num
from pallas_kernels import compressor, experts, grouped_gemm, hyper, indexer, latent, matmul, mla, router, topk
from pallas_kernels.common import Implementation, Unsupported

if TYPE_CHECKING:
    from ds4jax.model.transformer import Compute

Array = jax.Array

QUERIES = 1024  # scored at once, which bounds the scores in memory


class Matrix(NamedTuple):
    """Where a kernel finds a matrix: number `nth` of the stacks `planes`, (layers, n, ·) each, in format `fmt`."""

    fmt: str
    planes: tuple[Array, ...]
    nth: int

    @property
    def n(self) -> int:
        return self.planes[0].shape[-2]


def find(w: Stack | Quantized | Array, layer: int) -> tuple[Quantized | Array, int]:
    """`Stack.find`; what is no layer's is a stack of one."""
    return w.find(layer) if isinstance(w, Stack) else (jax.tree.map(lambda p: p[None], w), 0)


def matrix(w: Stack | Quantized, layer: int = 0) -> Matrix:
    """A layer's matrix of a family, or a matrix that is no layer's."""
    group, nth = find(w, layer)
    return Matrix(type(group).__name__, tuple(getattr(group, name) for name in group.planes), nth)


def index(*nth: int) -> Array:
    """int32 (n,), but (1,) where all are equal: of equal numbers XLA makes no constant, but a kernel in every step."""
    return jnp.array(nth[:1] if len({*nth}) == 1 else nth, jnp.int32)


class Norm(NamedTuple):
    """Number `nth` of stacked weights (layers, K) of an RMS norm."""

    weights: Array
    nth: int
    eps: float


@dataclass(frozen=True)
class Product:
    """A product that is asked for: x Wᵀ in `dtype`; or, with `clamp`, of gate and up their activation."""

    matrices: tuple[Matrix, ...]
    dtype: str = "bfloat16"
    clamp: float | None = None


def products(
    x: Array, asked: Sequence[Product], impl: Implementation, norm: Norm | None = None, groups: int = 1
) -> list[Array]:
    """x (S, K), RMS-normed first given a norm → (S, n) each; or x (S, groups, K), each group with its own rows."""
    weight = None if norm is None else norm.weights[norm.nth]
    if len(x) > matmul.MAX_ROWS:
        x = x if norm is None else rms_norm(x, norm.eps, weight)
        return [_large(x, p, groups, impl) for p in asked]
    outputs = tuple(matmul.Output(p.matrices[0].n, p.matrices[0].fmt, p.dtype, p.clamp) for p in asked)
    for p in asked:
        if len({(m.fmt, m.nth) for m in p.matrices}) > 1:
            raise Unsupported(f"gate and up: found formats {[m.fmt for m in p.matrices]}, expected the same for both")
    if norm is not None and norm.nth != asked[0].matrices[0].nth:
        raise Unsupported(
            f"norm: found layer {norm.nth} of its stack, expected {asked[0].matrices[0].nth}, the matrix's"
        )
    return list(
        matmul.matmul(
            x, index(*(p.matrices[0].nth for p in asked)), [[m.planes for m in p.matrices] for p in asked],
            None if norm is None else norm.weights, outputs=outputs, norm_eps=None if norm is None else norm.eps,
            implementation=impl,
        )
    )  # fmt: skip


def _large(x: Array, asked: Product, groups: int, impl: Implementation) -> Array:
    config = grouped_gemm.Config(fused=False) if impl == "xla" else None
    y = [
        grouped_gemm.linear(
            x, index(m.nth), m.planes, fmt=m.fmt, groups=groups, config=config,
            dtype="float32" if asked.clamp else asked.dtype,
        )
        for m in asked.matrices
    ]  # fmt: skip
    return moe.activation(*y, asked.clamp).astype(asked.dtype) if asked.clamp else y[0]


# ---- streams ---------------------------------------------------------------------------------------------------------
class Streams(NamedTuple):
    """X (S, N, E) before a sub-layer's output was added, and what adds it: y (S, E), post (S, N), C (S, N, N)."""

    X: Array
    mixed: tuple[Array, Array, Array] | None = None


def boundary(
    s: Streams, hc: HyperConnection, norm: Stack | Array, layer: int, cfg: ModelConfig, impl: Implementation
) -> tuple[Array, Array, Array | None, Array | None]:
    """The streams after one sub-layer, and what the next one (or the head) reads: X, h (S, E), its post and C."""
    (fn, nth), *rest = (find(w, layer) for w in (hc.fn, hc.base, hc.scale, norm))
    if any(n != nth for _, n in rest) or not hasattr(fn, "values"):
        raise Unsupported(f"hc_fn: found {type(fn).__name__} in stacks that differ, expected one of F32, F16, BF16")
    numbers = hyper.Numbers(cfg.norm_eps, cfg.hc_eps, cfg.sinkhorn_iters)
    return hyper.op(s.X, s.mixed, fn.values, *(w for w, _ in rest), index(nth), numbers=numbers, implementation=impl)


# ---- attention -------------------------------------------------------------------------------------------------------
class Turn(NamedTuple):
    """Cosines and sines of RoPE's angles: of the new tokens' positions (B, T, rope_dim / 2), and of that of the
    compressed row (B, rope_dim / 2) which the first of them goes into."""

    cos: Array
    sin: Array
    row_cos: Array
    row_sin: Array


def turns(cache: Cache, T: int, cfg: ModelConfig) -> dict[int, Turn]:
    """For layers of each ratio."""
    position = cache.length[:, None] + jnp.arange(T, dtype=jnp.int32)
    out, same = {}, rope.cos_sin(position, rope.frequencies(cfg, CSA_RATIO))  # layers that compress share their base
    for ratio in (0, CSA_RATIO, HCA_RATIO):
        freq = rope.frequencies(cfg, ratio)
        row = rope.cos_sin(cache.length // max(1, ratio) * ratio, freq)
        out[ratio] = Turn(*(same if ratio else rope.cos_sin(position, freq)), *row)
    return out


def attention(
    h: Array, n: Array, w: Weights, cache: Cache, layer: int, turn: Turn, cfg: ModelConfig, numerics: num.Numerics,
    impl: Implementation,
) -> tuple[Array, Cache]:  # fmt: skip
    """h (B·T, E) → (B·T, E), and the cache with these tokens stored; see `ds4jax.model.attention`."""
    a, ratio = w.attn, cfg.ratio(layer)
    B, T, _ = turn.cos.shape
    dtype, fmt = h.dtype, num.kv_row(cfg, numerics, h.dtype)
    first = cache.length if B == 1 else jnp.where(n > 0, cache.length, 0)  # a sequence that rests attends to nothing
    position = first[:, None] + jnp.arange(T, dtype=jnp.int32)
    nth = cfg.layers_of_ratio(ratio).index(layer) if ratio else 0
    capacity = next(iter(cache.of_ratio(ratio).rows.values())).shape[2] if ratio else 0
    choose = ratio == CSA_RATIO and capacity > cfg.index_top_k

    of_h = [Product((matrix(a.q_a, layer),), dtype.name), Product((matrix(a.kv, layer),), "float32")]
    of_r = [Product((matrix(a.q_b, layer),), dtype.name)]
    beside = []  # what else reads h: a call of its own, which runs side by side with q_b
    if ratio:
        families = compressors(w, ratio)
        beside += [Product((matrix(m, layer),), "float32") for c in families.values() for m in (c.kv, c.gate)]
    if choose:
        beside.append(Product((matrix(w.csa.indexer.proj, layer),), "float32"))
        of_r.append(Product((matrix(w.csa.indexer.q_b, layer),), "float32"))
    r, kv = products(h, of_h, impl)
    rest = products(h, beside, impl) if beside else []
    norms, norm_nth = a.q_a_norm.find(layer)
    q, *iq = products(r, of_r, impl, Norm(norms, norm_nth, cfg.norm_eps))

    if T == 1:
        norms, norm_nth = a.kv_norm.find(layer)
        q, window, iq = latent.op(
            q, kv, *(iq or [None]), norms, turn.cos[:, 0], turn.sin[:, 0], cache.length, n, index(norm_nth, layer),
            cache.window, eps=cfg.norm_eps, index_dim=cfg.index_head_dim, implementation=impl,
        )  # fmt: skip
        cache = cache.replace(window=window)
    else:
        heads = turn.cos[:, :, None], turn.sin[:, :, None]
        q = q.reshape(B, T, cfg.n_heads, cfg.head_dim).astype(jnp.float32)
        q = rope.turn(rms_norm(q, cfg.norm_eps), *heads).astype(jnp.float16)
        kv = rope.turn(rms_norm(kv, cfg.norm_eps, a.kv_norm[layer]).reshape(B, T, -1), turn.cos, turn.sin)
        cache, window = plain.slide(cache, layer, fmt.encode(kv), n, cfg.window)
        if choose:
            key_fmt = num.index_row(cfg, numerics, jnp.float32)
            iq = rope.turn(iq[0].reshape(B, T, cfg.index_heads, cfg.index_head_dim), *heads)
            iq = key_fmt.decode(key_fmt.encode(num.index_rotation(iq, numerics)), jnp.bfloat16)

    rows = indices = None
    if ratio:
        projected = list(zip(rest[::2], rest[1::2], strict=False))[: len(families)]
        if T == 1:
            cache = _append(projected, families, n, cache, layer, nth, turn, cfg, impl)
        else:
            projected = [(z.reshape(B, T, -1), g.reshape(B, T, -1)) for z, g in projected]
            cache = append(projected, n, w, cache, layer, cfg, numerics, dtype)
        rows = cache.of_ratio(ratio).rows
    if choose:
        # The heads' weights lack a factor here, (index_heads · index_head_dim)^-½, that no choice depends on.
        indices = _choose(iq, rest[-1].reshape(B, T, -1), cache, position, nth, cfg, impl)

    sinks, sink_nth = a.sinks.find(layer)
    o = mla.op(
        q, window, rows, indices, first, index(layer, nth, sink_nth), sinks, turn.cos, turn.sin, ratio=ratio,
        ring=T == 1, dtype=dtype, implementation=impl,
    )  # fmt: skip
    (o,) = products(o.reshape(B * T, cfg.o_groups, -1), [Product((matrix(a.o_a, layer),), dtype.name)], impl,
                    groups=cfg.o_groups)  # fmt: skip
    return products(o, [Product((matrix(a.o_b, layer),), dtype.name)], impl)[0], cache


def _append(
    projected: list[tuple[Array, Array]], families: dict[str, Compressor], n: Array, cache: Cache, layer: int,
    nth: int, turn: Turn, cfg: ModelConfig, impl: Implementation,
) -> Cache:  # fmt: skip
    """`compressor.append` for one token of each sequence."""
    kept = [getattr(cache, kind) for kind in families]
    found = [(c.ape.find(layer), c.norm.find(layer)) for c in families.values()]
    at = {place for pair in found for _, place in pair}
    if len(at) > 1 or not all(hasattr(ape, "values") for (ape, _), _ in found):
        raise Unsupported(
            f"compressor_ape: found {[type(a).__name__ for (a, _), _ in found]}, expected F32, F16 or BF16"
        )
    states = compressor.op(
        projected, [(ape.values, norm) for (ape, _), (norm, _) in found],
        [compressor.State(c.rows, c.z, c.g, c.prev_z, c.prev_g) for c in kept], cache.length, n, turn.row_cos,
        turn.row_sin, index(*at), index(nth), eps=cfg.norm_eps, implementation=impl,
    )  # fmt: skip
    return cache.replace(**{k: c.replace(**s._asdict()) for k, c, s in zip(families, kept, states, strict=True)})


def _choose(
    iq: Array, weight: Array, cache: Cache, position: Array, nth: int, cfg: ModelConfig, impl: Implementation
) -> Array:
    """The compressed rows that each query reads: int32 (B, T, k), ascending; those it sees come first."""
    keys, out = cache.index.rows, []
    B, T = position.shape
    for start in range(0, T, QUERIES):
        q, w, p = (x[:, start : start + QUERIES] for x in (iq, weight, position))
        score = indexer.op(q, w, keys["codes"], keys["exponents"], p, index(nth), ratio=CSA_RATIO, implementation=impl)
        chosen = topk.op(score.reshape(-1, score.shape[-1]), k=cfg.index_top_k, implementation=impl)
        out.append(chosen.reshape(B, -1, cfg.index_top_k))
    return out[0] if len(out) == 1 else jnp.concatenate(out, axis=1)


# ---- experts ---------------------------------------------------------------------------------------------------------
def feed_forward(
    h: Array, tokens: Array, real: Array | None, w: Weights, layer: int, cfg: ModelConfig, impl: Implementation
) -> Array:
    """h (S, E), token ids (S,) → (S, E): the routed experts and the shared one; see `ds4jax.model.moe`.

    real: int32 (S,), 0 for what is no token and needs no experts. None: all are.
    """
    f, clamp = w.ffn, cfg.clamp(layer)
    gate_up = Product((matrix(f.shared.gate, layer), matrix(f.shared.up, layer)), h.dtype.name, clamp)
    # Two calls: the routed experts wait for the scores alone, and run side by side with the shared one.
    (scores,) = products(h, [Product((matrix(f.router, layer),), "float32")], impl)
    (act,) = products(h, [gate_up], impl)
    (shared,) = products(act, [Product((matrix(f.shared.down, layer),), "float32")], impl)
    by_id = layer < cfg.n_hash_layers
    table, nth = (w.hash.tid2eid if by_id else w.route.bias).find(layer)
    gate, up, down = (matrix(m, layer) for m in (f.experts.gate, f.experts.up, f.experts.down))
    if (gate.fmt, gate.nth) != (up.fmt, up.nth):
        raise Unsupported(f"gate and up: found formats {gate.fmt}, {up.fmt}, expected the same for both")
    few = len(h) <= experts.MAX_TOKENS
    pack = few and impl == "pallas"  # the activations for the experts, on the way
    ids, weight, *packed = router.op(
        scores, table, tokens if by_id else None, index(nth), h if pack else None, real, k=cfg.n_experts_used,
        norm=cfg.route_norm, scale=cfg.route_scale, fmt=gate.fmt if pack else None, implementation=impl,
    )  # fmt: skip
    # A stack of layers of experts is a longer list of experts.
    flat = [tuple(p.reshape(-1, *p.shape[2:]) for p in m.planes) for m in (gate, up, down)]
    first = gate.nth * cfg.n_experts, down.nth * cfg.n_experts
    if few or impl == "xla":
        routed = experts.gate_up(
            packed[0] if pack else h, ids, weight, *flat[:2], fmt=gate.fmt, clamp=clamp, first=index(first[0]),
            implementation=impl,
        )  # fmt: skip
        return experts.down(
            routed, ids, flat[2], shared, fmt=down.fmt, first=index(first[1]), dtype=h.dtype, implementation=impl
        )
    routed = grouped_gemm.experts(
        h, ids, weight, *flat, fmts=(gate.fmt, down.fmt), clamp=clamp, n_experts=cfg.n_experts, first=first
    )
    return (routed.astype(jnp.float32) + shared).astype(h.dtype)


# ---- the whole model -------------------------------------------------------------------------------------------------
def forward(
    w: Weights,
    cache: Cache,
    tokens: Array,
    n: Array,
    cfg: ModelConfig,
    compute: Compute,
    all_positions: bool = False,
    impl: Implementation = "pallas",
) -> tuple[Array, Cache]:
    """Append tokens to every sequence, and the head: what `transformer.prefill` describes.

    impl: of every kernel. Raises Unsupported for a shape or a format that a kernel does not take, and ConfigError for
    numerics or a mesh that there are no kernels for.
    """
    if compute.numerics != "official" or compute.mesh is not None:
        found = f"numerics {compute.numerics!r} on {1 if compute.mesh is None else compute.mesh.size} devices"
        raise ConfigError(f"kernels = 'pallas': found {found}, expected 'official' on one")
    B, T = tokens.shape
    turn = turns(cache, T, cfg)
    flat = tokens.reshape(-1)
    real = None if B * T == 1 else (jnp.arange(T) < n[:, None]).astype(jnp.int32).reshape(-1)
    x = w.embed[flat].dequantize(jnp.dtype(compute.dtype))
    s = Streams(jnp.broadcast_to(x[:, None], (B * T, cfg.n_streams, cfg.embed_dim)))
    for layer in range(cfg.n_layers):
        X, h, post, C = boundary(s, w.attn.hc, w.attn.norm, layer, cfg, impl)
        y, cache = attention(h, n, w, cache, layer, turn[cfg.ratio(layer)], cfg, compute.numerics, impl)
        X, h, post, C = boundary(Streams(X, (y, post, C)), w.ffn.hc, w.ffn.norm, layer, cfg, impl)
        y = feed_forward(h, flat, real, w, layer, cfg, impl)
        s = Streams(X, (y, post, C))
    if not all_positions and T > 1:
        last = jnp.arange(B, dtype=jnp.int32) * T + jnp.maximum(n - 1, 0)
        s = jax.tree.map(lambda x: x[last], s)
    _, h, _, _ = boundary(s, w.head.hc, w.head.norm, 0, cfg, impl)
    (logits,) = products(h, [Product((matrix(w.head.out),), "float32")], impl)
    lead = (B, T) if all_positions else (B,)
    return logits.reshape(*lead, -1), cache.replace(length=cache.length + n)
