"""Every op as the model calls it: its kernel, interpreted, against its formula; and a wrong kernel is noticed."""

import functools
import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax.formats import F16, MXFP4, Q8_0, Quantized
from ds4jax.implementation import OPS
from ds4jax.numerics.rows import Fp4Row, Fp8Row
from ds4jax.ops import attend, compress, experts, index, latent, linear, mhc, ring, rope, route, topk
from ds4jax.ops.norm import Norm
from ds4jax.ops.weight import Weight
from pallas_kernels import compressor, grouped_gemm, hyper, indexer, matmul, mla, queries, router
from pallas_kernels import experts as experts_kernel
from pallas_kernels import latent as latent_kernel
from pallas_kernels import topk as topk_kernel

# The smallest shapes that the kernels take.
E, N, D, ROPE, HEADS, WINDOW = 256, 4, 128, 64, 16, 8
INDEX_HEADS, INDEX_D, EXPERTS = 32, 64, 16
ROW, KEY = Fp8Row(D, ROPE), Fp4Row(INDEX_D)
FREQ = np.linspace(1, 0.01, ROPE // 2, dtype=np.float32)


class Random:
    """Parts of a pool of normal deviates; every call gives another one. Weights are stacks of two layers; of matrices
    the first is used, of others the second, as where a layer's types differ from another's."""

    def __init__(self, pool):
        self.pool, self.used = pool, 0

    def normal(self, *shape):
        start, self.used = self.used, self.used + math.prod(shape)
        assert self.used <= self.pool.size
        return self.pool[start : self.used].reshape(shape)

    def stack(self, *shape):
        """About 1."""
        return Weight(1 + self.normal(2, *shape) / 8, 1)

    def matrix(self, fmt, *shape):
        """Of products of about unit scale."""
        shape = (2, *shape)
        if fmt is F16:
            return Weight(F16((self.normal(*shape) * shape[-1] ** -0.5).astype(jnp.float16)), 0)
        self.used += 1
        return Weight(fmt.random(jax.random.key(self.used), shape, shape[-1] ** -0.5), 0)

    def norm(self, n):
        return Norm(self.stack(n), 1e-6)

    def rows(self, row, *shape):
        return row.encode(self.normal(*shape, row.dim))


def ints(*values):
    return jnp.array(values, jnp.int32)


def angles(position, T, ratio=4):
    at = position[:, None] + jnp.arange(T, dtype=jnp.int32)
    row = position[:, None] // ratio + jnp.arange(-(-T // ratio), dtype=jnp.int32)
    return rope.Angles(*rope.cos_sin(at, FREQ), *rope.cos_sin(row * ratio, FREQ))


# ---- the calls: (random, implementation) -> a tree of results --------------------------------------------------------
def boundary(r, implementation, S=3, head=False):
    m, scales = (N, 1) if head else (2 * N + N * N, 3)
    connection = mhc.Connection(r.matrix(F16, m, N * E), r.stack(m), r.stack(scales))
    output = mhc.Output(r.normal(S, E), 1 + jnp.tanh(r.normal(S, N)), jax.nn.softmax(r.normal(S, N, N)))
    streams = mhc.Streams(r.normal(S, N, E), output)
    return mhc.boundary(
        streams, connection, r.norm(E), eps=1e-6, iterations=20, implementation=implementation
    )._asdict()  # fmt: skip


def products(r, implementation, rows):
    """A product with a norm before, and SwiGLU: gates of about 2, so that the clamp is met."""
    x, gate, up = 2 * r.normal(rows, E), r.matrix(Q8_0, E, E), r.matrix(Q8_0, E, E)
    asked = [linear.product(r.matrix(Q8_0, 64, E)), linear.gated(gate, up, 1.0)]
    normed = linear.products(x, asked[:1], norm=r.norm(E), implementation=implementation)
    plain = linear.products(x, asked, implementation=implementation)
    return {"after a norm": normed[0], "product": plain[0], "SwiGLU": plain[1]}


def of_two_types(r, implementation, rows):
    """SwiGLU of a gate and an up of different types."""
    asked = [linear.gated(r.matrix(Q8_0, E, E), r.matrix(F16, E, E), 1.0), linear.product(r.matrix(Q8_0, 64, E))]
    return linear.products(2 * r.normal(rows, E), asked, implementation=implementation)


def grouped(r, implementation, rows, n):
    asked = [linear.product(r.matrix(Q8_0, n, E))]
    return linear.products(r.normal(rows, 2, E), asked, groups=2, implementation=implementation)[0]


def finish_latent(r, implementation, T=1):
    """Three sequences, of which one rests; another's ring begins anew."""
    position, n = ints(5, WINDOW + ring.SPARE - 1, 2 * WINDOW - 1), ints(T, max(T - 1, 1), 0)
    window = r.rows(ROW, 2, 3, WINDOW + ring.SPARE)
    made = latent.latent(
        2 * r.normal(3 * T, HEADS * D), 3 * r.normal(3 * T, D), r.norm(D), angles(position, T), position, n,
        window, 1, row=ROW, dtype=attend.query_dtype("pallas", jnp.float32), implementation=implementation,
    )  # fmt: skip
    for plane, before in window.items():
        same = [made.window[plane][0] == before[0], made.window[plane][1, 2] == before[1, 2]]
        made.window[f"kept {plane}"] = jnp.stack([x.all() for x in same])
    return {"queries": made.queries, **made.window}


def index_queries(r, implementation, T):
    return index.queries(
        r.normal(2 * T, INDEX_HEADS * INDEX_D), angles(ints(40, 9), T), key=KEY, numerics="official",
        implementation=implementation,
    ).astype(jnp.float32)  # fmt: skip


def take_in(r, implementation, ratio, T=1):
    """Sequences whose window closes, stays open, is about to close but rests, and has just begun."""
    overlap, B = ratio == 4, 4
    length, n = ints(2 * ratio - 1, ratio + 1, ratio - 1, 0), ints(T, max(T - 1, 1), 0, T)
    fed, states = [], []
    for row, is_index in ((ROW, False), (KEY, True))[: 1 + overlap]:
        width = row.dim * (1 + overlap)
        fed.append(
            compress.Compressor(r.normal(B * T, width), r.normal(B * T, width), r.matrix(F16, ratio, width),
                                r.norm(row.dim), row, is_index)
        )  # fmt: skip
        rings = [r.normal(2, B, compress.slots(ratio), width) for _ in range(2)]
        states.append(compress.Compressed(r.rows(row, 2, B, 3), *rings))
    moved = compress.compress(
        fed, states, length, n, angles(length, T, ratio), 1, ratio=ratio, numerics="official",
        implementation=implementation,
    )  # fmt: skip
    out = {}
    for name, s, old in zip(("rows", "keys"), moved, states, strict=False):
        kept = [(x[:, 2] == y[:, 2]).all() for x, y in zip(*map(jax.tree.leaves, (s.rows, old.rows)), strict=True)]
        out[name] = {
            **s.rows,
            "kept": jnp.stack([*kept, (s.z[:, 2] == old.z[:, 2]).all()]),
            "rings": [s.z, s.g],
        }
    return out


def scores(r, implementation, T):
    position = ints(40, 9)[:, None] + jnp.arange(T, dtype=jnp.int32)
    q = KEY.decode(r.rows(KEY, 2, T, INDEX_HEADS), jnp.float32 if implementation == "xla" else jnp.bfloat16)
    found = index.scores(
        q, r.normal(2, T, INDEX_HEADS), r.rows(KEY, 2, 2, 12), 1, position, key=KEY, ratio=4,
        implementation=implementation,
    )  # fmt: skip
    # The kernel leaves out a factor, which no choice depends on.
    found = found if implementation == "xla" else found / (INDEX_HEADS * INDEX_D) ** 0.5
    return jnp.where(jnp.arange(12) < index.seen(position, 4)[..., None], found, -jnp.inf)


def choice(r, implementation):
    score = jnp.round(4 * r.normal(2, 3, 40))  # many are equal
    return jnp.sort(topk.highest(score, jnp.array([[30, 31, 40], [9, 8, 7]], jnp.int32), 8, implementation), axis=-1)


def attention(r, implementation, T=1, ratio=4, chosen=True, causal=True):
    position = ints(60, 3)
    near = r.rows(ROW, 2, 2, WINDOW + ring.SPARE) if T <= ring.SPARE else r.rows(ROW, 2, WINDOW + T)
    rows = r.rows(ROW, 2, 2, 20) if ratio else None
    picked = jnp.argsort(r.normal(2, T, 20), axis=-1)[..., :8].astype(jnp.int32) if chosen else None
    q = r.normal(2, T, HEADS, D).astype(jnp.float16).astype(attend.query_dtype(implementation, jnp.float32))
    return attend.attend(
        q, near, rows, picked, position, r.stack(HEADS), angles(position, T), layer=1, nth=1, ratio=ratio, row=ROW,
        dtype=jnp.float32, causal=causal, implementation=implementation,
    )  # fmt: skip


def routing(r, implementation, by_token):
    S, k, vocab = 5, 3, 7
    bias = Weight(r.normal(2, EXPERTS), 1)
    table = Weight(jnp.argsort(r.normal(2, vocab, EXPERTS), axis=-1)[..., :k].astype(jnp.int32), 1)
    tokens = jnp.arange(S, dtype=jnp.int32) + 1 if by_token else None
    found = route.route(
        r.normal(S, EXPERTS), table if by_token else bias, tokens, ints(1, 1, 0, 1, 1), k=k, norm=True, scale=1.5,
        implementation=implementation,
    )  # fmt: skip
    return {"ids": found.ids, "weight": found.weight[ints(0, 1, 3, 4)]}


def through_experts(r, implementation, S, up: type[Quantized] = Q8_0, up_nth=0):
    """One row is no token. Activations of about 2, so that the clamp is met. up, up_nth: type and layer of up."""
    w = experts.Experts(*(r.matrix(fmt, EXPERTS, E, E) for fmt in (Q8_0, up, Q8_0)))
    w = w._replace(up=w.up._replace(nth=up_nth))
    h, plus, k = 2 * r.normal(S, E).astype(jnp.bfloat16).astype(jnp.float32), r.normal(S, E) / 8, 3
    logits, bias, real = (
        r.normal(S, EXPERTS),
        Weight(jnp.zeros((1, EXPERTS)), 0),
        (jnp.arange(S) != 1).astype(jnp.int32),
    )
    fmt = experts.packs(S, w, implementation)
    apart = up is not Q8_0 or up_nth > 0
    assert (fmt is None) == (S > 32 or implementation == "xla" or apart)
    ids, weight, packed = route.route(
        logits, bias, None, real, k=k, norm=True, scale=1.5, pack=None if fmt is None else (h, fmt),
        implementation="xla" if fmt is None else implementation,
    )  # fmt: skip
    return experts.experts(h, ids, weight, w, plus, clamp=1.0, packed=packed, implementation=implementation)


# ---- how far apart the two may be ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    """A call. bound: of ‖found - expected‖ / ‖expected‖ of floats, by the name of the result if they differ.

    Integers, booleans and stored codes must be equal.
    """

    op: str
    call: Callable[[Random, str], Any]
    bound: Any


# Sums of at most 1024 float32 products in another order.
ORDER = 2e-6
# Queries are rounded to float16: one in 2¹³ of them to the other neighbour, 2⁻¹¹ away.
HALF = 5e-5
# Of attention the weights and the result are rounded to float16, each by at most 2⁻¹² of the value.
ATTENTION = 2 * 2.0**-12
# Activations in 16-bit fixed point are 2e-5 of the norm off, gate times up a little more.
FIXED = 1e-4
# x and weights are rounded to bfloat16, 0.12 % each on average; SwiGLU multiplies two such products.
BFLOAT16, GATED = 3e-3, 6e-3
# The same three times: gate and up, h, and the sums.
THREE = 6e-3

CASES = {
    "mhc": Case("mhc", boundary, ORDER),
    "mhc, many tokens": Case("mhc", functools.partial(boundary, S=70), ORDER),
    "mhc, head": Case("mhc", functools.partial(boundary, head=True), ORDER),
    "linear": Case("linear", functools.partial(products, rows=3), ORDER),
    "linear, many rows": Case(
        "linear", functools.partial(products, rows=100), {"SwiGLU": GATED, None: BFLOAT16}
    ),
    "linear, two types": Case("linear", functools.partial(of_two_types, rows=3), ORDER),
    "linear, groups": Case("linear", functools.partial(grouped, rows=3, n=64), ORDER),
    # No multiple of a tile: such a product of many rows is XLA's.
    "linear, left to XLA": Case("linear", functools.partial(grouped, rows=100, n=96), ORDER),
    "latent": Case("latent", finish_latent, {"queries": HALF, "rope": HALF, None: 0}),
    "latent, 4 tokens": Case("latent", functools.partial(finish_latent, T=4), {"queries": HALF, "rope": HALF, None: 0}),
    "latent, 9 tokens": Case("latent", functools.partial(finish_latent, T=9), {"queries": HALF, None: 0}),
    "compress, csa": Case("compress", functools.partial(take_in, ratio=4), {"rope": HALF, None: 0}),
    "compress, hca": Case("compress", functools.partial(take_in, ratio=128), {"rope": HALF, None: 0}),
    "compress, csa, 6 tokens": Case("compress", functools.partial(take_in, ratio=4, T=6), {"rope": HALF, None: 0}),
    "compress, hca, 3 tokens": Case("compress", functools.partial(take_in, ratio=128, T=3), {"rope": HALF, None: 0}),
    "index, the queries": Case("index", functools.partial(index_queries, T=3), 0),
    "index": Case("index", functools.partial(scores, T=1), ORDER),
    "index, 4 queries": Case("index", functools.partial(scores, T=4), ORDER),
    "topk": Case("topk", choice, 0),
    "attend": Case("attend", attention, ATTENTION),
    "attend, all rows": Case("attend", functools.partial(attention, ratio=8, chosen=False), ATTENTION),
    "attend, window": Case("attend", functools.partial(attention, ratio=0, chosen=False), ATTENTION),
    "attend, 4 queries": Case("attend", functools.partial(attention, T=4), ATTENTION),
    "attend, 9 queries": Case("attend", functools.partial(attention, T=9), ATTENTION),
    "attend, not causal": Case(
        "attend", functools.partial(attention, T=5, ratio=0, chosen=False, causal=False), ATTENTION
    ),
    "route": Case("route", functools.partial(routing, by_token=False), ORDER),
    "route, by token": Case("route", functools.partial(routing, by_token=True), ORDER),
    "experts": Case("experts", functools.partial(through_experts, S=3), FIXED),
    "experts, one token": Case("experts", functools.partial(through_experts, S=1), FIXED),
    "experts, many tokens": Case("experts", functools.partial(through_experts, S=40), THREE),
    "experts, two types": Case("experts", functools.partial(through_experts, S=1, up=MXFP4), FIXED),
    "experts, two layers of stacks": Case("experts", functools.partial(through_experts, S=12, up_nth=1), FIXED),
    "experts, many tokens, two types": Case("experts", functools.partial(through_experts, S=40, up=MXFP4), THREE),
}  # fmt: skip


def run(name, implementation):
    """Compiled as a whole in XLA; op by op with a kernel, which is then compiled once for all that call it."""
    call = CASES[name].call
    pool = jnp.asarray(np.random.default_rng(sum(name.encode())).standard_normal(2**19, np.float32))
    compiled = jax.jit if implementation == "xla" else lambda f: f
    return jax.device_get(compiled(lambda pool: call(Random(pool), implementation))(pool))


@functools.cache
def expected(name):
    return run(name, "xla")


def differing(name):
    """The results of the kernel that are not within bounds of the formula's, with their errors."""
    (found, tree), (right, same) = map(
        jax.tree_util.tree_flatten_with_path, (run(name, "pallas_interpret"), expected(name))
    )
    assert tree == same
    out, bound = {}, CASES[name].bound
    for (path, f), (_, e) in zip(found, right, strict=True):
        assert f.shape == e.shape and f.dtype == e.dtype
        which = [key.key for key in path if hasattr(key, "key")]
        limit = bound.get(which[-1] if which else None, bound[None]) if isinstance(bound, dict) else bound
        if f.dtype.name in ("float32", "float16", "bfloat16"):
            error = norm_error(np.float64(f), np.float64(e))
        else:
            error = float((f.view(np.uint8) != e.view(np.uint8)).mean()) if f.size else 0
            limit = 0
        if not error <= limit:
            out[jax.tree_util.keystr(path)] = error
    return out


def norm_error(found, right):
    seen = np.isfinite(right)
    if not np.array_equal(found[~seen], right[~seen]):
        return np.inf
    return np.linalg.norm(found[seen] - right[seen]) / max(np.linalg.norm(right[seen]), 1e-30)


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_computes_the_formula(name):
    assert differing(name) == {}


# ---- wrong kernels ---------------------------------------------------------------------------------------------------
def with_argument(change):
    """A kernel that takes some of its arguments for others."""
    return lambda right: lambda *args, **options: right(*change(*args), **options)


def without_output(X, mixed, *rest):
    return X, (0 * mixed[0], *mixed[1:]), *rest


def without_sums_of_streams(X, mixed, *rest):
    return X, (*mixed[:2], jnp.broadcast_to(jnp.eye(N), mixed[2].shape)), *rest


def once(right):
    return lambda *args, numbers, **options: right(
        *args, numbers=hyper.Numbers(numbers.norm_eps, numbers.hc_eps, 1), **options
    )


def without_scale(x, layer, weights, *rest):
    return x, layer, [[(jnp.full_like(d, 2**-9), q) for d, q in planes] for planes in weights], *rest


def without_scale_many(x, layer, planes):
    return x, layer, (jnp.full_like(planes[0], 2**-9), planes[1])


def without_norm_weight(x, layer, weights, norm):
    return x, layer, weights, None if norm is None else jnp.ones_like(norm)


def row_without_rope(right):
    def op(q, kv, norm, cos, sin, *rest, **options):
        queries, _ = right(q, kv, norm, cos, sin, *rest, **options)
        _, window = right(q, kv, norm, jnp.ones_like(cos), jnp.zeros_like(sin), *rest, **options)
        return queries, window

    return op


def without_ape(new, weights, *rest):
    return new, [(0 * ape, norm) for ape, norm in weights], *rest


def without_sink(q, near, rows, chosen, position, layers, sinks, *rest):
    return q, near, rows, chosen, position, layers, sinks - jnp.inf, *rest


def without_turning_back(*args):
    *rest, cos, sin = args
    return *rest, jnp.ones_like(cos), jnp.zeros_like(sin)


def without_bias(logits, table, *rest):
    return logits, 0 * table, *rest


def without_relu(module):
    return types.SimpleNamespace(**vars(jnp) | {"maximum": lambda a, b: a})


def without_clamp(right):
    return lambda *args, **options: right(*args, **options | {"clamp": 1e9})


def without_clamp_of_outputs(values, out):
    return (values[0] / (1 + jnp.exp(-values[0])) * values[1] if len(values) > 1 else values[0]).astype(out.dtype)


def without_plus(act, ids, planes, plus):
    return act, ids, planes, 0 * plus


WRONG = {
    "mhc without post · y": ("mhc", hyper, "op", with_argument(without_output)),
    "mhc without comb": ("mhc", hyper, "op", with_argument(without_sums_of_streams)),
    "mhc with one Sinkhorn iteration": (
        "mhc", hyper, "op",
        once,
    ),
    "linear without the weights' scales": ("linear", matmul, "matmul", with_argument(without_scale)),
    "linear without the norm's weight": ("linear", matmul, "matmul", with_argument(without_norm_weight)),
    "linear without the clamp": ("linear", matmul, "_finish", lambda right: without_clamp_of_outputs),
    "linear of many rows without scales": (
        "linear, many rows", grouped_gemm, "linear", with_argument(without_scale_many),
    ),
    "latent without RoPE on the row": ("latent", latent_kernel, "op", row_without_rope),
    "latent without the norm of the row": ("latent", latent_kernel, "rms_norm", lambda right: lambda x, eps: x),
    "latent without the norm of queries": (
        "latent", latent_kernel, "attention_heads", lambda right: lambda x, turn, eps: right(x, turn, 1.0),
    ),
    "latent of 9 tokens without the norm": ("latent, 9 tokens", queries, "rms_norm", lambda right: lambda x, eps: x),
    "index without the Hadamard matrix": (
        "index, the queries", queries, "hadamard_in_kernel", lambda right: lambda x: x,
    ),
    "compress without ape, csa": ("compress, csa", compressor, "op", with_argument(without_ape)),
    "compress without ape, hca": ("compress, hca", compressor, "op", with_argument(without_ape)),
    "compress without Hadamard": ("compress, csa", compressor, "hadamard_in_kernel", lambda right: lambda x: x),
    "index without relu": ("index", indexer, "jnp", without_relu),
    "topk of the lowest": ("topk", topk_kernel, "op", with_argument(lambda score, *rest: (-score, *rest))),
    "attend without the sink": ("attend", mla, "op", with_argument(without_sink)),
    "attend without the inverse RoPE": ("attend", mla, "op", with_argument(without_turning_back)),
    "route without the bias": ("route", router, "op", with_argument(without_bias)),
    "experts without the clamp": ("experts, one token", experts_kernel, "gate_up", without_clamp),
    "experts without what is added": ("experts, one token", experts_kernel, "down", with_argument(without_plus)),
    "experts of many tokens without the clamp": ("experts, many tokens", grouped_gemm, "experts", without_clamp),
}  # fmt: skip


def forget(module):
    """Have the module's kernels built anew, since each is built once for a shape."""
    for f in vars(module).values():
        if hasattr(f, "cache_clear"):
            f.cache_clear()


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_kernel_is_noticed(wrong, monkeypatch):
    name, module, attribute, change = WRONG[wrong]
    is_body = attribute not in ("op", "matmul", "linear", "experts", "gate_up", "down")
    with monkeypatch.context() as patch:
        patch.setattr(module, attribute, change(getattr(module, attribute)))
        if is_body:
            forget(module)
        found = differing(name)
    if is_body:
        forget(module)
    assert found


def test_every_op_is_compared_and_would_be_noticed():
    assert {case.op for case in CASES.values()} == {CASES[name].op for name, *_ in WRONG.values()} == set(OPS)
