"""Structured output: whatever a model would like to say, what comes out follows the schema."""

import json

import numpy as np
import pytest

from ds4jax.engine.constraints import Constraints, edits
from ds4jax.engine.form import Begin, Pattern
from ds4jax.engine.grammar import Grammar, GrammarError, Matcher, Vocabulary
from ds4jax.engine.types import Sampling
from ds4jax.io.tokenizer import Special, byte_tokenizer

TOKENIZER = byte_tokenizer()
VOCABULARY = Vocabulary(TOKENIZER)
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "size": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind": {"enum": ["big", "small"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["city", "size", "kind", "tags"],
    "additionalProperties": False,
}


def allowed(matcher, words=12):
    bits = np.full(words, 2**32 - 1, np.uint32)
    matcher.fill(bits)
    return {i for i in range(32 * words) if bits[i // 32] >> (i % 32) & 1}


def talk(matcher, seed, longest=400):
    """A model that says anything that is allowed, but would rather end; → text, whether it ended."""
    rng, ids = np.random.default_rng(seed), []
    for _ in range(longest):
        choices = sorted(allowed(matcher))
        token = TOKENIZER.eos_id if TOKENIZER.eos_id in choices else int(rng.choice(choices))
        matcher.push(token)
        assert not matcher.error
        if token == TOKENIZER.eos_id:
            return TOKENIZER.decode(ids), True
        ids.append(token)
    return TOKENIZER.decode(ids), False


def test_any_talk_follows_the_schema():
    start, ended = Grammar(VOCABULARY, SCHEMA), 0
    for seed in range(30):
        text, complete = talk(Matcher(start), seed)
        ended += complete
        if complete:
            value = json.loads(text)
            assert value.keys() == SCHEMA["properties"].keys() and len(value["city"]) <= 8
            assert 0 <= value["size"] <= 999 and value["kind"] in ("big", "small")
            assert len(value["tags"]) <= 3 and all(type(tag) is bool for tag in value["tags"])
    assert ended > 20


def test_json_object():
    for seed in range(10):
        text, complete = talk(Matcher(Grammar(VOCABULARY, "json_object")), seed)
        assert text.lstrip().startswith("{") and (not complete or type(json.loads(text)) is dict)


def test_control_tokens_are_never_allowed_within():
    matcher = Matcher(Grammar(VOCABULARY, {"type": "string"}))
    for token in TOKENIZER.encode_text('"</think> <｜User｜>'):
        assert token in allowed(matcher)
        assert not allowed(matcher) & TOKENIZER.control_ids
        matcher.push(token)
    matcher.push(TOKENIZER.encode_text('"')[0])
    assert allowed(matcher) == {TOKENIZER.eos_id}


def test_the_answer_is_free_up_to_a_given_token():
    end = TOKENIZER.special(Special.THINK_CLOSE)
    matcher = Matcher(Grammar(VOCABULARY, {"const": 1}, Begin((end,))))
    for token in [*TOKENIZER.encode_text("{ no"), end]:
        assert {*range(32 * 12)} - allowed(matcher) == {TOKENIZER.eos_id}  # the answer would not be one
        matcher.push(token)
    assert all(TOKENIZER.decode([i]).strip() in ("1", "") for i in allowed(matcher))


def test_a_token_that_is_not_allowed_is_an_error():
    matcher = Matcher(Grammar(VOCABULARY, {"type": "integer"}))
    matcher.push(ord("x"))
    assert "x" in matcher.error
    assert len(allowed(matcher)) == 32 * 12  # it masks no more; who follows the answer reads the error


def test_where_a_grammar_ends_the_answer_may_end():
    """min_tokens forbade the only token that was allowed."""
    start = Grammar(VOCABULARY, Pattern("grammar", 'start: "ab"'))
    constraints = Constraints(Sampling(min_tokens=9), [], {TOKENIZER.eos_id}, Matcher(start))
    for token in TOKENIZER.encode_text("ab"):
        assert constraints.forbidden
        constraints.push(token)
    (changes,) = edits([constraints], 12 * 32)
    assert not constraints.forbidden and not np.isinf(changes.add).any()
    assert allowed(constraints.matcher) == {TOKENIZER.eos_id}


def test_requests_share_a_grammar_but_not_its_state():
    start = Grammar(VOCABULARY, {"type": "integer"})
    one, two = Matcher(start), Matcher(start)
    before = allowed(two)
    one.push(ord("1"))
    assert allowed(two) == before != allowed(one)


def accepts(form, text):
    """Whether the answer may be this text, as a whole."""
    matcher = Matcher(Grammar(VOCABULARY, form))
    for token in [*TOKENIZER.encode_text(text), TOKENIZER.eos_id]:
        if token not in allowed(matcher):
            return False
        matcher.push(token)
    return True


def test_white_space_is_that_of_python():
    value = {"a": 1, "b": [True, {"c": {}}]}
    assert accepts("json_object", json.dumps(value))
    for text in (json.dumps(value, indent=1), "{ }", '{"a":  1}', '{"a": 1} ', ' {"a": 1}'):
        assert not accepts("json_object", text), text


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"oneOf": [{"const": 1}, {"const": 2, "title": "two"}]}, ["1", "2"], ["3", "12"]),
        ({"oneOf": [{"const": 1}, {"enum": [True, "b", None]}]}, ["1", "true", '"b"', "null"], ["false"]),
        ({"properties": {"oneOf": {"oneOf": [{"const": 1}, {"const": 2}]}}}, ['{"oneOf": 2}'], ['{"oneOf": 3}']),
        ({"const": {"oneOf": [{"const": 1}, {"const": 2}]}}, ['{"oneOf": [{"const": 1}, {"const": 2}]}'], ["1"]),
    ],
)
def test_one_of_different_constants(schema, good, bad):
    assert all(accepts(schema, text) for text in good) and not any(accepts(schema, text) for text in bad)


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        (Pattern("regex", "[ab]+c?"), ["a", "abac"], ["c", "ad", ""]),
        (Pattern("grammar", 'start: "x" | NUMBER\nNUMBER: /[0-9]+/'), ["x", "17"], ["y", "x1"]),
        (Pattern("grammar", 'root ::= "yes" | "no" [0-9]'), ["yes", "no7"], ["no", "maybe"]),
    ],
)
def test_patterns(pattern, good, bad):
    assert all(accepts(pattern, text) for text in good) and not any(accepts(pattern, text) for text in bad)


@pytest.mark.parametrize(
    ("kind", "text"),
    [("regex", "(("), ("regex", "a(?=b)"), ("grammar", ""), ("grammar", "root ::= x"), ("grammar", 'start: "a')],
)
def test_patterns_that_cannot_be_enforced(kind, text):
    with pytest.raises(GrammarError, match=rf"^{kind}: \S.*$"):
        Grammar(VOCABULARY, Pattern(kind, text))


DEEP = {"type": "integer"}
for _ in range(240):
    DEEP = {"type": "array", "items": DEEP}


@pytest.mark.parametrize(
    "schema",
    [{"type": "nothing"}, {"type": 3}, {"x": {1}}, {"$ref": "https://x/y"}, {"$ref": "#"}, {"pattern": "(("}, DEEP]
    + [{"oneOf": [{"const": 1}, {"const": 1.0}]}, {"oneOf": [{"const": 1}, {"type": "integer"}]}]
    + [{"anyOf": []}, {"type": "string", "maxLength": 10**18}, {"const": "\ud800"}, [1], "json", None, False],
)
def test_schemas_that_cannot_be_enforced(schema):
    with pytest.raises(GrammarError, match=r"^json_schema: \S.*$"):
        Grammar(VOCABULARY, schema)
