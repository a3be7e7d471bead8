"""A streaming parser: sampled token ids become thoughts, text and tool calls. It reads what `template` writes.

    THINK ── </think> ──► TEXT ── <｜DSML｜tool_calls> ──► TOOL ── </｜DSML｜tool_calls> ──► DONE
      (if the header opened it)      (if there are tools)

`</think>` and `｜DSML｜` count where their ids were sampled, never where text spells them. The rest of a tag is text
and shares tokens with its neighbours (`>` and a newline are one), so the machine reads characters: text as it is, and
each control token as one character that no text contains. How the text is cut into tokens changes nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from ds4jax.chat import calls
from ds4jax.chat import template as chat
from ds4jax.errors import Ds4Error
from ds4jax.io.tokenizer import Special, StreamDecoder, Tokenizer

# Lone surrogates stand for the control tokens: decoded UTF-8 has none.
_THINK, _END_THINK, _DSML = "\ud800", "\ud801", "\ud802"
_MARKS = {Special.THINK_OPEN: _THINK, Special.THINK_CLOSE: _END_THINK, Special.DSML: _DSML}
_SPELLINGS = str.maketrans({mark: special.value for special, mark in _MARKS.items()})

_CALLS, _END_CALLS, _END_INVOKE, _END_PARAMETER = (
    tag.replace(Special.DSML.value, _DSML)
    for tag in (chat.CALLS_OPEN, chat.CALLS_CLOSE, chat.INVOKE_CLOSE, chat.PARAMETER_CLOSE)
)
_INVOKE, _PARAMETER = f"<{_DSML}invoke", f"<{_DSML}parameter"
_TAG = re.compile(f"</?{_DSML}")
_EDGES = (_INVOKE, _END_INVOKE, _END_CALLS)  # tags that bound calls, by which malformed ones are skipped
_EDGE = re.compile("|".join(_EDGES))
_INVOKE_TAG = re.compile(rf'{_INVOKE}\s+name="([^"{_DSML}]+)"\s*>')
_PARAMETER_TAG = re.compile(rf'{_PARAMETER}\s+name="([^"{_DSML}]*)"(?:\s+string="(true|false)")?\s*>')

_SPACE = " \t\r\n"
# Limits on what is held back, so that a model that repeats itself forever costs no more than linear time.
_MAX_SPACE = 256  # characters of white space before a tag
_MAX_TAG = 1024  # characters of a tag


@dataclasses.dataclass(frozen=True)
class ThinkingDelta:
    """The next piece of a thought."""

    text: str


@dataclasses.dataclass(frozen=True)
class TextDelta:
    """The next piece of the visible text."""

    text: str


@dataclasses.dataclass(frozen=True)
class ToolCallStarted:
    """A tool call begins: its name is known. If no `ToolCallFinished` follows, there was no call."""

    index: int
    id: str
    name: str


@dataclasses.dataclass(frozen=True)
class ToolCallDelta:
    """The next piece of the JSON text of a call's arguments."""

    index: int
    arguments: str


@dataclasses.dataclass(frozen=True)
class ToolCallFinished:
    """A call is complete and well-formed, whatever follows it.

    arguments: the JSON text of an object: all deltas together.
    """

    index: int
    id: str
    name: str
    arguments: str


@dataclasses.dataclass(frozen=True)
class Finish:
    """The last event of a turn: why it ended.

    reason: "stop" (the model ended its turn), "length" (some calls may be finished), "tool_calls", "stop_sequence", or
        "error" (the turn ended inside a block of calls, of which none is finished).
    stop: the stop string, for "stop_sequence".
    turn: for "tool_calls", what `chat.render` needs to repeat this turn exactly; to be kept under each call's id.
    unfinished: the text of a block of calls that did not come to its end, be it only the beginning of its opening tag,
        with the white space before it. If calls are finished: what else is in the block.
    """

    reason: Literal["stop", "length", "tool_calls", "stop_sequence", "error"]
    stop: str | None = None
    turn: chat.SampledTurn | None = None
    unfinished: str = ""


Event = ThinkingDelta | TextDelta | ToolCallStarted | ToolCallDelta | ToolCallFinished | Finish


def new_call_id(prefix: str = "call_") -> str:
    return prefix + secrets.token_hex(16)


