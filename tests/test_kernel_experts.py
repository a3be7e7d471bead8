"""Routed experts: the kernels against XLA, and XLA against the model's own experts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from candidates import each_value
from unit_formats import UNITS, mostly_slow

from ds4jax import formats
from ds4jax.formats.iq import NIBBLES, SIGNS, spread
from ds4jax.ops import experts as experts_op
from ds4jax.ops.check import formula
from ds4jax.ops.check import packed as packed_in_xla
from ds4jax.ops.weight import single
from pallas_kernels import common, experts
from pallas_kernels import formats as known
from pallas_kernels.common import Unsupported
from pallas_kernels.experts import SHAPES, Config, Shape

FORMATS = known.names("experts")

# Fixed-point activations are 2e-5 of the norm off, gate times up a little more; sums are float32 or exact.
TOLERANCE = 1e-4
SMALL = Config(num_warps=2, rows=1)
DEVICES = ["NVIDIA H200", "NVIDIA RTX PRO 6000 Blackwell", "NVIDIA GB10"]


def error(found, expected):
    assert found.shape == expected.shape and found.dtype == expected.dtype == jnp.float32
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


def small(stage, fmt, tokens=1, k=256, n=32):
    return Shape(stage, fmt, tokens, k, n, experts=3, used=2)


def check(shape, config, inputs=None):
    inputs = inputs or shape.inputs(jax.random.key(0))
    expected = formula("experts")(*inputs, **shape.static)
    assert 0.01 < float(jnp.abs(expected).mean()) < 10
    found = experts.experts(*inputs, **shape.static, config=config, interpret=True)
    assert error(found, expected) < TOLERANCE
    return found


# ---- meaning ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fmt", mostly_slow(FORMATS, "IQ2_S"))
def test_gate_up(fmt):
    check(small("gate_up", fmt), SMALL)


@pytest.mark.parametrize("fmt", mostly_slow(FORMATS, "Q5_K"))
def test_down(fmt):
    """Units of 32 threads and more, so that a row takes several steps where the format has them."""
    check(small("down", fmt, k=256 if fmt in ("IQ2_XXS", "IQ2_3B") else 1024), SMALL)


@pytest.mark.parametrize("fmt", mostly_slow(FORMATS))
def test_a_format_takes_every_scale_and_code(fmt):
    """Random bytes instead of weights with equal scales; only float16 and exponent planes keep to a sensible range."""
    shape = small("down", fmt)
    act, ids, planes = shape.inputs(jax.random.key(0))
    rng = np.random.default_rng(0)

    def noise(plane):
        if plane.dtype == jnp.float16:
            return jnp.asarray(rng.uniform(0.1, 1, plane.shape), jnp.float16) * plane[:1]
        if plane.dtype == jnp.uint8:
            return jnp.asarray(rng.integers(120, 130, plane.shape), jnp.uint8)
        return jnp.asarray(np.frombuffer(rng.bytes(plane.nbytes), plane.dtype).reshape(plane.shape))

    planes = tuple(map(noise, planes))
    expected = formula("experts")(act, ids, planes, **shape.static)
    found = experts.experts(act, ids, planes, **shape.static, config=SMALL, interpret=True)
    assert error(found, expected) < TOLERANCE


def test_spread_signs():
    sets = jnp.arange(128, dtype=jnp.uint32)
    bits = np.asarray(SIGNS)[:, None] >> NIBBLES & 1
    np.testing.assert_array_equal(spread(sets)[:, None] >> np.arange(2, 32, 4, dtype=np.uint32) & 1, bits)


def test_a_wide_format_multiplies_bit_for_bit_as_the_stored_one():
    """The random weights are the same, and so are the sums of integers."""
    found, expected = (check(small("gate_up", fmt, k=1024), SMALL) for fmt in ("IQ2_3B", "IQ2_XXS"))
    np.testing.assert_array_equal(found, expected)


def test_tokens_of_one_expert_are_served_together():
    """All five choose expert 1, so that groups of two come out full, full and half; one pair is held elsewhere."""
    shape = small("gate_up", "Q8_0", tokens=5)
    x, _, *rest = shape.inputs(jax.random.key(0))
    ids = jnp.asarray([[0, 1], [1, 2], [1, 0], [2, 1], [-1, 1]], jnp.int32)
    together = check(shape, dataclasses.replace(SMALL, tokens=2), (x, ids, *rest))
    np.testing.assert_array_equal(together, check(shape, SMALL, (x, ids, *rest)))
    assert not together[8].any() and together[9].all()


def test_groups():
    rank, following = experts._groups(jnp.asarray([[3, 1], [1, 3], [2, 1]], jnp.int32))
    assert rank.tolist() == [0, 0, 1, 1, 0, 2]
    assert following.tolist() == [3, 2, 5, 6, 6, 6]


@pytest.mark.slow
def test_both_stages_are_the_models_experts():
    """Several tokens, in the types of the published file, some of their experts on another device; ids from 1 on."""
    S, E, F, held = 2, 256, 256, 3
    keys = jax.random.split(jax.random.key(0), 5)
    types = formats.IQ2_XXS, formats.IQ2_XXS, formats.Q2_K
    shapes = (held, F, E), (held, F, E), (held, E, F)
    w = experts_op.Experts(
        *(single(t.random(key, s, s[-1] ** -0.5)) for t, s, key in zip(types, shapes, keys, strict=False))
    )
    x = jax.random.normal(keys[3], (S, E)) * 4  # so that the clamp is met
    ids = jnp.asarray([[1, 0, 2], [3, 2, 1]], jnp.int32)
    weights = jax.random.uniform(keys[4], ids.shape, jnp.float32, 0.5, 1)
    expected = experts_op.experts(x, ids, weights, w, jnp.zeros((S, E)), clamp=2.0)
    gate, up, down = (tuple(p[0] for p in m.planes) for m in w)
    mine = jnp.where(ids < held, ids, -1)
    later = {"first": jnp.array([1], jnp.int32)}
    for start in ({}, later):
        if start:
            gate, up, down = (tuple(jnp.concatenate([p[-1:], p]) for p in planes) for planes in (gate, up, down))
        options = {"interpret": True, "config": Config(2, rows=2)}
        act = experts.gate_up(x, mine, weights, gate, up, fmt="IQ2_XXS", clamp=2.0, **start, **options)
        assert error(experts.down(act, mine, down, fmt="Q2_K", **start, **options), expected) < TOLERANCE
        run = formula("experts")
        act = run(x, mine, weights, gate, up, stage="gate_up", fmt="IQ2_XXS", clamp=2.0, **start)
        assert error(run(act, mine, down, stage="down", fmt="Q2_K", **start), expected) < TOLERANCE


def test_down_adds_to_its_sum():
    shape = small("down", "Q4_K", tokens=2)
    inputs = shape.inputs(jax.random.key(0))
    plus = jax.random.normal(jax.random.key(1), (2, shape.n))
    interpreted = functools.partial(experts.experts, config=SMALL, interpret=True)
    for run in (interpreted, formula("experts")):
        alone, both = (run(*inputs, p, **shape.static) for p in (None, plus))
        np.testing.assert_array_equal(both, alone + plus)
        narrow = run(*inputs, plus, dtype=jnp.bfloat16, **shape.static)
        np.testing.assert_array_equal(narrow, both.astype(jnp.bfloat16))


@pytest.mark.parametrize("config", [SMALL, dataclasses.replace(SMALL, tokens=2)])
def test_what_is_no_token_has_no_experts(config):
    """All its experts are -1; the others are served as they are alone."""
    shape = small("gate_up", "Q8_0", tokens=3, n=256)
    x, ids, weights, *w = shape.inputs(jax.random.key(0))
    down = small("down", "Q8_0", tokens=3)
    *_, planes = down.inputs(jax.random.key(1))
    plus = jax.random.normal(jax.random.key(2), (3, down.n))
    options = {"config": config, "interpret": True}

    def both(ids, rows):
        pairs = x[rows], ids[rows], weights[rows]
        act = experts.gate_up(*pairs, *w, fmt=shape.fmt, clamp=shape.clamp, **options)
        return experts.down(act, ids[rows], planes, plus[rows], fmt=down.fmt, **options)

    every, some = slice(None), np.array([0, 2])
    found = both(ids.at[1].set(-1), every)
    np.testing.assert_array_equal(found[some], both(ids, every)[some])
    np.testing.assert_array_equal(found[1], plus[1])


def test_gate_up_takes_packed_activations():
    shape = small("gate_up", "Q2_K", tokens=2)
    x, *rest = shape.inputs(jax.random.key(0))
    packed = experts.pack(x, fmt="Q2_K", interpret=True)
    found = experts.gate_up(packed, *rest, fmt="Q2_K", clamp=shape.clamp, config=SMALL, interpret=True)
    np.testing.assert_array_equal(check(shape, SMALL), found)


@pytest.mark.parametrize("fmt", mostly_slow(FORMATS, "Q5_K"))
def test_pack(fmt):
    """Every activation is in its word, at 1/65534 of the unit's largest; sums and scales are those of the words."""
    k, form = 512, known.needs(fmt, "experts")
    x = np.array(jax.random.normal(jax.random.key(0), (2, k)) * jnp.geomspace(1e-3, 1e3, k), np.float32)
    x[1, :256] = 0
    packed = np.asarray(experts.pack(jnp.asarray(x), fmt=fmt, interpret=True))
    np.testing.assert_array_equal(packed, packed_in_xla(jnp.asarray(x), fmt))
    words, sums, scale = np.split(packed, [form.unit // 2, form.unit // 2 + form.sums], axis=1)
    pairs = [np.ascontiguousarray(w.transpose(0, 2, 1)).view(np.int16) for w in np.split(words, 2, axis=1)]
    pairs = [p.reshape(*p.shape[:2], -1, 2) for p in pairs]
    values = np.concatenate(pairs, axis=-1).reshape(len(x), -1, form.unit)  # token, unit, position
    scale = scale[:, 0].view(np.float32)
    order = form.order(k)
    assert sorted(order.ravel()) == list(range(k))
    off = np.abs(values * scale[..., None] - x[:, order])
    assert (off <= np.abs(x[:, order]).max(-1, keepdims=True) * (0.5001 / experts.FIXED)).all()
    assert not values[x[:, order] == 0].any() and (np.abs(values).max(-1) == experts.FIXED)[0].all()
    if form.sums:
        np.testing.assert_array_equal(sums, values.reshape(*scale.shape, form.sums, -1).sum(-1).transpose(0, 2, 1))


# ---- what it takes ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fmt": "F16"}, "format: found F16, expected one of Q8_0, Q4_K, Q2_K, IQ2_XXS, MXFP4, Q6_K"),
        ({"tokens": 33}, "tokens: found 33, expected 1 to 32"),
        ({"k": 768}, "columns: found 768, expected a power of two"),
        ({"n": 6}, r"rows: found 6, expected a multiple of 4 · 1"),
    ],
)
def test_unsupported(changes, message):
    shape = dataclasses.replace(small("down", "Q8_0"), **changes)
    planes = known.find("Q8_0").structs((3, shape.n, shape.k))
    act = jax.ShapeDtypeStruct((shape.tokens * 2, shape.k), jnp.float32)
    ids = jax.ShapeDtypeStruct((shape.tokens, 2), jnp.int32)
    with pytest.raises(Unsupported, match=message):
        jax.eval_shape(functools.partial(experts.down, fmt=shape.fmt, config=Config(4, rows=1)), act, ids, planes)


