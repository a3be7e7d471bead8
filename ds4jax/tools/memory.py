"""Show what a model needs of each device's memory, before any is taken: ``python -m ds4jax.memory --config h200``.

See `ds4jax.engine.memory`.
"""

from __future__ import annotations

from absl import flags

from ds4jax.settings import Settings
from ds4jax.tools import cli

FLAGS = flags.FlagValues()
cli.define_model(FLAGS)
cli.define_synthetic(FLAGS)
flags.DEFINE_integer("ctx", None, "Tokens that one sequence can hold; by default the config's.", flag_values=FLAGS)
flags.DEFINE_integer("batch", None, "Sequences at once; by default the config's.", flag_values=FLAGS)
flags.DEFINE_bool(
    "compile", True, "Compile the steps, which takes a minute at full size; without, the workspace is left out.",
    flag_values=FLAGS,
)  # fmt: skip


def main() -> int:
    """Run the tool as FLAGS say; → exit status: 1 if the plan does not fit. Raises Ds4Error."""
    settings = Settings.load(FLAGS.config, **{key: FLAGS[key].value for key in ("model", "ctx", "batch")})
    settings.set_environment()
    from ds4jax.engine import compile_cache, compiled_steps, memory, model_runner

    compile_cache.keep_compilations()
    steps = compiled_steps.CompiledSteps(model_runner.open_model(settings, FLAGS.synthetic), settings, progress=True)
    if FLAGS.compile and memory.plan(steps).fits:
        steps.compile_largest()
    found = memory.plan(steps)
    print(found)
    if not found.fits:
        print(memory.advice(steps) if FLAGS.compile else "does not fit")
    return 0 if found.fits else 1