class OutputParser:
    """The state machine that turns sampled ids into events.

    `push` ids until `done`; call `finish` when sampling ended otherwise.

    A call is finished when its closing tag has come. The first one of a block is streamed, the others are sent when
    they are whole. If the rest of the block is malformed, or the turn ends inside it, the calls stay calls; the rest is
    reported as `Finish.unfinished` and becomes text, except at the limit. Calls after a malformed one count too, unless
    that one was streamed. A malformed block without a finished call becomes text.

    Attributes: ``done`` (stop sampling: `Finish` is out) and ``reasoning_tokens`` (ids pushed while thinking).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        thinking: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        stop: Sequence[str] = (),
        raw: bool = False,
        new_id: Callable[[], str] = new_call_id,
    ):
        """thinking: whether the prompt ended with `<think>`.

        tools: as given to `chat.render`; without any, or with None where calls are not wanted, their markup is text.
        stop: strings of which the first to be complete ends the text and is cut off; thoughts and calls do not count.
        raw: the prompt was not a chat, so a stray `</think>` is text too.
        new_id: makes the ids of calls.
        Raises Ds4Error for an empty stop string, tools `chat.normalise_tools` refuses and a vocabulary without control
        tokens.
        """
        if "" in stop:
            raise Ds4Error("stop: found an empty string, expected at least one character")
        self._schemas = {tool["name"]: tool.get("parameters") for tool in chat.normalise_tools(tools or ())}
        self._eos, self._marks = tokenizer.eos_id, {tokenizer.special(s): mark for s, mark in _MARKS.items()}
        self._decoder, self._stop, self._new_id = StreamDecoder(tokenizer), tuple(stop), new_id
        self.done, self.reasoning_tokens, self._raw_text = False, 0, raw

        self._thinking, self._ids = thinking, []  # of the turn
        self._state = self._opening if thinking else self._text  # consumes from the buffer; true if it is to go on
        self._buffer = ""  # read, but not consumed
        self._tail = ""  # consumed and spelled, but held back: it may be the beginning of a stop string or an escape
        self._events: list[Event] = []  # not yet returned
        self._history: list[Event] = []  # returned

        # What was consumed of the block of calls and belongs to no finished call: the white space before the block and
        # its opening tag, then malformed parts, then, from `_kept` on, the call that is being read.
        self._raw: list[str] | None = None
        self._kept = 1
        self._finished = 0  # calls
        self._call: ToolCallStarted | None = None
        self._arguments: list[str] = []  # the pieces of its JSON
        self._empty: list[bool] = []  # for each JSON object that is open: whether nothing is in it yet
        self._is_string = True  # the current value: without string= it is one, unless it is an object
        self._value: list[str] = []  # pieces of a value that cannot be streamed
        self._wrapper: tuple[str, str, str] | None = None  # first parameter, may hold all: key, string=, value
        self._waiting: list[Event] | None = None  # of a call that is to be out when it is whole
        self._open = 0  # while a malformed call is skipped: closing tags to come, its own and those in it

    def push(self, id: int) -> list[Event]:
        """Read one sampled id; → the events that it completes.

        EOS finishes the turn with "stop". After the end, ids are ignored.
        """
        if id == self._eos:
            return self.finish("stop")
        if self.done:
            return []
        self._ids.append(id)
        self.reasoning_tokens += self._state in (self._opening, self._think)
        if mark := self._marks.get(id):
            return self._read(self._decoder.flush() + mark)
        return self._read(self._decoder.push(id))

    def finish(self, reason: Literal["stop", "length"], *, cut: bool = False) -> list[Event]:
        """End the turn, because sampling ended; → what was held back, and `Finish`.

        cut: whether the turn was ended for the model, as "length" always is. Then a block of calls that is not complete
        is no error.
        """
        if self.done:
            return []
        events = self._read(self._decoder.flush())
        if self.done:
            return events
        if self._raw is not None:
            self._end_in_block(reason, cut or reason == "length")
        else:
            cut = _DSML in self._buffer  # the beginning of a block of calls is held back
            self._show("" if cut else _spell(self._buffer), last=True)
            if not self.done:
                self._end(Finish(reason, unfinished=_spell(self._buffer) if cut else ""))
        return events + self._drain()

    def _read(self, text: str) -> list[Event]:
        self._buffer += text
        while not self.done and self._state():
            pass
        return self._drain()

    def _drain(self) -> list[Event]:
        events, self._events = self._events, []
        self._history += events
        return events

    def _end(self, finish: Finish) -> None:
        self._events.append(finish)
        self.done = True

    # Thinking and text.

    def _opening(self) -> bool:
        """State: before the first thought. A `<think>` that the model repeats after the header's is dropped."""
        self._buffer = self._buffer.lstrip(_THINK)
        if self._buffer:
            self._state = self._think
        return bool(self._buffer)

    def _think(self) -> bool:
        """State: in a thought. Nothing is held back, as its end is one token. Calls in a thought are never executed."""
        text, close, self._buffer = self._buffer.partition(_END_THINK)
        if text:
            self._events.append(ThinkingDelta(_spell(text)))
        if close:
            self._state = self._text
        return bool(close)

    def _text(self) -> bool:
        """State: in the visible text. A stray `</think>` is dropped; white space before calls is dropped with them."""
        if not self._raw_text:
            self._buffer = self._buffer.replace(_END_THINK, "")
        text, marker = self._buffer, ""
        if self._schemas:
            text, marker, _ = text.partition(_CALLS)
            text = text if marker else text[: len(text) - _held(text, _CALLS)]
            text = text[: max(len(text.rstrip(_SPACE)), len(text) - _MAX_SPACE)]
        self._buffer = self._buffer[len(text) :]
        self._show(_spell(text), last=bool(marker))
        if marker and not self.done:
            self._raw = []
            self._take(self._buffer.index(_CALLS) + len(_CALLS))
            self._state = self._structure
        return bool(marker)

    def _show(self, text: str, last: bool = False) -> None:
        """Emit text, but hold back what may become a stop string. last: nothing can follow."""
        text = self._tail + text
        hits = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        end = min(hits)[1] if hits else len(text)
        if not hits and not last:
            end -= max((_held(text, stop) for stop in self._stop), default=0)
        if end:
            self._events.append(TextDelta(text[:end]))
        self._tail = "" if last else text[end:]
        if hits:
            self._end(Finish("stop_sequence", stop=min(hits)[2]))

    # A block of calls.

    def _take(self, n: int) -> str:
        assert self._raw is not None
        taken, self._buffer = self._buffer[:n], self._buffer[n:]
        self._raw.append(taken)
        return taken

    def _send(self, event: Event) -> None:
        (self._events if self._waiting is None else self._waiting).append(event)

    def _argue(self, json_text: str) -> None:
        assert self._call is not None
        self._arguments.append(json_text)
        self._send(ToolCallDelta(self._call.index, json_text))

    def _structure(self) -> bool:
        """State: between tags, where an opening tag or the closing one must follow."""
        self._take(len(self._buffer) - len(self._buffer.lstrip(_SPACE)))
        depth = len(self._empty)  # 0 in the block, 1 in a call, more in parameters of parameters
        close = (_END_CALLS, _END_INVOKE, _END_PARAMETER)[min(depth, 2)]
        head, pattern = (_PARAMETER, _PARAMETER_TAG) if depth else (_INVOKE, _INVOKE_TAG)
        if self._buffer.startswith(close):
            self._take(len(close))
            (self._close_object if depth else self._close_block)()
        elif tag := pattern.match(self._buffer, 0, _MAX_TAG):
            self._take(tag.end())
            (self._open_parameter if depth else self._open_call)(*map(_spell, tag.groups("")))
        else:
            rest = self._buffer[len(head) :]
            possible = head.startswith(self._buffer[: len(head)]) and _DSML not in rest and len(rest) < _MAX_TAG
            if possible or (close.startswith(self._buffer) and self._buffer != close):
                return False
            self._malformed()
        return True

    def _open_call(self, name: str) -> None:
        self._call = ToolCallStarted(self._finished, self._new_id(), name)
        self._arguments, self._empty, self._value, self._wrapper, self._tail = [], [True], [], None, ""
        self._waiting = [] if self._finished else None
        self._send(self._call)

    def _open_parameter(self, key: str, string: str) -> None:
        self._settle()
        if self._empty == [True] and string and self._undeclared(key):
            self._wrapper, self._state = (key, string, ""), self._buffered
            return
        self._key(key)
        self._is_string = string != "false"
        if string == "true":
            self._open_value()
        else:
            self._state = self._maybe_object

    def _key(self, key: str) -> None:
        self._argue(("{" if self._empty[-1] else ",") + _quote(key) + ":")
        self._empty[-1] = False

    def _close_object(self) -> None:
        """End a call, or a parameter whose value is an object of parameters."""
        if self._wrapper and _is_json(value := self._wrapper[2]) and value.lstrip(_SPACE).startswith("{"):
            self._wrapper = None
            self._empty.pop()
            self._argue(value.strip(_SPACE))
        else:
            self._settle()
            self._argue("{}" if self._empty.pop() else "}")
        if not self._empty:
            self._finish_call()

    def _finish_call(self) -> None:
        assert self._call is not None and self._raw is not None
        self._send(ToolCallFinished(self._call.index, self._call.id, self._call.name, "".join(self._arguments)))
        self._events += self._waiting or []
        self._finished += 1
        del self._raw[self._kept :]

    def _close_block(self) -> None:
        """End the turn; the closing tag of the block was the last thing taken."""
        assert self._raw is not None
        if self._finished:
            rest = "".join(self._raw[1:]).removesuffix(_END_CALLS)
            self._deliver(rest, rest)
        else:
            self._events.append(TextDelta(_spell("".join(self._raw))))
            self._end(Finish("stop"))

    def _end_in_block(self, reason: Literal["stop", "length"], cut: bool) -> None:
        """Sampling ended in the block."""
        assert self._raw is not None
        rest = "".join(self._raw[1 if self._finished else 0 :]) + self._buffer
        if not self._finished:
            self._end(Finish(reason if cut else "error", unfinished=_spell(rest)))
        elif cut:
            self._end(Finish(reason, unfinished=_spell(rest.strip(_SPACE))))
        else:
            self._deliver(rest[: len(rest) - _held_edge(rest)], rest)

    def _deliver(self, text: str, rest: str) -> None:
        """End a turn with finished calls. rest: of the block. text: of it, what is to be shown."""
        if text := text.strip(_SPACE):
            said = any(isinstance(event, TextDelta) for event in self._history + self._events)
            self._events.append(TextDelta("\n\n" * said + _spell(text)))
        turn = chat.SampledTurn(self._thinking, message(self._history + self._events), tuple(self._ids))
        self._end(Finish("tool_calls", turn=turn, unfinished=_spell(rest.strip(_SPACE))))

    # What is malformed.

    def _malformed(self) -> None:
        """The buffer begins with what cannot be here. A call in the text of a malformed one must not become one."""
        in_call, streamed = bool(self._empty), self._waiting is None
        self._empty = []
        if in_call and not streamed or not in_call and self._buffer.startswith(_INVOKE):
            self._open, self._state = int(in_call), self._skip
        else:
            self._state = self._lost if in_call or _TAG.match(self._buffer) else self._stray

    def _resume(self) -> None:
        assert self._raw is not None
        self._kept, self._state = len(self._raw), self._structure

    def _stray(self) -> bool:
        """State: in text between calls. It goes on to the next tag."""
        tag = _TAG.search(self._buffer)
        self._take(tag.start() if tag else len(self._buffer) - _held_edge(self._buffer))
        if tag:
            self._resume()
        return bool(tag)

    def _skip(self) -> bool:
        """State: in a malformed call. It goes on to its closing tag, or else to that of the block."""
        tag = _EDGE.search(self._buffer)
        self._take(tag.start() if tag else len(self._buffer) - _held_edge(self._buffer))
        if tag:
            self._take(len(tag[0]))
            self._open += {_INVOKE: 1, _END_INVOKE: -1}.get(tag[0], 0)
            if tag[0] == _END_CALLS:
                self._close_block()
            elif not self._open:
                self._resume()
        return bool(tag)

    def _lost(self) -> bool:
        """State: in a malformed block of which nothing more is read."""
        at = self._buffer.find(_END_CALLS)
        self._take(at if at >= 0 else len(self._buffer) - _held(self._buffer, _END_CALLS))
        if at >= 0:
            self._take(len(_END_CALLS))
            self._close_block()
        return False

    # Values of parameters.

    def _payload(self) -> tuple[str, bool]:
        """Take what has come of a value; → the text, and whether the value is complete.

        Any tag but the closing one breaks the block: the value would swallow the next parameter or call.
        """
        tag = _TAG.search(self._buffer)
        text = self._take(tag.start() if tag else len(self._buffer) - _held(self._buffer, _END_PARAMETER))
        whole = self._buffer.startswith(_END_PARAMETER)
        if whole:
            self._take(len(_END_PARAMETER))
            self._state = self._structure
        elif tag and not _END_PARAMETER.startswith(self._buffer):
            self._malformed()
        return _spell(text), whole

    def _string(self) -> bool:
        text, whole = self._payload()
        text = _unescape(self._tail + text)
        end = len(text) - (0 if whole else _held(text, _ESCAPED))
        self._tail = text[end:]
        if sent := _quote(text[:end])[1:-1] + '"' * whole:
            self._argue(sent)
        return self._state != self._string

    def _open_value(self) -> None:
        if self._is_string:
            self._argue('"')
        self._state = self._string if self._is_string else self._buffered

    def _maybe_object(self) -> bool:
        """State: at the start of a value without string="true". It is an object if a parameter comes next."""
        text = self._buffer.lstrip(_SPACE)
        if text in ("", "<") and len(self._buffer) - len(text) <= _MAX_SPACE:
            return False
        if text.startswith(f"<{_DSML}"):
            self._empty.append(True)
            self._state = self._structure
        else:
            self._open_value()
        return True

    def _buffered(self) -> bool:
        """State: in a value that must be complete before it is emitted: JSON, or all arguments in one parameter."""
        text, whole = self._payload()
        self._value.append(text)
        if whole:
            value, self._value = "".join(self._value), []
            if self._wrapper:
                key, string, _ = self._wrapper
                self._wrapper = key, string, _unescape(value) if string == "true" else value
            else:
                self._argue(_literal(value))
        return self._state != self._buffered

    def _undeclared(self, key: str) -> bool:
        """Whether the tool declares parameters, and `key`, which may hold all arguments, is not among them."""
        assert self._call is not None
        return calls.wraps(self._schemas.get(self._call.name), key)

    def _settle(self) -> None:
        """Emit a parameter named "arguments" or "input" as an ordinary one: it did not hold all arguments after all."""
        if self._wrapper:
            key, string, value = self._wrapper
            self._wrapper = None
            self._key(key)
            self._argue(_quote(value) if string == "true" else _literal(value))


