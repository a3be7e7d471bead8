"""Fetch a model file from Hugging Face: ``ds4jax download --config NAME``.

First it shows on stderr, if the config names a GPU, what the model needs of it and what would fit (see ds4jax.memory).
Then it shows its progress, goes on where an earlier run was interrupted, and prints the file's path.
"""

from __future__ import annotations

import dataclasses
import sys

from absl import flags

from ds4jax.errors import Ds4Error
from ds4jax.io.download import download, resolve_model
from ds4jax.settings import Settings
from ds4jax.tools import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("config", "tiny", "Name of a config, or path of a TOML file.", flag_values=FLAGS)
flags.DEFINE_string("model", None, "Instead of the config's model: hf:OWNER/REPO/FILE.", flag_values=FLAGS)
cli.define_device(FLAGS)


def main() -> None:
    """Print the path of the model file, downloaded if need be. Raises Ds4Error."""
    settings = Settings.load(FLAGS.config, model=FLAGS.model, device=FLAGS.device)
    if settings.hf_file is None:
        print(resolve_model(settings))
        return
    if settings.device != "here":
        show_plan(settings)
    print(download(*settings.hf_file))


def show_plan(settings: Settings) -> None:
    """What the model will need, on stderr. The shapes are known, or read from the header of the file on its server."""
    dataclasses.replace(settings, preallocate=False).set_environment()  # a download of hours needs no GPU memory
    from ds4jax.engine import planning

    try:
        source, origin = planning.shapes(settings, from_server=None)
        print(origin, planning.describe(planning.steps(source, settings)), sep="\n", file=sys.stderr, flush=True)
    except Ds4Error as error:  # whatever it is, the file can be fetched
        print(f"no memory plan: {error}", file=sys.stderr)
