"""Sampling against a plain numpy implementation of its definition, and the promises about seeds and batches."""

import functools
import itertools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax.engine import sampling
from ds4jax.engine.constraints import Constraints, edits
from ds4jax.engine.types import Sampling
from ds4jax.errors import ConfigError

sample, allowed = jax.jit(sampling.sample), jax.jit(lambda x, b: sampling.allowed(sampling.tempered(x, b), b))


def logits(rows, vocab=97, seed=0):
    return np.random.default_rng(seed).normal(0, 3, (rows, vocab)).astype(np.float32)


def positions(values):
    return np.array(values, np.int32)


def distribution(x, params):
    """The probabilities that the filters leave, by the definition, in float64: x (V,) → (V,)."""
    x = x.astype(np.float64)
    order = np.argsort(-x, kind="stable")
    p = np.exp((x - x.max()) / params.temperature)[order]
    likeliest = p[0]
    if params.top_k:
        p[params.top_k :] = 0
    p /= p.sum()
    if params.top_p < 1:
        n = np.searchsorted(np.cumsum(p), params.top_p) + 1  # as many as it takes to reach top_p
        p[n:] = 0
    p[np.exp((x - x.max()) / params.temperature)[order] < params.min_p * likeliest] = 0
    out = np.zeros_like(p)
    out[order] = p / p.sum()
    return out


GRID = [
    Sampling(temperature=t, top_k=k, top_p=p, min_p=m)
    for t, k, p, m in itertools.product((0.3, 1.0, 2.5), (0, 1, 5, 1000), (0.05, 0.6, 0.97, 1.0), (0.0, 0.1, 1.0))
]


def test_filters_leave_what_the_definition_leaves():
    x = logits(len(GRID))
    found = np.asarray(allowed(x, sampling.batch(GRID)))
    expected = np.array([distribution(row, params) > 0 for row, params in zip(x, GRID, strict=True)])
    assert {1, 5} < set(expected.sum(1)) and expected.all(1).any()  # the grid has filters that bite, and none
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "params", [Sampling(1.0, 0, 1.0, 0.0), Sampling(0.7, 6, 0.9, 0.02), Sampling(1.5, 0, 1.0, 0.1)]
)
def test_draws_follow_the_distribution(params):
    n = 20_000
    x, batch = logits(1, vocab=12, seed=3), sampling.batch([params])
    draws = jax.vmap(lambda p: sampling.sample(jnp.asarray(x), batch, p[None])[0])(np.arange(n, dtype=np.int32))
    found, expected = np.bincount(draws, minlength=12) / n, distribution(x[0], params)
    assert (found[expected == 0] == 0).all()
    # Five standard deviations of a binomial share: a correct sampler fails once in a million seeds; this one is fixed.
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / n)).all()


def test_temperature_zero_is_greedy_and_takes_the_first_of_equals():
    x = logits(3)
    x[1, [20, 30, 40]] = 99
    params = sampling.batch([Sampling(temperature=0.0, seed=s) for s in range(3)])
    assert sample(x, params, positions([1, 2, 3])).tolist() == [x[0].argmax(), 20, x[2].argmax()]


def test_a_tiny_temperature_is_greedy_in_effect():
    x = logits(4)
    params = sampling.batch([Sampling(temperature=1e-30, min_p=m) for m in (0.0, 0.05, 0.5, 1.0)])
    assert sample(x, params, positions(range(4))).tolist() == x.argmax(-1).tolist()


def test_a_draw_depends_on_seed_and_position_but_not_on_the_batch():
    x = logits(1, vocab=500) / 10  # nearly flat: the draws decide
    params = [Sampling(seed=s, min_p=0.0, top_p=p) for s, p in ((1, 1.0), (2, 1.0), (1, 1.0), (1, 0.9))]
    at = [7, 7, 8, 7]
    alone = [int(sample(x, sampling.batch([p]), positions([i]))[0]) for p, i in zip(params, at, strict=True)]
    together = sample(np.repeat(x, 4, 0), sampling.batch(params), positions(at)).tolist()
    assert together == alone
    assert len({alone[0], alone[1], alone[2]}) == 3  # other seeds and positions draw other tokens (of 500)


