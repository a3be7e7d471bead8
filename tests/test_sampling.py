"""Sampling against a plain numpy implementation of its definition, and the promises about seeds and batches."""

import itertools

import jax
import numpy as np
import pytest

from ds4jax import sampling
from ds4jax.errors import ConfigError
from ds4jax.sampling import Sampling

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
    x = logits(1, vocab=12, seed=3)
    draws = jax.vmap(lambda p: sampling.sample(x, sampling.batch([params]), p[None])[0])(np.arange(n, dtype=np.int32))
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
