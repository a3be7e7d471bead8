"""The Hadamard matrix (Sylvester's order) over √n, applied as butterflies: twice, it is the identity.

Butterflies rather than a product: the order of the additions, and so every bit, is the same for any batch. Both
functions here add in that one order.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.numerics.rope import pairs


def hadamard(x: Float[Array, "*s n"]) -> Float[Array, "*s n"]:
    """x times the n-point Hadamard matrix over √n, in XLA; n a power of two."""
    n, lead = x.shape[-1], x.shape[:-1]
    step = 1
    while step < n:
        halves = x.reshape(*lead, -1, 2, step)
        a, b = halves[..., 0, :], halves[..., 1, :]
        x = jnp.stack([a + b, a - b], axis=-2).reshape(*lead, n)
        step *= 2
    return x * (1 / math.sqrt(n))


def hadamard_in_kernel(x: Float[Array, "m n"]) -> Float[Array, "m n"]:
    """`hadamard` in what Triton takes: splits and joins of a last axis of two.

    The values that meet lie in one thread, and between two stages threads exchange what they hold.
    """
    m, n = x.shape
    x = x.reshape(m, 1, n)  # axis 1: what has passed, numbered by the low bits of a dim; axis 2: the high bits
    while x.shape[2] > 1:
        a, b = pairs(x)
        x = jnp.stack([a + b, a - b], axis=-1).transpose(0, 3, 1, 2).reshape(m, 2 * x.shape[1], -1)
    return x.reshape(m, n) * (1 / math.sqrt(n))
