"""A Hugging Face checkpoint of DeepSeek-V4, or a GGUF file of other types → a GGUF file.

    ds4jax convert --source DIR|FILE.gguf --out FILE.gguf --recipe q2 [--imatrix F.gguf] [--types F=TYPE,...]

Recipes: q2, q2-q4 (q2, but with q4's experts from layer 37 on), q4 and mxfp4 are those of the published files; f16, q8
and f32 have one type for all matrices. `--types` chooses another one for a family of `model.tensors`, such as
ffn.experts.down, or for all whose names begin so: ffn.experts.

A one-layer MTP head stays in the model's file. A DSpark drafter, 0731's, becomes a file of its own, FILE-dspark.gguf or
--draft_out. `--draft skip` leaves either out, `--draft only` writes nothing else, to --out.

Tensors pass through memory a slab at a time. The file grows as FILE.gguf.partial, beside it a journal; killed at any
moment, the same command goes on after the last tensor that was complete, and the result has the same bytes.
"""

from __future__ import annotations

from absl import flags

from ds4jax.errors import ConfigError
from ds4jax.io import recipes
from ds4jax.io.convert import convert

FLAGS = flags.FlagValues()
flags.DEFINE_string("source", None, "The folder of the checkpoint, or a GGUF file.", flag_values=FLAGS)
flags.DEFINE_string("out", None, "The GGUF file to write.", flag_values=FLAGS)
flags.DEFINE_enum("recipe", "q2", list(recipes.RECIPES), "The types of the matrices.", flag_values=FLAGS)
flags.DEFINE_list("types", [], "Exceptions: FAMILY=TYPE, with commas.", flag_values=FLAGS)
flags.DEFINE_string("imatrix", None, "Importances of columns: a file of ds4jax imatrix.", flag_values=FLAGS)
flags.DEFINE_enum(
    "draft", "keep", ["keep", "skip", "only"], "The MTP head or drafter: what becomes of it.", flag_values=FLAGS
)
flags.DEFINE_alias("mtp", "draft", flag_values=FLAGS)
flags.DEFINE_string("draft_out", None, "The drafter's file, instead of FILE-dspark.gguf.", flag_values=FLAGS)
flags.DEFINE_bool("restart", False, "Begin again, whatever there is of the file.", flag_values=FLAGS)


def main() -> None:
    """Run the tool as FLAGS say. Raises Ds4Error."""
    if not FLAGS.source or not FLAGS.out:
        raise ConfigError("expected --source DIR or FILE.gguf, and --out FILE")
    written = convert(
        FLAGS.source,
        FLAGS.out,
        recipes.RECIPES[FLAGS.recipe],
        recipes.parse_types(FLAGS.types),
        FLAGS.imatrix,
        FLAGS.draft,
        FLAGS.restart,
        progress=True,
        draft_out=FLAGS.draft_out,
    )
    print(*written, sep="\n")
