"""A model that compiles in seconds: one layer of each kind that compresses, random weights, the byte tokenizer."""

import dataclasses

from ds4jax.synthetic import BASE
from ds4jax.tokenizer import byte_tokenizer

CFG = dataclasses.replace(
    BASE, n_layers=2, compress_ratios=(4, 128), swiglu_clamp=(10.0,) * 2, n_hash_layers=1,
    vocab_size=byte_tokenizer().vocab_size, head_dim=96, rope_dim=32, q_lora_rank=128, o_lora_rank=32, o_groups=8,
    index_heads=8, index_head_dim=64, index_top_k=8, n_experts=16, n_experts_used=4,
)  # fmt: skip
