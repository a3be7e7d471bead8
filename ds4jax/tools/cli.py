"""What the command-line tools share: common flags, parsing, errors and exit status."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import select
import signal
import stat
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, cast

from absl import flags

from ds4jax.errors import ConfigError, Ds4Error
from ds4jax.files import write_whole
from ds4jax.profile import THINK_MODES

flags.disclaim_key_flags()  # --help lists what is defined here under the tool

DRAFTS = ("draft", "draft_tokens")
"""The flags of `define_drafts`, which replace the keys of these names in a config."""
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")
"""The flags of `define_sampling`: parameters of `engine.types.Sampling`."""
GROUPS = {
    "Model": ("config", "model", "profile", "synthetic", "recipe", "device"),
    "Answers": ("think", "max_tokens", "ctx", "system"),
    "Sampling": SAMPLING,
    "Computation": ("numerics", "kernels", "device_budget_gb", *DRAFTS),
}
"""How --help groups the flags that several tools have; a tool's own come first."""


def define_model(flag_values: flags.FlagValues) -> None:
    """Define --config and --model, which every tool has that runs or reads a model."""
    flags.DEFINE_string("config", "tiny", "Name of a config, or path of a TOML file.", flag_values=flag_values)
    text = "Instead of the config's model: a GGUF file, hf:OWNER/REPO/FILE, or a folder of ds4jax checkpoint."
    flags.DEFINE_string("model", None, text, flag_values=flag_values)


def define_profile(flag_values: flags.FlagValues) -> None:
    """Define --profile, for tools that write prompts."""
    text = "The model's release, which decides how efforts are asked for; by default the config's."
    flags.DEFINE_enum("profile", None, ["auto", "original", "0731"], text, flag_values=flag_values)


def define_device(flag_values: flags.FlagValues) -> None:
    """Define --device, for tools that plan."""
    text = "The GPU to plan for, H200 or RTX PRO 6000 for example, or here; by default the config's."
    flags.DEFINE_string("device", None, text, flag_values=flag_values)


def define_compute(flag_values: flags.FlagValues) -> None:
    """Define --numerics and --kernels, for tools that run a model."""
    flags.DEFINE_enum("numerics", None, ["official", "plain"], "By default the config's.", flag_values=flag_values)
    text = "pallas, xla, or pallas,OP=xla for one op in XLA; by default the config's."
    flags.DEFINE_string("kernels", None, text, flag_values=flag_values)


def define_answers(flag_values: flags.FlagValues) -> None:
    """Define --think, --max_tokens and --ctx, for tools that get answers to prompts."""
    flags.DEFINE_enum("think", "on", THINK_MODES, "Whether the model reasons first.", flag_values=flag_values)
    text = "The longest answer; by default the config's."
    flags.DEFINE_integer("max_tokens", None, text, flag_values=flag_values)
    text = "Tokens of prompt and answer together; by default the config's."
    flags.DEFINE_integer("ctx", None, text, flag_values=flag_values)


def define_drafts(flag_values: flags.FlagValues) -> None:
    """Define the flags in DRAFTS, for tools that generate tokens or plan to."""
    text = (
        "Whose drafts are verified, several tokens at once: a drafter's GGUF file, auto (the one beside the model, or "
        "its MTP head) or off; by default the config's. The text does not depend on it."
    )
    flags.DEFINE_string("draft", None, text, flag_values=flag_values)
    text = "Tokens drafted at once, at most; 0: what the drafter is made for. By default the config's."
    flags.DEFINE_integer("draft_tokens", None, text, flag_values=flag_values)


def define_budget(flag_values: flags.FlagValues) -> None:
    """Define --device_budget_gb, for tools that run a model or plan to; it replaces the config's key."""
    text = (
        "GiB of the GPU's memory that may be used: as many routed experts as that allows are kept there, the others in "
        "host memory. 0: all that JAX may take, with everything in it. By default the config's."
    )
    flags.DEFINE_float("device_budget_gb", None, text, flag_values=flag_values)


def define_trace_routing(flag_values: flags.FlagValues) -> None:
    """Define --trace_routing, for tools that generate tokens."""
    text = "A file to record in which experts the tokens go to, for `ds4jax memory --routing_trace`."
    flags.DEFINE_string("trace_routing", None, text, flag_values=flag_values)


def define_sampling(flag_values: flags.FlagValues, seed: int | None = 0) -> None:
    """Define the flags in SAMPLING. seed: the default."""
    flags.DEFINE_float("temperature", 1.0, "0 takes the likeliest token.", flag_values=flag_values)
    text = "Sample from the likeliest tokens that reach this probability."
    flags.DEFINE_float("top_p", 1.0, text, flag_values=flag_values)
    text = "Sample from this many of the likeliest tokens; 0 is off."
    flags.DEFINE_integer("top_k", 0, text, flag_values=flag_values)
    flags.DEFINE_float("min_p", 0.05, "Drop tokens this much less likely than the likeliest.", flag_values=flag_values)
    define_seed(flag_values, seed)


