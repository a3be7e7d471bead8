"""Serve a model over HTTP: ``ds4jax serve --config tiny --port 8000``; the chat page is at ``/``.

OpenAI's Chat Completions, Completions and Responses, and Anthropic's Messages. SIGTERM and Ctrl-C end it in order: no
new requests, running ones may finish within --grace seconds, and what they computed is kept where --kv_dir says.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import os
import re
import socket
import stat
import sys
from typing import TYPE_CHECKING

from absl import flags

from ds4jax.errors import ConfigError, Ds4Error
from ds4jax.files import read_small
from ds4jax.settings import Settings
from ds4jax.tools import cli

if TYPE_CHECKING:  # JAX takes a second to import
    from ds4jax.engine.async_engine import AsyncEngine
    from ds4jax.engine.hosts import Leader
    from ds4jax.io.checkpoint import Checkpoint
    from ds4jax.io.synthetic import Synthetic
    from ds4jax.server.access import Keys
    from ds4jax.server.app import Options
    from ds4jax.server.connections import Limits, Server
    from ds4jax.server.replay import Replay

type Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+")
_HOST = re.compile(r"\*|(\*\.)?[\w.-]+|\[?[0-9a-fA-F:]+\]?")

FLAGS = flags.FlagValues()
cli.define_model(FLAGS)
cli.define_profile(FLAGS)
cli.define_drafts(FLAGS)
cli.define_budget(FLAGS)
cli.define_trace_routing(FLAGS)
cli.define_synthetic(FLAGS)
flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; 0.0.0.0 for all of this machine's.", flag_values=FLAGS)
flags.DEFINE_integer("port", 8000, "0 takes a free one.", lower_bound=0, upper_bound=65535, flag_values=FLAGS)
flags.DEFINE_string(
    "api_key",
    None,
    "What clients must send; by default DS4JAX_API_KEY of the environment, which `ps` does not show as it shows this. "
    "Without a key, anyone may call.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "api_key_file", None, "A file of further keys, one for each client: lines NAME KEY.", flag_values=FLAGS
)
flags.DEFINE_list(
    "allowed_hosts",
    None,
    "Further names of this server that clients may use, *.NAME for all below one. By default those of this machine "
    "where only it can connect, else any.",
    flag_values=FLAGS,
)
flags.DEFINE_bool("cors", False, "Allow calls from pages of any origin.", flag_values=FLAGS)
flags.DEFINE_list("cors_origins", [], "Allow calls from pages of these origins.", flag_values=FLAGS)
flags.DEFINE_integer(
    "max_connections", None, "At once; by default what file descriptors allow, at most 4096.", 1, flag_values=FLAGS
)
flags.DEFINE_integer("max_body_mb", 32, "MiB of a request's body.", 1, 1024, flag_values=FLAGS)
flags.DEFINE_float("head_timeout", 15.0, "Seconds for the head of a request.", 0.01, 1e6, flag_values=FLAGS)
flags.DEFINE_float("body_timeout", 30.0, "Seconds until more of a body must come.", 0.01, 1e6, flag_values=FLAGS)
flags.DEFINE_float("write_timeout", 60.0, "Seconds that a client may take nothing.", 0.01, 1e6, flag_values=FLAGS)
flags.DEFINE_float("idle_timeout", 75.0, "Seconds between two requests of a connection.", 0.01, 1e6, flag_values=FLAGS)
flags.DEFINE_integer("ctx", None, "Tokens of prompt and answer together; by default the config's.", flag_values=FLAGS)
flags.DEFINE_integer("max_seqs", None, "Answers at once; by default the config's batch.", 1, flag_values=FLAGS)
flags.DEFINE_integer("max_waiting", 1024, "Requests that may wait for their turn.", 1, flag_values=FLAGS)
flags.DEFINE_float("queue_timeout", 600.0, "Seconds that a request may wait for its turn.", 0.0, flag_values=FLAGS)
flags.DEFINE_float(
    "itl_target_ms", 150.0, "Between two tokens of an answer: chunks of prompts are cut to keep it, if they get no "
    "much slower. 0: never.", 0.0, 1e9, flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_integer("max_seqs_per_key", None, "Answers at once for one API key.", 1, flag_values=FLAGS)
flags.DEFINE_integer("max_waiting_per_key", None, "Requests of one API key that may wait.", 1, flag_values=FLAGS)
flags.DEFINE_string("kv_dir", None, "A folder for prefixes, so that a restart computes none anew.", flag_values=FLAGS)
flags.DEFINE_float("kv_budget_gb", 16.0, "GiB that --kv_dir may hold.", 0.0, 1e6, flag_values=FLAGS)
flags.DEFINE_float("prefix_budget_gb", 2.0, "GiB of memory for prefixes.", 0.0, 1e6, flag_values=FLAGS)
flags.DEFINE_string("trace", None, "A file to which a JSON line is appended for every request.", flag_values=FLAGS)
flags.DEFINE_enum(
    "think_default",
    "on",
    ["on", "off", "asked"],
    "Whether the model thinks where a request does not say; asked: on, but off for Messages, as with Anthropic.",
    flag_values=FLAGS,
)
flags.DEFINE_bool(
    "strict", False, "Refuse requests with fields that are not known; else a header names them.", flag_values=FLAGS
)
flags.DEFINE_float("keep_alive", 10.0, "Seconds of silence before a stream says something.", 0.01, flag_values=FLAGS)
flags.DEFINE_float("grace", 30.0, "Seconds that running answers have once asked to stop.", 0.0, flag_values=FLAGS)


def settings() -> Settings:
    """The settings that FLAGS say. Raises ConfigError."""
    overrides = {key: FLAGS[key].value for key in ("model", "ctx", "profile", "device_budget_gb", *cli.DRAFTS)}
    return Settings.load(FLAGS.config, **overrides)


def main(model: Checkpoint | Synthetic | None = None, hosts: Leader | None = None) -> int:
    """Run the server as FLAGS say, until it is told to stop; → exit status. Raises Ds4Error.

    model: where it is open already. hosts: other processes that have some of its devices.
    """
    keys, origins = _keys(), ("*",) if FLAGS.cors else tuple(FLAGS.cors_origins)
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise ConfigError(f"cors_origins: found {origin!r}, expected SCHEME://HOST or SCHEME://HOST:PORT")
    for host in FLAGS.allowed_hosts or ():
        if not _HOST.fullmatch(host):
            raise ConfigError(f"allowed_hosts: found {host!r}, expected the name of a host without a port, or *.NAME")
    chosen = settings()
    chosen.set_environment()
    from ds4jax.engine.async_engine import AsyncEngine
    from ds4jax.server.app import Options
    from ds4jax.server.connections import Limits, most_connections
    from ds4jax.server.replay import Replay, split_budget

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    limits = Limits(
        connections=most_connections(FLAGS.max_connections),
        head=FLAGS.head_timeout,
        idle=FLAGS.idle_timeout,
        write=FLAGS.write_timeout,
    )
    listener = bind(FLAGS.host, FLAGS.port)  # a port in use is not to be found out after minutes of loading
    address = ipaddress.ip_address(listener.getsockname()[0])
    local = address.is_loopback
    if not local and not keys.names:
        text = f"warning: whoever reaches {FLAGS.host} may call: no key is set (--api_key_file, DS4JAX_API_KEY)"
        print(text, file=sys.stderr)
    options = Options(
        keep_alive=FLAGS.keep_alive,
        cors=origins,
        hosts=_hosts(FLAGS.host, address, FLAGS.allowed_hosts),
        keys=keys,
        max_body=FLAGS.max_body_mb << 20,
        body_timeout=FLAGS.body_timeout,
        think_default=FLAGS.think_default,
        strict=FLAGS.strict,
    )
    prefixes, turns = split_budget(int(FLAGS.kv_budget_gb * 2**30))
    engine = AsyncEngine.open(
        chosen,
        synthetic=FLAGS.synthetic,
        recipe=FLAGS.recipe,
        max_seqs=FLAGS.max_seqs,
        kv_dir=FLAGS.kv_dir,
        kv_budget_bytes=prefixes,
        prefix_budget_bytes=int(FLAGS.prefix_budget_gb * 2**30),
        trace=FLAGS.trace,
        trace_routing=FLAGS.trace_routing,
        progress=True,
        model=model,
        hosts=hosts,
        max_waiting=FLAGS.max_waiting,
        waiting_per_client=FLAGS.max_waiting_per_key,
        running_per_client=FLAGS.max_seqs_per_key,
        patience=FLAGS.queue_timeout,
        gap=FLAGS.itl_target_ms / 1000 or math.inf,
    )
    replay = Replay.beside(engine.kv_store, turns)
    asyncio.run(serve(engine, options, replay, listener, FLAGS.grace, limits))
    return 1 if engine.failed else 0


def bind(host: str, port: int) -> socket.socket:
    """A socket for `serve`, which does not listen yet. Raises Ds4Error, say for a port in use."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named: without it, asyncio leaves Nagle's algorithm on, and small events wait for 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise Ds4Error(f"port {port} of {host}: cannot be used: {error.strerror}") from None
    return listener


