"""A layer's weight as an op takes it: its stack, and its number there."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from ds4jax.formats import Quantized
from pallas_kernels.common import UnsupportedFormat

Array = jax.Array


class Weight(NamedTuple):
    """Number `nth` of `stack`, a Quantized or an Array with a leading axis of layers.

    A kernel reads the stack itself, since a slice of it would be a copy; a formula in XLA takes `value`.
    """

    stack: Any
    nth: Any  # an int; in `check`, an int32 scalar

    @property
    def value(self) -> Any:
        """The Quantized (..., out, in) or Array of this layer."""
        return jax.tree.map(lambda p: p[self.nth], self.stack)

    @property
    def format(self) -> str:
        """The name of a quantized weight's format."""
        return type(self.stack).__name__

    @property
    def planes(self) -> tuple[Array, ...]:
        """The planes of a quantized weight's stack, (layers, ..., out, ·) each."""
        return tuple(getattr(self.stack, name) for name in self.stack.planes)

    @property
    def n_out(self) -> int:
        """Rows of a matrix: values of its product with a vector."""
        return self.planes[0].shape[-2]

    @property
    def values(self) -> Array:
        """The stack of a matrix in F32, F16 or BF16 as a kernel reads it. Raises UnsupportedFormat for others."""
        if not hasattr(self.stack, "values"):
            raise UnsupportedFormat(self.format, ("F32", "F16", "BF16"))
        return self.stack.values


def single(value: Quantized | Array) -> Weight:
    """A weight that belongs to no layer."""
    return Weight(jax.tree.map(lambda p: p[None], value), 0)
