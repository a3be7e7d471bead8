"""A model that compiles in seconds: one layer of each kind that compresses, random weights, the byte tokenizer."""

import dataclasses
from pathlib import Path

from ds4jax.io.synthetic import BASE, RECIPES, write_synthetic
from ds4jax.io.tokenizer import byte_tokenizer

CFG = dataclasses.replace(
    BASE, n_layers=2, compress_ratios=(4, 128), swiglu_clamp=(10.0,) * 2, n_hash_layers=1,
    vocab_size=byte_tokenizer().vocab_size, head_dim=96, rope_dim=32, q_lora_rank=128, o_lora_rank=32, o_groups=8,
    index_heads=8, index_head_dim=64, index_top_k=8, n_experts=16, n_experts_used=4,
)  # fmt: skip


def write(folder: Path) -> Path:
    """The model as a file, in the types of the q8 recipe."""
    path = folder / "small.gguf"
    write_synthetic(path, CFG, 3, RECIPES["q8"], byte_tokenizer().to_metadata())
    return path
