"""`tiny` with its trained drafters: answers are those without drafts, under load too, and many drafts hold. Minutes."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_grammar import SCHEMA
from test_speculation import close, run

from ds4jax.chat import template as chat
from ds4jax.engine.grammar import Grammar, Vocabulary
from ds4jax.engine.model_runner import ModelRunner, open_model
from ds4jax.engine.prefix_cache import PrefixCache
from ds4jax.engine.types import Request, Sampling
from ds4jax.io.checkpoint import open_checkpoint
from ds4jax.paths import embedded_drafter, embedded_model
from ds4jax.settings import Settings

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("float64_in_threads")]
QUESTIONS = json.loads((Path(__file__).parent / "tiny" / "questions.json").read_text())
SAMPLINGS = [Sampling(temperature=0.0), Sampling(seed=1), Sampling(temperature=0.6, top_p=0.9, seed=2)]


def load(batch, draft, **changes):
    settings = Settings("tiny", ctx=512, draft="auto" if draft == "mtp" else draft, **changes)
    object.__setattr__(settings, "dtype", "float64")  # so that one order of sums says what another does
    model = open_checkpoint(embedded_model("tiny")) if draft == "mtp" else open_model(settings)
    return ModelRunner(model, settings, batch)


@pytest.fixture(scope="module")
def alone():
    return load(1, "off")


@pytest.fixture(scope="module")
def asked(alone):
    """Questions that share the beginning of their prompts, each with other parameters; every fourth wants JSON."""
    tok = alone.tokenizer
    system = {"role": "system", "content": "You answer in one sentence. " * 24}
    grammar = Grammar(Vocabulary(tok), SCHEMA)
    out = []
    for i, question in enumerate(QUESTIONS[:16]):
        tokens = chat.render_ids(tok, [system, {"role": "user", "content": question["question"]}], think="off")
        wanted, logprobs = (grammar if i % 4 == 3 else None), (2 if i % 8 == 2 else None)
        out.append(Request(tokens, 32 + i, SAMPLINGS[i % 3], grammar=wanted, logprobs=logprobs))
    assert min(len(request.tokens) for request in out) > 128
    return out


@pytest.fixture(scope="module")
def expected(alone, asked):
    return [run(alone, [request])[0] for request in asked]


@pytest.mark.parametrize("draft", ["auto", "mtp"])
def test_sixteen_streams_with_drafts_are_those_of_each_alone_without(asked, expected, draft):
    runner = load(16, draft, draft_tokens=5)
    assert runner.drafts == (f"{embedded_drafter()}, 5 at once" if draft == "auto" else "MTP head, 5 at once")
    cache = PrefixCache(1 << 30)
    for cycle, cancelled in (((5,), {}), ((5, 0, 3), {i: 3 + i for i in range(0, 16, 3)})):
        for i, (found, wanted) in enumerate(zip(run(runner, asked, cycle, cache, cancelled), expected, strict=True)):
            cut = i in cancelled and len(found) < len(wanted)
            close(*(([*x[: len(found)], None] for x in (found, wanted)) if cut else (found, wanted)))


@pytest.mark.parametrize("draft", ["auto", "mtp"])
@pytest.mark.parametrize("n", range(1, 6))
def test_any_number_of_drafts_says_the_same(asked, expected, draft, n):
    runner = load(4, draft, draft_tokens=n)
    before, some = runner.stats.decode_tokens, slice(0, 12, 2)
    for found, wanted in zip(run(runner, asked[some], (n,)), expected[some], strict=True):
        close(found, wanted)
    assert runner.stats.decode_tokens > before and np.isfinite(runner.stats.round_seconds)
