"""Rounds of drafts say what plain decoding says, whatever is drafted, and leave the state that it leaves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_weights
import scipy.stats
from test_verify import CFG as BASE
from test_verify import newest, reachable

from ds4jax.config import DrafterConfig
from ds4jax.engine import sampling, snapshot
from ds4jax.engine.compiled_steps import BLOCK, ROUNDS, decode_step, prefill_step, speculate_step
from ds4jax.engine.types import Sampling
from ds4jax.model import cache as kv
from ds4jax.model import transformer, weights
from ds4jax.model.compute import Compute
from ds4jax.model.drafting import DsparkDrafter, MtpDrafter, drafter_of

CFG = dataclasses.replace(
    BASE, n_mtp=1, drafter=DrafterConfig(stages=2, block_size=5, markov_rank=16, noise_token=63, target_layers=(1, 2))
)
pytestmark = pytest.mark.usefixtures("float64")
COMPUTE = Compute("official", "float64")  # in float64 no rounding to 4 or 8 bits falls on the other side
MODEL = {"cfg": CFG, "compute": COMPUTE}
LENGTHS = (1, 3, 30, 100, 122, 127)  # of the prompts, around windows of 4, 32 and 128 tokens
PARAMS = [
    Sampling(temperature=0.0),
    Sampling(seed=1),
    Sampling(temperature=0.5, top_k=9, seed=2),
    Sampling(temperature=2.0, top_p=0.8, seed=3),
    Sampling(temperature=0.0),
    Sampling(temperature=0.3, min_p=0.2, seed=4),
]
B, AHEAD = len(LENGTHS), 2 * BLOCK


@pytest.fixture(scope="module")
def model():
    w, _ = random_weights.make(CFG, weights.abstract(CFG, random_weights.F32, random_weights.F32), 3)
    return w


@functools.cache
def jitted(drafter):
    return jax.jit(functools.partial(speculate_step, **MODEL, drafter=drafter))


class Plain:
    """Prompts, and what plain decoding makes of them while a drafter follows.

    caches, anchors: after the prompts, and after AHEAD more tokens. text: these, (B, AHEAD). logits: after them.
    """

    def __init__(self, w, drafter):
        self.w, self.drafter = w, drafter
        prompts = np.random.default_rng(0).integers(0, CFG.vocab_size, (B, 128)).astype(np.int32)
        cache = kv.empty(CFG, COMPUTE.numerics, COMPUTE.dtype, B, 256)
        prefill = jax.jit(functools.partial(prefill_step, **MODEL, drafter=drafter))
        first = []
        for slot, (n, params) in enumerate(zip(LENGTHS, PARAMS, strict=True)):
            targets = np.full(128, -1, np.int32)
            args = np.int32(slot), np.array([True]), prompts[slot : slot + 1], np.array([n], np.int32)
            token, *_, cache = prefill(w, cache, *args, sampling.batch([params]), targets, np.zeros(1, np.int32))
            first.append(int(token[0]))
        self.params, self.anchors, self.caches = sampling.batch(PARAMS), [np.array(first, np.int32)], [cache]
        decode = jax.jit(functools.partial(decode_step, **MODEL, drafter=drafter))
        results, text = (np.zeros((BLOCK, B), np.int32), np.zeros((1, B), np.int32), np.zeros((B, CFG.vocab_size))), []
        for tokens in (self.anchors[0], np.full(B, -1, np.int32)):
            *results, cache = decode(
                w,
                cache,
                tuple(results),
                np.arange(B, dtype=np.int32),
                tokens,
                np.ones(B, bool),
                np.int32(BLOCK),
                self.params,
            )
            text.append(np.asarray(results[0]))
        self.text, self.logits = np.concatenate(text).T, np.asarray(results[2])
        self.caches.append(cache)

    def speculate(self, n, drafter):
        """Rounds of n drafts until every sequence is AHEAD tokens further → text, logits, cache, tokens of each round.

        The room of a call is not a multiple of what a round may give.
        """
        step = jitted(drafter)
        cache, tokens, text = self.caches[0], self.anchors[0], [[] for _ in range(B)]
        logits, last, kept = np.zeros((B, CFG.vocab_size)), np.zeros((1, B), np.int32), []
        while min(map(len, text)) < AHEAD:
            room = np.array([min(AHEAD - len(t), 7 + b) for b, t in enumerate(text)], np.int32)
            results = np.zeros((ROUNDS, 1 + n, B), np.int32), np.zeros((ROUNDS, B), np.int32), last, logits
            args = np.arange(B, dtype=np.int32), tokens, room, np.int32(3), self.params
            ids, counts, last, logits, cache = step(self.w, cache, results, *args)
            for b, t in enumerate(text):
                for r in range(ROUNDS):
                    t += np.asarray(ids)[r, : counts[r, b], b].tolist()
            tokens = np.full(B, -1, np.int32)
            kept.append(np.asarray(counts))
        return np.array(text), np.asarray(logits), cache, np.concatenate(kept)


class Both:
    """Both drafters follow, so that one text serves the tests of both; one of them drafts."""

    def __init__(self, drafts):
        self.drafters, self.draft = (DsparkDrafter(), MtpDrafter()), drafts.draft

    def tap(self, cfg):
        seen = [drafter.tap(cfg) for drafter in self.drafters]

        def both(*args):
            for one in seen:
                one(*args)

        both.seen = seen
        return both

    def follow(self, w, cache, both, *args):
        for drafter, seen in zip(self.drafters, both.seen, strict=True):
            cache = drafter.follow(w, cache, seen, *args)
        return cache


@pytest.fixture(scope="module")
def plain(model):
    return Plain(model, Both(DsparkDrafter()))


class Said:
    """A drafter that knows the text, and of every draft whether to say it: both come in place of the MTP head."""

    def tap(self, cfg):
        return lambda *_: None

    def follow(self, w, cache, *_):
        return cache

    def draft(self, w, cache, anchor, active, count, choose, cfg, compute):
        tokens, right = w.mtp
        at = cache.length[:, None] - jnp.array(LENGTHS, jnp.int32)[:, None] + jnp.arange(1, 1 + count, dtype=jnp.int32)
        true, right = (jnp.take_along_axis(x, at, axis=1) for x in (tokens, right))
        return jnp.where(right, true, (true + 1) % cfg.vocab_size)


SAID = Said()


def test_the_drafter_of_a_model():
    assert drafter_of(CFG) == DsparkDrafter()
    assert drafter_of(dataclasses.replace(CFG, drafter=None)) == MtpDrafter()
    assert drafter_of(dataclasses.replace(CFG, drafter=None, n_mtp=0)) is None


@pytest.mark.parametrize("before, size, n", [(0, 256, 200), (100, 128, 128)])
def test_the_state_at_a_mark_is_that_of_a_prompt_which_ends_there(plain, before, size, n):
    """Both drafters' part, too, and wherever the chunk begins."""
    prefill = jax.jit(functools.partial(prefill_step, **MODEL, drafter=plain.drafter))
    prompt = np.random.default_rng(1).integers(0, CFG.vocab_size, before + size).astype(np.int32)

    def run(cache, fresh, tokens, n, mark=0):
        args = np.int32(1), np.array([fresh]), tokens[None], np.array([n], np.int32)
        targets, mark = np.full(len(tokens), -1, np.int32), np.array([mark], np.int32)
        *_, state, cache = prefill(plain.w, cache, *args, sampling.batch(PARAMS[:1]), targets, mark)
        return state, cache

    cache = kv.empty(CFG, COMPUTE.numerics, COMPUTE.dtype, 2, 384)
    if before:
        _, cache = run(cache, True, np.resize(prompt[:before], 128), before)
    found, _ = run(cache, not before, prompt[before:], n, 128 - before)
    _, then = run(cache, not before, prompt[before:], 128 - before)
    wanted = snapshot.state(then, 1)
    assert found.keys() == wanted.keys() == {*snapshot.state_names(cache)} and found["length"] == 128
    for name, x in wanted.items():
        seen = np.ones(())
        if name.startswith("window."):
            held = newest(np.array([128], np.int32), x.shape[2])
            seen = (held > 128 - CFG.window)[..., None]
        np.testing.assert_allclose(np.asarray(found[name]) * seen, x * seen, rtol=1e-12, atol=1e-12, err_msg=name)


