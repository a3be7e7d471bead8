"""Manifold-constrained hyper-connections: N residual streams around every sub-layer (mHC, arXiv:2512.24880).

    m = fn · rms(flatten(X))                                all N·E values, no norm weight
    pre = sigmoid(m₀ · scale₀ + base₀) + eps                (N)      what the sub-layer reads of each stream
    post = 2 sigmoid(m₁ · scale₁ + base₁)                   (N)      what each stream gets of its output
    comb = Sinkhorn(softmax(m₂ · scale₂ + base₂) + eps)     (N, N)   how the streams mix
    h = rms(Σ_i pre_i X_i) · norm                           the sub-layer's input
    X'_k = post_k y + Σ_j comb[j, k] X_j                    after its output y

DeepSeek-V4 report, section 2.2. The end of one sub-layer and the beginning of the next are one op, `boundary`: both
pass over the streams.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ds4jax.implementation import Implementation
from ds4jax.numerics.precision import wide
from ds4jax.ops import tuned
from ds4jax.ops.linear import layers, linear
from ds4jax.ops.norm import Norm, rms_norm
from ds4jax.ops.weight import Weight
from pallas_kernels import hyper as kernel


class Connection(NamedTuple):
    """The weights of one hyper-connection: fn (2N + N², N·E), base (2N + N²), scale (3). At the head: N, N, 1."""

    fn: Weight
    base: Weight
    scale: Weight


class Output(NamedTuple):
    """What a sub-layer adds to the streams: its output y, as post and comb say."""

    y: Float[Array, "S E"]
    post: Float[Array, "S N"]
    comb: Float[Array, "S N N"]


class Streams(NamedTuple):
    """The residual streams X, to which `output` is still to be added, unless it is None."""

    X: Float[Array, "S N E"]
    output: Output | None = None

    def added(self) -> Float[Array, "S N E"]:
        """The streams with the last output in them."""
        return self.X if self.output is None else expand(self.X, self.output)


class Boundary(NamedTuple):
    """Between two sub-layers: the streams X, the next one's input h, and post and comb for its output.

    post and comb are float32 at least, and None before the output head.
    """

    X: Float[Array, "S N E"]
    h: Float[Array, "S E"]
    post: Float[Array, "S N"] | None
    comb: Float[Array, "S N N"] | None

    def add(self, y: Float[Array, "S E"]) -> Streams:
        """The streams after the sub-layer has returned y."""
        assert self.post is not None and self.comb is not None
        return Streams(self.X, Output(y, self.post, self.comb))


def boundary(
    streams: Streams,
    connection: Connection,
    norm: Norm,
    *,
    eps: float,
    iterations: int,
    implementation: Implementation = "xla",
) -> Boundary:
    """Add one sub-layer's output to the streams, and read from them what the next one takes.

    eps: of pre and of the Sinkhorn normalisations, of which there are `iterations` for rows and for columns. The norm
    over all streams has the eps of `norm`. The kernel takes fn in F32, F16 or BF16, N and E powers of two; sums are
    float32 in a fixed order. Raises Unsupported.
    """
    if implementation == "xla":
        return _formula(streams, connection, norm, eps, iterations)
    fn, base, scale = connection
    # X' is stored as it is kept, in its own dtype alone, and not once more in that of the sums it takes part in.
    s = streams if len(streams.X) < kernel.MANY else Streams(lax.optimization_barrier(streams.added()))
    numbers = layers(*(weight.nth for weight in (fn, base, scale, norm.weight)))
    return Boundary(
        *kernel.op(
            s.X, s.output, fn.values, base.stack, scale.stack, norm.weight.stack, numbers,
            numbers=kernel.Numbers(norm.eps, eps, iterations), config=tuned.tiles(kernel),
            interpret=implementation == "pallas_interpret",
        )
    )  # fmt: skip


def _formula(streams: Streams, connection: Connection, norm: Norm, eps: float, iterations: int) -> Boundary:
    X = streams.added()
    N = X.shape[-2]
    m, scale, base = mixing = _mixing(X, connection, norm.eps)
    h = norm(_read(X, *mixing, eps))
    if m.shape[-1] == N:  # the head
        return Boundary(X, h, None, None)
    post = 2 * jax.nn.sigmoid(m[..., N : 2 * N] * scale[1] + base[N : 2 * N])
    comb = (m[..., 2 * N :] * scale[2] + base[2 * N :]).reshape(*m.shape[:-1], N, N)
    comb = sinkhorn(jax.nn.softmax(comb, axis=-1) + eps, iterations, eps)
    return Boundary(X, h, post, comb)


def _mixing(X: Array, connection: Connection, norm_eps: float) -> tuple[Array, Array, Array]:
    """m, scale and base."""
    flat = X.reshape(*X.shape[:-2], -1).astype(wide(X.dtype))
    m = linear(rms_norm(flat, norm_eps), connection.fn)
    return m, connection.scale.value.astype(m.dtype), connection.base.value.astype(m.dtype)


def _read(X: Array, m: Array, scale: Array, base: Array, eps: float) -> Array:
    N = X.shape[-2]
    pre = jax.nn.sigmoid(m[..., :N] * scale[0] + base[:N]) + eps
    return jnp.sum(pre[..., None] * X.astype(pre.dtype), axis=-2).astype(X.dtype)


def collapse(streams: Streams, connection: Connection, *, eps: float, norm_eps: float) -> Float[Array, "S E"]:
    """What a sub-layer or a head reads of the streams, before its norm: Σ_i pre_i X_i. In XLA."""
    X = streams.added()
    return _read(X, *_mixing(X, connection, norm_eps), eps)


def sinkhorn(comb: Float[Array, "*s N N"], iterations: int, eps: float) -> Float[Array, "*s N N"]:
    """Scale comb towards a doubly stochastic matrix: columns first, then rows and columns in turn."""

    def rows_then_columns(_, comb: Array) -> Array:
        comb = comb / (comb.sum(-1, keepdims=True) + eps)
        return comb / (comb.sum(-2, keepdims=True) + eps)

    comb = comb / (comb.sum(-2, keepdims=True) + eps)
    return lax.fori_loop(0, iterations - 1, rows_then_columns, comb)


def expand(X: Float[Array, "S N E"], output: Output) -> Float[Array, "S N E"]:
    """X'_k = post_k y + Σ_j comb[j, k] X_j, in X's dtype."""
    # N is so small that sums of products, which compile to one pass over X, are faster than matrix products.
    y, post, comb = output
    wide_X = X.astype(comb.dtype)
    mixed = sum(comb[..., j, :, None] * wide_X[..., j, None, :] for j in range(X.shape[-2]))
    return (mixed + post[..., None] * y.astype(post.dtype)[..., None, :]).astype(X.dtype)
