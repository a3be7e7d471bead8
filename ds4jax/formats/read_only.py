"""Formats that are read, and computed with, but not written: they have no quantizer, and only some have kernels."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.formats import base
from ds4jax.formats.base import Quantized, mean_square, random_bits

Array = jax.Array


class ReadOnly(Quantized):
    """Base of such a format, which defines planes, `_decode` and, unless d is a plane, `random_scales`."""

    @classmethod
    def random(cls, key, shape, std):
        of_scales, *keys = jax.random.split(key, len(cls.planes) + 1)
        shapes = cls.plane_shapes(shape)
        planes = {
            name: random_bits(own, shapes[name], dtype)
            for own, (name, (dtype, _)) in zip(keys, cls.planes.items(), strict=True)
        }
        return cls(**planes | cls.random_scales(of_scales, planes, std))

    @classmethod
    def random_scales(cls, key: Array, planes: dict[str, Array], std: float) -> dict[str, Array]:
        """What replaces planes of uniform bits, so that weights have about mean 0 and standard deviation `std`.

        Here it is d, a float16 per block: of either sign, since many formats have codes that are not centred.
        """
        of_d, of_sign = jax.random.split(key)
        d = base.random_scales(of_d, planes["d"].shape, std / cls._deviation())
        sign = jax.random.rademacher(of_sign, d.shape, jnp.float32)
        return {"d": (sign * d).astype(jnp.float16)}

    @classmethod
    @functools.cache
    def _deviation(cls) -> float:
        """The root mean square of the weights of uniform bits where d = 1, measured."""
        raw = np.random.default_rng(0).integers(0, 256, (1000, cls.block_bytes), np.uint8)
        planes = cls.from_bytes(raw) | {"d": np.ones((1000, 1), np.float16)}
        with jax.ensure_compile_time_eval():
            weights = cls.decode(*(jnp.asarray(planes[name]) for name in cls.planes))
            return float(jnp.sqrt(jnp.mean(weights**2)))


def with_minimum(dm: Array, codes: Array) -> Array:
    """d·q + m in float32: dm (..., 2), the d and m of each block; codes (..., weights)."""
    d, m = dm[..., :1].astype(jnp.float32), dm[..., 1:].astype(jnp.float32)
    return d * codes.astype(jnp.float32) + m


def random_dm(key: Array, shape: tuple[int, ...], std: float, top: int) -> Array:
    """The plane dm of `shape`, float16 d and m of each block, for weights d·q + m of uniform codes 0 … top."""
    deviation = (mean_square(top + 1) - (top / 2) ** 2) ** 0.5
    d = base.random_scales(key, (*shape[:-1], shape[-1] // 2, 1), std / deviation)
    return (d * jnp.array([1, -top / 2], jnp.float32)).reshape(shape).astype(jnp.float16)