def test_a_filter_that_leaves_the_drawn_token_changes_nothing():
    x = logits(1, vocab=50)
    for seed in range(20):
        free = int(sample(x, sampling.batch([Sampling(seed=seed, min_p=0.0)]), positions([0]))[0])
        filtered = Sampling(seed=seed, top_k=12, top_p=0.95, min_p=0.01)
        if distribution(x[0], filtered)[free]:
            assert int(sample(x, sampling.batch([filtered]), positions([0]))[0]) == free


@pytest.mark.parametrize(
    "values", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}]
    + [{"min_p": -0.1}, {"min_p": 2}, {"seed": -1}, {"seed": 2**32}],
)  # fmt: skip
def test_impossible_values_are_refused(values):
    ((key, value),) = values.items()
    with pytest.raises(ConfigError, match=f"{key}: found {value}, expected"):
        Sampling(**values)


# ---- edits of the logits ---------------------------------------------------------------------------------------------
choose = jax.jit(sampling.choose)
edited = jax.jit(sampling.edited)


def all_edited(x, rows):
    return functools.reduce(edited, edits(rows, x.shape[1]), x)


def constrained(x, rows, params=None, at=None):
    """`sampling.choose` with the constraints of each row, as numpy arrays."""
    params = params or [Sampling(temperature=0.0)] * len(x)
    at = positions(at or range(len(x)))
    return [np.asarray(y) for y in choose(x, all_edited(x, rows), sampling.batch(params), at)]


def told(params, prompt=(), answer=(), stop_ids=(), matcher=None):
    constraints = Constraints(params, prompt, stop_ids, matcher)
    for token in answer:
        constraints.push(token)
    return constraints


