"""The embedded model: a small GGUF file with every kind of layer, written into the user's cache on first use.

Its weights are random, so it prints noise; but it takes every step that the real model takes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import platformdirs

from ds4jax.errors import Ds4Error
from ds4jax.synthetic import BASE, RECIPES, write_synthetic
from ds4jax.tokenizer import byte_tokenizer

# The start of the file's SHA-256, and part of its name: a new recipe makes a new file.
CONTENT = "275efc31eca669c3"

CONFIG = dataclasses.replace(
    BASE,
    n_layers=6,
    compress_ratios=(0, 0, 4, 128, 4, 128),
    swiglu_clamp=(10.0,) * 6,
    vocab_size=384,
    head_dim=96,
    rope_dim=32,
    q_lora_rank=128,
    o_lora_rank=32,
    o_groups=8,
    index_heads=8,
    index_head_dim=64,
    index_top_k=16,
    n_experts=16,
    n_experts_used=4,
)


def tiny_model() -> Path:
    """The path of the embedded model's file, written if it is not there yet.

    It lies in the user's cache directory, on Linux ``$XDG_CACHE_HOME/ds4jax``. Raises Ds4Error if it cannot be written.
    """
    path = cache_dir() / f"tiny-{CONTENT}.gguf"
    if not path.exists():
        write(path)
    return path


def write(path: Path) -> None:
    """Write the embedded model, in the types of the published file. The same bytes every time."""
    write_synthetic(path, CONFIG, seed=0, types=RECIPES["q2"], tokenizer_metadata=byte_tokenizer().to_metadata())


def cache_dir() -> Path:
    """The directory in the user's cache for what can be made again, created if need be."""
    path = Path(platformdirs.user_cache_dir("ds4jax"))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Ds4Error(
            f"cache directory {path}: cannot be created: {error.strerror} (XDG_CACHE_HOME moves it)"
        ) from None
    return path
