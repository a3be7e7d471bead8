"""GPUs by name: how much memory JAX can have of each, and what XLA has to know to compile for one that is not there."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import re
from typing import Any

import jax
from jax.experimental import topologies

from ds4jax.errors import ConfigError

GIB, MIB, GB = 2**30, 2**20, 10**9


@dataclasses.dataclass(frozen=True)
class Card:
    """One NVIDIA GPU. Memory in bytes, bandwidth in bytes per second, clock rate in GHz.

    name: part of what the driver calls it. kind: that name in full, as `jax.Device.device_kind`. memory: all that the
    driver reports (cudaMemGetInfo), of which JAX takes `memory_fraction`. The rest is from NVIDIA's data sheets and
    the CUDA programming guide, table of compute capabilities.
    """

    name: str
    kind: str
    memory: int
    capability: tuple[int, int]
    cores: int
    shared_per_block: int
    shared_per_core: int
    threads_per_core: int
    bandwidth: int
    l2: int
    ghz: float

    def named(self, text: str) -> bool:
        """Whether a name is this card's, however it is spelled; the driver's name will do. GH200 is no H200."""
        name = self.name.lower().replace(" ", "[ _-]?")
        return bool(re.search(rf"(?<![a-z0-9]){name}(?![a-z0-9])", text.lower()))

    def here(self) -> bool:
        """Whether this machine has one."""
        return jax.default_backend() == "gpu" and self.named(jax.local_devices()[0].device_kind)

    def devices(self, n: int = 1) -> list[Any]:
        """Devices of one host to compile for, with the CUDA plugin's compiler; nothing can run on them."""
        major, minor = self.capability
        target = f"""
            gpu_device_info {{
              threads_per_block_limit: 1024  threads_per_warp: 32
              shared_memory_per_block: 49152  shared_memory_per_block_optin: {self.shared_per_block}
              shared_memory_per_core: {self.shared_per_core}  threads_per_core_limit: {self.threads_per_core}
              core_count: {self.cores}  fpus_per_core: 128  clock_rate_ghz: {self.ghz}
              block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
              memory_bandwidth: {self.bandwidth}  l2_cache_size: {self.l2}  device_memory_size: {self.memory}
              registers_per_core_limit: 65536  registers_per_block_limit: 65536
              cuda_compute_capability {{ major: {major}  minor: {minor} }}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9  minor: 8 }}
            device_description_str: "{self.kind}"
        """
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name=self.kind, target_config=target, topology=f"1x1x{n}"
        )
        return topology.devices


# Memory: what PyTorch's out-of-memory messages in public bug reports call the total capacity; H200: measured.
_HOPPER, _GEFORCE = (232448, 233472, 2048), (101376, 102400, 1536)
CARDS = (
    Card("H200", "NVIDIA H200", int(139.80 * GIB), (9, 0), 132, *_HOPPER, 4814 * GB, 50 * MIB, 1.98),
    Card("H100", "NVIDIA H100 80GB HBM3", int(79.14 * GIB), (9, 0), 132, *_HOPPER, 3352 * GB, 50 * MIB, 1.98),
    Card("B200", "NVIDIA B200", int(178.35 * GIB), (10, 0), 148, *_HOPPER, 8000 * GB, 126 * MIB, 1.97),
    Card(
        "RTX PRO 6000", "NVIDIA RTX PRO 6000 Blackwell Workstation Edition", int(94.97 * GIB), (12, 0), 188, *_GEFORCE,
        1792 * GB, 128 * MIB, 2.6,
    ),
    Card("RTX 5090", "NVIDIA GeForce RTX 5090", int(31.36 * GIB), (12, 0), 170, *_GEFORCE, 1792 * GB, 96 * MIB, 2.4),
    Card("GB10", "NVIDIA GB10", int(121.69 * GIB), (12, 1), 48, *_GEFORCE, 273 * GB, 24 * MIB, 2.4),
)  # fmt: skip


def find(name: str) -> Card:
    """The card of this name. Raises ConfigError."""
    for card in CARDS:
        if card.named(name):
            return card
    raise ConfigError(f"device: found {name!r}, expected one of {', '.join(card.name for card in CARDS)}, or here")


def here() -> Card | None:
    """The card that this machine has, if it is one of those known."""
    return next((card for card in CARDS if card.here()), None)


def compiler_is_here() -> bool:
    """Whether the CUDA plugin is installed, without which nothing can be compiled for a card."""
    with contextlib.suppress(ModuleNotFoundError):
        return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{n}") for n in (13, 12))
    return False
