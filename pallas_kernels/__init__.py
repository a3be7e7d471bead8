"""Pallas kernels, one file per op: tiles, kernel, real shapes. They take arrays only; formulas are in `ds4jax.ops`."""
