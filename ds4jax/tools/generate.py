"""Generate text: answer a prompt, or with --prompts_file all prompts of a batch job.

    ds4jax generate "What is the capital of France?"
    ds4jax generate --config h200 --think off --max-tokens 200 "Why is the sky blue?"
    git diff | ds4jax generate --prompt_file - --system "Review this change."
    ds4jax generate --prompts_file in.jsonl --out out.jsonl

The answer goes to stdout as it comes. Thoughts, progress, speed and memory go to stderr.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from absl import flags

from ds4jax.chat import parser
from ds4jax.chat import template as chat
from ds4jax.chat.parser import Event as ParserEvent
from ds4jax.chat.parser import OutputParser, TextDelta, ThinkingDelta
from ds4jax.errors import ConfigError, Ds4Error
from ds4jax.files import LARGE, read_small
from ds4jax.io.checkpoint import Checkpoint
from ds4jax.io.drafter import open_with_drafter
from ds4jax.io.tokenizer import Special, StreamDecoder, Tokenizer
from ds4jax.profile import MAX_EFFORT_CTX, choose, effort_prefix
from ds4jax.settings import Settings
from ds4jax.terminal import DIM, PLAIN, has_colours, is_terminal
from ds4jax.tools import cli

if TYPE_CHECKING:  # JAX takes a second to import, and must not run before `Settings.set_environment`
    from ds4jax.engine.engine import Engine
    from ds4jax.engine.types import Event, Request, Token

DEFAULT_PROMPT = "Once upon a time"

ARGUMENT = "prompt"
FLAGS = flags.FlagValues()
cli.define_model(FLAGS)
cli.define_profile(FLAGS)
_text = f"The user's message, also without --prompt. Without any prompt: {DEFAULT_PROMPT!r}."
flags.DEFINE_string("prompt", None, _text, flag_values=FLAGS)
flags.DEFINE_string("prompt_file", None, "A UTF-8 file with the user's message; - is stdin.", flag_values=FLAGS)
flags.DEFINE_string(
    "prompts_file",
    None,
    'A batch job: JSON lines with "prompt" (and "system") or "messages", and perhaps "id", "think", "max_tokens" and '
    "sampling parameters, which replace the flags.",
    flag_values=FLAGS,
)
flags.DEFINE_string("out", None, "Where a batch job's results go, as JSON lines; by default stdout.", flag_values=FLAGS)
flags.DEFINE_string("system", "", "The system prompt.", flag_values=FLAGS)
flags.DEFINE_bool("raw", False, "Continue the prompt as it is, without the chat template.", flag_values=FLAGS)
_text = "Thoughts on stderr; by default where it and stdout are a terminal."
flags.DEFINE_bool("show_thinking", None, _text, flag_values=FLAGS)
cli.define_answers(FLAGS)
cli.define_sampling(FLAGS, seed=None)
cli.define_compute(FLAGS)
cli.define_drafts(FLAGS)
cli.define_budget(FLAGS)
cli.define_trace_routing(FLAGS)
flags.DEFINE_bool("dump_tokens", False, "Print the prompt's token ids and pieces, and stop.", flag_values=FLAGS)
flags.DEFINE_string("dump_logprobs", None, "A JSON file for the logits behind every token.", flag_values=FLAGS)
flags.DEFINE_integer("logprobs_top_k", 20, "Alternatives per step in --dump_logprobs.", flag_values=FLAGS)


def main() -> int:
    """Run the tool as FLAGS say; → exit status. Raises Ds4Error."""
    source, several = _prompt_source()
    keys = "model", "ctx", "max_tokens", "profile", "numerics", "kernels", "device_budget_gb", *cli.DRAFTS
    settings = Settings.load(FLAGS.config, **{key: FLAGS[key].value for key in keys})
    settings.set_environment()
    checkpoint = open_with_drafter(settings)
    file = checkpoint.file
    try:
        tokenizer = Tokenizer.from_metadata(file.metadata)
        profile = choose(settings.profile, file.metadata, file.path.name).name
    except Ds4Error as error:
        raise Ds4Error(f"{file.path}: {error}") from None
    settings = dataclasses.replace(settings, profile=profile)
    _note_lost_effort(settings)
    if several:
        return _batch_job(source, checkpoint, tokenizer, settings)
    tokens = _encode(source, tokenizer, settings)
    if FLAGS.dump_tokens:
        for id in tokens:
            print(f"{id}\t{tokenizer.piece(id)}")
        return 0
    return _stream(tokens, checkpoint, tokenizer, settings)


# ---- one prompt ------------------------------------------------------------------------------------------------------
def _stream(tokens: list[int], checkpoint: Checkpoint, tokenizer: Tokenizer, settings: Settings) -> int:
    from ds4jax.engine.types import Token, seed_or_random

    seed = seed_or_random(FLAGS.seed)
    request = _request(tokens, {"seed": seed}, checkpoint, tokenizer, settings)
    logprobs = Logprobs(Path(FLAGS.dump_logprobs), tokens, FLAGS.logprobs_top_k) if FLAGS.dump_logprobs else None
    decoder, read, output = StreamDecoder(tokenizer), _parser(tokenizer, tokens), _Output()

    def show(event: Event) -> None:
        if isinstance(event, Token):
            output.show(read.push(event.id))
            if logprobs:
                logprobs.add(event, "" if event.id == tokenizer.eos_id else decoder.push(event.id))

    with _engine(checkpoint, settings, 1, [request]) as engine, logprobs or contextlib.nullcontext():
        try:
            engine.add(request, show)
            while len(engine):
                engine.step()
                cli.check_interrupt()
        finally:  # an interrupted answer ends properly too
            output.show(read.finish("length"))
            output.end()
    if output.lacks_answer:
        print("note: the answer ended within its thought; see --max_tokens and --think", file=sys.stderr)
    if FLAGS.seed is None and FLAGS.temperature:
        print(f"seed: {seed}", file=sys.stderr)
    return 0


class _Output:
    """Where an answer goes: the text to stdout; thoughts to stderr, dimmed on a terminal, if they are to be seen."""

    def __init__(self):
        terminal = is_terminal(sys.stdout) and is_terminal(sys.stderr)
        self._shows_thoughts = terminal if FLAGS.show_thinking is None else FLAGS.show_thinking
        self._dim, self._plain = (DIM, PLAIN) if has_colours(sys.stderr) else ("", "")
        self._escape = "␛" if sys.stdout.isatty() else "\x1b"  # a model does not command the terminal
        self._thought = self._answered = False

    def show(self, events: Iterable[ParserEvent]) -> None:
        for event in events:
            match event:
                case ThinkingDelta(text):
                    self._thought = True
                    if self._shows_thoughts:
                        self._write(sys.stderr, f"{self._dim}{text}{self._plain}")
                case TextDelta(text):
                    if self._thought and self._shows_thoughts and not self._answered:
                        sys.stderr.write("\n\n")
                    self._answered = True
                    self._write(sys.stdout, text)

    def end(self) -> None:
        self._write(sys.stdout, "\n")

    @property
    def lacks_answer(self) -> bool:
        """Whether there was a thought and nothing else."""
        return self._thought and not self._answered

    def _write(self, stream: TextIO, text: str) -> None:
        stream.write(text.replace("\x1b", self._escape) if stream is sys.stdout else text)
        stream.flush()


class Logprobs:
    """The logits behind every token, for --dump_logprobs: written when the block ends, however it ends.

    ``{"prompt_tokens": [id, ...], "steps": [{"id", "text", "logit", "logprob", "top": [[id, logit, logprob], ...]}]}``.
    Logits are those of the position that the token was drawn from, before temperature and filters, to float32's full
    precision; `top` has the likeliest, in order. `text` is what the step added to the output: an end token adds none,
    nor does one that ends within a character.
    """

    def __init__(self, path: Path, prompt: list[int], top_k: int):
        if not path.parent.is_dir():
            raise ConfigError(f"dump_logprobs: found {path}, expected a file in an existing directory")
        if top_k < 0:
            raise ConfigError(f"logprobs_top_k: found {top_k}, expected at least 0")
        self._path, self._top_k = path, top_k
        self._content: dict[str, Any] = {"prompt_tokens": prompt, "steps": []}

    def add(self, token: Token, text: str) -> None:
        logits = token.logits
        assert logits is not None
        if not np.isfinite(logits).all():
            raise Ds4Error(f"step {len(self._content['steps'])}: found logits that are not finite; a damaged model?")
        wide = logits.astype(np.float64) - logits.max()
        logprobs = (wide - np.log(np.exp(wide).sum())).astype(np.float32)
        top = np.argsort(-logits, kind="stable")[: self._top_k]
        self._content["steps"].append(
            {
                "id": token.id,
                "text": text,
                "logit": float(logits[token.id]),
                "logprob": float(logprobs[token.id]),
                "top": [[int(i), float(logits[i]), float(logprobs[i])] for i in top],
            }
        )

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc) -> None:
        partial = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            partial.write_text(json.dumps(self._content) + "\n")
            os.replace(partial, self._path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise Ds4Error(f"dump_logprobs: {self._path} cannot be written: {error.strerror}") from None


# ---- many prompts ----------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a batch job: its number, its id (by default the number), and the request or what is wrong with it."""

    number: int
    id: Any
    request: Request | None
    error: str | None = None


