"""The compressors' kernel: interpreted against the model's own function, lowered for GPUs, run on one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax.ops.check import formula
from pallas_kernels import common, compressor
from pallas_kernels.compressor import CSA, HCA, SHAPES, Config, Part, Shape, State, op

GPUS = ["NVIDIA H200", "NVIDIA RTX PRO 6000 Blackwell", "NVIDIA GB10"]
SMALL_CSA = Part(128, 4, overlap=True), Part(64, 4, overlap=True, fp4=True)
SMALL_HCA = (Part(256, 128, overlap=False),)
EPS = Shape(1, HCA, 0).static["eps"]


def same_bits(found, expected) -> np.ndarray:
    """Which elements are equal, NaN and signs of zeros included."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    bits = f"u{found.dtype.itemsize}"
    return found.view(bits) == expected.view(bits)


def compare(found: tuple[State, ...], expected: tuple[State, ...], exact: bool, closed: int) -> None:
    """What is only copied is equal. `closed` rows were computed: if not `exact`, few of their values differ.

    Sums in another order move a pooled value by some 2⁻²² of it. The middles between codes lie 2⁻⁴ apart, those
    between float16 values 2⁻¹¹: one in 10⁵ codes and one in 10³ values of rope should be moved across one.
    """
    for f, e in zip(found, expected, strict=True):
        for name in ("z", "g"):
            assert same_bits(getattr(f, name), getattr(e, name)).all(), name
        for name, plane in e.rows.items():
            differ = np.sum(~same_bits(f.rows[name], plane))
            share = 0 if exact else {"codes": 1e-3, "exponents": 0, "rope": 1e-2}[name]
            assert differ <= np.ceil(share * closed * plane.shape[-1]), name


def exact(inputs: tuple) -> tuple:
    """The inputs of a Shape, such that every sum is exact in any order and every turn a multiple of 90°.

    All gates of a window are equal, so that weights are 1 over a power of two, and values are small integers.
    """
    new, weights, states, position, n, cos, sin, layer, nth = inputs

    def integers(x):
        return jnp.round(jnp.clip(x, -1, 1)).astype(jnp.int32).astype(jnp.float32)  # has no negative zeros

    ape = [integers(a.astype(jnp.float32)).astype(a.dtype) for a, _ in weights]
    T = len(new[0][0]) // len(position)
    at = (position[:, None] + jnp.arange(T)).reshape(-1)
    gates = [3 - a[layer[0]][at % a.shape[1]].astype(jnp.float32) for a in ape]
    states = [State(s.rows, integers(s.z), s.g * 0 + 3) for s in states]
    new = [(integers(z), g) for (z, _), g in zip(new, gates, strict=True)]
    weights = [(a, norm) for a, (_, norm) in zip(ape, weights, strict=True)]
    return tuple(new), tuple(weights), tuple(states), position, n, integers(cos), integers(sin), layer, nth


def closed(shape: Shape) -> int:
    return shape.closed(shape.parts[0])


