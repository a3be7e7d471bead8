"""ds4jax.chat.parser: tokens to events, however the text is cut; what is rendered is read back; nothing is lost."""

import collections
import functools
import itertools
import json
import random
import re
from typing import Literal

import deepseek_reference as reference
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ds4jax.chat.parser import (
    Finish,
    OutputParser,
    TextDelta,
    ThinkingDelta,
    ToolCallDelta,
    ToolCallFinished,
    ToolCallStarted,
    message,
    new_call_id,
    parse,
)
from ds4jax.chat.template import SampledTurn, render, render_ids, to_text
from ds4jax.errors import Ds4Error
from ds4jax.io.tokenizer import Special, Tokenizer, byte_tokenizer

MAKE = {"bytes": functools.cache(byte_tokenizer), "real": reference.real}
SPECIALS = {special.value: special for special in Special}
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": {"p": {}, "n": {}, "o": {}}}},
    }
    for name in "fg"
]
OPEN, CLOSE = "<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>"
quick = settings(max_examples=150, deadline=None, derandomize=True)


@pytest.fixture(params=MAKE)
def tok(request):
    return MAKE[request.param]()


def invoke(name="f", *parameters):
    return f'<｜DSML｜invoke name="{name}">\n' + ("".join(parameters) or "\n") + "</｜DSML｜invoke>\n"


def param(key, value, string="true"):
    attribute = f' string="{string}"' if string else ""
    return f'<｜DSML｜parameter name="{key}"{attribute}>{value}</｜DSML｜parameter>\n'


def block(*invokes):
    return f"{OPEN}\n" + "".join(invokes) + CLOSE


def sampled(tok, text):
    """Ids of an answer; control tokens that the text spells are control tokens."""
    parts = re.split("(" + "|".join(SPECIALS) + ")", text)
    return tok.encode_segments(tok.special(SPECIALS[part]) if part in SPECIALS else part for part in parts if part)


@functools.cache
def by_first_byte(tok):
    """All text tokens by their first byte, with the bytes they stand for."""
    control = {tok.special(special) for special in Special}
    index = collections.defaultdict(list)
    for id in range(tok.vocab_size):
        if id not in control and tok.tokens[id] in tok._text:
            index[(text := tok.id_to_bytes(id))[0]].append((text, id))
    return index


def chopped(tok, ids, rng):
    """The same text and control tokens, cut into tokens at random."""
    control = {tok.special(special) for special in Special}
    out = []
    for is_control, run in itertools.groupby(ids, control.__contains__):
        if is_control:
            out += run
            continue
        rest = b"".join(map(tok.id_to_bytes, run))
        while rest:
            text, id = rng.choice([pair for pair in by_first_byte(tok)[rest[0]] if rest.startswith(pair[0])])
            out.append(id)
            rest = rest[len(text) :]
    return out


def joined(events):
    """Events with neighbouring deltas made one."""
    out = []
    for event in events:
        if isinstance(event, ThinkingDelta | TextDelta):
            assert event.text
        if isinstance(event, ToolCallDelta):
            assert event.arguments
        match out[-1] if out else None, event:
            case ThinkingDelta(before), ThinkingDelta(text):
                out[-1] = ThinkingDelta(before + text)
            case TextDelta(before), TextDelta(text):
                out[-1] = TextDelta(before + text)
            case ToolCallDelta(index, before), ToolCallDelta(same, arguments) if index == same:
                out[-1] = ToolCallDelta(index, before + arguments)
            case _:
                out.append(event)
    return out


def events_of(tok, ids, *, end: Literal["stop", "length"] = "stop", thinking=False, tools=TOOLS, stop=()):
    """All events, with predictable call ids; each id is pushed, also after the end."""
    ids, numbers = list(ids), itertools.count()
    parser = OutputParser(tok, thinking=thinking, tools=tools, stop=stop, new_id=lambda: f"id{next(numbers)}")
    events = []
    for id in ids:
        new = parser.push(id)
        assert not (new and events and isinstance(events[-1], Finish))
        events += new
        assert parser.done == isinstance(events[-1] if events else None, Finish)
    events += parser.finish(end)
    assert parser.done
    assert parser.finish(end) == []
    assert [isinstance(event, Finish) for event in events].count(True) == 1
    return events


def outline(events):
    """Events as short tuples; a finished call's arguments must be its deltas."""
    out, deltas, ids = [], collections.defaultdict(str), {}
    for event in joined(events):
        match event:
            case ThinkingDelta(text):
                out.append(("think", text))
            case TextDelta(text):
                out.append(("text", text))
            case ToolCallStarted(index, id, name):
                assert index == len(ids) and id not in ids.values()
                ids[index] = id
                out.append(("call", name))
            case ToolCallDelta(index, arguments):
                deltas[index] += arguments
                out.append(("json", arguments))
            case ToolCallFinished(index, id, name, arguments):
                assert (id, out[-2:]) == (ids[index], [("call", name), ("json", arguments)])
                assert deltas[index] == arguments
                assert isinstance(json.loads(arguments), dict)
                out.append("call ends")
            case Finish(reason, stop, turn, unfinished):
                assert (turn is not None) == (reason == "tool_calls")
                assert reason in ("tool_calls", "length") or "call ends" not in out
                out.append((reason, *filter(None, (stop, unfinished))))
    return out


def call(arguments, name="f"):
    return [("call", name), ("json", arguments), "call ends"]


ONE = block(invoke("f", param("p", "x")))
ONE_CALL = call('{"p":"x"}')
HALF = ONE[: ONE.index("</｜DSML｜invoke")]

