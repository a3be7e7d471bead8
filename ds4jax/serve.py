"""Serve a model over HTTP: ``python -m ds4jax.serve --config tiny --port 8000``; the chat page is at ``/``.

OpenAI's Chat Completions, Completions and Responses, and Anthropic's Messages. SIGTERM and Ctrl-C end it in order: no
new requests, running ones may finish within --grace seconds, and what they computed is kept where --kv_dir says.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import TYPE_CHECKING

from absl import flags

from ds4jax import cli
from ds4jax.errors import Ds4Error
from ds4jax.settings import Settings

if TYPE_CHECKING:  # JAX takes a second to import
    from ds4jax.engine.engine import Engine
    from ds4jax.server.app import Options

FLAGS = flags.FlagValues()
cli.define_model(FLAGS)
flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; 0.0.0.0 for all of this machine's.", flag_values=FLAGS)
flags.DEFINE_integer("port", 8000, "0 takes a free one.", lower_bound=0, upper_bound=65535, flag_values=FLAGS)
flags.DEFINE_string("api_key", None, "What clients must send; without it, anyone may call.", flag_values=FLAGS)
flags.DEFINE_bool("cors", False, "Allow calls from pages of any origin.", flag_values=FLAGS)
flags.DEFINE_integer("ctx", None, "Tokens of prompt and answer together; by default the config's.", flag_values=FLAGS)
flags.DEFINE_integer("max_seqs", None, "Answers at once; by default the config's batch.", 1, flag_values=FLAGS)
flags.DEFINE_string("kv_dir", None, "A folder for prefixes, so that a restart computes none anew.", flag_values=FLAGS)
flags.DEFINE_float("kv_budget_gb", 16.0, "GiB that --kv_dir may hold.", 0.0, flag_values=FLAGS)
flags.DEFINE_float("prefix_budget_gb", 2.0, "GiB of memory for prefixes.", 0.0, flag_values=FLAGS)
flags.DEFINE_string("trace", None, "A file to which a JSON line is appended for every request.", flag_values=FLAGS)
flags.DEFINE_float("keep_alive", 5.0, "Seconds of silence before a stream says something.", 0.01, flag_values=FLAGS)
flags.DEFINE_float("grace", 30.0, "Seconds that running answers have once asked to stop.", 0.0, flag_values=FLAGS)


def main() -> int:
    """Run the server as FLAGS say, until it is told to stop; → exit status. Raises Ds4Error."""
    settings = Settings.load(FLAGS.config, model=FLAGS.model, ctx=FLAGS.ctx)
    settings.set_environment()
    from ds4jax.engine.engine import Engine
    from ds4jax.server.app import Options

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    options = Options(keep_alive=FLAGS.keep_alive, cors=FLAGS.cors, api_key=FLAGS.api_key)
    engine = Engine.open(
        settings,
        max_seqs=FLAGS.max_seqs,
        kv_dir=FLAGS.kv_dir,
        kv_budget_bytes=int(FLAGS.kv_budget_gb * 2**30),
        prefix_budget_bytes=int(FLAGS.prefix_budget_gb * 2**30),
        trace=FLAGS.trace,
        progress=True,
    )
    return asyncio.run(serve(engine, options, FLAGS.host, FLAGS.port, FLAGS.grace))


async def serve(engine: Engine, options: Options, host: str, port: int, grace: float) -> int:
    """Serve `engine` until SIGTERM or SIGINT, then close it; → exit status. Raises Ds4Error for a port in use.

    grace: seconds that running answers have to finish then; those cut off get an error event.
    """
    import uvicorn

    from ds4jax.server.app import make_app

    class Server(uvicorn.Server):
        async def startup(self, sockets=None):
            await super().startup(sockets)
            if self.started:
                address = self.servers[0].sockets[0].getsockname()
                print(f"serving {engine.model_name} at http://{address[0]}:{address[1]}", file=sys.stderr, flush=True)

        async def shutdown(self, sockets=None):
            closing = asyncio.create_task(engine.close(grace=grace))
            await super().shutdown(sockets)
            await closing

    config = uvicorn.Config(make_app(engine, options), host=host, port=port, log_level="warning", lifespan="off")
    try:
        await Server(config).serve()
    except SystemExit:  # uvicorn has logged why
        await engine.close()
        raise Ds4Error(f"port {port} of {host}: cannot be listened at") from None
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
