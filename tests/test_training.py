"""Training's forward pass gives the engine's own logits, and its gradients are those of what it computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax import training
from ds4jax.formats import IQ2_XXS, Q2_K
from ds4jax.formats.quantize import quantize
from ds4jax.io import synthetic
from ds4jax.model import cache as kv
from ds4jax.model import mtp, transformer, weights
from ds4jax.model.compute import Compute
from ds4jax.numerics import rows as num

CFG = dataclasses.replace(
    synthetic.synthetic_config("odd"), n_layers=3, compress_ratios=(0, 4, 128), swiglu_clamp=(1.0, 1.5, 2.0),
    embed_dim=32, vocab_size=64, n_heads=3, head_dim=48, q_lora_rank=32, index_heads=2, index_top_k=64, n_experts=4,
    n_experts_used=2, expert_dim=32, rope_dim=16, index_head_dim=16, sinkhorn_iters=3, n_mtp=1,
)  # fmt: skip


def batch(length, batch=2):
    """Token ids (batch, length + 1), and a mask."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CFG.vocab_size, (batch, length + 1)).astype(np.int32)
    return jnp.asarray(tokens), jnp.asarray(rng.random(tokens.shape) < 0.7)


@pytest.fixture(scope="module")
def model():
    return weights.init_random(weights.abstract(CFG, synthetic.RECIPES["f32"]), CFG, seed=3)


def differentiable(w):
    """Weights → what has a gradient, and the rest."""
    return w.replace(hash=None, route=None), (w.hash, w.route)


def whole(params, rest):
    return params.replace(hash=rest[0], route=rest[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("row", [num.kv_row, num.index_row])
def test_rows_hold_what_official_decodes(row, dtype):
    scale = jnp.exp2(jnp.linspace(-20, 6, 500)).astype(dtype)[:, None]
    x = jax.random.normal(jax.random.key(0), (500, row(CFG, "plain", dtype).dim), dtype) * scale
    official, ours = row(CFG, "official", dtype), row(CFG, "straight_through", dtype)
    expected = official.decode(official.encode(x), dtype)
    np.testing.assert_array_equal(ours.encode(x)["x"], expected)
    assert not np.array_equal(x, expected)


@pytest.mark.slow
def test_logits_are_those_of_the_official_numerics(model):
    """In float64, where no value falls between two codes by another order of sums."""
    tokens, _ = batch(256)
    with jax.enable_x64(True):
        inputs, following = tokens[:, :-1], tokens[:, 1:]
        n = jnp.full((2,), 256, jnp.int32)
        official = Compute("official", "float64")

        @jax.jit
        def expected():
            cache = kv.zeros(CFG, "official", "float64", 2, 256)
            X, after = transformer.forward(model, cache, inputs, n, CFG, official)
            drafted, _, _ = mtp.draft(model, after, X, following, cache.length, n, CFG, official)
            return transformer.logits(model, X, CFG), drafted

        compute = Compute("straight_through", "float64", query_blocks=2)
        found = jax.jit(lambda: training.forward(model, tokens, CFG, compute)[:2])()
        for a, b in zip(found, expected(), strict=True):
            assert np.abs(a - b).max() < 1e-10 * np.abs(b).max()


@pytest.fixture(scope="module")
def gradients(model):
    """[{family: gradient}] of the whole loss, and of the main loss alone."""
    tokens, mask = batch(128)
    params, rest = differentiable(model)

    @jax.jit
    def both(params):
        def losses(params):
            total, parts = training.loss(whole(params, rest), tokens, mask, CFG, Compute("straight_through"))
            return total, parts["main"]

        _, transpose = jax.vjp(losses, params)
        return [transpose((jnp.float32(total), jnp.float32(1 - total)))[0] for total in (1, 0)]

    return [by_family(g) for g in both(params)]


def by_family(gradient):
    specs = jax.tree.leaves(differentiable(weights.abstract(CFG, synthetic.RECIPES["f32"]))[0])
    return {s.tensors[0].family: g for s, g in zip(specs, jax.tree.leaves(gradient), strict=True)}


@pytest.mark.slow
def test_every_weight_has_a_gradient(gradients):
    for family, gradient in gradients[0].items():
        per_layer = np.abs(np.asarray(gradient)).reshape(len(gradient), -1).max(1)
        assert np.isfinite(gradient).all() and (per_layer > 0).any(), family
        if gradient.ndim > 1 and not family.startswith(("embed", "mtp", "head")):
            assert (per_layer > 0).all(), f"{family}: no gradient in layer {np.argmin(per_layer)} of its kind"


@pytest.mark.slow
def test_the_main_loss_reaches_all_but_the_indexer_and_the_head(gradients):
    for family, gradient in gradients[1].items():
        assert bool(np.any(gradient)) == (not family.startswith(("csa.indexer.", "mtp."))), family


@pytest.mark.slow
def test_gradient_is_the_slope(model):
    """The main loss, without round trips: along random directions, against differences."""
    tokens, mask = batch(32)
    with jax.enable_x64(True):
        params, rest = differentiable(jax.tree.map(jnp.asarray, model))
        params = jax.tree.map(lambda x: x.astype(jnp.float64), params)

        @jax.jit
        def main(params):
            return training.loss(whole(params, rest), tokens, mask, CFG, Compute("plain", "float64"))[1]["main"]

        slope, key, step = jax.jit(jax.grad(main))(params), jax.random.key(0), 1e-6
        leaves, treedef = jax.tree.flatten(params)
        for i in range(4):
            keys = jax.random.split(jax.random.fold_in(key, i), len(leaves))
            noise = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
            along = jax.tree.unflatten(treedef, noise)
            ahead, behind = (main(jax.tree.map(lambda x, d, s=s: x + s * d, params, along)) for s in (step, -step))
            expected = sum(jax.tree.leaves(jax.tree.map(lambda g, d: jnp.sum(g * d), slope, along)))
            np.testing.assert_allclose((ahead - behind) / (2 * step), expected, rtol=1e-6)


def test_the_indexers_loss_trains_the_indexer_alone(model):
    """And brings it down: it is a divergence, 0 for the right ranking only."""
    h = jax.random.normal(jax.random.key(1), (1, 64, CFG.embed_dim), jnp.float32)
    params, rest = differentiable(model)

    @jax.jit
    def step(params):
        return jax.value_and_grad(lambda p: training.index_loss(h, whole(p, rest), 1, CFG, Compute("plain")))(params)

    first, slope = step(params)
    for family, gradient in by_family(slope).items():
        assert bool(np.any(gradient)) == family.startswith("csa.indexer."), family
    for _ in range(60):
        params = jax.tree.map(lambda x, g: x - 0.3 * g, params, slope)
        last, slope = step(params)
    assert 0 < last < 0.5 * first


def test_balance_moves_biases_against_the_load(model):
    loads = jnp.array([[0.9, 0.5, 0.5, 0.1]] * 3, jnp.float32)
    moved = training.balance(model, loads).route.bias.groups[0] - model.route.bias.groups[0]
    np.testing.assert_allclose(moved, [[-1e-3, 0, 0, 1e-3]] * 3, atol=1e-8)


@pytest.mark.slow
def test_init_starts_near_a_plain_residual():
    tid2eid = np.tile(np.array([[0, 1]], np.int32), (CFG.vocab_size, 1))
    w = training.init(CFG, 0, tid2eid)
    assert jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), w) == weights.structs(
        weights.abstract(CFG, synthetic.RECIPES["f32"])
    )
    tokens, mask = batch(32)
    _, parts = jax.jit(lambda: training.loss(w, tokens, mask, CFG, Compute("straight_through")))()
    assert parts["loads"].shape == (3, CFG.n_experts)
    np.testing.assert_allclose(parts["loads"].sum(-1), CFG.n_experts_used, rtol=1e-5)
    assert abs(parts["main"] - np.log(CFG.vocab_size)) < 1.5  # knows nothing, and is not sure of it


