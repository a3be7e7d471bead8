"""What every kernel file uses: how a kernel is called, and how it is lowered for a GPU that is not there."""

from __future__ import annotations

import contextlib
import functools
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

type Choice[C, S] = C | Callable[[S], C]
"""Tiles: a config, or what gives the config for the shape of a call. Shapes with the same `key` share a config."""

# What a block may use on sm_120 and sm_121; Hopper has 227 KiB.
SHARED_MEMORY = 99 * 1024

_DEPRECATED = "The Pallas Triton backend is deprecated"


class Unsupported(ValueError):
    """A kernel was asked for a shape, dtype or format that it does not take; the message names it."""


class UnsupportedFormat(Unsupported):
    """A kernel was asked for weights in a format that it does not take.

    found: the name of the format. expected: the names of those that the kernel takes.
    """

    def __init__(self, found: str, expected: Sequence[str]):
        super().__init__(f"format: found {found}, expected one of {', '.join(expected)}")
        self.found, self.expected = found, tuple(expected)


def call(
    kernel: Callable[..., None],
    *,
    name: str,
    grid: tuple[int, ...],
    out_shape: Any,
    num_warps: int,
    num_stages: int,
    in_specs: Sequence[pl.BlockSpec] | None = None,
    out_specs: Any = None,
    aliases: dict[int, int] | None = None,
    rows: int = 0,
    interpret: bool = False,
) -> Callable[..., Any]:
    """`pl.pallas_call` for Triton. Without specs a kernel gets whole arrays as refs and indexes them itself.

    Keep the result (functools.cache on what builds it): a call object that is reused is lowered once.
    aliases: number of an argument → number of the output that takes its place. rows: the tokens of a decoding step; if
    there is just one, kernels that depend on this one start early, see `let_dependents_start`.
    """
    early = rows == 1 and not interpret
    specs: dict[str, Any] = {} if in_specs is None else {"in_specs": in_specs}
    specs |= {} if out_specs is None else {"out_specs": out_specs}
    return pl.pallas_call(
        functools.partial(_starting, kernel, 32 * num_warps) if early else kernel,
        name=name,
        grid=grid,
        out_shape=out_shape,
        input_output_aliases=aliases or {},
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        **specs,
    )


def _starting(kernel: Callable[..., None], threads: int, *refs: Any) -> None:
    let_dependents_start(jax.tree.leaves(refs)[-1], threads)
    kernel(*refs)


def let_dependents_start(ref: Any, threads: int) -> None:
    """The kernels that depend on this one may take their places on the GPU once all of its programs have come here.

    They read nothing before all of it is done: XLA begins every kernel with a wait for that (``griddepcontrol.wait``).
    That pays with one token, where most kernels are short; with sixteen, waiting programs are in the way of those that
    work (benchmarks/LOG.md). An instruction must have a result that is used: here it says that nothing is to be
    stored in `ref`, an output.
    """
    (nothing,) = plgpu.elementwise_inline_asm(
        "griddepcontrol.launch_dependents; mov.b32 $0, 0;",
        args=[lax.iota(jnp.int32, threads)],
        constraints="=r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct((threads,), jnp.int32)],
    )
    at = ref.at[(*(0,) * (len(ref.shape) - 1), nothing)]
    plgpu.store(at, jnp.zeros((threads,), ref.dtype), mask=nothing != 0)


def device_kind() -> str:
    """Of the device that a program is being compiled for: one that JAX was told to assume, or else the first here."""
    assumed = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if assumed is None else assumed.device_kind


def is_hopper() -> bool:
    """Whether that is an H100 or H200: its tensor cores read operands from shared memory, others' from registers."""
    return re.search(r"\bG?H\d", device_kind()) is not None


def choose[C, S](config: Choice[C, S], shape: S) -> C:
    """The config for a call of this shape."""
    return cast(Callable[[S], C], config)(shape) if callable(config) else config


def magnitude(n: int) -> int:
    """The nearest power of two, of 0 it is 0: for a capacity, of which any part may be in use."""
    return 2 ** round(math.log2(n)) if n else 0


def entry(numbers: Any, i: int) -> Any:
    """numbers[i], of an array or a ref (n,), or (1,): one that stands for all."""
    return numbers[min(i, numbers.shape[0] - 1)]


def ignore_deprecation() -> None:
    """Triton is what Pallas uses on these GPUs until Mosaic GPU can do the same; one line a kernel says nothing new."""
    warnings.filterwarnings("ignore", message=_DEPRECATED, category=DeprecationWarning)


ignore_deprecation()


def assumed_gpu(device: str, cores: int) -> contextlib.AbstractContextManager:
    """What is lowered inside is for a GPU of this kind: Pallas asks for it, and so do the tables of tile sizes."""
    abstract = AbstractDevice(device_kind=device, num_cores=cores, platform="gpu")
    return use_abstract_mesh(AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=abstract))


def lower_for_gpu(f: Callable, *args: Any, device: str = "NVIDIA H200", cores: int = 132) -> str:
    """StableHLO of `f(*args)` lowered for a GPU, on any machine; args: arrays or `jax.ShapeDtypeStruct`s.

    Raises what Pallas raises for a kernel that Triton cannot take. Every kernel in it is a `__gpu$xla.gpu.triton` call.
    """
    with warnings.catch_warnings(), assumed_gpu(device, cores):
        ignore_deprecation()
        return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
