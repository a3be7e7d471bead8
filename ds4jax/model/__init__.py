"""The forward pass of DeepSeek-V4, one file per idea; `transformer` puts them together."""

from ds4jax.model.transformer import Compute, decode_step, forward, logits, prefill

__all__ = ["Compute", "decode_step", "forward", "logits", "prefill"]
