"""The fields that the request bodies share, and how a wrong value is reported."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ds4jax.chat import template
from ds4jax.chat.calls import Calling
from ds4jax.engine.form import Form, Pattern, quoted
from ds4jax.engine.types import Sampling, seed_or_random
from ds4jax.server.ask import Json
from ds4jax.server.errors import ApiError

MAX_STOPS, MAX_STOP = 16, 1024  # stop strings, and characters of one
MAX_TOP_LOGPROBS = 20
MAX_ANSWERS = 128  # to one prompt
MAX_CHOICES = 1024  # answers to all prompts of a request
MAX_BIAS = 100.0  # as with OpenAI: the largest logit_bias

type Items[T] = Annotated[list[T], Field(fail_fast=True)]
"""A list. Only its first wrong item is reported: there may be millions."""
type Some[T] = Annotated[list[T], Field(min_length=1, fail_fast=True)]
"""`Items` that are not empty."""
type Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP)]
type Stops = Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)]
type Limit = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(lambda v: None if v == -1 else v)]
"""The longest answer, in tokens. -1 is all the room there is, as with llama.cpp."""
type LimitOrZero = Annotated[Annotated[int, Field(ge=0)] | None, BeforeValidator(lambda v: None if v == -1 else v)]
"""The same; with 0 nothing is said."""
type BudgetTokens = Annotated[Annotated[int, Field(ge=0)] | None, BeforeValidator(lambda v: None if v == -1 else v)]
"""Tokens that a thought may have; -1 is no limit, as with llama.cpp."""
type Answers = Annotated[int, Field(ge=1, le=MAX_ANSWERS)]
type TopLogprobs = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)]
type TokenId = Annotated[int, Field(ge=0)]
type Unsupported = None


class Schema(BaseModel):
    """Base class of JSON objects in a body. Types are not converted: "1" is not a number, and 1 is not true."""

    model_config = ConfigDict(strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


class Options(Schema):
    """An object whose fields say what the reply is to be. Those that are not known are kept, for `unknown` to list."""

    model_config = ConfigDict(extra="allow")
    without_effect: ClassVar[frozenset[str]] = frozenset()  # names that clients send and that change no reply


def unknown(options: Options, where: str = "") -> Iterator[tuple[str, Any]]:
    """The fields that are not known, in `options` and in the `Options` within it: their paths and values."""
    for name, value in (options.model_extra or {}).items():
        if name not in options.without_effect:
            yield where + name, value
    for name, field in type(options).model_fields.items():
        if isinstance(inner := getattr(options, name), Options):
            yield from unknown(inner, f"{where}{field.alias or name}.")


class Body(Options):
    """The fields that mean the same in all four APIs.

    The bounds are what `Sampling` does not bound itself: a number beyond float32 would only fail on the device. As with
    vLLM, top_k of -1 is off, top_p of 0 takes the likeliest token, and ignore_eos goes on to the limit.
    """

    without_effect = frozenset({
        "user", "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
        "prediction", "include", "client_metadata", "request_id", "priority", "cache_prompt", "id_slot", "cache_salt",
        "return_progress", "timings_per_token", "cache_control", "container", "inference_geo", "stream_options",
        "user_id", "truncation", "max_tool_calls",
    })  # fmt: skip

    model: str = ""
    stream: bool = False
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = None
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    logit_bias: dict[str, Any] = {}
    seed: int | None = None
    min_tokens: int = Field(0, ge=0, lt=2**31)
    ignore_eos: bool = False
    stop_token_ids: Items[TokenId] = []

    def common(self) -> dict[str, Any]:
        """The arguments of `Ask` that these fields give. Raises ApiError or ConfigError."""
        return {
            "model": self.model,
            "stream": self.stream,
            "sampling": self._sampling(),
            "stop_ids": frozenset(self.stop_token_ids),
            "ignored": dict(sorted(unknown(self))),
        }

    def _sampling(self) -> Sampling:
        numbers = {"temperature", "top_p", "top_k", "min_p"}
        numbers |= {"presence_penalty", "frequency_penalty", "repetition_penalty"}
        bias = tuple(_bias(id, value) for id, value in self.logit_bias.items())
        # Any integer is a seed to OpenAI; without one, answers differ.
        seed = seed_or_random(self.seed) % 2**32
        given = self.model_dump(include=numbers, exclude_unset=True)
        if given.get("top_k") == -1:
            given["top_k"] = 0
        if given.get("top_p") == 0:
            given |= {"top_p": 1.0, "temperature": 0.0}
        if self.ignore_eos and self.stop_token_ids:
            raise ApiError("stop_token_ids: found beside ignore_eos, expected one of them", param="stop_token_ids")
        least = 2**31 - 1 if self.ignore_eos else self.min_tokens
        return Sampling(**given, logit_bias=bias, seed=seed, min_tokens=least)


def _bias(id: str, value: Any) -> tuple[int, float]:
    if not (id.isascii() and id.isdecimal() and len(id) < 10):
        raise ApiError(f"logit_bias: found {id[:40]!r}, expected token ids", param="logit_bias")
    if type(value) not in (int, float) or not -MAX_BIAS <= value <= MAX_BIAS:
        raise wrong("logit_bias", value, f"a number from {-MAX_BIAS:g} to {MAX_BIAS:g}")
    return int(id), float(value)


class StreamOptions(Options):
    without_effect = frozenset({"include_obfuscation"})

    include_usage: bool = False


class TextFormat(Options):
    type: Literal["text"]


class ObjectFormat(Options):
    type: Literal["json_object"]
    schema_: Json | None = Field(None, alias="schema")


class JsonSchema(Options):
    without_effect = frozenset({"name", "description", "strict"})  # schemas are enforced in any case

    schema_: Json = Field(alias="schema")


class SchemaFormat(Options):
    without_effect = JsonSchema.without_effect

    type: Literal["json_schema"]
    schema_: Json = Field(alias="schema")


class NestedFormat(Options):
    type: Literal["json_schema"]
    json_schema: JsonSchema


type Format = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]
type ChatFormat = Annotated[TextFormat | ObjectFormat | NestedFormat, Field(discriminator="type")]


def form_of(format: TextFormat | ObjectFormat | SchemaFormat | NestedFormat | None) -> Form | None:
    """The value of `Ask.form` for a format."""
    match format:
        case None | TextFormat():
            return None
        case NestedFormat(json_schema=inner):
            return inner.schema_
        case _:
            return "json_object" if format.schema_ is None else format.schema_


type Choices = Some[str]


class Structured(Options):
    """vLLM's structured_outputs."""

    json_: Json | str | None = Field(default=None, alias="json")
    json_object: bool = False
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    structural_tag: Unsupported = None
    whitespace_pattern: Unsupported = None


