"""Chat in the terminal: ``ds4jax chat``, or ``ds4jax chat --config h200``.

    /regen                     answer the last message again
    /edit [TEXT]               change the last message, and send it again
    /new                       start over
    /think off|on|low|high|max whether, and how long, the model reasons before it answers
    /system [TEXT]             the system prompt: show it, or put another in its place
    /set NAME VALUE            temperature, top_p, top_k, min_p, max_tokens, seed (a number, or random)
    /show                      all that is set
    /tokens                    how many tokens the conversation has
    /read FILE                 send a text file as the message
    /save FILE, /load FILE     the conversation, as JSON
    /ctx N                     reopen the model with room for N tokens; the conversation goes on
    /help, /quit

Enter sends. Alt+Enter begins a new line, and so does Enter between three quotation marks and the next three; a text
that is pasted is one message. Ctrl-C stops the answer; at the prompt, Ctrl-D or /quit leaves.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

import ds4jax
from ds4jax.chat import template as chat
from ds4jax.chat.parser import TextDelta, ThinkingDelta
from ds4jax.errors import Ds4Error
from ds4jax.files import LARGE, read_small
from ds4jax.paths import cache_dir
from ds4jax.profile import MAX_EFFORT_CTX, THINK_MODES, effort_prefix
from ds4jax.settings import Settings
from ds4jax.terminal import DIM, PLAIN, has_colours, meter
from ds4jax.tools import cli
from ds4jax.tools.markdown import Answer, harmless
from ds4jax.tools.prompting import Ask as AskUser
from ds4jax.tools.prompting import asker, unquoted

if TYPE_CHECKING:  # JAX takes a second to import
    from ds4jax.engine.async_engine import AsyncEngine

FLAGS = flags.FlagValues()
cli.define_model(FLAGS)
cli.define_profile(FLAGS)
cli.define_drafts(FLAGS)
cli.define_budget(FLAGS)
flags.DEFINE_string("system", "", "The system prompt.", flag_values=FLAGS)
flags.DEFINE_enum("think", "on", THINK_MODES, "Whether the model reasons first.", flag_values=FLAGS)
flags.DEFINE_integer("max_tokens", None, "The longest answer; by default all the room.", 1, flag_values=FLAGS)
flags.DEFINE_integer("ctx", None, "Tokens of the whole conversation; by default the config's.", flag_values=FLAGS)
cli.define_sampling(FLAGS, seed=None)
flags.DEFINE_string("kv_dir", None, "A folder for prefixes, so that a restart computes none anew.", flag_values=FLAGS)

_NUMBERS = {"temperature": float, "top_p": float, "top_k": int, "min_p": float, "max_tokens": int, "seed": int}
"""What /set changes."""
_PATHS = ("/read", "/save", "/load")
_WORDS = {
    **{f"/{name}": () for name in ("regen", "edit", "new", "system", "show", "tokens", "ctx", "help", "quit")},
    **{path: () for path in _PATHS},
    "/think": THINK_MODES,
    "/set": tuple(_NUMBERS),
}


def main() -> int:
    """Chat as FLAGS say, until the user leaves; → exit status. Raises Ds4Error."""
    overrides = {key: FLAGS[key].value for key in ("model", "ctx", "profile", "device_budget_gb", *cli.DRAFTS)}
    settings = Settings.load(FLAGS.config, **overrides)
    ask = asker(cache_dir() / "chat_messages", _WORDS, _PATHS)
    with asyncio.Runner() as loop:
        session = Session(loop.run, settings, lambda settings: _open(settings), ask)
        session.greet()
        try:
            with cli.interrupts(signal.default_int_handler):  # by which the loop knows that it is to cancel what runs
                while (line := session.ask()) is not None:
                    try:
                        if not session.enter(line):
                            break
                    except KeyboardInterrupt:
                        if not session.is_open:  # while it was being reopened
                            raise
                        _note("(stopped)")  # and pressed again
        finally:
            session.close()
    return 0


def _open(settings: Settings) -> AsyncEngine:
    settings.set_environment()
    from ds4jax.engine.async_engine import AsyncEngine

    cli.watch_interrupts()  # line editing has taken its place
    with cli.interrupts(cli.end_at_interrupt):
        return AsyncEngine.open(settings, max_seqs=1, kv_dir=FLAGS.kv_dir, progress=True)


class Session:
    """A conversation with one engine.

    Attributes: messages (in Chat Completions' form), think, values (of _NUMBERS; None where nothing is set).
    """

    def __init__(
        self,
        run: Callable,
        settings: Settings,
        open_engine: Callable[[Settings], AsyncEngine],
        ask: AskUser = lambda _: None,
    ):
        """run: runs a coroutine to its end; Ctrl-C raises KeyboardInterrupt from it. Raises Ds4Error."""
        self._run, self._settings, self._open, self._ask = run, settings, open_engine, ask
        self._opened: AsyncEngine | None = open_engine(settings)
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": FLAGS.system}] if FLAGS.system else []
        self.think = FLAGS.think
        self.values: dict[str, Any] = {name: FLAGS[name].value for name in _NUMBERS}

    def close(self) -> None:
        if self._opened is not None:
            self._run(self._opened.close())
            self._opened = None

    @property
    def is_open(self) -> bool:
        """Whether there is an engine to answer."""
        return self._opened is not None

    @property
    def _engine(self) -> AsyncEngine:
        assert self._opened is not None
        return self._opened

    def greet(self) -> None:
        """Say what answers here."""
        engine = self._engine
        about = engine.model_name, f"{engine.ctx:,} tokens", engine.device, "/help lists commands, Ctrl-D leaves"
        _note(f"ds4jax {ds4jax.__version__} · {' · '.join(about)}")

    def ask(self, begin: str = "") -> str | None:
        """Ask the user for a message; → None at the end of the input."""
        while True:
            try:
                return self._ask(begin)
            except KeyboardInterrupt:
                print("\n(Ctrl-D or /quit leaves)", file=sys.stderr)

    def enter(self, line: str) -> bool:
        """Send a message or run a command; → whether to go on. Errors are printed."""
        text = unquoted(line)
        command, _, rest = ("", "", "") if "\n" in text.strip() or text is not line else text.rstrip().partition(" ")
        try:
            match command, rest.strip():
                case _ if not text.strip():
                    pass
                case "/quit" | "/exit", _:
                    return False
                case "/help", _:
                    print(__doc__)
                case "/think" | "/think-max" | "/nothink", mode:
                    self._set_think(mode or {"/think": "on", "/think-max": "max", "/nothink": "off"}[command])
                case "/regen", _:
                    before = self.messages
                    self._say(self._take_last(), before)
                case "/edit", changed:
                    self._edit(changed)
                case "/new", _:
                    self.messages = self._system
                case "/system", prompt:
                    self._set_system(prompt)
                case "/set", values:
                    self._set(*values.split())
                case "/show", _:
                    self._show()
                case "/tokens", _:
                    _note(self._used(len(self._prompt()) if self._turns else 0))
                case "/ctx", n:
                    self._reopen(n)
                case "/read", path:
                    self._say(_read(command, path))
                case "/save", path:
                    content = json.dumps({"think": self.think, "messages": self.messages}, indent=1) + "\n"
                    _note(f"written to {_write(command, path, content)}")
                case "/load", path:
                    self._load(path)
                case _ if command.startswith("/"):
                    raise Ds4Error(
                        f"found the command {command}, expected one that /help lists (a space before it sends it)"
                    )
                case _:
                    self._say(text)
        except Ds4Error as error:
            print(f"error: {error}", file=sys.stderr)
        return True

    # ---- messages ----------------------------------------------------------------------------------------------------
    @property
    def _system(self) -> list[dict[str, Any]]:
        return [message for message in self.messages[:1] if message["role"] == "system"]

    @property
    def _turns(self) -> list[dict[str, Any]]:
        return self.messages[len(self._system) :]

    def _take_last(self) -> str:
        """Take the last message of the user, and its answer, out of the conversation; → its text."""
        last = max((i for i, message in enumerate(self.messages) if message["role"] == "user"), default=None)
        if last is None:
            raise Ds4Error("found no message, expected one that was sent")
        text = self.messages[last]["content"]
        self.messages = self.messages[:last]
        return text

    def _edit(self, text: str) -> None:
        before = self.messages
        last = self._take_last()
        changed = text or self.ask(last)
        if changed is None or not changed.strip():
            self.messages = before
        else:
            self._say(unquoted(changed), before)

    def _say(self, text: str, before: list[dict[str, Any]] | None = None) -> None:
        """Send a message and print the answer. After Ctrl-C, what was said so far stays in the conversation.

        before: what the conversation is again if nothing was said; by default what it is now.
        """
        before = self.messages if before is None else before
        self.messages = [*self.messages, {"role": "user", "content": text}]
        said: dict[str, Any] = {}
        try:
            self._run(self._answer(said))
        except KeyboardInterrupt:
            _note("(stopped)")
        finally:
            self.messages = [*self.messages, said] if said else before

    async def _answer(self, said: dict[str, Any]) -> None:
        """Print the answer as it comes; `said` becomes its message, even if this is cancelled."""
        from ds4jax.engine.types import Sampling, seed_or_random
        from ds4jax.server.ask import Ask
        from ds4jax.server.conversation import Tick, start

        values: dict[str, Any] = self.values | {"seed": seed_or_random(self.values["seed"])}
        max_tokens = values.pop("max_tokens")
        ask = Ask("", True, Sampling(**values), self.messages, think=self.think, max_tokens=max_tokens)
        (talk,) = await start(self._engine, ask, tick=0.1)
        answer, first = Answer(), None
        bar = meter(talk.usage.prompt, "reading", "token", delay=0.3)
        bar.update(talk.usage.cached)
        try:
            async for event in talk:
                match event:
                    case Tick(prefilled):
                        bar.update(max(0, prefilled - bar.n))
                    case ThinkingDelta(text) | TextDelta(text):
                        if first is None:
                            first = time.perf_counter()
                            bar.close()
                        (answer.think if isinstance(event, ThinkingDelta) else answer.say)(text)
        finally:
            talk.cancel()
            bar.close()
            answer.end()
            if talk.message.get("reasoning_content") or talk.message["content"]:
                said.update(talk.message)
        seconds = time.perf_counter() - (first or time.perf_counter())
        usage = talk.usage
        speed = f", {(usage.completion - 1) / seconds:.1f} tokens/s" if seconds and usage.completion > 1 else ""
        cut = ", cut off by the limit" if talk.finish.reason == "length" else ""
        _note(f"({usage.completion} tokens{speed}{cut}; {self._used(usage.prompt + usage.completion)})")

    def _prompt(self) -> list[int]:
        """The token ids of the conversation."""
        engine = self._engine
        profile = engine.profile.name
        return chat.render_ids(engine.tokenizer, self.messages, think=self.think, profile=profile, ctx=engine.ctx)

    def _used(self, tokens: int) -> str:
        return f"{tokens:,} of {self._engine.ctx:,} tokens used"

    # ---- what is set -------------------------------------------------------------------------------------------------
    def _set_think(self, mode: str) -> None:
        if mode not in THINK_MODES:
            raise Ds4Error(f"/think: found {mode!r}, expected one of {', '.join(THINK_MODES)}")
        self.think = mode
        self._note_lost_effort()

    def _set_system(self, text: str) -> None:
        if text:
            self.messages = [{"role": "system", "content": text}, *self._turns]
        else:
            _note(self._system[0]["content"] if self._system else "no system prompt; /system TEXT sets one")

    def _set(self, name: str = "", value: str = "", *more: str) -> None:
        from ds4jax.engine.types import Sampling

        if name not in _NUMBERS or more:
            raise Ds4Error(f"/set: found {name!r}, expected one of {', '.join(_NUMBERS)} and a value")
        nothing = {"seed": "random", "max_tokens": "all"}.get(name, "")
        try:
            number = None if value and value == nothing else _NUMBERS[name](value)
        except ValueError:
            also = f" or {nothing}" if nothing else ""
            raise Ds4Error(f"/set {name}: found {value!r}, expected a number{also}") from None
        if name == "max_tokens" and number is not None and number < 1:
            raise Ds4Error(f"/set max_tokens: found {number}, expected at least 1")
        if name != "max_tokens" and number is not None:
            Sampling(**{name: number})  # raises Ds4Error
        self.values[name] = number

    def _show(self) -> None:
        shown = self.values | {"think": self.think, "model": self._engine.model_name, "ctx": self._engine.ctx}
        shown |= {"seed": "random" if self.values["seed"] is None else self.values["seed"]}
        shown |= {"max_tokens": self.values["max_tokens"] or "all the room"}
        shown |= {"system": self._system[0]["content"] if self._system else "none"}
        print(*(f"{name:<12} {value}" for name, value in shown.items()), sep="\n", file=sys.stderr)

    def _reopen(self, n: str) -> None:
        if not n.isascii() or not n.isdecimal():
            raise Ds4Error(f"/ctx: found {n!r}, expected a number of tokens")
        settings = dataclasses.replace(self._settings, ctx=int(n))
        self.close()  # two models might not fit
        try:
            self._opened = self._open(settings)
            self._settings = settings
        except Ds4Error:
            self._opened = self._open(self._settings)
            raise
        self._note_lost_effort()

    def _load(self, path: str) -> None:
        text = _read("/load", path)
        try:
            value = chat.read_json(text)
            messages, think = value["messages"], value["think"]
        except (ValueError, TypeError, LookupError):
            raise Ds4Error(f"{path}: found something else, expected a conversation that /save wrote") from None
        chat.render(messages, think=think)  # raises Ds4Error for what is no conversation
        self.messages, self.think = messages, think
        for message in messages:
            print(f"{'> ' if message['role'] == 'user' else ''}{harmless(message.get('content') or '')}")

    def _note_lost_effort(self) -> None:
        if self.think == "max" and not effort_prefix("max", self._engine.profile.name, self._engine.ctx):
            _note(f"note: /think max acts as /think on with a context below {MAX_EFFORT_CTX} tokens")


def _note(text: str) -> None:
    """Say something that is no answer."""
    dim, plain = (DIM, PLAIN) if has_colours(sys.stderr) else ("", "")
    print(f"{dim}{text}{plain}", file=sys.stderr)


def _named(command: str, path: str) -> Path:
    if not path:
        raise Ds4Error(f"{command}: found no name of a file, expected {command} FILE")
    return Path(path).expanduser()


def _read(command: str, path: str) -> str:
    try:
        return read_small(_named(command, path), LARGE).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise Ds4Error(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _write(command: str, path: str, text: str) -> Path:
    """Write a file; → its path."""
    file = _named(command, path)
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise Ds4Error(f"{path}: cannot be written: {error.strerror}") from None
    return file
