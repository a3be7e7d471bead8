"""DeepSeek-V4-Flash in JAX: one pure function over a pytree of quantized weights."""

__version__ = "0.1.0"
