"""The forward pass of DeepSeek-V4 over `ds4jax.ops`, its weights and its cache; `transformer` puts them together."""
