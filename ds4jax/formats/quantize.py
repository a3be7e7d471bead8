"""Quantizers: a float matrix → the planes of any format, one jitted function of array operations.

A quantizer minimises a weighted squared error (`_error_weights`) over short lists of candidates, with least squares:

1. each group finds its own best real-valued scale (and minimum);
2. the super-block finds the float16 scale whose small multiples come closest to those;
3. the codes are chosen again under the scales that the file will really hold.

Rows are independent, and are taken in chunks, so that memory stays bounded for matrices of any size. The same array,
sharding and device give the same bytes on every run; others may round the sums that a search compares otherwise, which
can decide a tie differently.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from ds4jax.errors import Ds4Error
from ds4jax.formats.quant import BF16, F16, F32, IQ2_XXS, MXFP4, Q2_K, Q4_K, Q8_0, Quantized
from pallas_kernels.formats import IQ2_XXS_GRID

Array = jax.Array

# Weights in work at once. IQ2_XXS holds two tables of 32 floats per weight: 2^20 keep a GPU busy in about 0.4 GB.
CHUNK = 1 << 20

# A column is worth at least this part of the mean of its block, so that weights without importance stay near their
# values instead of becoming arbitrary.
LEAST_IMPORTANCE = 1e-4

_F16_MAX = 65504.0
_INVERTIBLE = 2.0**126  # the largest power of two whose inverse is not subnormal, which devices flush to 0

# The largest magnitude of a weight for which every scale fits the file: float16 times the smallest of the top codes.
_LARGEST: dict[type[Quantized], float] = {
    F32: float(jnp.finfo(jnp.float32).max),
    F16: _F16_MAX,
    BF16: float(jnp.finfo(jnp.bfloat16).max),
    Q8_0: _F16_MAX * 127,
    Q4_K: _F16_MAX * 63,
    Q2_K: _F16_MAX * 15,
    IQ2_XXS: _F16_MAX * 15.5 / 4 * 43,
    MXFP4: _INVERTIBLE,
}


def quantize(x: Array, fmt: type[Quantized], importance: Array | None = None) -> Quantized:
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
    if not isinstance(x, jax.core.Tracer) and not isinstance(importance, jax.core.Tracer):
        check_values(x, fmt, importance)
        sharding = x.sharding if isinstance(x.sharding, NamedSharding) else None
    return _quantize(x, importance, fmt, sharding, CHUNK)


def check_values(x: Array, fmt: type[Quantized], importance: Array | None = None) -> None:
    """Raises Ds4Error if x is not finite or too large for the scales of `fmt`, or importance negative or not finite."""
    if bad := int(_count_outside(x, -_LARGEST[fmt], _LARGEST[fmt])):
        raise Ds4Error(f"{fmt.__name__}: {bad} of {x.size} weights are not finite or above {_LARGEST[fmt]:g}")
    if importance is not None and (bad := int(_count_outside(importance, 0.0, _INVERTIBLE))):
        raise Ds4Error(f"importance: {bad} of {importance.size} values are not from 0 to {_INVERTIBLE:g}")


@jax.jit
def _count_outside(x: Array, low: float, high: float) -> Array:
    x = x.astype(jnp.float32)
    return jnp.sum(~((x >= low) & (x <= high)))  # NaN compares as false


def _check_shapes(x: Array, fmt: type[Quantized], importance: Array | None) -> None:
    if fmt not in _KERNELS:
        raise Ds4Error(f"format {fmt!r}: expected one of {', '.join(f.__name__ for f in _KERNELS)}")
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
        planes = _KERNELS[fmt](row.astype(jnp.float32).reshape(blocks), importance[i].reshape(blocks))
        return fmt(**{name: plane.reshape(-1).astype(fmt.planes[name][0]) for name, plane in planes.items()})

    planes = lax.map(quantize_row, (rows, matrix), batch_size=max(1, chunk // x.shape[-1]))
    return jax.tree.map(lambda p: p.reshape(*x.shape[:-1], -1), planes)


# ---- pieces of a search ----------------------------------------------------------------------------------------------
def _search(evaluate: Callable, candidates: np.ndarray) -> tuple[Array, ...]:
    """evaluate(candidate) → (error, *values) of one shape. Returns each element's values at its least error."""
    errors, *values = jax.vmap(evaluate)(jnp.asarray(candidates))
    best = jnp.argmin(errors, axis=0)[None]
    return tuple(jnp.take_along_axis(v, best, axis=0)[0] for v in values)


def _ratio(a: Array, b: Array) -> Array:
    """a / b, and 0 where b is not positive: a group without extent has no scale."""
    return jnp.where(b > 1e-30, a / jnp.maximum(b, 1e-30), 0.0)


