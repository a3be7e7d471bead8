"""Show what a model needs of each device's memory, and what would fit: ``ds4jax memory --config h200``.

Neither the model's file nor the GPU need be there. The first line says where the shapes are from: the file, what is
known of the published ones, or with --remote the header of the file on its server. The table says where the workspace
is from: steps compiled for the GPU, which takes the CUDA plugin and a minute, or the config folder's workspace.json.

See `ds4jax.engine.memory` and `ds4jax.engine.planning`.
"""

from __future__ import annotations

from absl import flags

from ds4jax.settings import Settings
from ds4jax.tools import cli

FLAGS = flags.FlagValues()
cli.define_model(FLAGS)
cli.define_synthetic(FLAGS)
cli.define_device(FLAGS)
cli.define_drafts(FLAGS)
cli.define_budget(FLAGS)
flags.DEFINE_integer("ctx", None, "Tokens that one sequence can hold; by default the config's.", flag_values=FLAGS)
flags.DEFINE_integer("batch", None, "Sequences at once; by default the config's.", flag_values=FLAGS)
flags.DEFINE_integer("prefill_chunk", None, "Tokens per prefill call; by default the config's.", flag_values=FLAGS)
flags.DEFINE_string(
    "routing_trace", None, "From --trace_routing: tells how often its experts would be in the GPU.", flag_values=FLAGS
)
flags.DEFINE_float(
    "link_gb_s", 50.0, "GB/s from host memory to the GPU that the plan expects.", lower_bound=0.001, flag_values=FLAGS
)
flags.DEFINE_bool("remote", False, "Read the header of the file on its server, and no more.", flag_values=FLAGS)
flags.DEFINE_bool(
    "compile", True, "Compile the steps if that is possible here; without, the workspace is predicted or left out.",
    flag_values=FLAGS,
)  # fmt: skip


def main() -> int:
    """Run the tool as FLAGS say; → exit status: 1 if the plan does not fit. Raises Ds4Error."""
    keys = "model", "ctx", "batch", "prefill_chunk", "device", "device_budget_gb", *cli.DRAFTS
    settings = Settings.load(FLAGS.config, **{key: FLAGS[key].value for key in keys})
    settings.set_environment()
    from ds4jax.engine import compile_cache, memory, planning
    from ds4jax.engine.routing_trace import Trace

    source, origin = planning.shapes(settings, FLAGS.synthetic, FLAGS.remote, FLAGS.recipe)
    print(origin, flush=True)
    if settings.device == "here":
        compile_cache.keep_compilations()
    steps = planning.steps(source, settings, compiled=FLAGS.compile)
    if FLAGS.compile and steps.can_compile and memory.plan(steps).fits:
        steps.compile_largest()
    trace = Trace.read(FLAGS.routing_trace, steps.cfg) if FLAGS.routing_trace else None
    print(planning.describe(steps, trace, FLAGS.link_gb_s * 1e9))
    found = memory.plan(steps)
    if not found.fits and FLAGS.compile and steps.card is None:
        print(memory.advice(steps))
    return 0 if found.fits else 1