# Keys of a line → the types of their values.
_NUMBER = (int, float)
_SAMPLING = {"temperature": _NUMBER, "top_k": int, "top_p": _NUMBER, "min_p": _NUMBER, "seed": int}
_KEYS = {"prompt": str, "system": str, "messages": list, "think": str, "id": (str, int), "max_tokens": int, **_SAMPLING}


def parse_line(text: str, number: int, make: Callable[[dict[str, Any]], Request]) -> Line:
    """A line of --prompts_file: an object with ``prompt`` (and perhaps ``system``) or ``messages``; ``id``, ``think``,
    ``max_tokens`` and the sampling parameters are optional, and replace the flags."""
    id: Any = number
    try:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise Ds4Error(f"not JSON: {error}") from None
        if not isinstance(line, dict):
            raise Ds4Error(f"found {text.strip():.40}, expected an object")
        if type(line.get("id")) in _KEYS["id"]:
            id = line["id"]
        for key, value in line.items():
            if key not in _KEYS:
                raise Ds4Error(f"found the key {key!r}, expected some of {', '.join(_KEYS)}")
            if not isinstance(value, _KEYS[key]) or isinstance(value, bool):
                raise Ds4Error(f"{key}: found {json.dumps(value):.40}, expected another type of value")
        if ("prompt" in line) == ("messages" in line):
            raise Ds4Error("expected either prompt or messages")
        if "messages" in line and "system" in line:
            raise Ds4Error("found system beside messages, expected it among them")
        return Line(number, id, make(line))
    except Ds4Error as error:
        return Line(number, id, None, str(error))