def _normalized(x: Array) -> tuple[Array, Array]:
    """x (..., block) over the power of two at its largest magnitude, and that unit (...): squares stay in range."""
    unit = _power_of_two(jnp.max(jnp.abs(x), axis=-1))
    return x / unit[..., None], unit


def _power_of_two(x: Array) -> Array:
    """The largest power of two ≤ x, exactly; 1 for x = 0 and for subnormal numbers."""
    exponent = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7F800000)
    return jnp.where(exponent == 0, 1.0, lax.bitcast_convert_type(exponent, jnp.float32))


def _error_weights(x: Array, importance: Array) -> Array:
    """The weights w (..., block) of the error Σ w (x − x̂)² of normalized x, from importances of any unit.

    With mean squares of the input columns as importances, w = importance minimises the error of a product, if columns
    are uncorrelated. ggml has w = importance · (mean x² + x²)^½, because large weights matter more in practice. The
    exponent 0.4 gives smaller errors than ggml's quantizers in either measure, for Gaussian and heavy-tailed weights.
    """
    unit = _power_of_two(jnp.max(importance, axis=-1, keepdims=True))
    importance = importance / unit
    mean = jnp.mean(importance, axis=-1, keepdims=True)
    importance = jnp.where(mean > 0, jnp.maximum(_ratio(importance, mean), LEAST_IMPORTANCE), 1.0)
    return importance * (jnp.mean(x * x, axis=-1, keepdims=True) + x * x) ** 0.4


def _half(scale: Array, unit: Array) -> tuple[Array, Array]:
    """A super-block's scale as the file holds it, float16 in x's units, and the same number in normalized units."""
    stored = jnp.minimum(scale * unit, _F16_MAX).astype(jnp.float16)
    return stored, stored.astype(jnp.float32) / unit


def _super_scale(scales: Array, weights: Array, top: int, offset: float = 0.0) -> Array:
    """The d (...) ≥ 0 for which d·(offset + one of 0..top) approximates scales (..., groups) ≥ 0 best.

    weights (..., groups): the second derivative of each group's error with respect to its scale.
    """
    largest = jnp.max(scales, axis=-1)

    def evaluate(divisor):
        level = offset + _level(scales, largest / divisor, top, offset)
        d = _ratio(jnp.sum(weights * scales * level, axis=-1), jnp.sum(weights * level**2, axis=-1))
        return jnp.sum(weights * (scales - d[..., None] * level) ** 2, axis=-1), d

    return _search(evaluate, top + offset + np.linspace(0.8, -4, 25, dtype=np.float32))[0]


def _level(scales: Array, d: Array, top: int, offset: float = 0.0) -> Array:
    """The number of 0..top, as float32, for which d·(offset + number) is nearest to each of scales (..., groups)."""
    return jnp.clip(jnp.round(_ratio(scales, d[..., None]) - offset), 0, top)


def _pack(fields: Array, width: int) -> Array:
    """(..., n, k) uint32 fields of `width` bits, lowest first → (..., n) uint32."""
    shifts = jnp.arange(fields.shape[-1], dtype=jnp.uint32) * width
    return jnp.sum(fields << shifts, axis=-1, dtype=jnp.uint32)


def _words(bytes_: Array) -> Array:
    """(..., 4 n) uint32 bytes in file order → (..., n) uint32 words."""
    return _pack(bytes_.reshape(*bytes_.shape[:-1], -1, 4), 8)


# ---- formats: x and importance, float32 (blocks, block) → planes -----------------------------------------------------
def _dense(x: Array, importance: Array) -> dict[str, Array]:
    return {"values": x}


def _q8_0(x: Array, importance: Array) -> dict[str, Array]:
    # The reference's roundings, bit for bit. The compiler would multiply by 1/127 if the divisor were the same for all
    # blocks, and the barrier keeps it from merging the two divisions.
    largest = jnp.max(jnp.abs(x), axis=-1)
    d = lax.optimization_barrier(largest / jnp.where(largest > 0, 127.0, 1.0))
    inverse = jnp.where(d == 0, 0.0, 1 / d)
    return {"d": d, "q": lax.round(x * inverse[..., None], lax.RoundingMethod.AWAY_FROM_ZERO)}


def _affine(x: Array, w: Array, q: Array) -> tuple[Array, Array]:
    """The scale and low (...), both ≥ 0, that minimise Σ w (scale·q − low − x)² over the last axis, for codes q ≥ 0."""
    total = jnp.sum(w, axis=-1)
    q_mean, x_mean = (_ratio(jnp.sum(w * v, axis=-1), total) for v in (q, x))
    dq, dx = q - q_mean[..., None], x - x_mean[..., None]
    covariance, variance = jnp.sum(w * dq * dx, axis=-1), jnp.sum(w * dq * dq, axis=-1)
    # Codes that are all equal have no slope but that of rounding errors; with slope 0, the line is their mean.
    scale = jnp.where(variance > 1e-9 * total, jnp.maximum(_ratio(covariance, variance), 0.0), 0.0)
    low = scale * q_mean - x_mean
    through_zero = jnp.maximum(_ratio(jnp.sum(w * q * x, axis=-1), jnp.sum(w * q * q, axis=-1)), 0.0)
    return jnp.where(low > 0, scale, through_zero), jnp.maximum(low, 0.0)


