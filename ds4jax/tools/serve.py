"""Serve a model over HTTP: ``python -m ds4jax.serve --config tiny --port 8000``; the chat page is at ``/``.

OpenAI's Chat Completions, Completions and Responses, and Anthropic's Messages. SIGTERM and Ctrl-C end it in order: no
new requests, running ones may finish within --grace seconds, and what they computed is kept where --kv_dir says.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from typing import TYPE_CHECKING

from absl import flags

from ds4jax.errors import Ds4Error
from ds4jax.settings import Settings
from ds4jax.tools import cli

if TYPE_CHECKING:  # JAX takes a second to import
    import uvicorn

    from ds4jax.engine.async_engine import AsyncEngine
    from ds4jax.server.app import Options
    from ds4jax.server.replay import Replay

FLAGS = flags.FlagValues()
cli.define_model(FLAGS)
cli.define_synthetic(FLAGS)
flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; 0.0.0.0 for all of this machine's.", flag_values=FLAGS)
flags.DEFINE_integer("port", 8000, "0 takes a free one.", lower_bound=0, upper_bound=65535, flag_values=FLAGS)
flags.DEFINE_string(
    "api_key",
    None,
    "What clients must send; by default DS4JAX_API_KEY of the environment, which `ps` does not show. Without either, "
    "anyone may call.",
    flag_values=FLAGS,
)
flags.DEFINE_bool("cors", False, "Allow calls from pages of any origin.", flag_values=FLAGS)
flags.DEFINE_integer("ctx", None, "Tokens of prompt and answer together; by default the config's.", flag_values=FLAGS)
flags.DEFINE_integer("max_seqs", None, "Answers at once; by default the config's batch.", 1, flag_values=FLAGS)
flags.DEFINE_string("kv_dir", None, "A folder for prefixes, so that a restart computes none anew.", flag_values=FLAGS)
flags.DEFINE_float("kv_budget_gb", 16.0, "GiB that --kv_dir may hold.", 0.0, flag_values=FLAGS)
flags.DEFINE_float("prefix_budget_gb", 2.0, "GiB of memory for prefixes.", 0.0, flag_values=FLAGS)
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


def main() -> int:
    """Run the server as FLAGS say, until it is told to stop; → exit status. Raises Ds4Error."""
    key = os.environ.get("DS4JAX_API_KEY") if FLAGS.api_key is None else FLAGS.api_key
    if key == "":
        raise Ds4Error("api_key: found an empty one, expected a key, or no flag to let anyone call")
    settings = Settings.load(FLAGS.config, model=FLAGS.model, ctx=FLAGS.ctx)
    settings.set_environment()
    from ds4jax.engine.async_engine import AsyncEngine
    from ds4jax.server.app import Options
    from ds4jax.server.replay import Replay, split_budget

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    listener = bind(FLAGS.host, FLAGS.port)  # a port in use is not to be found out after minutes of loading
    options = Options(
        keep_alive=FLAGS.keep_alive,
        cors=FLAGS.cors,
        api_key=key,
        think_default=FLAGS.think_default,
        strict=FLAGS.strict,
    )
    prefixes, turns = split_budget(int(FLAGS.kv_budget_gb * 2**30))
    engine = AsyncEngine.open(
        settings,
        synthetic=FLAGS.synthetic,
        max_seqs=FLAGS.max_seqs,
        kv_dir=FLAGS.kv_dir,
        kv_budget_bytes=prefixes,
        prefix_budget_bytes=int(FLAGS.prefix_budget_gb * 2**30),
        trace=FLAGS.trace,
        progress=True,
    )
    replay = Replay.beside(engine.kv_store, turns)
    asyncio.run(serve(engine, options, replay, listener, FLAGS.grace))
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


async def serve(engine: AsyncEngine, options: Options, replay: Replay, listener: socket.socket, grace: float) -> None:
    """Serve `engine` until SIGTERM or SIGINT, then close it.

    grace: seconds that running answers have to finish then; those cut off get an error event.
    """
    import uvicorn

    from ds4jax.server.app import make_app

    class Server(uvicorn.Server):
        async def startup(self, sockets=None):
            await super().startup(sockets)
            host, port = listener.getsockname()[:2]
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            print(f"serving {engine.model_name} at http://{address}", file=sys.stderr, flush=True)

        async def shutdown(self, sockets=None):
            closing = asyncio.create_task(engine.close(grace=grace))
            await super().shutdown(sockets)
            await closing

    config = uvicorn.Config(make_app(engine, options, replay), log_level="warning", lifespan="off")
    server = Server(config)
    watching = asyncio.create_task(_end_with(engine, server))
    await server.serve([listener])
    watching.cancel()


async def _end_with(engine: AsyncEngine, server: uvicorn.Server) -> None:
    """Stop the server once the engine has failed, so that a supervisor starts the process anew."""
    while not engine.failed:
        await asyncio.sleep(0.5)
    await asyncio.sleep(1.0)  # clients are told
    server.should_exit = True