FAST = [(5, DsparkDrafter)]
SLOW = {(n, drafter) for n in range(1, 6) for drafter in (DsparkDrafter, MtpDrafter)} - {*FAST}


@pytest.mark.parametrize(
    "n, drafter", [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in sorted(SLOW, key=str))]
)
def test_text_logits_and_state_are_those_of_plain_decoding(plain, n, drafter):
    text, logits, cache, kept = plain.speculate(n, Both(drafter()))
    np.testing.assert_array_equal(text, plain.text)
    np.testing.assert_allclose(logits, plain.logits, rtol=1e-9, atol=1e-9)
    found, wanted = reachable(cache), reachable(plain.caches[1])
    for name, x in wanted.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-9, atol=1e-9, err_msg=name)
    np.testing.assert_allclose(cache.carry, plain.caches[1].carry, rtol=1e-9, atol=1e-9)
    assert kept.max() > 1  # some drafts hold by chance


@pytest.mark.parametrize("held", range(6))
def test_drafts_that_hold_in_part(plain, monkeypatch, held):
    """Every number of accepted drafts at every position from the prompts on, over the windows of 4, 32 and 128."""
    true = np.concatenate([plain.anchors[0][:, None], plain.text, np.zeros((B, 9), np.int32)], axis=1)
    right = np.random.default_rng(held).random(true.shape) < held / 5
    monkeypatch.setattr(plain, "w", dataclasses.replace(plain.w, mtp=(true, right)))
    text, logits, _, kept = plain.speculate(5, SAID)
    np.testing.assert_array_equal(text, plain.text)
    np.testing.assert_allclose(logits, plain.logits, rtol=1e-9, atol=1e-9)
    assert {0: {0, 1}, 5: {0, 6}}.get(held, set()) <= set(np.unique(kept)) and (held or kept.max() == 1)


