"""The results for a token are the same bits whether it comes alone or with others of its sequence, in most kernels.

They are not where the sums are taken in another order: in attention, which splits the rows of a query over fewer
programs if there are more queries; in products of more than 2 rows, which have another method; in experts, where a
program takes more rows of a matrix for more than one token.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax.formats import F16, Q8_0
from pallas_kernels import compressor, hyper, indexer, latent, matmul, mla, queries, router, topk
from pallas_kernels.compressor import Part
from pallas_kernels.matmul import Output

T = 2
KEY = jax.random.key(0)


def rows(op, inputs, by_row, **static):
    """Calls of `op` on all rows at once, and on one after the other. by_row: the arguments that have them."""
    run = functools.partial(op, interpret=True, **static)
    some = [
        run(*(jax.tree.map(lambda x, t=t: x[t : t + 1], x) if i in by_row else x for i, x in enumerate(inputs)))
        for t in range(T)
    ]  # fmt: skip
    return run(*inputs), jax.tree.map(lambda *x: jnp.concatenate(x), *some)


def in_window():
    shape = latent.Shape(1, T, heads=2, dim=128, window=12)
    q, kv, norm, cos, sin, position, n, layers, window = shape.inputs(KEY)
    run, made, moved = functools.partial(latent.op, interpret=True), [], window
    for t in range(T):
        at = slice(t, t + 1)
        one, moved = run(q[at], kv[at], norm, cos[:, at], sin[:, at], position + t, n // T, layers, moved)
        made.append(one)
    return run(q, kv, norm, cos, sin, position, n, layers, window), (jnp.concatenate(made, axis=1), moved)


def in_compressors(parts, slot):
    new, weights, states, position, n, *rest = compressor.Shape(1, parts, slot, T).inputs(KEY)
    run, moved = functools.partial(compressor.op, eps=1e-6, interpret=True), states
    for t in range(T):
        one = [tuple(x[t : t + 1] for x in of_part) for of_part in new]
        moved = run(one, weights, moved, position + t, n // T, *rest)
    return run(new, weights, states, position, n, *rest), moved


def attended(ratio, chosen):
    """With the rows split alike."""
    shape = mla.Shape(1, T, 150, ratio, chosen, heads=16, dim=128, window=32)
    q, window, rows, indices, position, layers, sinks, cos, sin = shape.inputs(KEY)
    run = functools.partial(mla.op, interpret=True, config=mla.Config(16, 16, 3, 1), **shape.static)
    some = []
    for t in range(T):
        at = slice(t, t + 1)
        picked = None if indices is None else indices[:, at]
        some.append(run(q[:, at], window, rows, picked, position + t, layers, sinks, cos[:, at], sin[:, at]))
    return run(q, window, rows, indices, position, layers, sinks, cos, sin), jnp.concatenate(some, axis=1)


def scores():
    q, weight, codes, exponents, position, layer = indexer.Shape(1, 4, 64, 252, heads=32, dim=32).inputs(KEY)
    run = functools.partial(indexer.op, interpret=True)
    each = [slice(t, t + 1) for t in range(4)]
    some = [run(q[:, t], weight[:, t], codes, exponents, position[:, t], layer) for t in each]
    seen = jnp.arange(64) < (position[..., None] + 1) // 4
    return [
        jnp.where(seen, x, 0) for x in (run(q, weight, codes, exponents, position, layer), jnp.concatenate(some, 1))
    ]


def products(*outputs, **shape):
    shape = matmul.Shape(T, 512, outputs, norm_eps=1e-6, norm_weight=True, **shape)
    return rows(matmul.matmul, shape.inputs(KEY), [0], **shape.static)


CASES = {
    "hyper": lambda: rows(hyper.op, hyper.Shape(T, dim=64).inputs(KEY), [0, 1]),
    "matmul": lambda: products(Output(32, Q8_0.__name__), Output(48, F16.__name__, "float32")),
    "matmul, SwiGLU": lambda: products(Output(64, Q8_0.__name__, clamp=10.0)),
    "latent": in_window,
    "queries": lambda: rows(
        queries.op, queries.Shape("index", T, 4, 64).inputs(KEY), [0, 1, 2], kind="index", dim=64
    ),
    "compressor, csa": lambda: in_compressors((Part(128, 4, True), Part(64, 4, True, fp4=True)), 2),
    "compressor, hca": lambda: in_compressors((Part(256, 128, False),), 126),
    "indexer": scores,
    "topk": lambda: rows(topk.op, topk.Shape(T, 300, 250).inputs(KEY), [0, 1], k=32),
    "mla, chosen": lambda: attended(4, 32),
    "mla, window": lambda: attended(0, None),
    "router": lambda: rows(
        lambda *args, **options: router.op(*args, k=4, norm=True, scale=1.5, **options)[:2],
        router.Shape(T, experts=16, k=4).inputs(KEY)[:4], [0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_alone_as_with_others(name):
    together, alone = map(jax.tree.leaves, CASES[name]())
    assert len(together) == len(alone) > 0
    for x, y in zip(together, alone, strict=True):
        x, y = np.asarray(x), np.asarray(y)
        np.testing.assert_array_equal(x.view(f"u{x.itemsize}"), y.view(f"u{y.itemsize}"))
