"""Mesh and logical axes: which dimension of a weight lies on which axis of the device mesh."""

from __future__ import annotations

import math

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ds4jax.errors import ConfigError

TENSOR, EXPERT = "tp", "ep"

# Routed experts are the bulk of the model, so they are spread over every device of the mesh; everything else that is
# sharded follows the tensor axis. A logical axis that is not listed is replicated.
RULES: dict[str, tuple[str, ...]] = {
    "vocab": (TENSOR,),
    "heads": (TENSOR,),
    "groups": (TENSOR,),
    "ffn": (TENSOR,),
    "experts": (EXPERT, TENSOR),
}


def make_mesh(tp: int = 1, ep: int = 1, devices=None) -> Mesh:
    """A mesh of ep × tp devices. Raises ConfigError when there are fewer."""
    devices = jax.devices() if devices is None else devices
    if tp < 1 or ep < 1 or tp * ep > len(devices):
        raise ConfigError(
            f"mesh: tp={tp} × ep={ep} needs {tp * ep} devices (each at least 1), this machine has {len(devices)}"
        )
    return jax.make_mesh((ep, tp), (EXPERT, TENSOR), axis_types=(AxisType.Auto,) * 2, devices=devices[: tp * ep])


def abstract_mesh(tp: int = 1, ep: int = 1) -> AbstractMesh:
    """The mesh that `make_mesh` would make, of devices that need not be there."""
    return AbstractMesh((ep, tp), (EXPERT, TENSOR), axis_types=(AxisType.Auto,) * 2)


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Logical axis names, one per dimension → PartitionSpec."""
    return PartitionSpec(*(RULES.get(axis or "") for axis in axes))


def named_sharding(
    mesh: Mesh | AbstractMesh, axes: tuple[str | None, ...], shape: tuple[int, ...], name: str
) -> NamedSharding:
    """Sharding of an array of `shape`; raises ConfigError naming `name` when an axis does not divide evenly."""
    for axis, size in zip(axes, shape, strict=True):
        parts = math.prod(mesh.shape[a] for a in RULES.get(axis or "", ()))
        if size % parts:
            raise ConfigError(f"mesh {dict(mesh.shape)}: {name} has {size} along {axis!r}, not a multiple of {parts}")
    return NamedSharding(mesh, partition_spec(axes))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding of everything that every device holds whole: the cache, tokens, activations."""
    return NamedSharding(mesh, PartitionSpec())
