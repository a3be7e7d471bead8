"""Rotation of adjacent pairs, the core of RoPE (arXiv:2104.09864)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def pairs(x: Array) -> tuple[Array, Array]:
    """(..., 2 n) → the values at even places (..., n), and those at odd ones; a split, as Triton has no strides."""
    even, odd = lax.split(x.reshape(*x.shape[:-1], -1, 2), (1, 1), axis=x.ndim)
    return even.reshape(even.shape[:-1]), odd.reshape(odd.shape[:-1])


def join(even: Array, odd: Array) -> Array:
    """The inverse of `pairs`."""
    return jnp.stack([even, odd], axis=-1).reshape(*even.shape[:-1], -1)


def rotate_pairs(even: Array, odd: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
    """Each pair turned by its angle."""
    return even * cos - odd * sin, even * sin + odd * cos


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """The adjacent pairs of x (..., 2 n) turned by the angles of cos and sin (..., n)."""
    return join(*rotate_pairs(*pairs(x), cos, sin))
