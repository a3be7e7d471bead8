"""scripts/eval_tiny.py: that it counts what it says it counts."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import eval_tiny
import tiny_data
import train_tiny

from ds4jax import training
from ds4jax.chat import template as chat
from ds4jax.io.tokenizer import Special, byte_tokenizer
from ds4jax.model.compute import Compute

TOK = byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    cfg = train_tiny.MINIATURE
    table = train_tiny.expert_table(np.arange(cfg.vocab_size), cfg)
    w = jax.jit(lambda: training.init(cfg, 1, table))()
    return eval_tiny.Model(w, cfg, TOK)


def rendered(calls):
    """The text of an assistant's turn with these calls."""
    calls = [{"id": str(i), "type": "function", "function": c} for i, c in enumerate(calls)]
    messages = [{"role": "user", "content": ""}, {"role": "assistant", "content": "", "tool_calls": calls}]
    text = chat.to_text(chat.render(messages, think="off", add_generation_header=False))
    return text.split(Special.THINK_CLOSE.value)[1].removesuffix(Special.EOS.value)


@pytest.mark.parametrize("arguments", [{"city": "São Paulo"}, {"a": 5, "on": True, "text": 'say "no"\n'}, {}])
def test_calls_are_parsed(arguments):
    text = rendered([{"name": "f", "arguments": arguments}])
    assert eval_tiny.parse_call(text) == ("f", arguments)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-1],
        lambda text: "Sure. " + text,
        lambda text: text.replace(chat.PARAMETER_CLOSE, ""),
        lambda text: text.replace('string="false">5', 'string="false">five'),
        lambda text: rendered([{"name": "f", "arguments": {"a": 5}}] * 2),
        lambda text: text + text,
    ],
)
def test_what_is_not_one_well_formed_call_is_refused(damage):
    text = rendered([{"name": "f", "arguments": {"a": 5, "b": "x"}}])
    assert eval_tiny.parse_call(text) is not None and eval_tiny.parse_call(damage(text)) is None


def test_answers_are_found_as_words():
    assert eval_tiny.contains("The answer is 15.", "15") and not eval_tiny.contains("It is 150.", "15")
    assert eval_tiny.contains("It is `def`.", "def") and not eval_tiny.contains("default", "def")


def test_thinking_has_a_thought_and_an_answer():
    open_, close, x = TOK.special(Special.THINK_OPEN), TOK.special(Special.THINK_CLOSE), TOK.encode_text("x")
    assert eval_tiny.thinks([*x, close, *x], TOK)
    for ids in ([close, *x], [*x, close], [*x, *x], [open_, *x, close, *x], [*x, close, *x, close, *x]):
        assert not eval_tiny.thinks(ids, TOK)


def test_needles_are_as_far_away_as_claimed():
    texts = [{"text": "".join(f"line {i} of a text\n" for i in range(700))}]
    for item in eval_tiny.needles(TOK, texts)[:5]:
        text = item.messages[0]["content"]
        sentence = next(line for line in text.splitlines() if line.startswith("The ") and " is " in line)
        after = text.split(sentence)[1].split("What is the ")[0]
        assert eval_tiny.NEEDLE_DISTANCE <= len(TOK.encode_text(after)) < eval_tiny.NEEDLE_DISTANCE + 10
        assert item.right(sentence) and not item.right("The code word is unknown.")


@pytest.mark.slow
def test_observed_losses_and_agreement_are_those_of_training(model):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.cfg.vocab_size, (2, 129)).astype(np.int32)
    mask = rng.random((2, 129)) < 0.6
    mask[:, 0] = False
    documents = [(t.tolist(), m.tolist()) for t, m in zip(tokens, mask, strict=True)]
    nats, agreement = eval_tiny.observe(model, documents, 2)
    compute = Compute("straight_through")
    _, parts = jax.jit(
        lambda: training.loss(model.weights, jnp.asarray(tokens), jnp.asarray(mask), model.cfg, compute)
    )()
    np.testing.assert_allclose(nats / mask[:, 1:].sum(), parts["main"], rtol=1e-3)
    np.testing.assert_allclose(agreement, parts["agreement"], atol=0.02)


@pytest.mark.slow
def test_batched_answers_are_those_of_each_prompt_alone(model, monkeypatch):
    monkeypatch.setattr(eval_tiny, "LONGEST_ANSWER", 5)
    prompts = [TOK.encode_raw(text) for text in ("one", "another prompt", "x")]
    together = eval_tiny.answer(model, prompts, 2)
    assert all(len(ids) <= 5 and TOK.eos_id not in ids for ids in together) and any(together)
    assert together == [eval_tiny.answer(model, [p, prompts[1]], 2)[0] for p in prompts]


def test_the_exam_is_complete():
    assert len(eval_tiny.questions()) == 40 and len(eval_tiny.tool_requests()) == 200
    for item in eval_tiny.tool_requests():
        assert len(chat.render_ids(TOK, item.messages, think="on", tools=item.tools)) < 8 * tiny_data.CONTEXT
        assert not item.right("I do not know.")


def test_a_column_for_every_model_there_is(tmp_path, monkeypatch):
    """The float32 weights only where training has left them; the others are made of these."""
    made = []
    monkeypatch.setattr(eval_tiny, "convert", lambda source, out, *_: made.append((source.name, out.name, _[-1])))
    eval_tiny.FLAGS(["eval_tiny", f"--weights={tmp_path}"])
    assert list(eval_tiny.models(tmp_path)) == ["tiny_q2", "tiny"] and not made
    (tmp_path / "tiny-f32.gguf").touch()
    found = eval_tiny.models(tmp_path)
    assert found["float32"] == tmp_path / "tiny-f32.gguf" and len(found) == 6
    assert [(source, imatrix is not None) for source, _, imatrix in made] == [
        ("tiny_q2-f32.gguf", False), ("tiny-f32.gguf", False), ("tiny-f32.gguf", True)
    ]  # fmt: skip
    assert {found[name].name for name in list(found)[3:]} == {out for _, out, _ in made}
    eval_tiny.FLAGS(["eval_tiny", "--models=tiny,some/other.gguf"])
    assert eval_tiny.models(tmp_path) == {"tiny": eval_tiny.embedded_model("tiny"), "other": Path("some/other.gguf")}
