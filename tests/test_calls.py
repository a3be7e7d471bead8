"""Forced calls: whatever a model would like to say, the parser finds calls whose arguments obey the schemas."""

import json
import re

import jsonschema
import numpy as np
import pytest

from ds4jax.chat import calls, template
from ds4jax.chat.calls import Calling
from ds4jax.chat.parser import parse
from ds4jax.engine.form import Begin, Either, Pattern
from ds4jax.engine.grammar import Grammar, Matcher, Vocabulary
from ds4jax.errors import Ds4Error
from ds4jax.io.tokenizer import Special, byte_tokenizer

TOKENIZER = byte_tokenizer()
VOCABULARY = Vocabulary(TOKENIZER)
DSML, END_THINK = TOKENIZER.special(Special.DSML), TOKENIZER.special(Special.THINK_CLOSE)
REQUIRED = Calling(required=True)

CITY = {"type": "string", "minLength": 1, "maxLength": 6}
COLOUR = {"enum": ["red", "dark </｜DSML｜parameter> red", None, 7]}
SCHEMAS = {
    "nothing": None,
    "empty": {"type": "object", "properties": {}},
    "closed": {"type": "object", "properties": {}, "additionalProperties": False},
    "kinds": {
        "type": "object",
        "properties": {
            "city": CITY,
            "days": {"type": "integer", "minimum": 1, "maximum": 20},
            "colour": COLOUR,
            "note": {"type": ["string", "null"], "maxLength": 3},
            "where": {"anyOf": [{"const": "here"}, {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}]},
            "code": {"type": "string", "pattern": "^[a-c]{2}$"},
            "one": {"oneOf": [{"const": "x"}, {"const": 1}]},
        },
        "required": ["city", "colour", "code", "one"],
        "additionalProperties": False,
    },
    "more": {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "referring": {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/point"}},
        "required": ["at"],
        "additionalProperties": False,
        "$defs": {
            "point": {"type": "array", "items": {"$ref": "#/$defs/a%20~1%20b"}, "minItems": 2, "maxItems": 2},
            "a / b": {"enum": [1, 2]},
        },
    },
    "either": {
        "anyOf": [
            {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False},
            {"type": "object", "properties": {"b": {"enum": ["x"]}}, "required": ["b"], "additionalProperties": False},
        ]
    },
    "quoted": {
        "type": "object",
        "properties": {'a "b"': {"type": "boolean"}},
        "required": ['a "b"'],
        "additionalProperties": False,
    },
}


def tools(*names, **options):
    return [
        {
            "type": "function",
            "function": {"name": name} | ({"parameters": schema} if schema is not None else {}) | options,
        }
        for name, schema in SCHEMAS.items()
        if not names or name in names
    ]


def matcher(tools, calling=REQUIRED, begin=None, other=None):
    begin = Begin() if begin is None else begin
    form = calls.grammar(TOKENIZER, tools, calling, begun=bool(begin.after) and begin.after[-1] == DSML)
    return Matcher(Grammar(VOCABULARY, form if other is None else Either(other, form), begin))


def talk(matcher, seed, longest=1500):
    """The ids of a model that says anything that is allowed, and rather goes on with a tag."""
    rng, ids = np.random.default_rng(seed), []
    while len(ids) < longest and not (ids and matcher.ended):
        bits = np.full(-(-TOKENIZER.vocab_size // 32), 2**32 - 1, np.uint32)
        matcher.fill(bits)
        allowed = [i for i in range(TOKENIZER.vocab_size) if bits[i // 32] >> (i % 32) & 1]
        ends = [i for i in (TOKENIZER.eos_id, DSML, ord("<"), ord("/")) if i in allowed]
        id = int(rng.choice(ends if ends and rng.random() < 0.7 else allowed))
        if id == TOKENIZER.eos_id:
            break
        ids.append(id)
        matcher.push(id)
        assert not matcher.error
    return ids


def called(ids, tools, **options):
    message, finish = parse(TOKENIZER, ids, thinking=False, tools=tools, **options)
    found = [call["function"] for call in message.get("tool_calls", [])]
    return [(call["name"], json.loads(call["arguments"])) for call in found], finish


@pytest.mark.parametrize("name", SCHEMAS)
def test_arguments_obey_the_schema(name):
    shown, seen, ended = tools(name), set(), 0
    start = matcher(shown)
    for seed in range(15):
        ids = talk(Matcher(start.grammar), seed)
        if ids[-1:] != TOKENIZER.encode_text(">"):
            continue  # cut by the limit
        found, finish = called(ids, shown)
        assert finish.reason == "tool_calls" and found, TOKENIZER.decode(ids)
        ended += 1
        for tool, arguments in found:
            assert tool == name
            jsonschema.validate(arguments, SCHEMAS[name] or {"type": "object"})
            seen |= {(key, type(value)) for key, value in arguments.items()}
    assert ended > 10
    if name == "kinds":
        kinds = {("city", str), ("colour", str), ("colour", type(None)), ("note", str), ("note", type(None))}
        assert kinds | {("where", str), ("where", list), ("days", int), ("code", str), ("one", int)} <= seen


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_the_template_writes_is_allowed(name):
    """The grammar's calls are spelled as those that the model was trained on."""
    examples = {
        "nothing": {"x": "any text", "y": [1]},
        "empty": {},
        "closed": {},
        "kinds": {"city": "Oslo", "days": 3, "colour": "red", "note": None, "where": "here", "one": 1},
        "more": {"a": True, "b": 3},
        "referring": {"at": [1, 2]},
    }
    if name not in examples:
        return
    shown = tools(name)
    arguments = examples[name]
    if name == "kinds":  # a string that must match a pattern is written as JSON
        shown[0]["function"]["parameters"] = {**SCHEMAS[name], "required": ["city", "colour", "one"]}
    call = {"id": "1", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
    turn = template.render(
        [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}],
        think="off",
        add_generation_header=False,
    )
    ids = template.to_ids(TOKENIZER, turn)
    ids = ids[ids.index(END_THINK) + 1 : -1]
    start = matcher(shown)
    for i, id in enumerate(ids):
        start.push(id)
        assert not start.error, (start.error, TOKENIZER.decode(ids[:i]))
    assert start.ended


def test_a_choice_of_tools_and_a_single_call():
    shown = tools("empty", "closed", "more")
    for seed in range(10):
        ids = talk(matcher(shown, Calling(required=True, only=frozenset({"closed"}), single=True)), seed)
        assert called(ids, shown)[0] == [("closed", {})]
    several = [called(talk(matcher(shown), seed), shown)[0] for seed in range(10)]
    assert max(map(len, several)) > 1 and {name for found in several for name, _ in found} > {"closed"}
    with pytest.raises(Ds4Error, match="tool_choice: found 'other'"):
        matcher(shown, Calling(required=True, only=frozenset({"other"})))


def test_calls_that_are_free_to_come():
    """Up to the control token the answer is free, and may end; then a strict tool's arguments obey."""
    shown = tools("closed", "kinds")
    begin = Begin((END_THINK, DSML), must=False)
    calling = Calling(strict=frozenset({"closed"}))
    head = [
        *TOKENIZER.encode_text("a <"),
        DSML,
        *TOKENIZER.encode_text("b"),
        END_THINK,
        *TOKENIZER.encode_text("c\n\n<"),
    ]
    names = set()
    for seed in range(10):
        start = matcher(shown, calling, begin)
        for id in [*head, DSML]:
            bits = np.full(-(-TOKENIZER.vocab_size // 32), 2**32 - 1, np.uint32)
            start.fill(bits)
            assert (bits == 2**32 - 1).all() and not start.ended
            start.push(id)
        ids = [*head[head.index(END_THINK) + 1 :], DSML, *talk(start, seed)]
        found, finish = called(ids, shown)
        names |= {name for name, _ in found}
        if finish.reason == "tool_calls":
            assert all(arguments == {} for name, arguments in found if name == "closed")
    assert names == {"closed", "kinds"}


def test_thoughts_cannot_be_all_of_a_turn_that_must_call():
    start = matcher(tools("empty"), begin=Begin((END_THINK,)))
    bits = np.full(-(-TOKENIZER.vocab_size // 32), 2**32 - 1, np.uint32)
    start.fill(bits)
    eos = TOKENIZER.eos_id
    assert not bits[eos // 32] >> (eos % 32) & 1 and bits[0] == 2**32 - 1
    start.push(END_THINK)
    assert called(talk(start, 0), tools("empty"))[0]


def test_calls_or_an_answer_by_a_schema():
    shown, schema = (
        tools("closed"),
        {
            "type": "object",
            "properties": {"ok": {"type": "boolean"}},
            "required": ["ok"],
            "additionalProperties": False,
        },
    )
    kinds = set()
    for seed in range(12):
        ids = talk(matcher(shown, Calling(), other=schema), seed)
        found, finish = called(ids, shown)
        kinds.add(finish.reason)
        if not found:
            jsonschema.validate(json.loads(TOKENIZER.decode(ids)), schema)
    assert kinds == {"stop", "tool_calls"}


@pytest.mark.parametrize(
    "pattern",
    [Pattern("regex", "[a-c]{2}/x</b>"), Pattern("lark", 'start: line+\nline: /[a-c]{2}/ "/x</b>" NL?\nNL: "\\n"')],
)
def test_the_text_of_a_tool_of_free_text(pattern):
    text = {"type": "object", "properties": {calls.FREE_TEXT: {"type": "string"}}, "required": [calls.FREE_TEXT]}
    shown = [{"type": "function", "name": "patch", "parameters": text}]
    for seed in range(8):
        ids = talk(matcher(shown, Calling(required=True, texts={"patch": pattern})), seed)
        found, _ = called(ids, shown)
        assert found or len(ids) == 1500
        for _, arguments in found:
            assert arguments.keys() == {"input"}
            assert re.fullmatch(r"([a-c]{2}/x</b>\n?)+", arguments["input"])


@pytest.mark.parametrize(
    "schema, message",
    [
        (True, "found true, expected the schema of an object"),
        ({"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}, "required": ["a"]}, "regex"),
        ({"anyOf": [{"properties": {"arguments": {}}}, {"properties": {"input": {}}}]}, "expected an object's type"),
    ],
)
def test_what_cannot_be_enforced_is_refused(schema, message):
    with pytest.raises(Ds4Error, match=message):
        matcher([{"name": "f", "parameters": schema}])


def test_definitions_are_written_where_they_are_used():
    """All of them at each of many parameters would be more than memory holds."""
    large = {f"d{i}": {"enum": [f"{i}" * 50]} for i in range(2000)}
    properties = {f"p{i}": {"$ref": f"#/$defs/d{i}"} for i in range(200)}
    schema = {"type": "object", "properties": properties, "$defs": large}
    text = calls.grammar(TOKENIZER, [{"name": "f", "parameters": schema}], REQUIRED, begun=False).text
    assert len(text) < 200_000 and "1" * 50 in text
    schema["properties"] = {f"p{i}": {"$ref": "#/$defs/all"} for i in range(200)}
    schema["$defs"] = large | {"all": {"anyOf": [{"$ref": f"#/$defs/{name}"} for name in large]}}
    with pytest.raises(Ds4Error, match="tools: f: parameters: found schemas of more than 1000000 characters"):
        calls.grammar(TOKENIZER, [{"name": "f", "parameters": schema}], REQUIRED, begun=False)
