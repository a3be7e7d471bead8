"""Pieces of a quantizer: a search over short lists of candidates, error weights, and the float16 scale of a block.

A quantizer minimises a weighted squared error (`error_weights`), with least squares:

1. each group finds its own best real-valued scale (and minimum);
2. the super-block finds the float16 scale whose small multiples come closest to those;
3. the codes are chosen again under the scales that the file will really hold.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array

# A column is worth at least this part of the mean of its block, so that weights without importance stay near their
# values instead of becoming arbitrary.
LEAST_IMPORTANCE = 1e-4

F16_MAX = 65504.0
INVERTIBLE = 2.0**126  # the largest power of two whose inverse is not subnormal, which devices flush to 0


def search(evaluate: Callable, candidates: np.ndarray) -> tuple[Array, ...]:
    """evaluate(candidate) → (error, *values) of one shape. Returns each element's values at its least error."""
    errors, *values = jax.vmap(evaluate)(jnp.asarray(candidates))
    best = jnp.argmin(errors, axis=0)[None]
    return tuple(jnp.take_along_axis(v, best, axis=0)[0] for v in values)


def ratio(a: Array | float, b: Array) -> Array:
    """a / b, and 0 where b is not positive: a group without extent has no scale."""
    return jnp.where(b > 1e-30, a / jnp.maximum(b, 1e-30), 0.0)


def normalized(x: Array) -> tuple[Array, Array]:
    """x (..., block) over the power of two at its largest magnitude, and that unit (...): squares stay in range."""
    unit = power_of_two(jnp.max(jnp.abs(x), axis=-1))
    return x / unit[..., None], unit


def power_of_two(x: Array) -> Array:
    """The largest power of two ≤ x, exactly; 1 for x = 0 and for subnormal numbers."""
    exponent = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7F800000)
    return jnp.where(exponent == 0, 1.0, lax.bitcast_convert_type(exponent, jnp.float32))


def error_weights(x: Array, importance: Array) -> Array:
    """The weights w (..., block) of the error Σ w (x − x̂)² of normalized x, from importances of any unit.

    With mean squares of the input columns as importances, w = importance minimises the error of a product, if columns
    are uncorrelated. ggml has w = importance · (mean x² + x²)^½, because large weights matter more in practice. The
    exponent 0.4 gives smaller errors than ggml's quantizers in either measure, for Gaussian and heavy-tailed weights.
    """
    unit = power_of_two(jnp.max(importance, axis=-1, keepdims=True))
    importance = importance / unit
    mean = jnp.mean(importance, axis=-1, keepdims=True)
    importance = jnp.where(mean > 0, jnp.maximum(ratio(importance, mean), LEAST_IMPORTANCE), 1.0)
    return importance * (jnp.mean(x * x, axis=-1, keepdims=True) + x * x) ** 0.4


def half(scale: Array, unit: Array) -> tuple[Array, Array]:
    """A super-block's scale as the file holds it, float16 in x's units, and the same number in normalized units."""
    stored = jnp.minimum(scale * unit, F16_MAX).astype(jnp.float16)
    return stored, stored.astype(jnp.float32) / unit


def super_scale(scales: Array, weights: Array, top: int, offset: float = 0.0) -> Array:
    """The d (...) ≥ 0 for which d·(offset + one of 0..top) approximates scales (..., groups) ≥ 0 best.

    weights (..., groups): the second derivative of each group's error with respect to its scale.
    """
    largest = jnp.max(scales, axis=-1)

    def evaluate(divisor):
        steps = offset + level(scales, largest / divisor, top, offset)
        d = ratio(jnp.sum(weights * scales * steps, axis=-1), jnp.sum(weights * steps**2, axis=-1))
        return jnp.sum(weights * (scales - d[..., None] * steps) ** 2, axis=-1), d

    return search(evaluate, top + offset + np.linspace(0.8, -4, 25, dtype=np.float32))[0]


def level(scales: Array, d: Array, top: int, offset: float = 0.0) -> Array:
    """The number of 0..top, as float32, for which d·(offset + number) is nearest to each of scales (..., groups)."""
    return jnp.clip(jnp.round(ratio(scales, d[..., None]) - offset), 0, top)