async def serve(
    engine: AsyncEngine,
    options: Options,
    replay: Replay,
    listener: socket.socket,
    grace: float,
    limits: Limits | None = None,
) -> None:
    """Serve `engine` until SIGTERM or SIGINT, then close it.

    grace: seconds that running answers have to finish then; those cut off get an error event.
    """
    from ds4jax.server.app import make_app
    from ds4jax.server.connections import Server

    host, port = listener.getsockname()[:2]
    profile = f"profile: {engine.profile.name} ({engine.profile.sign})"
    text = f"{profile}\nserving {engine.model_name} at http://{f'[{host}]' if ':' in host else host}:{port}"
    server = Server(
        make_app(engine, options, replay),
        listener,
        limits,
        begun=lambda: print(text, file=sys.stderr, flush=True),
        close=lambda: engine.close(grace=grace),
    )
    watching = asyncio.create_task(_watch(engine, server))
    await server.serve()
    watching.cancel()


def _keys() -> Keys:
    """The keys that the flags and the environment say. Raises Ds4Error."""
    from ds4jax.server.access import Keys

    key = os.environ.get("DS4JAX_API_KEY") if FLAGS.api_key is None else FLAGS.api_key
    keys = [] if key is None else [("default", key)]
    if (path := FLAGS.api_key_file) is not None:
        try:
            keys += Keys.parse(read_small(path).decode())
            mode = os.stat(path).st_mode
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "not UTF-8"
            raise Ds4Error(f"api_key_file: {path}: cannot be read: {why}") from None
        if stat.S_ISREG(mode) and mode & stat.S_IROTH:
            print(f"warning: {path}: others can read the keys (chmod o-r)", file=sys.stderr)
    return Keys.of(keys)


def _hosts(host: str, address: Address, more: list[str] | None) -> tuple[str, ...]:
    """The names by which clients may call this server, see `Access`: any unless some are given or it is a local one.

    host: as asked for, a name or an address; address: the one that it listens at.
    """
    from ds4jax.server.access import LOOPBACK

    in_loopback = address.is_loopback and host == str(address)
    own = () if in_loopback or address.is_unspecified else (host,)  # nobody calls 0.0.0.0
    return tuple(dict.fromkeys((*LOOPBACK, *own, *(more or ())))) if address.is_loopback or more else ()


async def _watch(engine: AsyncEngine, server: Server) -> None:
    """Log where the engine hangs. Once it has failed stop the server, so that a supervisor starts it anew."""
    hung = False
    while not engine.failed:
        await asyncio.sleep(0.5)
        hangs = bool(engine.hang) and not (server.should_exit or engine.failed)
        if hangs and not hung:
            logging.error("the engine hangs: %s, at\n%s", engine.hang, engine.stack())
        elif hung and not hangs:
            logging.warning("the engine goes on")
        hung = hangs
    await asyncio.sleep(1.0)  # clients are told
    server.should_exit = True
