"""Rotation of adjacent pairs, the core of RoPE (arXiv:2104.09864)."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def pairs(x: Float[Array, "*s n"]) -> tuple[Float[Array, "*s n//2"], Float[Array, "*s n//2"]]:
    """The values at even places, and those at odd ones; a split, as Triton has no strides."""
    even, odd = lax.split(x.reshape(*x.shape[:-1], -1, 2), (1, 1), axis=x.ndim)
    return even.reshape(even.shape[:-1]), odd.reshape(odd.shape[:-1])


def join(even: Float[Array, "*s n"], odd: Float[Array, "*s n"]) -> Float[Array, "*s 2*n"]:
    """The inverse of `pairs`."""
    return jnp.stack([even, odd], axis=-1).reshape(*even.shape[:-1], -1)


def rotate_pairs(even: Array, odd: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
    """Each pair turned by its angle."""
    return even * cos - odd * sin, even * sin + odd * cos


def rotate(
    x: Float[Array, "*s n"], cos: Float[Array, "*#s n//2"], sin: Float[Array, "*#s n//2"]
) -> Float[Array, "*s n"]:
    """The adjacent pairs of x turned by the angles of cos and sin."""
    return join(*rotate_pairs(*pairs(x), cos, sin))
