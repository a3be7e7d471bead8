"""Weight formats as the kernels know them: what each kernel needs of a format, and a registry by name.

`ds4jax.formats` fills the registry; a kernel takes the name of a format and asks for it with `find`. What a kernel
needs is described, beside the code that formats share, in `runs` (matmul), `dots` (experts) and `tiles` (grouped_gemm).
`units` makes all three of one description.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.common import UnsupportedFormat
from pallas_kernels.formats.dots import Dots
from pallas_kernels.formats.runs import Runs
from pallas_kernels.formats.tiles import Tiles

Array = jax.Array
Kernel = Literal["matmul", "experts", "grouped_gemm"]


@dataclass(frozen=True)
class Format:
    """One way to store a matrix (rows, columns) in planes (rows, elements), which stacks of matrices have too.

    planes: (dtype, elements per block of `block` weights) of each, in order.
    dequantize: planes (..., rows, elements) → float32 (..., rows, columns), exact, in plain XLA.
    random: key, shape (..., rows, columns), standard deviation → planes of weights with about mean 0.
    matmul, experts, grouped_gemm: what these kernels need, None if the format is not for them.
    """

    name: str
    block: int
    planes: tuple[tuple[str, int], ...]
    dequantize: Callable[..., Array]
    random: Callable[..., tuple[Array, ...]]
    matmul: Runs | None = None
    experts: type[Dots] | None = None
    grouped_gemm: Tiles | None = None

    def nbytes(self, weights: int) -> int:
        """Bytes of so many weights."""
        return weights // self.block * sum(jnp.dtype(dtype).itemsize * n for dtype, n in self.planes)

    def structs(self, shape: tuple[int, ...]) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The planes of matrices of `shape` (..., rows, columns)."""
        lead, blocks = shape[:-1], shape[-1] // self.block
        return tuple(jax.ShapeDtypeStruct((*lead, blocks * n), dtype) for dtype, n in self.planes)


_FORMATS: dict[str, Format] = {}


def register(fmt: Format) -> None:
    """Make a format known to the kernels."""
    _FORMATS[fmt.name] = fmt


def names(kernel: Kernel | None = None) -> list[str]:
    """The formats that a kernel takes; without one, all."""
    return [name for name, fmt in _FORMATS.items() if kernel is None or getattr(fmt, kernel) is not None]


def find(name: str, kernel: Kernel | None = None) -> Format:
    """The format of this name. Raises UnsupportedFormat if there is none, or if it is not for `kernel`."""
    if name not in names(kernel):
        raise UnsupportedFormat(name, names(kernel))
    return _FORMATS[name]


def needs(name: str, kernel: Kernel) -> Any:
    """What a kernel needs of the format of this name: Runs, Dots or Tiles. Raises Unsupported."""
    return getattr(find(name, kernel), kernel)


def dequantize(name: str, *planes: Array) -> Array:
    """The planes of matrices in a format → float32 (..., rows, columns), exact."""
    return find(name).dequantize(*planes)