def test_planes_of_another_format_are_unsupported():
    shape = small("down", "Q4_K")
    with pytest.raises(Unsupported, match=r"Q2_K planes of rows of 256 values: found .*, expected .*uint32"):
        experts.down(*shape.inputs(jax.random.key(0)), fmt="Q2_K", interpret=True)


def test_gate_and_up_must_have_equal_shapes():
    x, ids, weights, gate, up = small("gate_up", "Q8_0").inputs(jax.random.key(0))
    with pytest.raises(Unsupported, match="expected equal shapes"):
        experts.gate_up(x, ids, weights, gate, tuple(p[:, :2] for p in up), fmt="Q8_0", clamp=10.0, interpret=True)


# ---- the GPU ---------------------------------------------------------------------------------------------------------
def structs(shape):
    return jax.eval_shape(shape.inputs, jax.eval_shape(lambda: jax.random.key(0)))


@pytest.mark.parametrize(
    "name", [name for name in SHAPES if name.endswith(" 1")] + ["gate_up IQ2_XXS 16", "gate_up IQ2_3B 16"]
)
def test_lowers_for_every_gpu(name):
    shape = SHAPES[name]
    for device in DEVICES if name in ("gate_up IQ2_XXS 1", "gate_up IQ2_3B 1", "down Q2_K 1") else DEVICES[:1]:
        text = common.lower_for_gpu(lambda *a: experts.experts(*a, **shape.static), *structs(shape), device=device)
        assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 2  # pack and the product


