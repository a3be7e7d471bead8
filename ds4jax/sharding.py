"""The device mesh: which dimension of a weight or of the cache lies on which axis, and what the devices exchange.

A step runs on every device as on one alone, each with its part of the weights and of the cache (`model.spread`):

    dp   sequences: the cache; the weights are whole in every part
    ep   routed experts
    tp   routed experts, too; attention by heads and output groups, the shared expert by its width, the output matrix
         by vocabulary

Each routed expert is whole on one device: a part of its width would be too narrow for the kernels of few tokens.
What a layer adds to the streams is summed over the devices, once after attention and once after the experts.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ds4jax.errors import ConfigError

DATA, EXPERT, TENSOR = AXES = "dp", "ep", "tp"

# A logical axis that is not listed is whole on every device.
RULES: dict[str, tuple[str, ...]] = {
    "sequences": (DATA,),
    "experts": (EXPERT, TENSOR),
    "vocab": (TENSOR,),
    "heads": (TENSOR,),
    "groups": (TENSOR,),
    "ffn": (TENSOR,),
}


def make_mesh(tp: int = 1, ep: int = 1, dp: int = 1, devices=None) -> Mesh:
    """A mesh of dp × ep × tp devices. Raises ConfigError when there are fewer."""
    devices, n = jax.devices() if devices is None else devices, tp * ep * dp
    if min(tp, ep, dp) < 1 or n > len(devices):
        raise ConfigError(
            f"mesh: tp={tp} × ep={ep} × dp={dp} needs {n} devices (each at least 1), this machine has {len(devices)}"
        )
    return jax.make_mesh((dp, ep, tp), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:n])


def abstract_mesh(tp: int = 1, ep: int = 1, dp: int = 1) -> AbstractMesh:
    """The mesh that `make_mesh` would make, of devices that need not be there."""
    return AbstractMesh((dp, ep, tp), AXES, axis_types=(AxisType.Auto,) * 3)


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Logical axis names, one per dimension → PartitionSpec."""
    return PartitionSpec(*(RULES.get(axis or "") for axis in axes))


def parts(mesh: Mesh | AbstractMesh | None, *axes: str | None) -> int:
    """Into how many parts a mesh cuts an array along logical axes: 1 without a mesh."""
    return 1 if mesh is None else math.prod(mesh.shape[a] for axis in axes for a in RULES.get(axis or "", ()))


def share(mesh: Mesh | AbstractMesh | None, sequences: int) -> int:
    """How many of some sequences a device computes: its part of them, or all where they cannot be shared out evenly."""
    n = parts(mesh, "sequences")
    return sequences if sequences % n else sequences // n


def named_sharding(
    mesh: Mesh | AbstractMesh, axes: tuple[str | None, ...], shape: tuple[int, ...], name: str
) -> NamedSharding:
    """Sharding of an array of `shape`; raises ConfigError naming `name` when an axis does not divide evenly."""
    for axis, size in zip(axes, shape, strict=True):
        if size % (n := parts(mesh, axis)):
            raise ConfigError(f"mesh {dict(mesh.shape)}: {name} has {size} along {axis!r}, not a multiple of {n}")
    return NamedSharding(mesh, partition_spec(axes))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def put(x: np.ndarray | np.generic, where: jax.sharding.Sharding | None) -> jax.Array:
    """An array of the host on the devices; where these belong to several processes, every one must have the same."""
    if where is None or where.is_fully_addressable:
        return jax.device_put(x, where)

    # `device_put` would first let all processes compare what they have.
    def part(index: Any) -> np.ndarray:
        return np.asarray(x[index])

    return jax.make_array_from_callback(x.shape, where, part, dtype=x.dtype)


# ---- in the program of one device ------------------------------------------------------------------------------------
def total(x: jax.Array, mesh: Mesh | None, *axes: str) -> jax.Array:
    """The sum of all devices' x along axes of the mesh; x itself where there is one device."""
    several = _several(mesh, axes)
    return lax.psum(x, several) if several else x


def gathered(x: jax.Array, mesh: Mesh | None, axis: str, dimension: int = -1) -> jax.Array:
    """All devices' parts of x, cut along one of its dimensions and an axis of the mesh."""
    return lax.all_gather(x, axis, axis=dimension % x.ndim, tiled=True) if _several(mesh, (axis,)) else x


def place(mesh: Mesh | None, *axes: str) -> jax.Array | int:
    """The number of this device along axes of the mesh, the last of which counts fastest."""
    several = _several(mesh, axes)
    return lax.axis_index(several) if several else 0


def _several(mesh: Mesh | None, axes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if mesh is not None and mesh.shape[axis] > 1)