def _codes(x: Array, scale: Array, low: Array, top: int) -> Array:
    """Nearest codes 0..top, as float32, of x (..., n) under scale·q − low, both (...)."""
    return jnp.clip(jnp.round((x + low[..., None]) * _ratio(1.0, scale)[..., None]), 0, top)


def _k_quant(x: Array, importance: Array, group: int, top: int, top_scale: int) -> tuple[Array, ...]:
    """Formats with x ≈ (d·sc)·q − (dmin·m): q in 0..top, sc and m in 0..top_scale for each `group` of a block.

    Returns d and dmin, float16 (blocks,); sc and m, uint32 (blocks, groups); q, uint32 (blocks, groups, group).
    """
    x, unit = _normalized(x)
    x, w = (v.reshape(len(x), -1, group) for v in (x, _error_weights(x, importance)))

    # Every group's own scale and min: some number of steps over its range, counted from the lowest weight (code 0) or
    # from the highest (code `top`), then two rounds of least squares.
    lowest = jnp.minimum(jnp.min(x, axis=-1), 0.0)
    extent = jnp.maximum(jnp.max(x, axis=-1), lowest) - lowest

    def error(q, scale, low):
        return jnp.sum(w * (scale[..., None] * q - low[..., None] - x) ** 2, axis=-1)

    def fit(candidate):
        steps, from_highest = candidate
        scale = extent / steps
        low = from_highest * (top * scale - extent) - lowest
        for _ in range(2):
            q = _codes(x, scale, low, top)
            scale, low = _affine(x, w, q)
        # Of fits that are about as good the finest: then groups of alike weights agree on their scale.
        return error(q, scale, low) + 1e-3 * jnp.sum(w, axis=-1) * scale**2, scale, low

    starts = [(top + extra, end) for extra in np.linspace(-0.9, 1.2, 10) for end in (0, 1)]
    scale, low = _search(fit, np.array(starts, np.float32))
    q = _codes(x, scale, low, top)

    # The two scales of the block, and for each group the best of the numbers next to the rounded ones.
    d_half, d = _half(_super_scale(scale, jnp.sum(w * q * q, axis=-1), top_scale), unit)
    dmin_half, dmin = _half(_super_scale(low, jnp.sum(w, axis=-1), top_scale), unit)
    sc, m = _level(scale, d, top_scale), _level(low, dmin, top_scale)

    def move(by):
        sc1, m1 = jnp.clip(sc + by[0], 0, top_scale), jnp.clip(m + by[1], 0, top_scale)
        scale, low = d[..., None] * sc1, dmin[..., None] * m1
        return error(_codes(x, scale, low, top), scale, low), sc1, m1

    sc, m = _search(move, np.array([(i, j) for i in (0, -1, 1) for j in (0, -1, 1)], np.float32))
    q = _codes(x, d[..., None] * sc, dmin[..., None] * m, top)
    return d_half, dmin_half, *(v.astype(jnp.uint32) for v in (sc, m, q))


def _q4_k(x: Array, importance: Array) -> dict[str, Array]:
    d, dmin, sc, m, q = _k_quant(x, importance, group=32, top=15, top_scale=63)
    # Two groups share 32 bytes, the first in the low nibbles. For the 6-bit numbers see `Q4_K._values`.
    low, high = (v[:, :4] | v[:, 4:] >> 4 << 6 for v in (sc, m))
    rest = sc[:, 4:] & 15 | (m[:, 4:] & 15) << 4
    q = q.reshape(-1, 4, 2, 32)
    return {
        "dm": jnp.stack([d, dmin], axis=-1),
        "scales": _words(jnp.concatenate([low, high, rest], axis=-1)),
        "q": _words(q[:, :, 0] | q[:, :, 1] << 4),
    }


def _q2_k(x: Array, importance: Array) -> dict[str, Array]:
    d, dmin, sc, m, q = _k_quant(x, importance, group=16, top=3, top_scale=15)
    # Eight groups share 32 bytes, two for each pair of bits.
    q = _pack(jnp.swapaxes(q.reshape(-1, 2, 4, 32), -1, -2), 2)
    return {"scales": _words(sc | m << 4), "q": _words(q), "dm": jnp.stack([d, dmin], axis=-1)}


