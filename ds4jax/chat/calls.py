"""The grammar of tool calls: blocks as `template` writes and `parser` reads them, with arguments that obey schemas.

A parameter that is a string is written as it is, any other as JSON. Arguments whose schema says more than which
parameters there are (`anyOf`, `minProperties`) are written as one JSON object in a parameter `arguments` or `input`,
which `parser` takes apart.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from ds4jax.chat import template
from ds4jax.engine.form import MAX_TEXT, Pattern, llguidance_schema, quoted, unanchored, without_one_of
from ds4jax.errors import Ds4Error
from ds4jax.io.tokenizer import Special, Tokenizer

FREE_TEXT = "input"  # the parameter of a tool of free text
WRAPPERS = ("arguments", "input")
"""Names under which all arguments may come as one JSON object."""

# Keywords of a schema that say nothing of its values.
_NOTES = {
    "$schema", "$id", "$comment", "title", "description", "default", "examples", "deprecated", "$defs", "definitions",
}  # fmt: skip
_OBJECT = _NOTES | {"type", "properties", "required", "additionalProperties"}
_DEFINITIONS = ("$defs", "definitions")
_UNREADABLE = set('"<>\n')  # characters that `parser` cannot read in a name
_OTHERS = ["null", "boolean", "number", "array", "object"]  # JSON types that are no strings


@dataclasses.dataclass(frozen=True)
class Calling:
    """Which calls a reply may or must have.

    required: there must be one, and the arguments of all calls obey the tools' schemas. only: the names of the tools
    that may be called, or None for all. single: at most one call. strict: the names of the tools whose arguments always
    obey their schemas. texts: for tools that take free text, by name, what the text (their parameter FREE_TEXT) must
    match.
    """

    required: bool = False
    only: frozenset[str] | None = None
    single: bool = False
    strict: frozenset[str] = frozenset()
    texts: Mapping[str, Pattern] = dataclasses.field(default_factory=dict)


def grammar(tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]], calling: Calling, *, begun: bool) -> Pattern:
    """What a block of calls must be.

    tools: as given to `template.render`. begun: whether the beginning of the block, up to its first control token, has
    been sampled already, so that the grammar starts behind that.
    Raises Ds4Error, naming the tool, for arguments that cannot be enforced.
    """
    shown = template.normalise_tools(tools)
    if unknown := sorted((calling.only or set()) - {tool["name"] for tool in shown}):
        raise Ds4Error(f"tool_choice: found {unknown[0]!r}, expected the name of one of the tools")
    rules = _Rules(f"<[{tokenizer.special(Special.DSML)}]>")
    calls = [
        rules.add("call", _call(rules, tool, calling))
        for tool in shown
        if calling.only is None or tool["name"] in calling.only
    ]
    head, *rest = rules.markup(template.CALLS_OPEN + "\n")
    block = f"({' | '.join(calls)}){'' if calling.single else '+'} {' '.join(rules.markup(template.CALLS_CLOSE))}"
    start = rest[1:] if begun else [quoted("\n\n"), head, *rest]
    return Pattern("lark", rules.text(f"{' '.join(start)} {block}"))


class _Rules:
    """The text of a grammar in Lark as it grows. dsml: the control token."""

    def __init__(self, dsml: str):
        self._dsml, self._lines, self._size = dsml, dict[str, str](), 0

    def add(self, kind: str, body: str) -> str:
        """→ the name of a new rule. Raises Ds4Error if the text gets longer than MAX_TEXT."""
        self._size += len(body)
        if self._size > MAX_TEXT:
            raise Ds4Error(f"found schemas of more than {MAX_TEXT} characters, expected at most that")
        name = f"{kind}_{len(self._lines)}"
        self._lines[name] = body
        return name

    def markup(self, text: str) -> list[str]:
        """Markup in Lark: strings, and the control token by its id."""
        return [symbol for part in text.split(Special.DSML.value) for symbol in (self._dsml, quoted(part))][1:]

    def text(self, start: str) -> str:
        """The grammar. TEXT is a string up to the tag that closes it; only the control token can end it."""
        lines = {"start": start, "TEXT": r"/(?s:.*)<\//", "NAME": r'/[^"<>\n]{1,64}/', **self._lines}
        return "".join(f"{name}: {body}\n" for name, body in lines.items())


def _call(rules: _Rules, tool: Mapping[str, Any], calling: Calling) -> str:
    name, schema = tool["name"], tool.get("parameters")
    if not name or set(name) & _UNREADABLE:
        raise Ds4Error(f'tools: found the name {name!r:.80}, expected one without any of "<> and line ends')
    head = rules.markup(f'{template.INVOKE_OPEN}{name}">\n')
    if name in calling.texts:
        arguments = _parameter(rules, quoted(FREE_TEXT), [("true", _matching(rules, calling.texts[name]))])
    elif calling.required or name in calling.strict:
        try:
            arguments = _arguments(rules, {"type": "object"} if schema is None else schema)
        except Ds4Error as error:
            raise Ds4Error(f"tools: {name}: parameters: {error}") from None
    else:
        arguments = _anything(rules)
    return " ".join([*head, arguments, *rules.markup(template.INVOKE_CLOSE + "\n")])


def _anything(rules: _Rules) -> str:
    """Any parameters."""
    return _or_newline(f"{_parameter(rules, 'NAME', [('true', 'TEXT'), ('false', 'TEXT')])}*")


def _or_newline(parameters: str) -> str:
    """Parameters that may be absent: then `template` writes a lone newline."""
    return f"({quoted('\n')} | {parameters})" if parameters else quoted("\n")


def _arguments(rules: _Rules, schema: Any) -> str:
    """Parameters that obey a schema."""
    if not isinstance(schema, Mapping):
        raise Ds4Error(f"found {json.dumps(schema):.80}, expected the schema of an object")
    properties = schema.get("properties", {})
    if not _only_lists_parameters(schema):
        return _wrapped(rules, schema)
    required, definitions = schema.get("required", []), {key: schema[key] for key in _DEFINITIONS if key in schema}
    out = [
        _parameter(rules, quoted(name), _values(rules, inner, definitions)) + "?" * (name not in required)
        for name, inner in properties.items()
        if inner is not False
    ]
    more = schema.get("additionalProperties", not properties)
    if more is not False:
        name = "NAME"
        taken = [*properties, *(name for name in WRAPPERS if wraps(schema, name))]
        if taken:
            others = "|".join(map(_expression, taken))
            name = rules.add("NAME", f"NAME & ~/{others}/")
        out.append(_parameter(rules, name, _values(rules, more, definitions)) + "*")
    return " ".join(out) if required else _or_newline(" ".join(out))


def _only_lists_parameters(schema: Mapping[str, Any]) -> bool:
    """Whether a schema says no more than which parameters an object has."""
    properties, required = schema.get("properties", {}), schema.get("required", [])
    return (
        schema.keys() <= _OBJECT
        and schema.get("type", "object") == "object"
        and isinstance(properties, Mapping)
        and isinstance(required, list)
        and all(isinstance(name, str) for name in required)
        and all(properties.get(name, False) is not False for name in required)
        and not any(set(name) & _UNREADABLE or not name for name in properties)
        and all(ref.startswith(("#/$defs/", "#/definitions/")) for ref in _references(schema))
    )


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, Mapping):
        if isinstance(ref := schema.get("$ref"), str):
            yield ref
        schema = list(schema.values())
    if isinstance(schema, list):
        for inner in schema:
            yield from _references(inner)


def _declared(schema: Any) -> set[str]:
    """The names of all properties of a schema, of its alternatives and of what it refers to."""
    if not isinstance(schema, Mapping):
        return set()
    alternatives = [schema[key] for key in ("anyOf", "oneOf", "allOf") if isinstance(schema.get(key), list)]
    definitions = [schema[key].values() for key in _DEFINITIONS if isinstance(schema.get(key), Mapping)]
    names = {*properties} if isinstance(properties := schema.get("properties"), Mapping) else set[str]()
    return names.union(*(_declared(inner) for group in [*alternatives, *definitions] for inner in group))


def wraps(schema: Any, name: str) -> bool:
    """Whether a parameter of this name can hold all arguments of a tool: one that its schema does not declare."""
    if not (name in WRAPPERS and isinstance(schema, Mapping) and isinstance(schema.get("properties", {}), Mapping)):
        return False
    names = _declared(schema)
    return name not in names and (bool(names) or not _only_lists_parameters(schema))


def _wrapped(rules: _Rules, schema: Mapping[str, Any]) -> str:
    """All arguments as one JSON object."""
    name = next((name for name in WRAPPERS if wraps(schema, name)), None)
    if name is None:
        raise Ds4Error(f"found {json.dumps(schema):.80}, expected an object's type, properties and required alone")
    return _parameter(rules, quoted(name), [("false", _json(rules, schema))])


def _parameter(rules: _Rules, name: str, values: Sequence[tuple[str, str]]) -> str:
    """values: alternatives, each with what `string=` says and the value up to the control token."""
    head, close = rules.markup(template.PARAMETER_OPEN), rules.markup(template.PARAMETER_CLOSE + "\n")
    kinds = " | ".join(f"""{quoted(f'" string="{string}">')} {value}""" for string, value in values)
    return rules.add("parameter", f"{' '.join(head)} {name} ({kinds}) {' '.join(close[1:])}")


def _values(rules: _Rules, schema: Any, definitions: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The alternatives of a parameter's value; see `_parameter`."""
    strings, others = _split(without_one_of(schema) if isinstance(schema, Mapping) else {})
    out = [("true", rules.add("STRING", text)) for text in strings]
    return out + [("false", _json(rules, {**inner, **_used(inner, definitions)})) for inner in others]


