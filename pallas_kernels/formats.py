"""Weight formats as the kernels know them: a registry by name, which `ds4jax.formats` fills."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax

from pallas_kernels.common import Unsupported

Array = jax.Array


@dataclass(frozen=True)
class Format:
    """One way to store a matrix (rows, columns) in planes (rows, elements), which stacks of matrices have too.

    dequantize: planes (..., rows, elements) → float32 (..., rows, columns), exact, in plain XLA.
    random: key, shape (..., rows, columns), standard deviation → planes of weights with about mean 0.
    """

    name: str
    dequantize: Callable[..., Array]
    random: Callable[[Array, tuple[int, ...], float], tuple[Array, ...]]


FORMATS: dict[str, Format] = {}


def register(fmt: Format) -> None:
    """Make a format known to all kernels."""
    FORMATS[fmt.name] = fmt


def find(name: str) -> Format:
    """The format of this name. Raises Unsupported."""
    if name not in FORMATS:
        raise Unsupported(f"format: found {name!r}, expected one of {', '.join(FORMATS)}")
    return FORMATS[name]


def dequantize(name: str, *planes: Array) -> Array:
    """The planes of matrices in a format → float32 (..., rows, columns), exact."""
    return find(name).dequantize(*planes)