class Choosing(Body):
    """The fields that Chat Completions and Completions share: how many choices there are, and what form each must have.

    They are OpenAI's, vLLM's and llama.cpp's. return_token_ids, of vLLM: for those of the prompt and the answer.
    """

    n: Answers = 1
    stop: Stops = []
    stream_options: StreamOptions = StreamOptions()
    return_token_ids: bool = False
    response_format: ChatFormat | None = None
    guided_json: Json | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: Unsupported = None
    structured_outputs: Structured = Structured()
    grammar: str | None = None
    json_schema: Json | None = None

    def common(self) -> dict[str, Any]:
        return super().common() | {
            "form": self.form(),
            "stop": stops(self.stop),
            "include_usage": self.stream_options.include_usage,
            "token_ids": self.return_token_ids,
        }

    def form(self) -> Form | None:
        """The value of `Ask.form`. Raises ApiError if several fields give one."""
        inner = self.structured_outputs
        said = {
            "response_format": form_of(self.response_format),
            "json_schema": self.json_schema,
            "guided_json": _read_json("guided_json", self.guided_json),
            "structured_outputs.json": _read_json("structured_outputs.json", inner.json_),
            "structured_outputs.json_object": "json_object" if inner.json_object else None,
            "guided_regex": _pattern("regex", self.guided_regex),
            "structured_outputs.regex": _pattern("regex", inner.regex),
            "grammar": _pattern("grammar", self.grammar),
            "guided_grammar": _pattern("grammar", self.guided_grammar),
            "structured_outputs.grammar": _pattern("grammar", inner.grammar),
            "guided_choice": _choice(self.guided_choice),
            "structured_outputs.choice": _choice(inner.choice),
        }
        given = [name for name, form in said.items() if form is not None]
        if len(given) > 1:
            raise ApiError(f"{given[1]}: found beside {given[0]}, expected one of them", param=given[1])
        return said[given[0]] if given else None


def _pattern(kind: Literal["regex", "grammar"], text: str | None) -> Pattern | None:
    return None if text is None else Pattern(kind, text)


def _choice(texts: list[str] | None) -> Pattern | None:
    """One of the texts, in Lark, whose strings are those of JSON."""
    if texts is None:
        return None
    return Pattern("lark", "start: " + " | ".join(map(quoted, texts)))


MAX_SCHEMA = 1_000_000


