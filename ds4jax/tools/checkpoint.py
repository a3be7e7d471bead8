"""A GGUF file → a checkpoint: a folder with its weights as devices hold them, so that each device reads its part alone.

    ds4jax checkpoint FILE.gguf --out DIR
    ds4jax checkpoint DIR --verify

DIR then stands for the file wherever a tool takes --model. It takes as much disk as the file, and has its tokenizer and
drafter in it. Any mesh of devices can load it. The format is Orbax's.

What was written is read back and compared. An interrupted conversion goes on if the command is given again. Loading
checks the size of every file; --verify reads and hashes them all.
"""

from __future__ import annotations

import os
from pathlib import Path

from absl import flags

from ds4jax.errors import ConfigError
from ds4jax.settings import Settings
from ds4jax.tools import cli

ARGUMENT = "model"
FLAGS = flags.FlagValues()
flags.DEFINE_string("out", None, "The folder to write; made if need be, else empty.", flag_values=FLAGS)
flags.DEFINE_bool("verify", False, "Compare what is in the folder with what was written.", flag_values=FLAGS)
text = "What drafts for the model and goes with it: a GGUF file, auto (the drafter beside the model), or off."
flags.DEFINE_string("draft", "auto", text, flag_values=FLAGS)
cli.define_model(FLAGS)


def main() -> None:
    """Run the tool as FLAGS say. Raises Ds4Error."""
    if FLAGS.verify == bool(FLAGS.out):
        raise ConfigError(f"found {'both' if FLAGS.verify else 'neither'} of --out DIR and --verify, expected one")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed
    from ds4jax.io import packed
    from ds4jax.io.download import resolve_model
    from ds4jax.io.drafter import open_with_drafter
    from ds4jax.io.pack import pack

    settings = Settings.load(FLAGS.config, model=FLAGS.model, draft=FLAGS.draft)
    if FLAGS.verify:
        folder = resolve_model(settings)
        manifest, what = packed.verify(folder, progress=True), "as written"
    else:
        folder = Path(FLAGS.out)
        manifest, what = pack(open_with_drafter(settings), folder, progress=True), "complete"
    size = sum(file["size"] for file in manifest.files.values())
    print(f"{folder}: {what}, {size / 2**30:.2f} GiB in {len(manifest.files)} files")
