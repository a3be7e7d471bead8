"""Grammars that hang, grow or crash their compiler end another process, and nothing else."""

import contextlib
import os
import random
import signal
import threading
import time

import pytest

from ds4jax.engine.form import Begin, Either, Pattern, TooHard
from ds4jax.engine.grammar import GrammarError, Matcher
from ds4jax.engine.grammar_compiler import GrammarCompiler, Limits, check_size
from ds4jax.io.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def compiler():
    compiler = GrammarCompiler(TOKENIZER, Limits(1.0, 256 << 20))
    compiler({"const": 0}, Begin())  # the process is there
    yield compiler
    compiler.close()
    assert compiler._process is None


def chained(n):
    """A schema whose definitions refer to each other, one after the other."""
    definitions = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(n)}
    return {"$ref": "#/$defs/d0", "$defs": definitions | {f"d{n}": {"type": "null"}}}


def conjoined(n):
    return {"type": "string", "allOf": [{"pattern": f".*{chr(48 + i)}.*"} for i in range(n)]}


HARD = {
    "multiple": {"type": "integer", "multipleOf": 2**31},
    "conjunction": conjoined(30),
    "lark": Pattern("lark", "start: /(.*a.{300}){9}/ & /(.*b.{300}){9}/"),
    "either": Either(conjoined(24), {"type": "null"}),
}


@pytest.mark.parametrize("name", HARD)
def test_what_is_hard_to_compile_is_refused_in_time(compiler, name):
    """And what comes after it is compiled as ever."""
    errors = []
    for seconds in (10, 0.1):  # known by the second time
        begun = time.perf_counter()
        with pytest.raises(GrammarError) as error:
            compiler(HARD[name], Begin())
        assert time.perf_counter() - begun < seconds
        errors.append(str(error.value))
    assert errors[0] == errors[1] and len(errors[0]) < 2000
    compiler({"enum": [name]}, Begin())


def test_a_process_that_dies_is_replaced(compiler):
    """As if its native stack had overflowed."""
    compiler({"const": "before"}, Begin())
    compiler._process.kill()
    compiler({"const": "after"}, Begin())
    compiler._process.kill()
    compiler._process.wait()
    compiler({"const": "later"}, Begin())


def test_a_processor_that_others_use_is_not_the_grammars_fault(compiler):
    """The process has to wait for longer than the limit, and computes for a moment."""
    os.kill(compiler._process.pid, signal.SIGSTOP)
    threading.Timer(1.3, os.kill, (compiler._process.pid, signal.SIGCONT)).start()
    begun = time.perf_counter()
    assert Matcher(compiler({"const": "slow"}, Begin())).error == ""
    assert time.perf_counter() - begun > 1


def test_sizes_come_first(compiler):
    with contextlib.suppress(GrammarError):  # the most that is tried
        compiler(chained(900), Begin())
    for form, message in (
        (chained(5000), "json_schema: found more than 1000 references"),
        ({"enum": list(range(200_000))}, "json_schema: found more than 100000 values"),
        (Pattern("regex", "a" * 2_000_000), "grammar: found more than 1000000 characters"),
        (Either({"type": "null"}, chained(5000)), "references"),
    ):
        with pytest.raises(GrammarError, match=message):
            check_size(form)
    deep = {}
    for _ in range(200):
        deep = {"items": deep}
    with pytest.raises(TooHard, match="more than 128 levels"):
        check_size(deep)


def test_grammars_are_remembered(compiler):
    first = compiler({"const": "kept"}, Begin())
    assert compiler({"const": "kept"}, Begin()) is first
    assert compiler({"const": "kept"}, Begin((3,))) is not first
    for _ in range(2):
        with pytest.raises(GrammarError, match="hiccup"):
            compiler({"type": "hiccup"}, Begin())
    for i in range(40):
        compiler({"const": i}, Begin())
    assert compiler({"const": "kept"}, Begin()) is not first
    assert Matcher(first).error == ""


def random_schema(rng, depth=0):
    kinds = ["string", "integer", "number", "boolean", "null", "array", "object", "anyOf", "allOf", "enum", "pattern"]
    kind = rng.choice(kinds[:5] if depth > 3 else kinds)

    def inner():
        return random_schema(rng, depth + 1)

    match kind:
        case "array":
            return {"type": "array", "items": inner(), "maxItems": rng.choice([0, 3, 10**6])}
        case "object":
            names = [rng.choice("abc") * rng.randint(1, 4) for _ in range(rng.randint(0, 4))]
            return {"type": "object", "properties": {name: inner() for name in names}, "required": names[:1]}
        case "anyOf" | "allOf":
            return {kind: [inner() for _ in range(rng.randint(1, 4))]}
        case "enum":
            return {"enum": [rng.randint(0, 9), "x", None]}
        case "pattern":
            return {"type": "string", "pattern": rng.choice([".*a.*", "^(a|b)*c{1,99}$", "[", "(a*)*b", "\\d{1,2000}"])}
        case "integer" | "number":
            return {"type": kind, rng.choice(["minimum", "multipleOf", "maximum"]): rng.choice([1, 3, 2**40, 0.5])}
    return {"type": kind, "maxLength": rng.choice([0, 5, 10**9])} if kind == "string" else {"type": kind}


@pytest.mark.parametrize("n", [60, pytest.param(4000, marks=pytest.mark.slow)])
def test_random_schemas(compiler, n):
    """None hangs and none kills; most are grammars."""
    rng, good = random.Random(0), 0
    for _ in range(n):
        begun = time.perf_counter()
        try:
            compiler(random_schema(rng), Begin())
            good += 1
        except GrammarError:
            pass
        assert time.perf_counter() - begun < 8
    assert good > n / 3
