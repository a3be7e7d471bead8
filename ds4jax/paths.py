"""Where files lie: the models that come with the package, and what it keeps in the user's cache."""

from __future__ import annotations

from pathlib import Path

import platformdirs

from ds4jax.errors import Ds4Error

MODELS = Path(__file__).parent / "models"
EMBEDDED = ("tiny", "tiny_q2")
"""Names of the models in the package: small ones of the same architecture, trained; each has a card, NAME.md."""


def embedded_model(name: str) -> Path:
    """The GGUF file of one of EMBEDDED."""
    return MODELS / f"{name}.gguf"


def embedded_drafter() -> Path:
    """The GGUF file of the DSpark drafter of ``tiny``, named as `ds4jax convert` would; it has a card too."""
    return MODELS / "tiny-dspark.gguf"


def cache_dir() -> Path:
    """The directory in the user's cache for what can be made again, created if need be.

    On Linux ``$XDG_CACHE_HOME/ds4jax``. Raises Ds4Error if it cannot be created.
    """
    path = Path(platformdirs.user_cache_dir("ds4jax"))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Ds4Error(
            f"cache directory {path}: cannot be created: {error.strerror} (XDG_CACHE_HOME moves it)"
        ) from None
    return path