def define_seed(flag_values: flags.FlagValues, default: int | None = None) -> None:
    """Define --seed. default: None stands for a random one, which `engine.types.seed_or_random` gives."""
    text = "Of the random draws; by default a random one." if default is None else "Of the random draws."
    flags.DEFINE_integer("seed", default, text, 0, 2**32 - 1, flag_values=flag_values)


def define_synthetic(flag_values: flags.FlagValues) -> None:
    """Define --synthetic and --recipe, for tools whose model need not be a file."""
    from ds4jax.io.recipes import RANDOM_RECIPES
    from ds4jax.io.synthetic import SHAPES

    text = "The types of --synthetic's matrices: a published file's, or official: MXFP4 experts, most else E4M3."
    flags.DEFINE_enum("recipe", "q2", list(RANDOM_RECIPES), text, flag_values=flag_values)
    text = "Instead of a model file: random weights of this shape; full is DeepSeek-V4-Flash."
    flags.DEFINE_enum("synthetic", None, list(SHAPES), text, flag_values=flag_values)
    flags.register_multi_flags_validator(
        ["recipe", "synthetic"],
        lambda given: given["synthetic"] is not None or given["recipe"] == "q2",
        "expected --recipe beside --synthetic alone; a file has its own types",
        flag_values=flag_values,
    )


def make_folder(folder: Path) -> None:
    """Make a folder for results, unless it is there. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made a folder: {error.strerror}") from None


def write_json(path: Path, value: Any) -> None:
    """Write a report; what is no number in it becomes null. Raises Ds4Error."""
    value = json.loads(json.dumps(value), parse_constant=lambda _: None)
    try:
        write_whole(path, [json.dumps(value, ensure_ascii=False, indent=1).encode() + b"\n"])
    except OSError as error:
        raise Ds4Error(f"{path}: cannot be written: {error.strerror}") from None


PAUSE = 0.1
"""Seconds that a write waits for room in a pipe; after a wait in vain, writes do not wait until there is room again."""


class Lossy:
    """A text stream that drops what cannot be written: it is closed, the disk is full, or nobody reads the pipe.

    `close` does nothing: a logging handler that holds it, as absl's does, would close the process's own stderr.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = open(os.devnull, "w") if stream is None else stream
        self._pipe, self._stalled = _pipe(self._stream), False

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            if self._pipe is None:
                self._stream.write(text)
            else:
                self._pass(self._pipe, text.encode(errors="backslashreplace"))
        return len(text)

    def _pass(self, pipe: int, data: bytes) -> None:
        """Write as much as the pipe has room for; a piece of PIPE_BUF bytes fits as a whole or not at all."""
        for i in range(0, len(data), select.PIPE_BUF):
            if not select.select([], [pipe], [], 0 if self._stalled else PAUSE)[1]:
                self._stalled = True
                return
            self._stalled = False
            os.write(pipe, data[i : i + select.PIPE_BUF])

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def close(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _log_to(stream: TextIO, instead_of: TextIO) -> None:
    """Redirect the log to another stream, if a library has set up a handler for it already."""
    for handler in logging.root.handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is instead_of:
            handler.setStream(stream)


def _pipe(stream: TextIO) -> int | None:
    """The descriptor of a stream that is a pipe or a socket, else None."""
    with contextlib.suppress(OSError, ValueError):
        number = stream.fileno()
        mode = os.fstat(number).st_mode
        return number if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) else None
    return None


_interrupted = False
_watched: int | None = None  # the write end of a pipe, into which the numbers of signals go
ENDING = 1.0
"""Seconds from Ctrl-C to the end of the process, whatever it does."""


def end_at_interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C raises KeyboardInterrupt, and the process ends soon, see `watch_interrupts`."""
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt


@contextlib.contextmanager
def interrupts(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """While the block runs, `handler` handles Ctrl-C."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def check_interrupt() -> None:
    """Raise KeyboardInterrupt if Ctrl-C was pressed; to be called in long loops.

    Python drops the exception where it is raised in a callback of its garbage collector, and JAX has one.
    """
    if _interrupted:
        raise KeyboardInterrupt