def parse(
    tokenizer: Tokenizer, ids: Iterable[int], *, end: Literal["stop", "length"] = "stop", **options: Any
) -> tuple[dict[str, Any], Finish]:
    """Parse a complete sequence of sampled ids; → the message, and how it ends.

    end: why sampling ended, if the ids do not show it.  options: those of `OutputParser`.
    """
    parser = OutputParser(tokenizer, **options)
    events = [event for id in ids for event in parser.push(id)] + parser.finish(end)
    last = events[-1]
    assert isinstance(last, Finish)
    return message(events), last


def message(events: Iterable[Event]) -> dict[str, Any]:
    """An OpenAI-style assistant message: content (None if only calls), and reasoning_content and tool_calls if any.

    events: of one `OutputParser`, also before its end; calls that are not finished are not in the message.
    """
    content, reasoning, calls = [], [], []
    for event in events:
        match event:
            case TextDelta(text):
                content.append(text)
            case ThinkingDelta(text):
                reasoning.append(text)
            case ToolCallFinished(_, id, name, arguments):
                calls.append({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}})
    out: dict[str, Any] = {"role": "assistant", "content": "".join(content) or (None if calls else "")}
    if reasoning:
        out["reasoning_content"] = "".join(reasoning)
    if calls:
        out["tool_calls"] = calls
    return out


def _spell(text: str) -> str:
    """Text with the internal marks of control tokens replaced by their spellings, as clients see them."""
    return text.translate(_SPELLINGS)


def _held(text: str, pattern: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `pattern`."""
    at = text.find(pattern[0], max(0, len(text) - len(pattern) + 1))
    while at >= 0 and not pattern.startswith(text[at:]):
        at = text.find(pattern[0], at + 1)
    return len(text) - at if at >= 0 else 0


def _held_edge(text: str) -> int:
    return max(_held(text, tag) for tag in _EDGES)


# The one thing that the renderer changes in a string. Other entities (`&amp;`) are the argument's own.
_ESCAPED = chat.escape(chat.PARAMETER_CLOSE, chat.PARAMETER_CLOSE)
_quote = functools.partial(json.dumps, ensure_ascii=False)


def _unescape(text: str) -> str:
    return text.replace(_ESCAPED, chat.PARAMETER_CLOSE)


def _literal(value: str) -> str:
    """The JSON text of a value marked string="false": the value itself, or a JSON string if it is not JSON."""
    return value.strip(_SPACE) if _is_json(value) else _quote(_unescape(value))


def _is_json(text: str) -> bool:
    try:
        chat.read_json(text)
    except ValueError:
        return False
    return True
