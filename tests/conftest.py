"""Strictness for every test: strict dtype promotion, no implicit rank promotion surprises, four fake CPU devices."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import jax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
