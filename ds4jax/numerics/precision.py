"""Products in XLA: at least float32 sums, no TF32, and gradients that stay in the operands' dtype."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32, Shaped


def wide(dtype) -> np.dtype:
    """The dtype to accumulate in and to compute norms, gates and routing in: float32, or float64 for float64."""
    return np.dtype(np.float64 if dtype == jnp.float64 else np.float32)


def matmul(equation: str, a: Float[Array, "..."], b: Float[Array, "..."], dtype=None) -> Float[Array, "..."]:
    """einsum with at least float32 accumulation, and float32 computed as float32 (no TF32).

    The result has `dtype`, or a's, which must be b's.
    """
    return _matmul(equation, np.dtype(dtype or a.dtype), a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(equation: str, dtype: np.dtype, a: Array, b: Array) -> Array:
    return _einsum(equation, a, b, preferred_element_type=wide(a.dtype)).astype(dtype)


def _matmul_forward(equation: str, dtype: np.dtype, a: Array, b: Array):
    return _matmul(equation, dtype, a, b), (a, b)


def _matmul_backward(equation: str, dtype: np.dtype, operands: tuple[Array, Array], gradient: Array):
    # Rounded to the operands' dtype: a product of float32 and bfloat16 would be computed as slowly as float32.
    _, transpose = jax.vjp(functools.partial(_einsum, equation), *operands)
    return transpose(gradient.astype(operands[0].dtype))


_matmul.defvjp(_matmul_forward, _matmul_backward)


def _einsum(equation: str, a: Array, b: Array, preferred_element_type=None) -> Array:
    # Float32 operands as float32; narrower ones need no more than the tensor cores give.
    precision = lax.Precision.HIGHEST if a.dtype.itemsize >= 4 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=preferred_element_type)


@jax.custom_vjp
def lookup(table: Shaped[Array, "n *rest"], index: Int32[Array, "*s"]) -> Shaped[Array, "*s *rest"]:
    """table[index].

    The gradient is a matrix product: scattered additions come in any order on a GPU, and wait for one another.
    """
    return table[index]


def _lookup_backward(residuals: tuple[Array, Array], gradient: Array):
    table, index = residuals
    chosen = jax.nn.one_hot(index.reshape(-1), table.shape[0], dtype=gradient.dtype)
    return matmul("sn,se->ne", chosen, gradient.reshape(index.size, -1)).reshape(table.shape), None


lookup.defvjp(lambda table, index: (table[index], (table, index)), _lookup_backward)