def _read_json(where: str, schema: Json | str | None) -> Json | None:
    """A schema that may come as its text, of at most MAX_SCHEMA characters."""
    if not isinstance(schema, str):
        return schema
    try:
        value = json.loads(schema) if len(schema) <= MAX_SCHEMA else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise wrong(where, schema, f"a JSON schema of at most {MAX_SCHEMA} characters")
    return value


class Named(Schema):
    """A reference to a function."""

    name: str


def calling(tools: Sequence[Any], choice: str, only: Iterable[str] | None = None, single: bool = False) -> Calling:
    """The value of `Ask.calling`.

    choice: "auto", "required" or "none". only: the names of the tools that may be called. single: at most one call.
    Raises ApiError if a call is required and there are no tools.
    """
    if choice == "required" and not tools:
        raise ApiError("tool_choice: found that a call is required, expected it only with tools", param="tool_choice")
    functions = [tool.get("function", tool) for tool in tools if isinstance(tool, dict)]
    strict = {f.get("name") for f in functions if isinstance(f, dict) and f.get("strict") is True}
    return Calling(
        required=choice == "required",
        only=None if only is None else frozenset(only),
        single=single,
        strict=frozenset(name for name in strict if isinstance(name, str)),
    )


def stops(value: str | list[str]) -> tuple[str, ...]:
    """The value of `Ask.stop` for one stop string or several."""
    return (value,) if isinstance(value, str) else tuple(value)


def answers(n: int, prompts: int) -> int:
    """n, the number of answers to each prompt. Raises ApiError if they are too many."""
    if n * prompts > MAX_CHOICES:
        raise ApiError(
            f"n: found {prompts} prompts, {n} answers each, expected {MAX_CHOICES} answers at most", param="n"
        )
    return n


# ---- errors ----------------------------------------------------------------------------------------------------------
def parse[T: Schema](kind: type[T], body: Json) -> T:
    """Check a body; → the model of class `kind`. Raises ApiError."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _api_error(error, body) from None


def wrong(where: str, found: Any, expected: str) -> ApiError:
    """The error for a value: where it is in the body, what it is, what it should be."""
    shown = "nothing" if found is None else json.dumps(found, ensure_ascii=False)
    return ApiError(f"{where}: found {shown:.80}, expected {expected}", param=where)


def unseen(where: str, kind: str) -> ApiError:
    """The error for a part of a message, of type `kind`, that is not text."""
    return wrong(f"{where}.type", kind, template.TEXT_ONLY)


_EXPECTED = {  # by pydantic's types of errors, with their contexts
    "missing": "a value",
    "string_type": "a string",
    "string_unicode": "Unicode text",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "none_required": "nothing: it is not supported",
    "literal_error": "{expected}",
    "union_tag_invalid": "{expected_tags}",
    "union_tag_not_found": "a value",
    "greater_than_equal": "at least {ge:g}",
    "less_than_equal": "at most {le:g}",
    "string_too_short": "at least {min_length} character",
    "string_too_long": "at most {max_length} characters",
    "too_short": "at least {min_length} item",
    "too_long": "at most {max_length} items",
}


def _api_error(error: ValidationError, body: Json) -> ApiError:
    """The error to report: the first of those that lie deepest in the body.

    Alternative types of one value have an error each; what they expected is joined.
    """
    errors = error.errors(include_url=False)
    depth = max(len(e["loc"]) for e in errors)
    places = [(_where(e["loc"], e["type"] == "missing", body), e) for e in errors if len(e["loc"]) == depth]
    where, first = places[0]
    expected = " or ".join(
        dict.fromkeys(
            _EXPECTED[e["type"]].format(**e.get("ctx", {})) if e["type"] in _EXPECTED else e["msg"]
            for w, e in places
            if w == where
        )
    )
    found: Any = None if first["type"] == "missing" else first["input"]
    if first["type"].startswith("union_tag"):
        key = first.get("ctx", {})["discriminator"].strip("'")
        where, found = f"{where}.{key}", found.get(key)
    return wrong(where[:100], found, expected)


def _where(loc: tuple[int | str, ...], missing: bool, body: Json) -> str:
    """The path of a value in the body, such as messages[0].content.

    loc: pydantic's, which also names the alternatives of a type. missing: its last part is not in the body.
    """
    path, node = "", cast(Any, body)
    for i, key in enumerate(loc):
        try:
            node = node[key]
        except (TypeError, LookupError):  # the name of an alternative, or of what is missing
            if not missing or i < len(loc) - 1:
                continue
        path += f"[{key}]" if isinstance(key, int) else f".{key}"
    return path.removeprefix(".")
