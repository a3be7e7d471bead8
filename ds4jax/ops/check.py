"""The formula of every kernel, in the kernel's own arguments: what tests and the sweep of tiles compare it with.

`formula("topk")(*shape.inputs(key), **shape.static)` is what `pallas_kernels.topk.op` computes of the same. Activations
are taken in float32, so that only the kernel's roundings are seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ds4jax import formats
from ds4jax.formats import Quantized
from ds4jax.numerics.rows import Fp4Row, Fp8Row
from ds4jax.ops import attend, compress, index, latent, mhc, rope, route, topk
from ds4jax.ops.linear import Product, decoded_whole, products, swiglu
from ds4jax.ops.norm import Norm, rms_norm
from ds4jax.ops.ring import SPARE
from ds4jax.ops.weight import Weight
from pallas_kernels import compressor as compressor_kernel
from pallas_kernels import experts as experts_kernel
from pallas_kernels import grouped_gemm as grouped_kernel
from pallas_kernels import hyper as hyper_kernel
from pallas_kernels.common import entry

Array = jax.Array
Planes = tuple[Array, ...]


def formula(kernel: str) -> Callable[..., Any]:
    """The formula of a module of `pallas_kernels`, by its name."""
    return globals()[f"_{kernel}"]


def _wide(x: Any) -> Any:
    return None if x is None else x.astype(jnp.float32)


def _quantized(fmt: str, planes: Sequence[Array]) -> Quantized:
    return getattr(formats, fmt)(*planes)


def _dense(values: Array) -> Quantized:
    """A matrix of floats as a Quantized."""
    return {"float32": formats.F32, "float16": formats.F16, "bfloat16": formats.BF16}[values.dtype.name](values)


def _hyper(
    X: Array, mixed: tuple[Array, Array, Array] | None, fn: Array, base: Array, scale: Array, norm: Array, layer: Array,
    *, numbers: hyper_kernel.Numbers = hyper_kernel.Numbers(),  # noqa: B008 (frozen)
) -> mhc.Boundary:  # fmt: skip
    stacks = _dense(fn), base, scale
    connection = mhc.Connection(*(Weight(stack, entry(layer, i)) for i, stack in enumerate(stacks)))
    streams = mhc.Streams(X, None if mixed is None else mhc.Output(*mixed))
    normed = Norm(Weight(norm, entry(layer, 3)), numbers.norm_eps)
    return mhc.boundary(streams, connection, normed, eps=numbers.hc_eps, iterations=numbers.iterations)


def _matmul(
    x: Array, layer: Array, weights: Sequence[Sequence[Planes]], norm: Array | None = None, *, outputs: Sequence[Any],
    norm_eps: float | None = None,
) -> tuple[Array, ...]:  # fmt: skip
    asked = [
        Product(tuple(Weight(_quantized(out.fmt, p), entry(layer, i)) for p in w), out.dtype, out.clamp)
        for i, (w, out) in enumerate(zip(weights, outputs, strict=True))
    ]
    x = _wide(x)
    if norm_eps is not None:
        x = rms_norm(x, norm_eps, None if norm is None else norm[entry(layer, len(outputs))])
    return tuple(products(x, asked, groups=x.shape[1] if x.ndim == 3 else 1))


def _latent(
    q: Array, kv: Array, norm: Array, cos: Array, sin: Array, position: Array, n: Array, layers: Array, window: Any, *,
    eps: float,
) -> tuple[Array, Any]:  # fmt: skip
    made = latent.latent(
        _wide(q), _wide(kv), Norm(Weight(norm, entry(layers, 0)), eps),
        rope.Angles(cos, sin, cos, sin), position, n, window, entry(layers, 1),
        row=Fp8Row(kv.shape[1], 2 * cos.shape[-1]), dtype=jnp.float16,
    )  # fmt: skip
    return made.queries, made.window


def _queries(x: Array, cos: Array, sin: Array, *, kind: str, dim: int, eps: float) -> Array:
    angles = rope.Angles(cos[None], sin[None], cos, sin)
    if kind == "index":
        return index.queries(_wide(x), angles, key=Fp4Row(dim), numerics="official")[0].astype(jnp.bfloat16)
    heads = rms_norm(_wide(x).reshape(len(x), -1, dim), eps)
    return rope.turn(heads, cos[:, None], sin[:, None]).astype(jnp.float16)


def _compressor(
    new: Sequence[tuple[Array, Array]], weights: Sequence[tuple[Array, Array]], states: Sequence[Any], position: Array,
    n: Array, cos: Array, sin: Array, layer: Array, nth: Array, *, eps: float,
) -> tuple[compressor_kernel.State, ...]:  # fmt: skip
    fed, kept = [], []
    for i, ((z, g), (ape, norm), state) in enumerate(zip(new, weights, states, strict=True)):
        D, is_index = norm.shape[-1], "rope" not in state.rows
        row = Fp4Row(D) if is_index else Fp8Row(D, 2 * cos.shape[-1])
        norm = Norm(Weight(norm, entry(layer, 2 * i + 1)), eps)
        fed.append(compress.Compressor(z, g, Weight(_dense(ape), entry(layer, 2 * i)), norm, row, is_index))
        kept.append(compress.Compressed(*state))
    angles = rope.Angles(cos, sin, cos, sin)
    ratio = weights[0][0].shape[1]
    moved = compress.compress(fed, kept, position, n, angles, nth[0], ratio=ratio, numerics="official")
    return tuple(compressor_kernel.State(s.rows, s.z, s.g) for s in moved)


def _indexer(
    q: Array, weight: Array, codes: Array, exponents: Array, position: Array, layer: Array, *, ratio: int = 4
) -> Array:
    """Without the factor 1 / √(heads · dims), which no choice depends on."""
    H, D = q.shape[2:]
    keys = {"codes": codes, "exponents": exponents}
    return index.scores(_wide(q), weight * (H * D) ** 0.5, keys, layer[0], position, key=Fp4Row(D), ratio=ratio)


def _topk(score: Array, visible: Array, *, k: int) -> Array:
    return jnp.sort(topk.highest(score[None], visible[None], k)[0], axis=-1)


def _mla(
    q: Array, window: Any, rows: Any, indices: Array | None, position: Array, layers: Array, sinks: Array, cos: Array,
    sin: Array, *, ratio: int, width: int, ring: bool, causal: bool = True, dtype: Any = jnp.float32,
) -> Array:  # fmt: skip
    assert ring == (q.shape[1] <= SPARE)
    layer, nth, sink = (entry(layers, i) for i in range(3))
    return attend.attend(
        _wide(q), window, rows, indices, position, Weight(sinks, sink), rope.Angles(cos, sin, cos, sin), layer=layer,
        nth=nth, ratio=ratio, row=Fp8Row(q.shape[-1], 2 * cos.shape[-1]), dtype=dtype, causal=causal,
    )  # fmt: skip


def _router(
    logits: Array, table: Array, tokens: Array | None, layer: Array, x: Array | None = None, real: Array | None = None,
    *, k: int, norm: bool, scale: float, fmt: str | None = None,
) -> tuple[Array, ...]:  # fmt: skip
    ids, weight, _ = route.route(logits, Weight(table, layer[0]), tokens, real, k=k, norm=norm, scale=scale)
    if x is None:
        return ids, weight
    assert fmt is not None
    return ids, weight, packed(x, fmt)


def packed(x: Array, fmt: str) -> Array:
    """What `experts.pack` makes of activations x (S, K), in XLA."""
    packing = experts_kernel.Packing(fmt, x.shape[1])
    return jax.vmap(lambda x: jnp.concatenate(packing.parts(*(x[columns] for columns in packing.order))))(x)


def _experts(*arrays: Any, stage: str, **static: Any) -> Array:
    """One pair of token and expert after the other."""
    return (_gate_up_pairs if stage == "gate_up" else _down_pairs)(*arrays, **static)


def _products_of(planes: Sequence[Array], fmt: str, expert: Array, x: Array) -> Array:
    """Expert (…, n, K) times x (K): (n)."""
    matrix = _quantized(fmt, [p[jnp.maximum(expert, 0)] for p in planes])
    return jnp.matmul(matrix.dequantize(), x, precision=lax.Precision.HIGHEST)


def _gate_up_pairs(
    x: Array, ids: Array, weights: Array, gate: Planes, up: Planes, *, fmt: str, clamp: float,
    first: Array | None = None,
) -> Array:  # fmt: skip
    S, k = ids.shape
    x = jnp.repeat(_wide(x), k, axis=0)

    def pair(args: tuple[Array, Array, Array]) -> Array:
        x, expert, weight = args
        here = expert if first is None else expert + first[0]
        g, u = (_products_of(planes, fmt, here, x) for planes in (gate, up))
        return jnp.where(expert >= 0, swiglu(g, u, clamp) * weight, 0)

    return lax.map(pair, (x, ids.reshape(-1), weights.reshape(-1)))


def _down_pairs(
    act: Array, ids: Array, planes: Planes, plus: Array | None = None, *, fmt: str, first: Array | None = None,
    dtype: Any = jnp.float32,
) -> Array:  # fmt: skip
    experts = ids if first is None else jnp.where(ids < 0, ids, ids + first[0])
    pairs = lax.map(lambda pair: _products_of(planes, fmt, *pair), (experts.reshape(-1), _wide(act)))
    total = pairs.reshape(*ids.shape, -1).sum(1)
    return (total if plus is None else total + plus).astype(dtype)


def left_to_xla(x: Array, layer: Array, planes: Planes, *, kind: str, fmt: str, groups: int = 1) -> Array:
    """What `grouped_gemm` with a config that is not fused stands for: the op's product by XLA, in x's dtype."""
    assert kind == "linear"
    return decoded_whole(x, Weight(_quantized(fmt, planes), layer[0]), groups, x.dtype)


def _grouped_gemm(*args: Any, kind: str, fmt: str, clamp: float = 0, groups: int = 1) -> Array:
    """Every expert meets every token; pairs are in the kernel's order, sorted by expert."""
    if kind == "linear":
        x, layer, planes = args
        return products(_wide(x), [Product((Weight(_quantized(fmt, planes), layer[0]),))], groups=groups)[0]
    x, ids, *rest = args
    x, order = _wide(x), jnp.argsort(ids.reshape(-1), stable=True)
    numbers = jnp.arange(rest[-1][0].shape[0], dtype=jnp.int32)

    def dot(x: Array, planes: Planes, arrange: bool = False) -> Array:
        w = _quantized(fmt, planes).dequantize()
        w = grouped_kernel.arrange(w, fmt) if arrange else w
        return jnp.matmul(x, w.T, precision=lax.Precision.HIGHEST)

    if kind == "down":
        h = jnp.zeros_like(x).at[order].set(x).reshape(*ids.shape, -1)

        def add(total: Array, e: tuple[Array, Planes]) -> tuple[Array, None]:
            mine = jnp.where((ids == e[0])[..., None], h, 0).sum(1)
            return total + dot(mine, e[1], arrange=True), None

        return lax.scan(add, jnp.zeros((ids.shape[0], rest[0][0].shape[1]), jnp.float32), (numbers, rest[0]))[0]
    weight, *matrices = rest

    def put(y: Array, e: tuple[Array, Planes, Planes]) -> tuple[Array, None]:
        gate, up = (dot(x, planes) for planes in e[1:])
        return jnp.where((ids == e[0])[..., None], swiglu(gate, up, clamp)[:, None], y), None

    y = jnp.zeros((*ids.shape, matrices[0][0].shape[1]), jnp.float32)
    y = lax.scan(put, y, (numbers, *matrices))[0] * weight[..., None]
    return y.reshape(ids.size, -1)[order]
