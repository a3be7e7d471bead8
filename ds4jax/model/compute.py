"""What a forward pass needs beside weights and cache: how to compute, and the tokens of one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int32

from ds4jax.config import ModelConfig
from ds4jax.implementation import Kernels, parse
from ds4jax.numerics.precision import wide
from ds4jax.numerics.rows import Numerics
from ds4jax.ops import rope


@dataclasses.dataclass(frozen=True)
class Compute:
    """How to compute, as opposed to what: a static argument of every jitted step.

    numerics: see `ds4jax.numerics.rows`. dtype: of activations. mesh: of the devices that compute together, see
    `ds4jax.sharding`; None for one device. query_blocks: how many blocks of queries attention takes at once; more are
    faster, and need more memory. kernels: the implementation of the ops, see `ds4jax.implementation`.
    """

    numerics: Numerics = "official"
    dtype: str = "float32"
    mesh: Mesh | None = None
    query_blocks: int | None = None  # one
    kernels: str = "xla"

    @property
    def implementations(self) -> Kernels:
        """The implementation of each op."""
        return parse(self.kernels)


class Inputs(NamedTuple):
    """T new tokens of each of B sequences, in rows: S = B·T, sequence by sequence.

    n: how many of the T are real; the rest leaves no trace. real: 0 for rows that are no tokens; None if there is one
    row only. first: the position of the first token; 0 for a sequence without a real token, which then attends to
    nothing. angles: of RoPE, by the layers' ratio. causal: whether a token sees none after it; otherwise each sees
    all T and the whole window before them.
    """

    ids: Int32[Array, "S"]
    n: Int32[Array, "B"]
    real: Int32[Array, "S"] | None
    first: Int32[Array, "B"]
    angles: dict[int, rope.Angles]
    causal: bool = True

    @property
    def shape(self) -> tuple[int, int]:
        """B, T."""
        B = self.n.shape[0]
        return B, self.ids.shape[0] // B


def inputs(
    tokens: Int32[Array, "B T"], n: Int32[Array, "B"], length: Int32[Array, "B"], cfg: ModelConfig, dtype: str,
    causal: bool = True,
) -> Inputs:  # fmt: skip
    """The inputs of a call. length: how many tokens each sequence has before these."""
    B, T = tokens.shape
    real = None if B * T == 1 else (jnp.arange(T, dtype=jnp.int32) < n[:, None]).astype(jnp.int32).reshape(-1)
    first = length if B == 1 else jnp.where(n > 0, length, 0)
    return Inputs(tokens.reshape(-1), n, real, first, rope.angles(cfg, length, T, wide(jnp.dtype(dtype))), causal)


Tap = Callable[[int, str, Any], None]
"""Called in the pass with a layer, the name of a value, and the value, or a function that computes it:
``attention`` (S, E) and ``ffn`` (S, E), the normed inputs of the sub-layers; ``query`` (S, Rq), the normed latent of
the queries; ``shared`` (S, F), the shared expert's activations; ``routing``, a `Routing`; ``streams`` (S, N, E), the
streams after the layer; ``window``, planes (B, T, ·), the new tokens' rows of the
window, if there are more than SPARE tokens; ``compressors``, by kind, each a `Compressor` with the
projections that it is fed."""


def no_tap(layer: int, name: str, value: Any) -> None:
    """Takes no notice."""
