"""DeepSeek-V4-Flash in JAX: one pure function over a pytree of quantized weights.

`Model` is a model from text to text, see `ds4jax.api`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds4jax.api import Answer, Model, Piece

__version__ = "0.1.0"
__all__ = ["Answer", "Model", "Piece", "__version__"]


def __getattr__(name: str) -> Any:
    """The names of `ds4jax.api`, imported when they are first asked for."""
    if name in ("Answer", "Model", "Piece"):
        return getattr(importlib.import_module("ds4jax.api"), name)
    raise AttributeError(f"module 'ds4jax' has no attribute {name!r}")