# What is sampled, with which options, and what comes of it.
CASES = {
    "text": ("Hi.", {}, [("text", "Hi."), ("stop",)]),
    "nothing": ("", {}, [("stop",)]),
    "nothing, thinking": ("", {"thinking": True}, [("stop",)]),
    "eos": ("Hi.<｜end▁of▁sentence｜>never", {}, [("text", "Hi."), ("stop",)]),
    "length": ("Hi.", {"end": "length"}, [("text", "Hi."), ("length",)]),
    "thinking": ("R</think>A", {"thinking": True}, [("think", "R"), ("text", "A"), ("stop",)]),
    "empty thought": ("</think>A", {"thinking": True}, [("text", "A"), ("stop",)]),
    "endless thought": ("R", {"thinking": True, "end": "length"}, [("think", "R"), ("length",)]),
    "repeated <think>": ("<think><think>R</think>A", {"thinking": True}, [("think", "R"), ("text", "A"), ("stop",)]),
    "later <think>": ("R<think>S</think>A", {"thinking": True}, [("think", "R<think>S"), ("text", "A"), ("stop",)]),
    "<think>, off": ("<think>A", {}, [("text", "<think>A"), ("stop",)]),
    "stray </think>": ("</think>A</think>B", {}, [("text", "AB"), ("stop",)]),
    "stray </think>, thinking": (
        "R</think></think>A</think>", {"thinking": True}, [("think", "R"), ("text", "A"), ("stop",)],
    ),
    "stray </think> within the marker": ("A<</think>" + ONE[1:], {}, [("text", "A"), *ONE_CALL, ("tool_calls",)]),
    "other control tokens": ("A<｜User｜>B", {}, [("text", "A<｜User｜>B"), ("stop",)]),
    "call": (ONE, {}, [*ONE_CALL, ("tool_calls",)]),
    "call at the limit": (ONE, {"end": "length"}, [*ONE_CALL, ("tool_calls",)]),
    "after the call": (ONE + ">\n\nMore", {}, [*ONE_CALL, ("tool_calls",)]),
    "text and call": (f"Let me see: \r\n\t\n{ONE}", {}, [("text", "Let me see:"), *ONE_CALL, ("tool_calls",)]),
    "all": (
        f"R\n</think>\n\nA  b\n\n{ONE}", {"thinking": True},
        [("think", "R\n"), ("text", "\n\nA  b"), *ONE_CALL, ("tool_calls",)],
    ),
    "call in a thought": (f"R{ONE}S", {"thinking": True}, [("think", f"R{ONE}S"), ("stop",)]),
    "call in a thought, then one": (
        f"R{ONE}</think>{ONE}", {"thinking": True}, [("think", f"R{ONE}"), *ONE_CALL, ("tool_calls",)],
    ),
    "no tools": (f"A \n\n{ONE} B", {"tools": None}, [("text", f"A \n\n{ONE} B"), ("stop",)]),
    "empty list of tools": (ONE, {"tools": []}, [("text", ONE), ("stop",)]),
    "held at the end": ("2 <", {}, [("text", "2 <"), ("stop",)]),
    "spaces at the end": ("2 \n\n", {"end": "length"}, [("text", "2 \n\n"), ("length",)]),
    "almost a marker": ("2 \n<｜DSML｜tool_", {}, [("text", "2"), ("stop", " \n<｜DSML｜tool_")]),
    "almost a marker, at the limit": ("<｜DSML｜", {"end": "length"}, [("length", "<｜DSML｜")]),
    "almost a marker, and no tools": (
        "2 \n<｜DSML｜tool_", {"tools": None}, [("text", "2 \n<｜DSML｜tool_"), ("stop",)],
    ),
    "not a marker": ("2 <｜DSML｜tool> <b> < ｜DSML｜", {}, [("text", "2 <｜DSML｜tool> <b> < ｜DSML｜"), ("stop",)]),
    "call without its block": (invoke(), {}, [("text", invoke()), ("stop",)]),
    "two calls": (
        block(invoke("f", param("p", "x"), param("n", "[1, 2]", "false")), invoke("g")), {},
        [*call('{"p":"x","n":[1, 2]}'), *call("{}", "g"), ("tool_calls",)],
    ),
    "white space": (
        f'{OPEN} <｜DSML｜invoke  name="f" >\t<｜DSML｜parameter\nname="p" string="true" > x </｜DSML｜parameter>'
        f"</｜DSML｜invoke>\n\n{CLOSE}",
        {}, [*call('{"p":" x "}'), ("tool_calls",)],
    ),
    "unknown tool": (block(invoke("h i")), {}, [*call("{}", "h i"), ("tool_calls",)]),
    "json": (
        block(invoke("f", *(param(k, v, "false") for k, v in {
            "a": " -1.50 ", "b": "true", "c": '"s"', "d": '{"x":\n[]}', "e": "9" * 4000,
            "f": '["\\u003c/｜"]'}.items()))),
        {}, [*call(f'{{"a":-1.50,"b":true,"c":"s","d":{{"x":\n[]}},"e":{"9" * 4000},"f":["\\u003c/｜"]}}'),
             ("tool_calls",)],
    ),
    "not json": (
        block(invoke("f", *(param(k, v, "false") for k, v in {
            "a": "yes", "b": "NaN", "c": "-Infinity", "d": "", "e": "[1,", "f": " 'x' ", "g": "{" * 5000,
            "h": "1e400", "i": "9" * 5000}.items()))),
        {}, [*call(f'{{"a":"yes","b":"NaN","c":"-Infinity","d":"","e":"[1,","f":" \'x\' ","g":"{"{" * 5000}",'
                   f'"h":"1e400","i":"{"9" * 5000}"}}'),
             ("tool_calls",)],
    ),
    "escapes": (
        block(invoke("f", param("p", 'a "b" \\n \n\t\x01 é 🙂'), param("q\\>", "&amp; &lt; </p> 2>&1"))), {},
        [*call('{"p":"a \\"b\\" \\\\n \\n\\t\\u0001 é 🙂","q\\\\>":"&amp; &lt; </p> 2>&1"}'), ("tool_calls",)],
    ),
    "ends like the tag": (
        block(invoke("f", param("p", "2>&1<"), param("q", "x</"), param("r", "</｜"))), {},
        [*call('{"p":"2>&1<","q":"x</","r":"</｜"}'), ("tool_calls",)],
    ),
    "thinks in a value": (
        block(invoke("f", param("p", "<think></think>"))), {}, [*call('{"p":"<think></think>"}'), ("tool_calls",)],
    ),
    "｜DSML｜ in a value": (
        block(invoke("f", param("p", "｜DSML｜ &lt;/｜DSML｜parameter> /｜DSML｜>"),
                     param("q", "&lt;/｜DSML｜parameter>", "false"))), {},
        [*call('{"p":"｜DSML｜ </｜DSML｜parameter> /｜DSML｜>","q":"</｜DSML｜parameter>"}'), ("tool_calls",)],
    ),
    "no string=": (
        block(invoke("f", param("p", " <x> 1", ""), param("q", "", ""), param("r", " \n", ""))), {},
        [*call('{"p":" <x> 1","q":"","r":" \\n"}'), ("tool_calls",)],
    ),
    "parameters of a parameter": (
        block(invoke("f", param("a", "\n" + param("b", "x") + param("c", param("d", "1", "false"), ""), ""),
                     param("e", param("f", "", ""), "false"))),
        {}, [*call('{"a":{"b":"x","c":{"d":1}},"e":{"f":""}}'), ("tool_calls",)],
    ),
    "all arguments in one, a string": (
        block(invoke("f", param("arguments", ' {"p": 1e300}\n'))), {}, [*call('{"p": 1e300}'), ("tool_calls",)],
    ),
    "all arguments in one, an object": (
        block(invoke("f", param("input", "{}", "false")), invoke("f", param("input", '{"p": []}', "false"))), {},
        [*call("{}"), *call('{"p": []}'), ("tool_calls",)],
    ),
    "arguments, no object": (
        block(invoke("f", param("arguments", "[1]")), invoke("f", param("arguments", "[1]", "false"))), {},
        [*call('{"arguments":"[1]"}'), *call('{"arguments":[1]}'), ("tool_calls",)],
    ),
    "arguments and others": (
        block(invoke("f", param("arguments", "{}"), param("input", "{}"), param("p", "")),
              invoke("f", param("p", "", ""), param("input", "{}", "false"))),
        {}, [*call('{"arguments":"{}","input":"{}","p":""}'), *call('{"p":"","input":{}}'), ("tool_calls",)],
    ),
    "arguments without string=": (
        block(invoke("f", param("arguments", "{}", ""))), {}, [*call('{"arguments":"{}"}'), ("tool_calls",)],
    ),
    "arguments of an unknown tool": (
        block(invoke("h", param("arguments", "{}"))), {}, [*call('{"arguments":"{}"}', "h"), ("tool_calls",)],
    ),
    "unfinished": (
        f"A\n{HALF}", {}, [("text", "A"), ("call", "f"), ("json", '{"p":"x"'), ("error", f"\n{HALF}")],
    ),
    "unfinished at the limit": (
        f'{OPEN}<｜DSML｜invoke name="f', {"end": "length"}, [("length", f'{OPEN}<｜DSML｜invoke name="f')],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_events(tok, name):
    text, options, expected = CASES[name]
    assert outline(events_of(tok, sampled(tok, text), **options)) == expected


@pytest.mark.parametrize("name", CASES)
def test_the_cut_into_tokens_changes_nothing(tok, name):
    text, options, expected = CASES[name]
    rng = random.Random(name)
    for _ in range(5):
        ids = chopped(tok, sampled(tok, text), rng)
        assert outline(events_of(tok, ids, **options)) == expected


P = param("p", "x")
MALFORMED = {
    "empty": (block(), []),
    "text in the call": (block(invoke("f", P, "and ", P)), [("call", "f"), ("json", '{"p":"x"')]),
    "</think> between tags": (block(invoke("f", P, "</think>")), [("call", "f"), ("json", '{"p":"x"')]),
    "no name": (block(invoke("")), []),
    "unquoted name": (block("<｜DSML｜invoke name=f>\n", P, "</｜DSML｜invoke>"), []),
    "nameless parameter": (block(invoke("f", "<｜DSML｜parameter>x</｜DSML｜parameter>")), [("call", "f")]),
    "quote in a name": (block(invoke('f"g', P)), []),
    "string=maybe": (block(invoke("f", param("p", "x", "maybe"))), [("call", "f")]),
    "wrong tag": (block("<｜DSML｜function>", invoke("f", P)), []),
    "parameter in the block": (block(P), []),
    "call in a call": (block("<｜DSML｜invoke name='f'>", invoke()), []),
    "call not closed": (block('<｜DSML｜invoke name="f">\n', P), [("call", "f"), ("json", '{"p":"x"')]),
    "call closed by a parameter": (block('<｜DSML｜invoke name="f">', "</｜DSML｜parameter>"), [("call", "f")]),
    "value not closed": (
        block(invoke("f", '<｜DSML｜parameter name="p" string="true">x')), [("call", "f"), ("json", '{"p":"x')],
    ),
    "value swallows a call": (
        block(invoke("f", '<｜DSML｜parameter name="p" string="true">x'), invoke("f", P)),
        [("call", "f"), ("json", '{"p":"x')],
    ),
    "value swallows a parameter": (
        block(invoke("f", '<｜DSML｜parameter name="o" string="true">x y', P)), [("call", "f"), ("json", '{"o":"x y')],
    ),
    "json not closed": (
        block(invoke("f", '<｜DSML｜parameter name="p" string="false">1', P)), [("call", "f"), ("json", '{"p":')],
    ),
    "block closed in a value": (
        OPEN + '<｜DSML｜invoke name="f"><｜DSML｜parameter name="p" string="true">x<' + CLOSE,
        [("call", "f"), ("json", '{"p":"x<')],
    ),
    "far parameters of a parameter": (
        block(invoke("f", param("p", " " * 300 + P, ""))), [("call", "f"), ("json", f'{{"p":"{" " * 300}')],
    ),
    "endless tag": (block(invoke("f", param("p" * 2000, "x"))), [("call", "f")]),
}  # fmt: skip


# What a block holds, the calls that come of it, and the text of the rest.
G = param("o", "1", "false")
MIXED = {
    "text before the call": (["Sure: ", invoke("f", P)], "f", "Sure:"),
    "text after the call": ([invoke("f", P), " ."], "f", "."),
    "text between calls": ([invoke("f", P), "and\n", invoke("g", G), "."], "fg", "and\n\n."),
    "</think> between calls": ([invoke("f", P), "</think>", invoke("g", G)], "fg", "</think>"),
    "text in the second call": ([invoke("f", P), bad := invoke("g", ".")], "f", bad.strip()),
    "the second of three": (
        [invoke("f", P), bad := invoke("g", '<｜DSML｜parameter name="p" string="true">x'), invoke("g", G)], "fg",
        bad.strip(),
    ),
    "the second and the fourth": (
        [invoke("f", P), invoke("g", "1"), invoke("g", G), invoke("f", "2"), invoke("f", P)], "fgf",
        f'{invoke("g", "1")}{invoke("f", "2")}'.strip(),
    ),
    "within a string, after an escape": (
        [invoke("f", P), bad := invoke("f", '<｜DSML｜parameter name="p" string="true">x &lt;/｜DSML｜param'),
         invoke("f", P)], "ff", bad.strip(),
    ),
    "json not closed": (
        [invoke("f", P), bad := invoke("f", '<｜DSML｜parameter name="p" string="false">1'),
         invoke("f", param("n", "2", "false"))], "ff", bad.strip(),
    ),
    "all arguments in one, not closed": (
        [invoke("f", P), bad := invoke("g", param("arguments", "{}"), "."), invoke("f", P)], "ff", bad.strip(),
    ),
    "no name, then a call": ([bad := invoke("")[:-1], invoke("f", P)], "f", bad),
    "tag too long, then a call": (
        [bad := invoke("h" * 2000)[:-1], invoke("f", P), worse := invoke("h" * 2000)[:-1]], "f", f"{bad}\n{worse}",
    ),
    "call not closed": (
        [invoke("f", P), bad := '<｜DSML｜invoke name="g">\n' + G + invoke("f", P)], "f", bad.strip(),
    ),
    "calls in a value": (
        [invoke("f", P), bad := invoke("g", param("p", f"like {invoke('f')} and {invoke('f')}.")), invoke("g", G)],
        "fg", bad.strip(),
    ),
    "block in a value": (
        [invoke("f", P), bad := f'<｜DSML｜invoke name="g"><｜DSML｜parameter name="p">{OPEN}{invoke()}'],
        "f", bad.strip(),
    ),
    "parameter between calls": ([invoke("f", P), bad := P + invoke("g", G)], "f", bad.strip()),
    "wrong tag between calls": ([invoke("f", P), bad := "<｜DSML｜function>" + invoke("g", G)], "f", bad.strip()),
    "closed too often": ([invoke("f", P), bad := "</｜DSML｜invoke>\n" + invoke("g", G)], "f", bad.strip()),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_what_is_whole_in_a_malformed_block_is_delivered(tok, name):
    parts, names, rest = MIXED[name]
    for before in ("", "A"):
        ids = sampled(tok, f"{before}\n\n{block(*parts)}")
        for cut in (ids, chopped(tok, ids, random.Random(name))):
            events = events_of(tok, cut)
            *calls, text, end = outline(events)
            assert "".join(e[1] for e in calls if e[0] == "call") == names
            assert calls.count("call ends") == len(names)
            assert (text, end) == (("text", "\n\n" * bool(before) + rest), ("tool_calls", rest))
            said = message(events)
            assert said["content"] == (f"A\n\n{rest}" if before else rest)
            assert events[-1].turn.message == said


def test_a_call_that_was_streamed_cannot_be_left_out():
    """A client would take it for one: no call after it counts."""
    tok = MAKE["bytes"]()
    text = block(invoke("f", P, "."), invoke("g"))
    assert outline(events_of(tok, sampled(tok, text))) == [
        ("call", "f"), ("json", '{"p":"x"'), ("text", text), ("stop",),
    ]  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_block_is_text_and_its_calls_stay_unfinished(tok, name):
    text, started = MALFORMED[name]
    expected = [("text", "A"), *started, ("text", f"\n\n{text}"), ("stop",)]
    ids = sampled(tok, f"A\n\n{text}")
    for cut in (ids, chopped(tok, ids, random.Random(name))):
        events = events_of(tok, cut, end="length")
        got = outline(events)
        if started:
            assert got == expected
        else:  # two neighbouring texts
            assert got == [("text", f"A\n\n{text}"), ("stop",)]
        assert "tool_calls" not in message(events)


INVOKES = st.builds(
    lambda name, parameters: invoke(name, *parameters),
    st.sampled_from("fg"),
    st.lists(
        st.sampled_from([P, G, param("p", "2 </ <｜é\n"), param("p", "", ""), param("input", '{"p": 1}'),
                         param("o", param("p", "x"), ""), param("a", "</think>")]),
        max_size=3, unique=True,
    ),
)  # fmt: skip


@settings(quick, max_examples=20)
@given(
    st.sampled_from(["", "A \n", "2 <"]),
    st.lists(INVOKES, min_size=1, max_size=3),
    st.sampled_from(["stop", "length"]),
    st.sampled_from(sorted(MAKE)),
    st.randoms(use_true_random=False),
)
def test_a_cut_loses_no_finished_call_and_shows_no_piece_of_a_tag(before, invokes, end, make, rng):
    tok = MAKE[make]()
    ids = chopped(tok, sampled(tok, before + block(*invokes)), rng)
    calls = message(events_of(tok, ids))["tool_calls"]
    assert len(calls) == len(invokes)
    for n in range(len(ids) + 1):
        events = events_of(tok, ids[:n], end=end)
        outline(events)
        text, said, finish = tok.decode(ids[:n]), message(events), events[-1]
        *_, last = parts = text.split("</｜DSML｜invoke>")
        assert said.get("tool_calls", []) == calls[: len(parts) - 1]
        closed, last = last.endswith(CLOSE), last.removesuffix(CLOSE)
        content, said_before, rest = said["content"] or "", before.rstrip(), last.strip()
        if len(parts) == 1:
            marked = text.startswith(f"{before}<｜DSML｜")
            assert content == (said_before if marked else text)
            assert content + finish.unfinished == text
            assert finish.reason == ("error" if OPEN in text and end == "stop" else end)
        elif end == "length" and not closed:
            assert (finish.reason, finish.unfinished, content) == ("length", rest, said_before)
        else:
            assert (finish.reason, finish.unfinished) == ("tool_calls", rest)
            tags, last = ("<@invoke", "</@invoke>", "</@tool_calls>"), last.replace("｜DSML｜", "@")
            piece = max(i for tag in tags for i in range(len(tag)) if last.endswith(tag[:i]))
            shown = last[: len(last) - piece].strip().replace("@", "｜DSML｜")
            assert content == "\n\n".join(filter(None, (said_before, shown)))


@pytest.mark.parametrize("end", ["stop", "length"])
def test_a_cut_never_shows_a_piece_of_the_marker(tok, end):
    marker = sampled(tok, OPEN)
    for before, space in itertools.product(["", "2 <", "a ｜DSML｜"], ["", " ", "\n\n"]):
        for n in range(marker.index(tok.special(Special.DSML)) + 1, len(marker)):
            events = events_of(tok, [*sampled(tok, before), *tok.encode_text(space), *marker[:n]], end=end)
            assert joined(events)[:-1] == [TextDelta(before)] * bool(before)
            assert events[-1] == Finish(end, unfinished=space + tok.decode(marker[:n]))


def test_a_spelled_marker_is_shown_wherever_it_is_cut():
    tok = MAKE["real"]()
    for n in range(len(OPEN) + 1):
        said, finish = parse(tok, tok.encode_text(f"a {OPEN[:n]}"), thinking=False, tools=TOOLS)
        assert (said["content"], finish) == (f"a {OPEN[:n]}", Finish("stop"))


def test_a_stop_string_at_a_cut_before_the_marker(tok):
    for text, expected in {"a ST": [("text", "a ST")], "a STOP": [("text", "a ")]}.items():
        got = outline(events_of(tok, sampled(tok, f"{text} <｜DSML｜"), stop=["STOP"], end="length"))
        end = ("stop_sequence", "STOP") if text.endswith("P") else ("length", " <｜DSML｜")
        assert got == [*expected, end]


def test_the_deltas_come_as_early_as_they_can():
    """One byte at a time: what is held back is only what may still become something else."""
    tok = MAKE["bytes"]()
    parser = OutputParser(tok, thinking=True, tools=TOOLS, stop=["END"], new_id=lambda: "id0")
    first = invoke("f", param("p", "a </b &lt;é"), param("n", "[1]", "false")).strip()
    text = f"R <</think>2 < 3 EN.{OPEN}\n{first}"
    control = {tok.special(special) for special in Special}
    ids = [id for i in sampled(tok, text) for id in ([i] if i in control else tok.id_to_bytes(i))]
    by_push = [outline(parser.push(id)) for id in ids[:-1]]
    seen = ["".join(text for _, text in events) for events in by_push if events]
    assert [type(event) for event in parser.push(ids[-1])] == [ToolCallDelta, ToolCallFinished]
    by_push = [parser.push(id) for id in sampled(tok, f"\n{invoke().strip()}")]
    assert not any(by_push[:-1])  # a later call comes as a whole
    assert [type(event) for event in by_push[-1]] == [ToolCallStarted, ToolCallDelta, ToolCallFinished]
    assert seen == ["R", " ", "<", "2", " <", " 3", " ", "EN.",
                    "f", '{"p":"', "a", " ", "</b", " ", "&lt;é", '"', ',"n":', "[1]"]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("a STOP b", ["STOP"], ["a ", "STOP"]),
        ("a STOP", ["STOP"], ["a ", "STOP"]),
        ("STO STOSTOP", ["STOP"], ["STO STO", "STOP"]),
        ("a STO", ["STOP"], ["a STO", None]),
        ("aabaac", ["aac"], ["aab", "aac"]),
        ("one two", ["two", "one"], ["", "one"]),
        ("abcd", ["abcd", "bc"], ["a", "bc"]),  # the first to be complete
        ("abcd", ["cd", "abcd", "d"], ["", "abcd"]),  # complete at once: the longest
        ("x🙂y", ["🙂"], ["x", "🙂"]),
        ("line\n\nnext", ["\n\n"], ["line", "\n\n"]),
        ("line\n\n", ["\n\n"], ["line", "\n\n"]),
        (f"line\n\n{ONE}", ["\n\n"], ["line", ONE]),  # white space before calls is never shown
        (f"line {ONE}", ["x", "p", OPEN], ["line", ONE]),  # nor are the calls
        ("a </think>b", ["a b"], ["", "a b"]),
        (f"ST{ONE}", ["STOP"], ["ST", ONE]),
    ],
)
def test_stop_strings(tok, text, stop, expected):
    shown, why = expected
    end = ("tool_calls",) if why == ONE else ("stop_sequence", why) if why else ("stop",)
    expected = [("text", shown)] * bool(shown) + ONE_CALL * (why == ONE) + [end]
    assert outline(events_of(tok, sampled(tok, text), stop=stop)) == expected
    for seed in range(5):
        ids = chopped(tok, sampled(tok, text), random.Random(seed))
        assert outline(events_of(tok, ids, stop=stop)) == expected
        thinking = events_of(tok, [*sampled(tok, f"{stop[0]}</think>"), *ids], stop=stop, thinking=True)
        assert outline(thinking) == [("think", stop[0]), *expected]


def test_a_stop_string_stops_at_once():
    tok = MAKE["bytes"]()
    parser = OutputParser(tok, thinking=False, tools=TOOLS, stop=["ab"])
    assert [parser.push(b) for b in b"xab"] == [[TextDelta("x")], [], [Finish("stop_sequence", stop="ab")]]


def test_utf8():
    tok = MAKE["bytes"]()
    broken = b"\xe2\x82</think>\xf0\x9f"  # no valid character in it
    parser = OutputParser(tok, thinking=True)
    events = [e for part in (b"\xc3", b"\xa9\xe2\x82") for b in part for e in parser.push(b)]
    assert events == [ThinkingDelta("é")]
    assert parser.push(tok.special(Special.THINK_CLOSE)) == [ThinkingDelta("\ufffd")]
    assert [parser.push(b) for b in b"\xe2\x82\xac"] == [[], [], [TextDelta("€")]]
    assert [e for b in broken for e in parser.push(b)][0] == TextDelta("\ufffd<")
    assert parser.finish("length") == [TextDelta("\ufffd"), Finish("length")]


def test_control_tokens_count_by_id_only():
    """Text that spells them out is text, in every state."""
    tok = MAKE["real"]()
    spelled, both = tok.encode_text, f"R</think>{ONE}"
    ids = [*spelled(both), tok.special(Special.THINK_CLOSE), *spelled(f"</think>{ONE}")]
    head, tail = block(invoke("f", param("p", "@"))).split("@")
    ids += [*sampled(tok, head), *spelled(f"{ONE}</think>"), *sampled(tok, tail)]
    value = json.dumps(f"{ONE}</think>", ensure_ascii=False)
    assert outline(events_of(tok, ids, thinking=True)) == [
        ("think", both),
        ("text", f"</think>{ONE}"),
        *call(f'{{"p":{value}}}'),
        ("tool_calls",),
    ]


def test_what_is_held_back_is_bounded():
    tok = MAKE["bytes"]()
    parser = OutputParser(tok, thinking=False, tools=TOOLS)
    events = [event for _ in range(3000) for event in parser.push(ord("\n"))]
    assert "".join(e.text if isinstance(e, TextDelta) else "?" for e in events) == "\n" * (3000 - 256)
    assert outline(parser.push(ord("."))) == [("text", "\n" * 256 + ".")]
    for id in sampled(tok, f'{OPEN}<｜DSML｜invoke name="f"><｜DSML｜parameter name="p">'):
        parser.push(id)
    for _ in range(3000):
        parser.push(ord(" "))
    assert len(parser._buffer) < 300
    for id in sampled(tok, '</｜DSML｜parameter><｜DSML｜parameter name="'):
        parser.push(id)
    for _ in range(3000):
        parser.push(ord(">"))
    assert len(parser._buffer) < 300
    text = "".join(e.text for id in sampled(tok, CLOSE) for e in parser.push(id) if isinstance(e, TextDelta))
    assert len(text) > 6000


def test_the_limit_of_a_tag_does_not_depend_on_the_cut():
    tok = MAKE["real"]()
    finished = 0
    for n in range(960, 1024, 3):
        text = block(invoke("f", param("=" * n, "x")))
        once, again = (outline(events_of(tok, chopped(tok, sampled(tok, text), random.Random(i)))) for i in range(2))
        assert once == again
        finished += once[-1] == ("tool_calls",)
    assert 0 < finished < 22


def test_reasoning_tokens(tok):
    parser = OutputParser(tok, thinking=True)
    ids = sampled(tok, "<think>Some thought.</think>Answer</think>.")
    for id in ids:
        parser.push(id)
    assert parser.reasoning_tokens == ids.index(tok.special(Special.THINK_CLOSE)) + 1
    assert OutputParser(tok, thinking=False).reasoning_tokens == 0


def test_call_ids():
    ids = {new_call_id() for _ in range(10)} | {new_call_id("toolu_")}
    assert len(ids) == 11
    assert all(re.fullmatch("(call_|toolu_)[0-9a-f]{32}", id) for id in ids)
    tok = MAKE["bytes"]()
    parser = OutputParser(tok, thinking=False, tools=TOOLS)
    events = [e for id in sampled(tok, block(invoke(), invoke())) for e in parser.push(id)]
    started = [e.id for e in events if isinstance(e, ToolCallStarted)]
    finished = [e.id for e in events if isinstance(e, ToolCallFinished)]
    finish = events[-1]
    assert isinstance(finish, Finish) and finish.turn
    assert started == finished == [c["id"] for c in finish.turn.message["tool_calls"]]
    assert len(set(started)) == 2
    assert started[0].startswith("call_")


def test_bad_options():
    tok = MAKE["bytes"]()
    with pytest.raises(Ds4Error, match="stop: found an empty string"):
        OutputParser(tok, thinking=False, stop=["a", ""])
    with pytest.raises(Ds4Error, match=r"tools\[0\].name: found nothing"):
        OutputParser(tok, thinking=False, tools=[{}])
    metadata = tok.to_metadata()
    metadata["tokenizer.ggml.tokens"] = [t.replace("DSML", "other") for t in tok.tokens]
    with pytest.raises(Ds4Error, match="control token dsml"):
        OutputParser(Tokenizer.from_metadata(metadata), thinking=False)


def test_a_tool_without_a_usable_schema():
    tok = MAKE["bytes"]()
    text = block(invoke("f", param("arguments", "{}")))
    for schema in ({}, {"parameters": None}, {"parameters": {"properties": []}}, {"parameters": {"properties": {}}}):
        events = events_of(tok, sampled(tok, text), tools=[{"name": "f", **schema}])
        assert outline(events) == [*call('{"arguments":"{}"}'), ("tool_calls",)]


# Messages, rendered and read back.

USER = {"role": "user", "content": "Q"}


def answer(content, arguments=(), reasoning=None, names="ffff"):
    out = {"role": "assistant", "content": content}
    if reasoning:
        out["reasoning_content"] = reasoning
    if arguments:
        out["tool_calls"] = [
            {"id": f"id{i}", "type": "function", "function": {"name": name, "arguments": a}}
            for i, (a, name) in enumerate(zip(arguments, names, strict=False))
        ]
    return out


def rendered(tok, message, think):
    """The ids that an assistant's message has after its header, up to EOS."""
    options = {"think": think, "tools": TOOLS}
    prompt = render_ids(tok, [USER], **options)
    ids = render_ids(tok, [USER, message], add_generation_header=False, **options)
    assert ids[: len(prompt)] == prompt
    assert ids[-1] == tok.eos_id
    return ids[len(prompt) :]


def read(tok, ids, think="on", tools=TOOLS):
    numbers = itertools.count()
    return parse(tok, ids, thinking=think != "off", tools=tools, new_id=lambda: f"id{next(numbers)}")


TEXTS = st.text(max_size=12) | st.lists(
    st.sampled_from(
        [*SPECIALS, "<", "</", ">", "｜DSML｜parameter", "</｜DSML｜parameter>", "</｜DSML｜parameter", OPEN, CLOSE]
        + ["&lt;", "&amp;", "2>&1", "\\u003c", '"', "\\", "\n", " ", "a", "é", "\x00", "\ud800", "🙂", "NaN", "{}"]
    ),
    max_size=6,
).map("".join)  # fmt: skip
VALUES = st.recursive(
    TEXTS | st.integers() | st.floats() | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
KEYS = st.text(max_size=8).filter(lambda key: '"' not in key)
OBJECTS = st.dictionaries(KEYS, VALUES, max_size=4).filter(lambda o: not {"arguments", "input"} & o.keys())
ARGUMENTS = OBJECTS.map(json.dumps) | TEXTS
MESSAGES = st.builds(
    answer,
    TEXTS.map(lambda text: text.rstrip(" \t\r\n")),  # before calls it would be dropped
    st.lists(ARGUMENTS, max_size=3),
    TEXTS,
    st.lists(KEYS.filter(bool), min_size=3, max_size=3),
)


@quick
@given(MESSAGES, st.sampled_from(["on", "off"]), st.sampled_from(sorted(MAKE)))
def test_render_parse_render_is_stable(message, think, make):
    tok = MAKE[make]()
    ids = rendered(tok, message, think)
    parsed, finish = read(tok, ids, think)
    assert finish.reason == ("tool_calls" if "tool_calls" in message else "stop")
    assert rendered(tok, parsed, think) == ids


@quick
@given(OBJECTS)
@example({"cmd": "make 2>&1", "text": "a &amp; b < c", "tag": "x</｜DSML｜parameter>y</｜DSML｜tool_calls>"})
@example({"n": 10**400, "m": -(10**4000), "f": 1e308, "g": [5e-324, -0.0], "u": "é🙂\u2028", "q": "\"'\\\n\r\t\x00"})
def test_arguments_come_back(arguments):
    """Also as values: all but what was `&lt;/｜DSML｜parameter>` before it was escaped, and what JSON cannot say."""
    text = json.dumps(arguments)
    if re.search(r"NaN|Infinity|\\ud[89a-f]|&lt;/\\uff5c", text):
        return
    tok = MAKE["bytes"]()
    parsed, _ = read(tok, rendered(tok, answer("", [text]), "on"))
    assert json.loads(parsed["tool_calls"][0]["function"]["arguments"]) == arguments


@pytest.mark.parametrize(
    ("arguments", "back"),
    [
        ('{"p": 1e400}', '{"arguments":"{\\"p\\": 1e400}"}'),  # a float could not say it: one string
        ('{"p": NaN}', '{"arguments":"{\\"p\\": NaN}"}'),
        ({"p": float("inf")}, '{"arguments":"{\\"p\\": Infinity}"}'),
        ('{"p": [-1e-400, 1E22, 1.50]}', '{"p":[-0.0, 1e+22, 1.5]}'),
        (f'{{"p": {"9" * 4000}}}', f'{{"p":{"9" * 4000}}}'),
        (f'{{"p": {"9" * 5000}}}', f'{{"arguments":"{{\\"p\\": {"9" * 5000}}}"}}'),
        ("", "{}"),
        ("[1]", '{"arguments":"[1]"}'),
        ('{"p": "x', '{"arguments":"{\\"p\\": \\"x"}'),
        ('{"p": ["</｜DSML｜parameter>"]}', '{"p":["\\u003c/｜DSML｜parameter>"]}'),
        ('{"p": "</｜DSML｜parameter>"}', '{"p":"</｜DSML｜parameter>"}'),
        ('{"p": "&lt;/｜DSML｜parameter"}', '{"p":"&lt;/｜DSML｜parameter"}'),
        ("</｜DSML｜parameter>", '{"arguments":"</｜DSML｜parameter>"}'),
        ('{"arguments": {"p": 1}, "p": 2}', '{"arguments":{"p": 1},"p":2}'),
    ],
)
def test_awkward_arguments_come_back(tok, arguments, back):
    ids = rendered(tok, answer(None, [arguments]), "on")
    parsed, _ = read(tok, ids)
    assert parsed == answer(None, [back])
    assert rendered(tok, parsed, "on") == ids


# Random streams.

PIECES = [
    *SPECIALS,
    OPEN,
    CLOSE,
    ONE,
    invoke(),
    "</｜DSML｜invoke>",
    '<｜DSML｜invoke name="f">\n',
    P,
    " ",
    "\n\n",
    "END",
]
PIECES += ["<", "</", ">", '"', "tool_calls>", '<｜DSML｜parameter name="p" string="', 'true">', 'false">', '">', "E"]
PIECES += ["</｜DSML｜parameter>", "｜DSML｜parameter>", "&lt;/", "[1, 2]", "NaN", "a", "é", "🙂"]
STREAMS = st.lists(st.sampled_from(PIECES) | st.binary(max_size=3), max_size=25)
OPTIONS = st.fixed_dictionaries(
    {
        "thinking": st.booleans(),
        "tools": st.sampled_from([None, TOOLS]),
        "stop": st.sampled_from([(), ("END",), ("ND", "E\n", "\n\n")]),
        "end": st.sampled_from(["stop", "length"]),
    }
)


def stream(tok, pieces):
    return [id for piece in pieces for id in (piece if isinstance(piece, bytes) else sampled(tok, piece))]


@settings(quick, max_examples=250)
@given(STREAMS, OPTIONS, st.randoms(use_true_random=False))
def test_any_stream_gives_the_same_events_however_it_is_cut(pieces, options, rng):
    tok = MAKE["bytes"]()
    ids = stream(tok, pieces)
    once, again = (outline(events_of(tok, cut, **options)) for cut in (ids, chopped(tok, ids, rng)))
    assert once == again


@settings(quick, max_examples=250)
@given(STREAMS, OPTIONS)
def test_no_text_is_lost(pieces, options):
    """Thought, text and what is unfinished are the sampled text, less the tags that are swallowed."""
    tok = MAKE["bytes"]()
    ids = stream(tok, pieces)
    events = events_of(tok, ids, **options)
    said, finish = message(events), events[-1]
    think, close = tok.special(Special.THINK_OPEN), tok.special(Special.THINK_CLOSE)
    ids = list(itertools.takewhile(lambda id: id != tok.eos_id, ids))
    if options["thinking"]:
        ids = list(itertools.dropwhile(lambda id: id == think, ids))
        n = ids.index(close) if close in ids else len(ids)
        assert said.get("reasoning_content", "") == tok.decode(ids[:n])
        ids = ids[n:]
    text = "".join(tok.decode(run) for is_tag, run in itertools.groupby(ids, close.__eq__) if not is_tag)
    shown = (said["content"] or "") + finish.unfinished
    whole = shown.replace("</think>", "")  # in a block they are kept
    match finish.reason:
        case "tool_calls" | "length" if "tool_calls" in said:
            before, _, inside = text.partition(OPEN)
            before, content = before.rstrip(" \t\r\n"), (said["content"] or "").replace("</think>", "")
            rest = finish.unfinished.replace("</think>", "")
            assert content.startswith(before) and rest.startswith(content.removeprefix(before).lstrip())
            following = iter(inside)
            assert all(letter in following for letter in rest)  # in this order
        case "stop_sequence":
            assert text.startswith(whole + finish.stop)
        case "stop" if whole.endswith(CLOSE):  # malformed: nothing is read after it
            assert text.startswith(whole)
        case _:
            assert whole == text
    if options["tools"] is None:
        assert not any(isinstance(event, ToolCallStarted) for event in events)


@settings(quick, max_examples=100)
@given(st.lists(st.integers(0, 129279), max_size=40), OPTIONS)
def test_any_ids_of_the_real_vocabulary(ids, options):
    """Nothing raises; the checks in `outline` and `events_of` hold."""
    outline(events_of(MAKE["real"](), ids, **options))


# Exact replay of sampled turns.


def conversation(tok, text, think="on", seed=0):
    """A prompt, an answer sampled with an unusual cut into tokens, its turn, and the messages that follow it."""
    options = {"think": think, "tools": TOOLS}
    prompt = render_ids(tok, [USER], **options)
    ids = chopped(tok, sampled(tok, text), random.Random(seed))
    said, finish = parse(tok, ids, thinking=think != "off", tools=TOOLS)
    results = [{"role": "tool", "tool_call_id": c["id"], "content": "A"} for c in said["tool_calls"]]
    replay = {c["id"]: finish.turn for c in said["tool_calls"]}
    return prompt, ids, [USER, said, *results], {**options, "replay": replay}


SLOPPY = block(invoke("f", param("o", '{"b":1,  "a":1.50}', "false"), param("p", "x")), invoke("g"))
TURNS = {
    "on": f"<think>Thought. </think>Text. \n {SLOPPY}",
    "off": f"Text.</think>{SLOPPY}",
}


@pytest.mark.parametrize("think", TURNS)
def test_a_sampled_turn_is_repeated_token_by_token(tok, think):
    prompt, ids, messages, options = conversation(tok, TURNS[think], think)
    again = render_ids(tok, messages, **options)
    assert again[: len(prompt) + len(ids) + 1] == [*prompt, *ids, tok.eos_id]
    canonical = render_ids(tok, messages, **options | {"replay": None})
    assert again != canonical
    n = len(prompt) + len(ids)
    assert again[n:] == canonical[canonical.index(tok.eos_id, len(prompt)) :]


@pytest.mark.parametrize("name", MIXED)
def test_a_turn_with_text_after_its_calls_is_repeated_too(tok, name):
    text = f"R</think>A\n\n{block(*MIXED[name][0])}"
    for turn in (text, text.removesuffix(CLOSE), text[:-3]):  # also where the model ended it too early
        prompt, ids, messages, options = conversation(tok, turn)
        assert messages[1]["content"].startswith("A\n\n")
        messages[1] = json.loads(json.dumps(messages[1]))
        again = render_ids(tok, messages, **options)
        assert again[: len(prompt) + len(ids) + 1] == [*prompt, *ids, tok.eos_id]
        messages[1]["content"] += "."
        assert render_ids(tok, messages, **options) == render_ids(tok, messages, **options | {"replay": None})


def replayed(messages, options):
    return any(isinstance(segment, int) for segment in render(messages, **options))


CHANGES = {
    "nothing": (lambda m, o: None, True),
    "reasoning left out": (lambda m, o: m[1].pop("reasoning_content"), True),
    "keys in another order": (lambda m, o: reorder(m[1]["tool_calls"][0]["function"]), True),
    "arguments as an object": (lambda m, o: m[1]["tool_calls"][1]["function"].update(arguments={}), True),
    "content in parts": (lambda m, o: m[1].update(content=[{"type": "text", "text": m[1]["content"]}]), True),
    "through JSON": (lambda m, o: m.__setitem__(1, json.loads(json.dumps(m[1]))), True),
    "reasoning": (lambda m, o: m[1].update(reasoning_content="other"), False),
    "content": (lambda m, o: m[1].update(content="Text"), False),
    "arguments": (lambda m, o: m[1]["tool_calls"][1]["function"].update(arguments='{"p": 1}'), False),
    "name": (lambda m, o: m[1]["tool_calls"][1]["function"].update(name="f"), False),
    "one call less": (lambda m, o: (m[1]["tool_calls"].pop(), m.pop()), False),
    "order of calls": (lambda m, o: m[1]["tool_calls"].reverse(), False),
    "another id": (lambda m, o: m[1]["tool_calls"][1].update(id="other"), False),
    "no ids": (lambda m, o: [c.pop("id") for c in m[1]["tool_calls"]], False),
    "thinking off": (lambda m, o: o.update(think="off"), False),
    "forgotten": (lambda m, o: o["replay"].clear(), False),
}


def reorder(function):
    function["arguments"] = json.dumps(dict(reversed(json.loads(function["arguments"]).items())), indent=1)


@pytest.mark.parametrize("name", CHANGES)
def test_only_an_unchanged_turn_is_repeated(name):
    tok = MAKE["bytes"]()
    change, expected = CHANGES[name]
    _, _, messages, options = conversation(tok, TURNS["on"])
    exact = render_ids(tok, messages, **options)
    messages = json.loads(json.dumps(messages))  # the turn's own message stays as it is
    change(messages, options)
    assert replayed(messages, options) == expected
    if expected:
        assert render_ids(tok, messages, **options) == exact
    else:
        assert render(messages, **options) == render(messages, **{**options, "replay": None})


def test_a_turn_sampled_without_thinking_in_a_thinking_prompt():
    tok = MAKE["bytes"]()
    _, _, messages, options = conversation(tok, TURNS["off"], "off")
    assert replayed(messages, options)
    assert not replayed(messages, options | {"think": "on"})


def test_replayed_tokens_in_the_text_to_look_at():
    _, _, messages, options = conversation(MAKE["bytes"](), "</think>" + ONE)
    assert re.search(
        r"<think>(\[\d+\])+<｜end▁of▁sentence｜><｜User｜><tool_result>", to_text(render(messages, **options))
    )


def test_turns_can_be_stored_as_json():
    tok = MAKE["bytes"]()
    _, _, messages, options = conversation(tok, TURNS["on"])
    (turn, same) = options["replay"].values()
    assert turn is same
    stored = json.loads(json.dumps([turn.thinking, turn.message, turn.ids]))
    restored = SampledTurn(stored[0], stored[1], tuple(stored[2]))
    assert restored == turn
    ids = render_ids(tok, messages, **options)
    options["replay"] = dict.fromkeys(options["replay"], restored)
    assert render_ids(tok, messages, **options) == ids