# ---- the same as the formula, token by token -------------------------------------------------------------------------
@pytest.mark.parametrize("sums_are_exact", [True, False])
@pytest.mark.parametrize(
    "parts, first, calls, T",
    [
        (SMALL_CSA, (0, 1, 2), 11, 1),
        (SMALL_CSA, (0, 1, 6), 4, 3),
        (SMALL_CSA, (0, 3, 14), 3, 8),
        (SMALL_HCA, (125, 126, 381), 3, 1),
        (SMALL_HCA, (125, 120, 379), 2, 5),
    ],
    ids=["csa", "csa by 3", "csa by 8", "hca", "hca by 5"],
)
def test_call_after_call_as_the_formula(parts, first, calls, T, sums_are_exact):
    """Three sequences, of which one has fewer tokens in the second call; the last of the rows find no room."""
    R = parts[0].ratio
    shape = Shape(3, parts, None, T, rows=2)
    inputs = jax.jit(lambda key: exact(shape.inputs(key)) if sums_are_exact else shape.inputs(key))
    _, weights, states, *_ = inputs(jax.random.key(0))
    freq = (0.0,) * 32 if sums_are_exact else tuple(np.linspace(1, 0.01, 32).tolist())
    run = jax.jit(functools.partial(op, eps=EPS, config=Config(4, 4), interpret=True))
    length, index, rows = jnp.array(first, jnp.int32), jnp.array([1], jnp.int32), 0
    for call in range(calls):
        n = jnp.array([T, T // 2 if call == 1 else T, T], jnp.int32)
        new = inputs(jax.random.key(1 + call))[0]
        if sums_are_exact:
            # All gates are 3 again, with the ape of their slot.
            at = (length[:, None] + jnp.arange(T)).reshape(-1) % R
            new = [(z, 3 - w[0][1, at].astype(jnp.float32)) for (z, _), w in zip(new, weights, strict=True)]
        window = length[:, None] // R + jnp.arange(-(-T // R))
        angle = (window * R).astype(jnp.float32)[..., None] * jnp.array(freq)
        args = new, weights, states, length, n, jnp.cos(angle), jnp.sin(angle), index, index
        expected = formula("compressor")(*args, eps=EPS)
        found = run(*args)
        closes = int(np.sum((length % R + n) // R))
        length += n
        rows += closes
        compare(found, expected, sums_are_exact, closes)
        states = found
    assert rows >= 2


# ---- the same as the formula -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "parts, ape",
    [(SMALL_CSA, "float16"), (SMALL_CSA[1:], "bfloat16"), (SMALL_HCA, "float32")],
    ids=["csa", "fp4 alone", "hca"],
)
def test_interpreted(parts, ape):
    shape = Shape(3, parts, -1, 1, ape, rows=4)
    run = jax.jit(functools.partial(op, eps=EPS, config=Config(8, 4), interpret=True))
    inputs = shape.inputs(jax.random.key(2))
    for args, is_exact in ((inputs, False), (exact(inputs), True)):
        found = run(*args)
        compare(found, formula("compressor")(*args, eps=EPS), is_exact, closed(shape))
        for f, before in zip(found, args[2], strict=True):
            assert all(not same_bits(x[1], before.rows[name][1]).all() for name, x in f.rows.items())


@pytest.mark.parametrize("slot", [1, -1])
def test_inactive_sequences_keep_everything(slot):
    shape = Shape(2, SMALL_CSA, slot, rows=3)
    new, weights, states, position, _, *rest = shape.inputs(jax.random.key(3))
    run = jax.jit(functools.partial(op, eps=EPS, interpret=True))
    found = run(new, weights, states, position, jnp.array([0, 1], jnp.int32), *rest)
    for f, before in zip(jax.tree.leaves(found), jax.tree.leaves(states), strict=True):
        assert same_bits(f[:, 0], before[:, 0]).all() and same_bits(f[0], before[0]).all()
    changed = [not same_bits(f, s).all() for f, s in zip(jax.tree.leaves(found), jax.tree.leaves(states), strict=True)]
    is_row = [True] * 3 + [False] * 2 + [True] * 2 + [False] * 2
    assert changed == [slot == -1 or not row for row in is_row]


@pytest.mark.parametrize("device", GPUS)
def test_lowers_for_gpus(device):
    """One kernel, which takes the place of every array of the state."""
    for name in ("csa/32", "hca/1"):
        inputs = jax.eval_shape(SHAPES[name].inputs, jax.random.key(0))
        text = common.lower_for_gpu(functools.partial(op, eps=EPS), *inputs, device=device)
        assert text.count("__gpu$xla.gpu.triton") == 1
        assert text.count("output_operand_alias<") == sum(x.size > 0 for x in jax.tree.leaves(inputs[2]))


def test_nbytes_counts_tokens_and_windows():
    assert Shape(2, HCA, 5).nbytes == 2 * 512 * (4 * 4 + 2)
    # Read: the token and its part of ape; for a row the b-halves of 3 tokens, 4 a-halves, norm. Written: token and row.
    token, window = 1024 * (16 + 2), 8 * 7 * 512 + 4 * 512 + 448 + 7 + 128
    assert Shape(1, CSA[:1], -1).nbytes == token + window
    assert Shape(1, CSA[:1], 2, 6).nbytes == 6 * token + 2 * window


@pytest.mark.parametrize(
    "part, change, message",
    [
        (Part(96, 4, overlap=True), {}, "rows of 96, expected a power of two, 128 at least"),
        (Part(128, 3, overlap=True), {}, "3 tokens per row"),
        (Part(128, 4, overlap=True), {"rows": {"x": jnp.zeros((2, 2, 8, 128))}}, "planes"),
        (Part(128, 4, overlap=True), {"z": jnp.zeros((2, 2, 8, 256))}, "rings of 8, expected 9 at least"),
        (Part(128, 4, overlap=True), {"g": jnp.zeros((2, 2, 16, 256), jnp.bfloat16)}, "stored g is bfloat16"),
        (Part(128, 8, overlap=False), {"config": Config(3, 4)}, "slots 3, expected a power of two"),
    ],
)
def test_unsupported(part, change, message):
    new, weights, (state,), *rest = Shape(2, (part,), 0, rows=8).inputs(jax.random.key(0))
    config = change.pop("config", None)
    with pytest.raises(common.Unsupported, match=message):
        op(new, weights, (state._replace(**change),), *rest, eps=EPS, config=config)


# ---- on a GPU --------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
def test_gpu(name):
    shape = SHAPES[name]
    inputs = shape.inputs(jax.random.key(sum(name.encode())))
    expected, expected_exact = (
        jax.jit(functools.partial(formula("compressor"), eps=EPS))(*a) for a in (inputs, exact(inputs))
    )
    for config in compressor.configs(shape):
        run = jax.jit(functools.partial(op, eps=EPS, config=config))
        found, again = run(*inputs), run(*inputs)
        compare(found, expected, False, closed(shape))
        compare(run(*exact(inputs)), expected_exact, True, closed(shape))
        for f, a in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True):
            assert same_bits(f, a).all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["csa/16, closing", "hca/16, closing"])
def test_gpu_without_room_or_inactive(name):
    """The first rows of the next sequence's lie where a row without room would be."""
    shape = SHAPES[name]
    new, weights, states, position, _, *rest = exact(shape.inputs(jax.random.key(6)))
    b = jnp.arange(shape.batch)
    position = jnp.where(b < 8, position + shape.rows * shape.parts[0].ratio, position)
    args = new, weights, states, position, (b % 4 != 1).astype(jnp.int32)
    expected = jax.jit(functools.partial(formula("compressor"), eps=EPS))(*args, *rest)
    compare(jax.jit(functools.partial(op, eps=EPS))(*args, *rest), expected, True, 0)
    for e, before in zip(expected, states, strict=True):
        assert all(same_bits(x[:, :8], before.rows[plane][:, :8]).all() for plane, x in e.rows.items())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["csa/16, closing", "hca/16"])
def test_gpu_updates_in_place(name):
    inputs = SHAPES[name].inputs(jax.random.key(5))
    run = jax.jit(functools.partial(op, eps=EPS), donate_argnums=2).lower(*inputs).compile()
    copied = re.findall(r"= \w+(\[[\d,]*\])\S* copy", str(run.as_text()))
    assert all(",0," in dims for dims in copied), copied
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(inputs[2]) if x.size]
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(run(*inputs)) if x.size] == pointers