def _used(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Those of the definitions that a schema refers to, directly or not."""
    out: dict[str, dict[str, Any]] = {}
    open_ = [*_references(schema)]
    while open_:
        # A JSON pointer in a URI: RFC 6901.
        group, name, *_ = [unquote(part).replace("~1", "/").replace("~0", "~") for part in open_.pop().split("/")[1:]]
        found = definitions.get(group)
        if isinstance(found, Mapping) and name in found and name not in out.setdefault(group, {}):
            out[group][name] = found[name]
            open_ += _references(found[name])
    return out


def _split(schema: Mapping[str, Any]) -> tuple[list[str], list[Mapping[str, Any]]]:
    """What a value may be: terminals of strings as they are, and schemas of what is written as JSON."""
    said = {key: value for key, value in schema.items() if key not in _NOTES}
    types = said.get("type", ["string", *_OTHERS])
    types = [types] if isinstance(types, str) else types
    if not isinstance(types, list):
        return [], [schema]
    if not said or said.keys() == {"type"} or said.keys() <= {"type", "minLength", "maxLength"} and types == ["string"]:
        if (length := _length(said)) is None:
            return [], [schema]
        strings = [rf"/(?s:.{length})<\//"] if "string" in types else []
        others = [kind for kind in types if kind != "string"]
        return strings, [{"type": others}] if others else []
    if said.keys() <= {"type", "enum", "const"} and isinstance(values := said.get("enum", [said.get("const")]), list):
        strings = [value for value in values if isinstance(value, str) and "string" in types]
        others = [value for value in values if not isinstance(value, str)]
        # `type` and `const` beside an enum may leave fewer of them.
        if "enum" in said and "const" in said or not strings:
            return [], [schema]
        ends = " | ".join(quoted(template.escape(text, template.PARAMETER_CLOSE) + "</") for text in strings)
        return [ends], [{**schema, "enum": others}] if others and types != ["string"] else []
    if said.keys() == {"anyOf"} and isinstance(said["anyOf"], list):
        parts = [_split(inner) if isinstance(inner, Mapping) else ([], [{"anyOf": [inner]}]) for inner in said["anyOf"]]
        return [text for strings, _ in parts for text in strings], [inner for _, others in parts for inner in others]
    return [], [schema]


def _length(said: Mapping[str, Any]) -> str | None:
    """How often a string's characters are repeated, for a regular expression; None if a bound is no whole number."""
    bounds = {key: said[key] for key in ("minLength", "maxLength") if key in said}
    for bound in bounds.values():
        if type(bound) not in (int, float) or bound < 0 or bound % 1:
            return None
    if not bounds:
        return "*"
    most = int(bounds["maxLength"]) if "maxLength" in bounds else ""
    return f"{{{int(bounds.get('minLength', 0))},{most}}}"


def _json(rules: _Rules, schema: Mapping[str, Any]) -> str:
    return f"{rules.add('json', f'%json {json.dumps(llguidance_schema(schema))}')} {quoted('</')}"


def _matching(rules: _Rules, pattern: Pattern) -> str:
    """A string that matches a pattern."""
    if pattern.kind == "regex":
        text = re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", unanchored(pattern.text), flags=re.S)
        return rules.add("STRING", rf"/(?:{text})<\//")
    return f"{rules.add('text', f'%lark {{\n{pattern.text}\n}}')} {quoted('</')}"


def _expression(text: str) -> str:
    """A regular expression that matches a text."""
    return "".join(f"\\x{{{ord(char):x}}}" for char in text)
