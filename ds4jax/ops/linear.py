"""Products with quantized matrices: y = x Wᵀ, several W that share an input at once, norm before and SwiGLU after.

Decoding reads every weight once, so what shares an input is one call: q_a and kv, all compressors' projections, gate
and up. The kernels are chosen by the number of rows: up to 96 read the quantized weights as they are
(`pallas_kernels.matmul`); more multiply decoded tiles on the tensor cores (`pallas_kernels.grouped_gemm`), or matrices
that XLA decodes whole, where that is faster.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from ds4jax.implementation import Implementation
from ds4jax.numerics.precision import matmul, wide
from ds4jax.ops import tuned
from ds4jax.ops.norm import Norm
from ds4jax.ops.weight import Weight
from pallas_kernels import grouped_gemm
from pallas_kernels import matmul as few


@dataclass(frozen=True)
class Product:
    """A product that is asked for: x Wᵀ in `dtype`, x's unless given; or, with `clamp`, SwiGLU of the products with
    two matrices, gate and up.

    exact: XLA multiplies in float32 at least, not in x's dtype, since a choice depends on it.
    """

    matrices: tuple[Weight, ...]
    dtype: str | None = None
    clamp: float | None = None
    exact: bool = False


def product(matrix: Weight, dtype=None, *, exact: bool = False) -> Product:
    """x Wᵀ."""
    return Product((matrix,), None if dtype is None else jnp.dtype(dtype).name, exact=exact)


def gated(gate: Weight, up: Weight, clamp: float) -> Product:
    """SwiGLU of x Gᵀ and x Uᵀ."""
    return Product((gate, up), clamp=clamp)


def swiglu(gate: Float[Array, "*s"], up: Float[Array, "*s"], clamp: float) -> Float[Array, "*s"]:
    """silu(min(gate, clamp)) · clip(up, -clamp, clamp) (arXiv:2002.05202, clamped)."""
    return jax.nn.silu(jnp.minimum(gate, clamp)) * jnp.clip(up, -clamp, clamp)


def linear(x: Float[Array, "*s K"], w: Weight, dtype=None) -> Float[Array, "*s n"]:
    """x times w (n, K) transposed, in `dtype`, x's unless given; in XLA."""
    return matmul("...i,oi->...o", x, w.value.dequantize(x.dtype), dtype=dtype)


def products(
    x: Float[Array, "S *groups K"], asked: Sequence[Product], *, norm: Norm | None = None, groups: int = 1,
    implementation: Implementation = "xla",
) -> list[Float[Array, "S _n"]]:  # fmt: skip
    """The products of x that are asked for.

    norm: of x, first. groups: of x, where it has them; each meets its own n / groups rows of the matrices: a
    block-diagonal product. Sums are float32 at least. Raises Unsupported for a format, shape or dtype that the kernels
    do not take.
    """
    asked = [Product(p.matrices, p.dtype or x.dtype.name, p.clamp, p.exact) for p in asked]
    x = x[:, 0] if x.ndim == 3 and groups == 1 else x
    if implementation == "xla":
        x = x if norm is None else norm(x)
        return [_formula(x, p, groups) for p in asked]
    apart = [len({(m.format, m.nth) for m in p.matrices}) > 1 for p in asked]  # gate and up of different types
    if any(apart):
        parts = [
            [Product((m,), "float32") for m in p.matrices] if a else [p] for p, a in zip(asked, apart, strict=True)
        ]
        every = itertools.chain.from_iterable(parts)
        made = iter(products(x, list(every), norm=norm, groups=groups, implementation=implementation))
        return [
            swiglu(next(made), next(made), p.clamp).astype(p.dtype) if a and p.clamp is not None else next(made)
            for p, a in zip(asked, apart, strict=True)
        ]
    interpret = implementation == "pallas_interpret"
    if len(x) > few.MAX_ROWS:
        x = x if norm is None else norm(x)
        return [_many(x, p, groups, interpret) for p in asked]
    layer = layers(*(p.matrices[0].nth for p in asked), *([] if norm is None else [norm.weight.nth]))
    outputs = tuple(
        few.Output(p.matrices[0].n_out, p.matrices[0].format, p.dtype or x.dtype.name, p.clamp) for p in asked
    )
    return list(
        few.matmul(
            x, layer, [[m.planes for m in p.matrices] for p in asked], None if norm is None else norm.weight.stack,
            outputs=outputs, norm_eps=None if norm is None else norm.eps, config=tuned.tiles(few),
            interpret=interpret,
        )
    )  # fmt: skip


def layers(*numbers: int) -> Int32[Array, "n"]:
    """The numbers, but one where all are equal: of equal numbers XLA makes no constant, but a kernel in every step."""
    return jnp.array(numbers[:1] if len({*numbers}) == 1 else numbers, jnp.int32)


def _formula(x: Array, asked: Product, groups: int) -> Array:
    if asked.exact:
        x = x.astype(wide(x.dtype))
    dtype = wide(x.dtype) if asked.clamp is not None else asked.dtype
    y = [_multiply(x, m, groups, dtype) for m in asked.matrices]
    return y[0] if asked.clamp is None else swiglu(y[0], y[1], asked.clamp).astype(asked.dtype)


def _multiply(x: Array, m: Weight, groups: int, dtype) -> Array:
    if groups == 1:
        return linear(x, m, dtype)
    w = m.value.dequantize(x.dtype)
    y = matmul("...gi,goi->...go", x, w.reshape(groups, -1, w.shape[-1]), dtype)
    return y.reshape(*y.shape[:-2], -1)


@functools.partial(jax.jit, static_argnames=("groups", "dtype"))  # traced once for all layers of a shape
def decoded_whole(x: Float[Array, "S *groups K"], m: Weight, groups: int, dtype) -> Float[Array, "S n"]:
    """The product of many rows, by XLA, with the whole matrix decoded to x's dtype first."""
    # Not before x is there: XLA would decode the matrices of all layers first, and keep them.
    x, layer = lax.optimization_barrier((x, jnp.int32(m.nth)))
    return _multiply(x, Weight(m.stack, layer), groups, dtype)


def _many(x: Array, asked: Product, groups: int, interpret: bool) -> Array:
    """The product of more rows than `few` takes."""
    (S, *_, K), dtype = x.shape, "float32" if asked.clamp is not None else asked.dtype

    def multiply(m: Weight) -> Array:
        shape = grouped_gemm.Shape("linear", S, m.n_out, K, m.format, m.planes[0].shape[0], groups=groups)
        config = tuned.tiles(grouped_gemm)(shape)
        if not config.fused:
            return decoded_whole(x, m, groups, dtype)
        return grouped_gemm.linear(
            x.astype(jnp.bfloat16), layers(m.nth), m.planes, fmt=m.format, groups=groups, config=config, dtype=dtype,
            interpret=interpret,
        )  # fmt: skip

    y = [multiply(m) for m in asked.matrices]
    return y[0] if asked.clamp is None else swiglu(y[0], y[1], asked.clamp).astype(asked.dtype)