def _batch_job(text: str, checkpoint: Checkpoint, tokenizer: Tokenizer, settings: Settings) -> int:
    """Results as they finish, one JSON object per line: id, text, reasoning (the thought, or ""), tokens (of both,
    without the end token), finish_reason and n_prompt_tokens; or id, line and error."""
    from ds4jax.engine.types import Finished, Token

    def make(line: dict[str, Any]) -> Request:
        return _request(_encode(line, tokenizer, settings), line, checkpoint, tokenizer, settings)

    lines = [parse_line(line, n, make) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    requests = [line.request for line in lines if line.request]
    for line in lines:
        if line.error:
            print(f"{FLAGS.prompts_file} line {line.number}: {line.error}", file=sys.stderr)
    done = 0

    def collect(line: Line, request: Request, answer: list[int], event: Event) -> None:
        nonlocal done
        if isinstance(event, Token):
            answer.append(event.id)
        elif isinstance(event, Finished):
            said = answer[:-1] if event.reason == "stop" else answer
            read = _parser(tokenizer, request.tokens)
            message = parser.message([e for id in said for e in read.push(id)] + read.finish("length"))
            reasoning = message.get("reasoning_content", "")
            result = {"id": line.id, "text": message["content"], "reasoning": reasoning, "tokens": said}
            _write(out, result | {"finish_reason": event.reason, "n_prompt_tokens": len(request.tokens)})
            done += 1

    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(_engine(checkpoint, settings, settings.batch, requests)) if requests else None
        out = stack.enter_context(_output())
        for line in lines:
            if line.error:
                _write(out, {"id": line.id, "line": line.number, "error": line.error})
            elif engine is not None and line.request:
                engine.add(line.request, functools.partial(collect, line, line.request, []))
        try:
            while engine is not None and len(engine):
                engine.step()
                cli.check_interrupt()
        finally:
            print(f"{done} of {len(lines)} prompts finished", file=sys.stderr)
    return 0 if done == len(lines) else 1


@contextlib.contextmanager
def _output() -> Iterator[TextIO]:
    if FLAGS.out is None:
        yield sys.stdout
        return
    try:
        file = open(FLAGS.out, "w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"out: {FLAGS.out} cannot be written: {error.strerror}") from None
    with file:
        yield file


def _write(out: TextIO, result: dict) -> None:
    """One whole line at once: what is in the file can be used while the job runs, and after it broke off."""
    out.write(json.dumps(result, ensure_ascii=False) + "\n")
    out.flush()


# ---- both ------------------------------------------------------------------------------------------------------------
def _parser(tokenizer: Tokenizer, prompt: Sequence[int]) -> OutputParser:
    """What tells the thought from the answer to a prompt."""
    thinking = not FLAGS.raw and prompt[-1] == tokenizer.special(Special.THINK_OPEN)
    return OutputParser(tokenizer, thinking=thinking, raw=FLAGS.raw)


def _prompt_source() -> tuple[Any, bool]:
    """What the flags say to continue: (the values of one line, see `parse_line`), or the text of many and True."""
    given = [name for name in ("prompt", "prompt_file", "prompts_file") if FLAGS[name].value is not None]
    if len(given) > 1:
        raise ConfigError(f"found --{given[0]} and --{given[1]}, expected one of them")
    if FLAGS.prompts_file is not None:
        for name in ("dump_tokens", "dump_logprobs"):
            if FLAGS[name].value:
                raise ConfigError(f"found --{name} with --prompts_file, expected it with a single prompt")
        return _read(FLAGS.prompts_file), True
    if FLAGS.out is not None:
        raise ConfigError("found --out without --prompts_file; the text of a single prompt goes to stdout")
    if FLAGS.prompt_file is not None:
        return {"prompt": _read(FLAGS.prompt_file)}, False
    return {"prompt": DEFAULT_PROMPT if FLAGS.prompt is None else FLAGS.prompt}, False


def _read(path: str) -> str:
    try:
        content = sys.stdin.buffer.read(LARGE) if path == "-" else read_small(path, LARGE)
        return content.decode()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: found {error.object[error.start]:#04x} at byte {error.start}, expected UTF-8"
        ) from None


def _encode(values: dict[str, Any], tokenizer: Tokenizer, settings: Settings) -> list[int]:
    """The token ids of a prompt: `values` as in a line of a batch job."""
    system = values.get("system", FLAGS.system)
    if FLAGS.raw:
        if system or "messages" in values:
            raise ConfigError(f"found --raw with {'a system prompt' if system else 'messages'}, expected only a prompt")
        return tokenizer.encode_raw(values["prompt"])
    messages = [{"role": "system", "content": system}] if system else []
    messages += values.get("messages", [{"role": "user", "content": values.get("prompt")}])
    think = values.get("think", FLAGS.think)
    return chat.render_ids(tokenizer, messages, think=think, profile=settings.profile, ctx=settings.ctx)


def _request(
    tokens: list[int], line: dict[str, Any], checkpoint: Checkpoint, tokenizer: Tokenizer, settings: Settings
) -> Request:
    """A request: parameters that a line has replace those of the flags. Raises Ds4Error if it cannot run."""
    from ds4jax.engine.model_runner import check_prompt
    from ds4jax.engine.types import Request, Sampling

    check_prompt(tokens, checkpoint.cfg, settings.ctx)
    max_tokens = line.get("max_tokens", settings.max_tokens)
    if max_tokens < 1:
        raise ConfigError(f"max_tokens: found {max_tokens}, expected at least 1")
    params: dict[str, Any] = {name: line.get(name, FLAGS[name].value) for name in cli.SAMPLING}
    params["seed"] = params["seed"] or 0  # a batch job gives the same results every time
    return Request(
        tokens, max_tokens, Sampling(**params), frozenset([tokenizer.eos_id]), logits=FLAGS.dump_logprobs is not None
    )


@contextlib.contextmanager
def _engine(checkpoint: Checkpoint, settings: Settings, batch: int, requests: Iterable[Request]) -> Iterator[Engine]:
    """An engine for some requests; at the end, speed and memory go to stderr."""
    from ds4jax.engine import compile_cache, memory, model_runner
    from ds4jax.engine.chunks import chunk_sizes
    from ds4jax.engine.engine import Engine
    from ds4jax.engine.routing_trace import Writer

    compile_cache.keep_compilations()
    sizes = chunk_sizes((len(request.tokens) for request in requests), settings.prefill_chunk)
    traced: dict[str, Any] = {}
    if FLAGS.trace_routing:
        traced = {"record": Writer(FLAGS.trace_routing, checkpoint.cfg)}
    runner = model_runner.ModelRunner(checkpoint, settings, batch, progress=True, sizes=sizes, **traced)
    engine = Engine(runner, sizes=sizes)
    try:
        yield engine
    finally:
        stats = runner.stats
        for what, n, seconds in (
            ("prefill", stats.prefill_tokens, stats.prefill_seconds),
            ("decode", stats.decode_tokens, stats.decode_seconds),
        ):
            if n:
                print(f"{what}: {n} tokens in {seconds:.2f} s, {n / seconds:.1f} tokens/s", file=sys.stderr)
        if engine.speculation:
            print(f"drafts: {engine.speculation}", file=sys.stderr)
        found, lacked = runner.brought
        if asked := found + lacked:
            print(f"experts of decoded tokens on the device: {found / asked:.1%}", file=sys.stderr)
        peak = memory.describe_peak(runner.steps)
        print(f"compilation: {stats.compile_seconds:.1f} s; {peak}", file=sys.stderr)


def _note_lost_effort(settings: Settings) -> None:
    if FLAGS.think == "max" and not FLAGS.raw and not effort_prefix("max", settings.profile, settings.ctx):
        print(
            f"note: --think=max acts as on: this model's instruction for it needs a ctx of {MAX_EFFORT_CTX}, found "
            f"{settings.ctx}",
            file=sys.stderr,
        )
