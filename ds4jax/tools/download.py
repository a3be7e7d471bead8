"""Fetch a model file from Hugging Face: ``python -m ds4jax.download --config NAME``.

It shows its progress, goes on where an earlier run was interrupted, and prints the file's path.
"""

from __future__ import annotations

from absl import flags

from ds4jax.io.download import download, resolve_model
from ds4jax.settings import Settings

FLAGS = flags.FlagValues()
flags.DEFINE_string("config", "tiny", "Name of a config, or path of a TOML file.", flag_values=FLAGS)
flags.DEFINE_string("model", None, "Instead of the config's model: hf:OWNER/REPO/FILE.", flag_values=FLAGS)


def main() -> None:
    """Print the path of the model file, downloaded if need be. Raises Ds4Error."""
    settings = Settings.load(FLAGS.config, model=FLAGS.model)
    print(download(*settings.hf_file) if settings.hf_file else resolve_model(settings))
