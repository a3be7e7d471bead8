"""The quantizer: a float matrix → the planes of any format that is written, one jitted function of array operations.

Each format searches in its own way (`Quantized.quantize_blocks`, from the pieces in `ds4jax.formats.search`). Rows are
independent, and are taken in chunks, so that memory stays bounded for matrices of any size. The same array, sharding
and device give the same bytes on every run; others may round the sums that a search compares otherwise, which can
decide a tie differently.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from ds4jax.errors import Ds4Error
from ds4jax.formats import WRITABLE, Quantized
from ds4jax.formats.search import INVERTIBLE

Array = jax.Array

# Weights in work at once. IQ2_XXS holds two tables of 32 floats per weight: 2^20 keep a GPU busy in about 0.4 GB.
CHUNK = 1 << 20


def quantize[Q: Quantized](x: ArrayLike, fmt: type[Q], importance: ArrayLike | None = None) -> Q:
    """Quantizes x (..., out, in), any float dtype, to `fmt`: the planes, of logical shape x.shape.

    importance: mean or sum of squares ≥ 0 of each input column, by which errors are weighed, in any unit: (in,), or
    (..., in) with one row per matrix of x (experts). None weighs all columns alike. Q8_0 and the unquantized formats
    round to nearest and do not use it.

    An array that lies in shards (NamedSharding) is quantized shard by shard, and the planes are sharded like it. Under
    `jax.jit` the values cannot be looked at: see `check_values`.

    Raises Ds4Error for shapes or dtypes that do not fit, and, outside of `jax.jit`, for what `check_values` refuses.
    """
    x = jnp.asarray(x)
    importance = jnp.ones(x.shape[-1:]) if importance is None else jnp.asarray(importance)
    _check_shapes(x, fmt, importance)
    sharding = None
    if not isinstance(x, Tracer) and not isinstance(importance, Tracer):
        check_values(x, fmt, importance)
        sharding = x.sharding if isinstance(x.sharding, NamedSharding) else None
    return _quantize(x, importance, fmt, sharding, CHUNK)


def check_values(x: Array, fmt: type[Quantized], importance: Array | None = None) -> None:
    """Raises Ds4Error if x is not finite or too large for the scales of `fmt`, or importance negative or not finite."""
    if bad := int(_count_outside(x, -fmt.largest, fmt.largest)):
        raise Ds4Error(f"{fmt.__name__}: {bad} of {x.size} weights are not finite or above {fmt.largest:g}")
    if importance is not None and (bad := int(_count_outside(importance, 0.0, INVERTIBLE))):
        raise Ds4Error(f"importance: {bad} of {importance.size} values are not from 0 to {INVERTIBLE:g}")


@jax.jit
def _count_outside(x: Array, low: float, high: float) -> Array:
    x = x.astype(jnp.float32)
    return jnp.sum(~((x >= low) & (x <= high)))  # NaN compares as false


def _check_shapes(x: Array, fmt: type[Quantized], importance: Array | None) -> None:
    if fmt not in WRITABLE:
        names = ", ".join(f.__name__ for f in WRITABLE)
        raise Ds4Error(f"format: found {getattr(fmt, '__name__', fmt)}, expected one that can be written: {names}")
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim < 1:
        raise Ds4Error(f"{fmt.__name__}: found {x.dtype}{list(x.shape)}, expected floating-point rows")
    if x.shape[-1] % fmt.block:
        raise Ds4Error(f"{fmt.__name__}: row length {x.shape[-1]} is not a multiple of {fmt.block}")
    if importance is not None:
        shapes = (x.shape[-1:], (*x.shape[:-2], x.shape[-1]))
        if importance.shape not in shapes or not jnp.issubdtype(importance.dtype, jnp.floating):
            expected = " or ".join(str(list(s)) for s in dict.fromkeys(shapes))
            raise Ds4Error(
                f"importance: found {importance.dtype}{list(importance.shape)}, expected floats {expected} "
                f"for weights {list(x.shape)}"
            )


@functools.partial(jax.jit, static_argnames=("fmt", "sharding", "chunk"))
def _quantize(
    x: Array, importance: Array, fmt: type[Quantized], sharding: NamedSharding | None, chunk: int
) -> Quantized:
    if sharding is None:
        return _quantize_rows(x, importance, fmt, chunk)
    axes = (*sharding.spec, *[None] * (x.ndim - len(sharding.spec)))
    if axes[-1] is not None and sharding.shard_shape(x.shape)[-1] % fmt.block:
        raise Ds4Error(f"{fmt.__name__}: rows of {x.shape[-1]} in shards that are not a multiple of {fmt.block}")
    columns = PartitionSpec(*(axes[:-2] if importance.ndim > 1 else ()), axes[-1])
    spec = PartitionSpec(*axes)
    local = functools.partial(_quantize_rows, fmt=fmt, chunk=chunk)
    shards = jax.shard_map(local, mesh=sharding.mesh, in_specs=(spec, columns), out_specs=spec, check_vma=False)
    return shards(x, importance)


def _quantize_rows(x: Array, importance: Array, fmt: type[Quantized], chunk: int) -> Quantized:
    rows = x.reshape(-1, x.shape[-1])
    importance = importance.astype(jnp.float32).reshape(-1, x.shape[-1])
    matrix = jnp.arange(rows.shape[0]) // max(1, rows.shape[0] // importance.shape[0])

    def quantize_row(row_and_matrix):
        row, i = row_and_matrix
        blocks = (-1, fmt.block)
        planes = fmt.quantize_blocks(row.astype(jnp.float32).reshape(blocks), importance[i].reshape(blocks))
        return fmt(**{name: plane.reshape(-1).astype(fmt.planes[name][0]) for name, plane in planes.items()})

    planes = lax.map(quantize_row, (rows, matrix), batch_size=max(1, chunk // x.shape[-1]))
    return jax.tree.map(lambda p: p.reshape(*x.shape[:-1], -1), planes)
