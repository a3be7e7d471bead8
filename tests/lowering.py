"""Kernels lowered for GPUs that are not there."""

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels import common


def kernels_of(op: Callable, shape: Any, device: str) -> int:
    """How many kernels a call of `op` for a shape is on a device. Raises Pallas' errors for what Triton cannot take."""
    inputs = jax.eval_shape(shape.inputs, jax.random.key(0))
    text = common.lower_for_gpu(lambda *a: op(*a, **shape.static), *inputs, device=device)
    return text.count("__gpu$xla.gpu.triton")
