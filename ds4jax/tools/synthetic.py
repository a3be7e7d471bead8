"""Write a GGUF file of random weights, of any size, as fast as the disk takes it, for timing.

    ds4jax synthetic --synthetic full --out FILE.gguf [--layers N] [--recipe q2] [--seed S]

See `ds4jax.io.synthetic.write_repeating`.
"""

from __future__ import annotations

from absl import flags

from ds4jax.errors import ConfigError
from ds4jax.io.synthetic import RECIPES, SHAPES, Synthetic, first_layers, synthetic_config, write_repeating

FLAGS = flags.FlagValues()
flags.DEFINE_enum("synthetic", "full", list(SHAPES), "The shape; full is DeepSeek-V4-Flash.", flag_values=FLAGS)
flags.DEFINE_string("out", None, "The GGUF file to write.", flag_values=FLAGS)
flags.DEFINE_enum("recipe", "q2", list(RECIPES), "The types of the matrices.", flag_values=FLAGS)
flags.DEFINE_integer("layers", None, "No more than the first layers.", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Of the random numbers.", flag_values=FLAGS)


def main() -> None:
    """Run the tool as FLAGS say. Raises Ds4Error."""
    if not FLAGS.out:
        raise ConfigError("expected --out FILE.gguf")
    cfg = synthetic_config(FLAGS.synthetic)
    cfg = cfg if FLAGS.layers is None else first_layers(cfg, FLAGS.layers)
    write_repeating(FLAGS.out, Synthetic(cfg, RECIPES[FLAGS.recipe], FLAGS.seed), progress=True)
    print(FLAGS.out)
