"""Chat in the terminal: ``python -m ds4jax.chat --config tiny``.

    /think, /think-max, /nothink   whether the model reasons before it answers
    /read FILE                     send a text file as the message
    /save FILE, /load FILE         the conversation, as JSON
    /new                           start over
    /ctx N                         reopen the model with room for N tokens; the conversation goes on
    /help, /quit

Ctrl-C stops the answer; at the prompt, Ctrl-D or /quit leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from tqdm import tqdm

from ds4jax.chat import template as chat
from ds4jax.chat.parser import TextDelta, ThinkingDelta
from ds4jax.errors import Ds4Error
from ds4jax.files import LARGE, read_small
from ds4jax.paths import cache_dir
from ds4jax.profile import MAX_EFFORT_CTX, THINK_MODES, effort_prefix
from ds4jax.settings import Settings
from ds4jax.tools import cli

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
flags.DEFINE_float("temperature", 1.0, "0 takes the likeliest token.", flag_values=FLAGS)
flags.DEFINE_float("top_p", 1.0, "Sample from the likeliest tokens that reach this probability.", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Of the random draws.", flag_values=FLAGS)
flags.DEFINE_string("kv_dir", None, "A folder for prefixes, so that a restart computes none anew.", flag_values=FLAGS)

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def main() -> int:
    """Chat as FLAGS say, until the user leaves; → exit status. Raises Ds4Error."""
    overrides = {key: FLAGS[key].value for key in ("model", "ctx", "profile", "device_budget_gb", *cli.DRAFTS)}
    settings = Settings.load(FLAGS.config, **overrides)
    with asyncio.Runner() as loop, _line_editing():
        session = Session(loop.run, settings, lambda settings: _open(settings))
        try:
            while (line := _ask()) is not None and session.enter(line):
                pass
        finally:
            session.close()
    return 0


def _open(settings: Settings) -> AsyncEngine:
    settings.set_environment()
    from ds4jax.engine.async_engine import AsyncEngine

    return AsyncEngine.open(settings, max_seqs=1, kv_dir=FLAGS.kv_dir, progress=True)


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """Gives `input` its line editing, and a history that outlives the program."""
    try:
        import readline
    except ImportError:  # not on every system
        yield
        return
    path = cache_dir() / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.touch(mode=0o600)
            readline.write_history_file(path)


def _ask() -> str | None:
    """Ask the user for a line; → None at the end of the input."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)")


class Session:
    """A conversation with one engine.

    Attributes: messages (in Chat Completions' form), think.
    """

    def __init__(self, run: Callable, settings: Settings, open_engine: Callable[[Settings], AsyncEngine]):
        """run: runs a coroutine to its end; Ctrl-C raises KeyboardInterrupt from it. Raises Ds4Error."""
        self._run, self._settings, self._open = run, settings, open_engine
        self._opened: AsyncEngine | None = open_engine(settings)
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": FLAGS.system}] if FLAGS.system else []
        self.think = FLAGS.think

    def close(self) -> None:
        if self._opened is not None:
            self._run(self._opened.close())
            self._opened = None

    @property
    def _engine(self) -> AsyncEngine:
        assert self._opened is not None
        return self._opened

    def enter(self, line: str) -> bool:
        """Send a message or run a command; → whether to go on. Errors are printed."""
        command, _, rest = line.rstrip().partition(" ")
        try:
            match command, rest.strip():
                case _ if not line.strip():
                    pass
                case "/quit" | "/exit", _:
                    return False
                case "/help", _:
                    print(__doc__)
                case "/think" | "/think-max" | "/nothink", _:
                    self.think = {"/think": "on", "/think-max": "max", "/nothink": "off"}[command]
                    self._note_lost_effort()
                case "/new", _:
                    self.messages = [m for m in self.messages[:1] if m["role"] == "system"]
                case "/ctx", n:
                    self._reopen(n)
                case "/read", path:
                    self._say(_read(path))
                case "/save", path:
                    _write(path, json.dumps({"think": self.think, "messages": self.messages}, indent=1) + "\n")
                case "/load", path:
                    self._load(path)
                case _ if command.startswith("/"):
                    raise Ds4Error(
                        f"found the command {command}, expected one that /help lists (a space before it sends it)"
                    )
                case _:
                    self._say(line)
        except Ds4Error as error:
            print(f"error: {error}", file=sys.stderr)
        return True

    def _say(self, text: str) -> None:
        """Send a message and print the answer. After Ctrl-C, what was said so far stays in the conversation."""
        self.messages.append({"role": "user", "content": text})
        said: dict[str, Any] = {}
        try:
            self._run(self._answer(said))
        except KeyboardInterrupt:
            print("\n(stopped)", file=sys.stderr)
        finally:
            if said:
                self.messages.append(said)
            else:
                self.messages.pop()

    async def _answer(self, said: dict[str, Any]) -> None:
        """Print the answer as it comes; `said` becomes its message, even if this is cancelled."""
        from ds4jax.engine.types import Sampling
        from ds4jax.server.ask import Ask
        from ds4jax.server.conversation import Tick, start

        sampling = Sampling(temperature=FLAGS.temperature, top_p=FLAGS.top_p, seed=FLAGS.seed)
        ask = Ask("", True, sampling, self.messages, think=self.think, max_tokens=FLAGS.max_tokens)
        (talk,) = await start(self._engine, ask, tick=0.1)
        dim, plain = (_DIM, _PLAIN) if sys.stdout.isatty() else ("", "")
        thinking, first = False, None
        bar = tqdm(total=talk.usage.prompt, desc="reading", unit="token", leave=False, delay=0.3)
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
                        if isinstance(event, ThinkingDelta) != thinking:
                            thinking = not thinking
                            print(end=dim if thinking else f"{plain}\n\n")
                        print(text.replace("\x1b", "␛"), end="", flush=True)  # a model does not command the terminal
        finally:
            talk.cancel()
            bar.close()
            print(plain)
            if talk.message.get("reasoning_content") or talk.message["content"]:
                said.update(talk.message)
        seconds = time.perf_counter() - (first or time.perf_counter())
        usage = talk.usage
        speed = f", {(usage.completion - 1) / seconds:.1f} tokens/s" if seconds and usage.completion > 1 else ""
        cut = ", cut off by the limit" if talk.finish.reason == "length" else ""
        used = f"{usage.prompt + usage.completion} of {self._engine.ctx} tokens used"
        print(f"({usage.completion} tokens{speed}{cut}; {used})", file=sys.stderr)

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
        try:
            value = chat.read_json(_read(path))
            messages, think = value["messages"], value["think"]
        except (ValueError, TypeError, LookupError):
            raise Ds4Error(f"{path}: found something else, expected a conversation that /save wrote") from None
        chat.render(messages, think=think)  # raises Ds4Error for what is no conversation
        self.messages, self.think = messages, think
        for message in messages:
            print(f"{'> ' if message['role'] == 'user' else ''}{message.get('content') or ''}")

    def _note_lost_effort(self) -> None:
        if self.think == "max" and not effort_prefix("max", self._engine.profile.name, self._engine.ctx):
            print(f"note: /think-max acts as /think with a context below {MAX_EFFORT_CTX} tokens", file=sys.stderr)


def _read(path: str) -> str:
    try:
        return read_small(Path(path).expanduser(), LARGE).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise Ds4Error(f"{path or 'FILE'}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _write(path: str, text: str) -> None:
    try:
        Path(path).expanduser().write_text(text, encoding="utf-8")
    except OSError as error:
        raise Ds4Error(f"{path or 'FILE'}: cannot be written: {error.strerror}") from None