@pytest.mark.slow
def test_a_call_for_some_slots_leaves_the_others_as_they_are(plain):
    slots = np.array([1, 4], np.int32)

    step = jax.jit(functools.partial(speculate_step, **MODEL, drafter=Both(DsparkDrafter())))
    before = plain.caches[0]
    nothing = np.full((ROUNDS, 6, B), 77, np.int32), np.zeros((ROUNDS, B), np.int32), np.full((1, B), 77, np.int32)
    args = (
        slots,
        plain.anchors[0][slots],
        np.array([9, 9], np.int32),
        np.int32(3),
        sampling.batch([PARAMS[1], PARAMS[4]]),
    )
    ids, counts, last, logits, cache = step(plain.w, before, (*nothing, np.full((B, CFG.vocab_size), 7.0)), *args)
    assert not np.delete(counts, slots, axis=1).any() and (np.delete(last, slots, axis=1) == 77).all()
    assert (np.delete(logits, slots, axis=0) == 7).all()
    for slot in slots:
        said = [t for r in range(ROUNDS) for t in np.asarray(ids)[r, : counts[r, slot], slot]]
        assert said == plain.text[slot, : len(said)].tolist() and len(said) >= 3 and last[0, slot] == said[-1]
        assert cache.length[slot] == LENGTHS[slot] + len(said)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(cache), strict=True):
        axis = min(1, x.ndim - 1)
        np.testing.assert_array_equal(np.delete(x, slots, axis), np.delete(y, slots, axis))


@pytest.mark.slow
def test_the_distribution_of_what_is_drawn(plain):
    """20,000 draws at three positions, by rounds of drafts: chi-square against the model's own probabilities."""
    draws, at_once, temperature, anchor = 20_000, 250, 0.7, 7
    w, drafter, vocab = plain.w, DsparkDrafter(), CFG.vocab_size
    prompt = np.random.default_rng(2).integers(0, vocab, (1, 6)).astype(np.int32)

    contexts = np.array([(*prompt[0], anchor, a, b) for a in range(vocab) for b in range(vocab)], np.int32)
    forward = jax.jit(functools.partial(transformer.forward, cfg=CFG, compute=COMPUTE))
    chances = []  # of the tokens after each of the last three
    for some in np.split(contexts, vocab):
        cache, n = kv.empty(CFG, COMPUTE.numerics, COMPUTE.dtype, vocab, 256), np.full(vocab, 9, np.int32)
        X, _ = forward(w, cache, some, n)
        chances.append(jax.nn.softmax(transformer.logits(w, X[:, 6:], CFG, COMPUTE) / temperature))
    first, second, third = np.moveaxis(np.asarray(jnp.stack(chances)), 2, 0)  # each (a, b, token)
    first = first[0, 0]
    second = first @ second[:, 0]
    pairs = first[:, None] * np.moveaxis(np.asarray(jnp.stack(chances)), 2, 0)[1][:, 0]  # of a and b
    third = np.einsum("ab,abt->t", pairs, third)

    prefill = jax.jit(functools.partial(prefill_step, **MODEL, drafter=drafter))
    one = kv.empty(CFG, COMPUTE.numerics, COMPUTE.dtype, 1, 256)
    padded, nothing = np.resize(prompt, (1, 8)), np.full(8, -1, np.int32)
    args = np.int32(0), np.array([True]), padded, np.array([6], np.int32), sampling.batch(PARAMS[:1]), nothing
    *_, one = prefill(w, one, *args, np.zeros(1, np.int32))
    cache = jax.tree.map(lambda x: jnp.repeat(x, at_once, axis=min(1, x.ndim - 1)), one)
    step, counted, kept = jitted(drafter), np.zeros((3, vocab)), []
    for start in range(0, draws, at_once):
        seeds = range(start, start + at_once)
        params = [Sampling(temperature=temperature, min_p=0.0, seed=seed) for seed in seeds]
        results = (
            np.zeros((ROUNDS, 4, at_once), np.int32), np.zeros((ROUNDS, at_once), np.int32),
            np.zeros((1, at_once), np.int32), np.zeros((at_once, vocab)),
        )  # fmt: skip
        slots, tokens, room = np.arange(at_once, dtype=np.int32), np.full(at_once, anchor), np.full(at_once, 3)
        args = slots, tokens.astype(np.int32), room.astype(np.int32), np.int32(3), sampling.batch(params)
        ids, counts, *_ = step(w, cache, results, *args)
        ids, counts = np.asarray(ids), np.asarray(counts)
        for b in range(at_once):
            said = [token for r in range(ROUNDS) for token in ids[r, : counts[r, b], b]]
            counted[np.arange(3), said] += 1
        kept.append(counts[0])
    assert 1 < np.mean(kept) < 3  # some drafts hold, and some do not
    for expected, found in zip((first, second, third), counted, strict=True):
        assert scipy.stats.chisquare(found, draws * expected / expected.sum()).pvalue > 1e-3