@pytest.mark.slow
def test_experts_as_they_will_be_stored():
    cfg = dataclasses.replace(CFG, embed_dim=256, expert_dim=256)
    w = weights.init_random(weights.abstract(cfg, synthetic.RECIPES["f32"]), cfg, seed=3)
    experts, rng = w.ffn.experts, np.random.default_rng(0)
    importance = jax.tree.map(lambda m: jnp.asarray(rng.random(m.groups[0].values.shape[:-2] + (256,), np.float32)),
                              experts, is_leaf=lambda x: isinstance(x, weights.Stack))  # fmt: skip
    formats = weights.SwiGLU(gate=IQ2_XXS, up=IQ2_XXS, down=Q2_K)

    def values(experts, name):
        return getattr(experts, name).groups[0].values

    names = "gate", "up", "down"
    slopes = {name: jax.random.normal(jax.random.key(0), values(experts, name).shape) for name in names}

    def stored(params):
        found = training.as_stored(params, formats, importance).ffn.experts
        return sum(jnp.sum(values(found, name) * slopes[name]) for name in names), found

    gradient, found = jax.jit(jax.grad(stored, has_aux=True))(dataclasses.replace(w, hash=None))
    for name in names:
        expected = quantize(values(experts, name), getattr(formats, name), getattr(importance, name)).dequantize()
        np.testing.assert_allclose(values(found, name), expected, atol=1e-6)  # x + (Q(x) − x) is rounded
        np.testing.assert_array_equal(values(gradient.ffn.experts, name), slopes[name])
