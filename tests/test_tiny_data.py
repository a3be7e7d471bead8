"""The tiny model's training data: what the tests ask is kept out, the rest is as the chat format has it."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import tiny_data
import tiny_dialogues
from tiny_facts import COUNTRIES, facts

from ds4jax.io import tokenizer
from ds4jax.io.tokenizer import Special

QUESTIONS = json.loads((tiny_dialogues.HELD_OUT / "questions.json").read_text())
REQUESTS = json.loads((tiny_dialogues.HELD_OUT / "tool_requests.json").read_text())


@pytest.fixture
def generator():
    return tiny_dialogues.Generator(5, tiny_dialogues.held_out())


def user_texts(dialogue):
    return [message["content"] for message in dialogue.messages if message["role"] == "user"]


def test_held_out_requests_are_never_drawn(generator):
    """They would be: without the exclusion, the same number of draws has many."""
    asked = [f" {tiny_dialogues.normalise(item['question'])} " for item in QUESTIONS]
    wanted = {tiny_dialogues.normalise(item["request"]) for item in REQUESTS}
    unfiltered = tiny_dialogues.Generator(5, frozenset())

    def found(source):
        texts = itertools.chain.from_iterable(user_texts(source.conversation()) for _ in range(6000))
        heard = [f" {tiny_dialogues.normalise(text)} " for text in texts]
        heard_tools = itertools.chain.from_iterable(user_texts(source.tool_use()) for _ in range(3000))
        return sum(any(q in text for q in asked) for text in heard) + sum(
            tiny_dialogues.normalise(text) in wanted for text in heard_tools
        )

    assert found(generator) == 0
    assert found(unfiltered) > 10


def test_the_40_questions_are_other_wordings_of_facts():
    by_wording = {question: fact for fact in facts() for question in fact.questions}
    assert len(by_wording) == sum(len(fact.questions) for fact in facts())
    assert len(QUESTIONS) == 40 and len(COUNTRIES) >= 60
    for item in QUESTIONS:
        fact = by_wording[item["question"]]
        assert fact.short == item["answer"] and fact.short in fact.answer and len(fact.questions) > 2


def test_the_200_requests_have_two_tools_and_one_right_call():
    assert len(REQUESTS) == 200
    for item in REQUESTS:
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in item["tools"]}
        assert len(schemas) == 2
        assert list(item["arguments"]) == schemas[item["name"]]["required"]


def test_what_the_assistant_writes_is_predicted(generator):
    tok = tokenizer.byte_tokenizer()
    think_close = Special.THINK_CLOSE.value
    for think, dialogue in ((d.think, d) for d in (generator.tool_use() for _ in range(40))):
        ids, mask = tiny_data.dialogue_document(dialogue, tok)
        written = tok.decode(id for id, m in zip(ids, mask, strict=True) if m).split(Special.EOS.value)
        said = [message for message in dialogue.messages if message["role"] == "assistant"]
        assert len(written) == len(said) + 1 and written[-1] == ""
        for text, message in zip(written, said, strict=False):
            thought = message["reasoning_content"] + think_close if think else ""
            assert text.startswith(thought + message["content"])
            names = [call["function"]["name"] for call in message.get("tool_calls", ())]
            assert text.count("invoke name=") == len(names) and all(f'invoke name="{name}"' in text for name in names)


def test_needles_lie_in_the_text(generator):
    depths = 0.5, 0.2, 0.9
    dialogue, words = generator.needles("a line\n" * 100, depths)
    said = [message["content"] for message in dialogue.messages]
    text, answers = said[0], said[1::2]
    for depth, word, answer in zip(depths, words, answers, strict=True):
        needle = answer + "\n"
        assert answer.endswith(f" is {word}.") and text.count(needle) == 1
        assert abs(text.index(needle) / len(text) - depth) < 0.15
    assert all(said[2 * i].endswith(f" of {answers[i].split()[-3]}?") for i in range(3))


def test_packing_keeps_every_document():
    rng = np.random.default_rng(0)
    sizes = rng.integers(2, 600, 300)
    documents = [([1000 + i] * n, [j % 2 == 0 for j in range(n)]) for i, n in enumerate(sizes)]
    tokens, mask = tiny_data.pack([*documents, ([1] * (tiny_data.ROW + 1), [True] * (tiny_data.ROW + 1))], fill=7)
    for i, n in enumerate(sizes):
        rows = np.unique(np.nonzero(tokens == 1000 + i)[0])
        assert len(rows) == 1
        at = np.nonzero(tokens[rows[0]] == 1000 + i)[0]
        assert len(at) == n and at[-1] - at[0] == n - 1 and mask[rows[0], at].tolist() == documents[i][1]
    assert not (tokens == 1).any() and not mask[tokens == 7].any()
    assert (tokens == 7).mean() < 0.12


def test_text_is_cut_into_rows_and_comes_back():
    tok = tokenizer.byte_tokenizer()
    text = "".join(f"line {i}\n" for i in range(900))
    pieces = list(tiny_data.text_documents(text, tok))
    assert all(len(ids) <= tiny_data.ROW and ids[0] == tok.bos_id and not mask[0] for ids, mask in pieces)
    assert "".join(tok.decode(ids[1:]) for ids, _ in pieces) == text


def test_a_vocabulary_learned_twice_is_the_same():
    texts = [path.read_text() for path in sorted(Path(tiny_data.__file__).parent.glob("tiny_*.py"))]
    first, second = (tokenizer.train(iter(texts), 600) for _ in range(2))
    assert first.to_metadata() == second.to_metadata()
    assert first.vocab_size == 600 and all(first.special(special) >= 600 - len(Special) for special in Special)
    assert first.decode(first.encode_text(texts[0])) == texts[0]
    assert len(first.encode_text(texts[0])) < 0.6 * len(texts[0].encode())