class Only:
    """A grammar that allows some tokens."""

    error, ended = "", False

    def __init__(self, *ids):
        self.ids = ids

    def push(self, token):
        pass

    def fill(self, allowed):
        allowed[:] = 0
        for i in self.ids:
            allowed[i // 32] |= np.uint32(1 << i % 32)


def edited_by_definition(x, params, prompt, answer):
    """float64 (V,): penalties as OpenAI and Hugging Face define them, then biases."""
    x = x.astype(np.float64)
    for i in {*prompt, *answer} if params.repetition_penalty != 1 else ():
        x[i] = x[i] / params.repetition_penalty if x[i] > 0 else x[i] * params.repetition_penalty
    for i, n in Counter(answer).items():
        x[i] -= params.presence_penalty + n * params.frequency_penalty
    for i, bias in params.logit_bias:
        x[i] += bias
    return x


EDITING = [
    Sampling(presence_penalty=1.5),
    Sampling(frequency_penalty=-0.7),
    Sampling(repetition_penalty=1.3),
    Sampling(logit_bias=((3, 4.0), (96, -100.0))),
    Sampling(presence_penalty=0.4, frequency_penalty=0.9, repetition_penalty=0.8, logit_bias=((5, 1.0), (7, -2.0))),
]


def test_penalties_and_biases_by_their_definition():
    x, rng = logits(len(EDITING)), np.random.default_rng(1)
    prompts, answers = (
        rng.integers(0, 97, (len(EDITING), 30)).tolist(),
        rng.integers(0, 97, (len(EDITING), 40)).tolist(),
    )
    rows = [told(*each) for each in zip(EDITING, prompts, answers, strict=True)]
    found = np.asarray(all_edited(x, rows))
    expected = [edited_by_definition(*each) for each in zip(x, EDITING, prompts, answers, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)  # float32 against float64
    assert all((abs(a - b) > 0.1).any() for a, b in zip(x, expected, strict=True))


def test_edits_of_any_number_of_tokens_are_compiled_as_few_ones_are():
    x, traced = jnp.zeros((2, 2000)), []

    @jax.jit
    def one(x, edit):
        traced.append(edit)
        return sampling.edited(x, edit)

    def found(n):
        bias = tuple((i, float(i)) for i in range(n))
        return functools.reduce(one, edits([told(Sampling(logit_bias=bias)), None], 2000), x)

    found(3)
    np.testing.assert_array_equal(found(700), [[*range(700), *[0] * 1300], [0] * 2000])
    np.testing.assert_array_equal(found(1999), [[*range(1999), 0], [0] * 2000])
    assert len(traced) == 1


def test_no_edits_change_nothing():
    x = logits(3)
    np.testing.assert_array_equal(all_edited(x, [None] * 3), x)


def test_a_grammar_leaves_what_it_allows_and_a_bias_does_not_bring_back_the_rest():
    x = logits(3)
    x[:, 50] = 30
    bias = Sampling(logit_bias=((50, 50.0),))
    ids, *_ = constrained(x, [told(bias, matcher=Only(0, 31, 32, 96)), told(bias, matcher=Only(96)), None])
    allowed = [0, 31, 32, 96]
    assert ids.tolist() == [allowed[x[0, allowed].argmax()], 96, 50]


def test_no_end_before_min_tokens():
    x = logits(1)
    x[0, 9] = 99
    params = Sampling(min_tokens=2)
    found = [constrained(x, [told(params, answer=[1] * n, stop_ids=[9])])[0][0] == 9 for n in range(4)]
    assert found == [False, False, True, True]


def test_log_probabilities_are_the_models_own():
    x = logits(2)
    ids, logprob, top_ids, top = constrained(x, [told(Sampling(logit_bias=((4, 1000.0),))), None])
    expected = x - np.log(np.exp(x.astype(np.float64)).sum(1, keepdims=True))
    assert ids[0] == 4 and top_ids.shape == (2, sampling.MAX_LOGPROBS)
    np.testing.assert_allclose(logprob, expected[[0, 1], ids], atol=1e-5)
    order = np.argsort(-x, axis=1)[:, : sampling.MAX_LOGPROBS]
    np.testing.assert_array_equal(top_ids, order)
    np.testing.assert_allclose(top, np.take_along_axis(expected, order, 1), atol=1e-5)


def test_constraints_of_one_sequence_leave_the_others_draws_alone():
    x = logits(4, vocab=500) / 10
    params = [Sampling(seed=s, min_p=0.0) for s in range(4)]
    free = sample(x, sampling.batch(params), positions(range(4))).tolist()
    long = told(Sampling(repetition_penalty=1.1), prompt=range(400))  # more entries than the others have room for
    assert constrained(x, [None] * 4, params)[0].tolist() == free
    assert constrained(x, [long, None, told(Sampling(logit_bias=((7, 1.0),))), None], params)[0][[1, 3]].tolist() == [
        free[1],
        free[3],
    ]


@pytest.mark.parametrize(
    "values", [{"presence_penalty": float("nan")}, {"frequency_penalty": float("inf")}, {"repetition_penalty": 0.0}]
    + [{"logit_bias": ((1, float("nan")),)}, {"min_tokens": -1}],
)  # fmt: skip
def test_impossible_edits_are_refused(values):
    ((key, value),) = values.items()
    with pytest.raises(ConfigError, match=f"{key}: found {re.escape(str(value))}, expected"):
        Sampling(**values)


@pytest.mark.parametrize("apart", [0.0, 0.3, 1.0, 3.0])
def test_two_draws_with_the_same_noise_agree_as_often_as_the_bound_says(apart):
    """Why drafts hold: with TV the distance of two distributions, between (1 - TV) / (1 + TV) and 1 - TV."""
    rng, n, vocab = np.random.default_rng(7), 4000, 40
    p = rng.normal(0, 2, vocab).astype(np.float32)
    q = p + apart * rng.normal(0, 1, vocab).astype(np.float32)
    params = sampling.batch([Sampling(seed=seed, min_p=0.0) for seed in range(n)])
    drawn = [sampling.sample(jnp.tile(x, (n, 1)), params, jnp.arange(n, dtype=jnp.int32)) for x in (p, q)]
    agree = np.mean(np.asarray(drawn[0]) == np.asarray(drawn[1]))
    tv = np.abs(np.asarray(jax.nn.softmax(p)) - np.asarray(jax.nn.softmax(q))).sum() / 2
    error = 4 * (0.25 / n) ** 0.5
    assert (1 - tv) / (1 + tv) - error <= agree <= 1 - tv + error
    assert (agree == 1) == (apart == 0)