def test_dependents_start_early_with_one_token():
    """With more, they would take the places of programs that work."""
    for tokens, early in ((1, True), (2, False)):
        shape = dataclasses.replace(SHAPES["down Q2_K 1"], tokens=tokens)
        text = common.lower_for_gpu(lambda *a, of=shape: experts.experts(*a, **of.static), *structs(shape))
        assert ("griddepcontrol.launch_dependents" in text) == early


def test_candidates_cover_the_default():
    for shape in SHAPES.values():
        assert experts.default_config(shape) in experts.configs(shape)


REAL = {
    f"{shape.stage} {fmt} {tokens}": shape
    for fmt in UNITS
    for tokens in (1, 16)
    for shape in (Shape("gate_up", fmt, tokens, k=4096, n=2048), Shape("down", fmt, tokens, k=2048, n=4096))
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES | REAL)
def test_on_the_gpu(name):
    shape = (SHAPES | REAL)[name]
    inputs = shape.inputs(jax.random.key(1))
    run = jax.jit(lambda *a: experts.experts(*a, **shape.static))
    found = run(*inputs)
    assert error(found, jax.jit(lambda *a: formula("experts")(*a, **shape.static))(*inputs)) < TOLERANCE
    np.testing.assert_array_equal(found, run(*inputs))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["gate_up IQ2_XXS 1", "gate_up IQ2_XXS 16", "gate_up IQ2_3B 1", "down Q2_K 1", "down Q2_K 16"]
)
def test_each_value_of_a_candidate_on_the_gpu(name):
    shape = SHAPES[name]
    inputs = shape.inputs(jax.random.key(2))
    expected = jax.jit(lambda *a: formula("experts")(*a, **shape.static))(*inputs)
    for config in each_value(experts.configs(shape)):
        found = jax.jit(lambda *a, config=config: experts.experts(*a, **shape.static, config=config))(*inputs)
        assert error(found, expected) < TOLERANCE, config


@pytest.mark.gpu
def test_tokens_that_agree_on_their_experts_on_the_gpu():
    """All sixteen choose the same six, so every group is full; one token has some of them elsewhere."""
    shape = SHAPES["gate_up IQ2_XXS 16"]
    x, ids, *rest = shape.inputs(jax.random.key(3))
    ids = jnp.tile(ids[:1], (16, 1)).at[5, 2:].set(-1)
    expected = jax.jit(lambda *a: formula("experts")(*a, **shape.static))(x, ids, *rest)
    for tokens in (1, 2, 4):
        config = dataclasses.replace(experts.default_config(shape), tokens=tokens)
        found = jax.jit(lambda *a, config=config: experts.experts(*a, **shape.static, config=config))(x, ids, *rest)
        assert error(found, expected) < TOLERANCE, config