def _iq2_xxs(x: Array, importance: Array) -> dict[str, Array]:
    """With a group's scale s, eight weights cost Σ w (|x| − s·g)² = s²·B − 2s·A + constant at grid point g.

    A = Σ w|x|g and B = Σ w g² do not depend on s: one table of each serves the whole search. The number of minus signs
    must be even; where x has an odd number, one weight i takes the wrong sign, which costs 4s·w|x|g at i. The cheapest
    i depends on g only, and A less twice its w|x|g makes the cost above exact again.
    """
    x, unit = _normalized(x)
    x, w = (v.reshape(len(x), 8, 4, 8) for v in (x, _error_weights(x, importance)))
    wx = w * jnp.abs(x)
    negative = x < 0
    odd = jnp.sum(negative, axis=-1) % 2 == 1

    # Sums of eight terms rather than matrix products: the same bits on every run, and no reduced precision.
    def terms(v, grid):
        return [v[..., i, None] * grid[:, i] for i in range(8)]

    aligned = terms(wx, IQ2_XXS_GRID)
    least = functools.reduce(jnp.minimum, aligned)
    a = functools.reduce(jnp.add, aligned) - jnp.where(odd[..., None], 2 * least, 0.0)
    b = functools.reduce(jnp.add, terms(w, IQ2_XXS_GRID**2))

    def costs(scale):
        scale = scale[..., None, None]
        return scale * (scale * b - 2 * a)

    def nearest(scale):
        """Grid index (blocks, 8, 4) at scale (blocks, 8), and A and B there, summed over the group."""
        index = jnp.argmin(costs(scale), axis=-1)
        at = (jnp.take_along_axis(table, index[..., None], axis=-1)[..., 0] for table in (a, b))
        return index, *(jnp.sum(v, axis=-1) for v in at)

    # Every group's own scale: around the ratio of the root mean squares, then one step of least squares.
    rms = jnp.sqrt(_ratio(jnp.sum(w * x * x, axis=(-1, -2)), jnp.sum(w, axis=(-1, -2))) / np.mean(IQ2_XXS_GRID**2))
    factors = np.geomspace(0.6, 1.6, 10, dtype=np.float32)
    (scale,) = _search(lambda c: (jnp.sum(jnp.min(costs(c * rms), axis=-1), axis=-1), c * rms), factors)
    _, a_sum, b_sum = nearest(scale)
    scale = jnp.maximum(_ratio(a_sum, b_sum), 0.0)

    # The file's scale is d·(½ + s)/4.
    d_half, d = _half(_super_scale(4 * scale, b_sum, top=15, offset=0.5), unit)
    s = _level(4 * scale, d, top=15, offset=0.5)
    index, _, _ = nearest(d[..., None] * (0.5 + s) / 4)

    wrong = jnp.argmin(wx * jnp.asarray(IQ2_XXS_GRID)[index], axis=-1)
    flip = odd[..., None] & (jnp.arange(8) == wrong[..., None])
    signs = _pack((negative ^ flip)[..., :7].astype(jnp.uint32), 1)
    return {
        "d": d_half,
        "grid": _pack(index.astype(jnp.uint32), 8),
        "signs": _pack(signs, 7) | s.astype(jnp.uint32) << 28,
    }


_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def _mxfp4(x: Array, importance: Array) -> dict[str, Array]:
    x, unit = _normalized(x)
    w = _error_weights(x, importance)

    def code(step):
        halfway = (_E2M1[1:] + _E2M1[:-1]) / 2
        return jnp.sum(jnp.abs(x)[..., None] > step[..., None, None] * halfway, axis=-1)

    # The largest magnitude lies in [1, 2): a step of ¼ puts it at 4 to 8, where 6 is the top.
    def evaluate(step):
        step = jnp.broadcast_to(step, unit.shape)
        error = jnp.abs(x) - step[..., None] * jnp.asarray(_E2M1)[code(step)]
        return jnp.sum(w * error**2, axis=-1), step

    (step,) = _search(evaluate, np.array([1 / 4, 1 / 2, 1 / 8], np.float32))
    magnitude = code(step)
    # The biased exponent of unit · step. Below the format's range, the weights are 0.
    e = sum(lax.bitcast_convert_type(v, jnp.int32) >> 23 for v in (unit, step)) - 127
    magnitude = jnp.where(e[..., None] < 0, 0, magnitude).astype(jnp.uint32)
    codes = magnitude | ((x < 0) & (magnitude > 0)).astype(jnp.uint32) << 3
    return {"e": jnp.maximum(e, 0), "q": _words(codes[:, :16] | codes[:, 16:] << 4)}


_KERNELS: dict[type[Quantized], Callable] = {
    F32: _dense,
    F16: _dense,
    BF16: _dense,
    Q8_0: _q8_0,
    Q4_K: _q4_k,
    Q2_K: _q2_k,
    IQ2_XXS: _iq2_xxs,
    MXFP4: _mxfp4,
}