def watch_interrupts() -> None:
    """From now on, end the process ENDING seconds after Ctrl-C if it has not ended by then, whatever it does.

    Python calls its handlers only between steps of the main thread, which may compile or load for minutes. The number
    of the signal goes into a pipe at once, and a thread reads it. It does nothing where the handler is not
    `end_at_interrupt`. Only one pipe can get the numbers: after code that sets its own (an event loop, line editing),
    call this again.
    """
    global _watched
    if threading.current_thread() is not threading.main_thread():
        return
    if _watched is None:
        read, _watched = os.pipe()
        os.set_blocking(_watched, False)
        threading.Thread(target=_end_after_interrupt, args=[read], name="ctrl-c", daemon=True).start()
    signal.set_wakeup_fd(_watched, warn_on_full_buffer=False)


def _end_after_interrupt(pipe: int) -> None:
    while numbers := os.read(pipe, 64):
        if signal.SIGINT in numbers and signal.getsignal(signal.SIGINT) is end_at_interrupt:
            time.sleep(ENDING)
            with contextlib.suppress(OSError):
                os.write(2, b"interrupted\n")
            os._exit(130)


def _spelled(argv: Iterable[str], flag_values: flags.FlagValues) -> list[str]:
    """The arguments with the flags' names as absl has them, with underscores: --max_tokens for --max-tokens."""
    found, flags_end = [], False
    for arg in argv:
        flags_end |= arg == "--"
        name, equals, value = arg.partition("=")
        plain = name.lstrip("-").replace("-", "_")
        if not flags_end and name.startswith("--") and {plain, plain.removeprefix("no")} & set(flag_values):
            arg = f"--{plain}{equals}{value}"
        found.append(arg)
    return found


def _help(flag_values: flags.FlagValues) -> str:
    """All flags, the tool's own first, then those that tools share, in groups."""
    shared = {name: title for title, names in GROUPS.items() for name in names}
    own = [name for name in flag_values if name not in shared]
    lines = []
    for title, names in {"Flags": own, **GROUPS}.items():
        if names := [name for name in names if name in flag_values]:
            lines += ["", f"{title}:"]
        for name in names:
            flag = flag_values[name]
            text = [flag.help]
            if flag.default not in (None, "", False, []):
                text.append(f"By default {flag.default}.")
            spelled = f"  --{'[no]' if flag.boolean else ''}{name}: {' '.join(text)}"
            lines.append(textwrap.fill(spelled, 100, subsequent_indent="      ", break_on_hyphens=False))
    return "\n".join(lines)


def run(
    tool: Callable[[], int | None],
    flag_values: flags.FlagValues,
    usage: str | None,
    argv: list[str] | None = None,
    argument: str | None = None,
) -> int:
    """Parse the flags, call `tool` and return its exit status, see `exit_status`; or print the usage for --help.

    flag_values: the tool's own set of flags, so that several tools can be imported into one process.
    usage: what --help prints before the flags. argv: arguments without the program's name, by default the process's;
    names of flags may have hyphens in place of underscores.
    argument: the flag that an argument without a name stands for, before or after flags, if the tool takes one.
    """
    argv = _spelled(sys.argv[1:] if argv is None else argv, flag_values)
    flag_values.unparse_flags()
    flag_values.set_gnu_getopt()

    def parsed() -> int | None:
        if {"--help", "-h", "-help"} & set(argv):
            print((usage or "").strip(), _help(flag_values), sep="\n")
            return 0
        try:
            _, *rest = flag_values(["ds4jax", *argv])
        except flags.Error as error:
            raise ConfigError(f"{error} (--help lists the flags)") from None
        if argument and rest and flag_values[argument].value is None:
            flag_values[argument].value = rest.pop(0)
            if rest:
                raise ConfigError(f"found a second argument {rest[0]!r}, expected one: quote what has spaces")
        for name in flag_values:
            if isinstance(value := flag_values[name].value, float) and math.isnan(value):
                raise ConfigError(f"{name}: found nan, expected a number")
        if rest:
            raise ConfigError(f"found the argument {rest[0]!r}, expected only flags (--help lists them)")
        return tool()

    return exit_status(parsed)


def exit_status(work: Callable[[], int | None]) -> int:
    """Call `work` and return an exit status: its result, or 1 for an error, or 130 for Ctrl-C.

    A Ds4Error becomes one line on stderr; a reader of stdout that has gone away (``| head``) ends the work silently.
    After Ctrl-C the process ends soon, see `watch_interrupts`.
    """
    global _interrupted
    _interrupted = False
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_interrupt)
        watch_interrupts()
    stderr, sys.stderr = sys.stderr, cast(TextIO, Lossy(sys.stderr))
    _log_to(sys.stderr, instead_of=stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # whatever the locale: models write any script
    try:
        status = work() or 0
        sys.stdout.flush()
        return status
    except Ds4Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter's last flush fails again
        return 1
    finally:
        _log_to(stderr, instead_of=sys.stderr)
        sys.stderr = stderr
