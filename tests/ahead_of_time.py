"""Compiling for NVIDIA GPUs that are not there: XLA's compiler needs a description of the device, and no driver.

    python tests/ahead_of_time.py DEVICE TOKENS [LAYERS]    # one step of the full shape; prints what was compiled

It needs the CUDA plugin's compiler, ``pip install jax-cuda13-pjrt`` in the version of jax, and runs on a CPU.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from ds4jax.engine import compiled_steps, sampling
from ds4jax.io.synthetic import FULL, RECIPES, Synthetic
from ds4jax.model import cache as kv
from ds4jax.model import weights
from ds4jax.model.compute import Compute


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA asks of a device. Bytes, bytes per second; limits of NVIDIA's CUDA programming guide, table of compute
    capabilities; sizes of the vendor's data sheets."""

    name: str
    capability: tuple[int, int]
    cores: int
    shared_per_block: int
    shared_per_core: int
    threads_per_core: int
    memory: int
    bandwidth: int
    l2: int
    ghz: float

    def target_config(self) -> str:
        """A GpuTargetConfigProto in text form."""
        major, minor = self.capability
        return f"""
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
            device_description_str: "{self.name}"
        """


GB, MIB = 10**9, 2**20
GPUS = {
    "sm_90": Gpu("NVIDIA H200", (9, 0), 132, 232448, 233472, 2048, 150754820096, 4814 * GB, 50 * MIB, 1.98),
    "sm_120": Gpu(
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition", (12, 0), 188, 101376, 102400, 1536, 102005473280,
        1792 * GB, 128 * MIB, 2.6,
    ),
    "sm_121": Gpu("NVIDIA GB10", (12, 1), 48, 101376, 102400, 1536, 128 * GB, 273 * GB, 24 * MIB, 2.4),
}  # fmt: skip


def compile_step(gpu: Gpu, tokens: int, layers: int, ctx: int = 32768) -> jax.stages.Compiled:
    """A step of the full shape in its first `layers`: decoding for one token, with the loop over a block, or prefill.

    With the kernels and the XLA options that it has on such a GPU.
    """
    cfg = dataclasses.replace(
        FULL, n_layers=layers, compress_ratios=FULL.compress_ratios[:layers], swiglu_clamp=FULL.swiglu_clamp[:layers]
    )
    compute = Compute("official", "bfloat16", kernels="pallas")
    w = weights.structs(weights.abstract(cfg, Synthetic(cfg, RECIPES["q2"]).types))
    cache, params = kv.abstract(cfg, "official", "bfloat16", 1, ctx), sampling.batch([sampling.Sampling()])
    if tokens == 1:
        ints = jax.ShapeDtypeStruct((compiled_steps.BLOCK, 1), jnp.int32), jax.ShapeDtypeStruct((1, 1), jnp.int32)
        results = *ints, jax.ShapeDtypeStruct((1, cfg.vocab_size), jnp.float32)
        step, donated, name = compiled_steps.decode_step, (1, 2), "decode"
        args = w, cache, results, *compiled_steps.decode_args({0: 0}, 1, params)
    else:
        step, donated, name = compiled_steps.prefill_step, (1,), "prefill"
        padded, n = compiled_steps.pad([0] * tokens)
        args = w, cache, jnp.int32(0), jnp.array([True]), padded, n, params, jnp.zeros(padded.shape[1], jnp.int32)
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=gpu.name, target_config=gpu.target_config(), topology="1x1x1"
    )
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    f = jax.jit(functools.partial(step, cfg=cfg, compute=compute), donate_argnums=donated, out_shardings=sharding)
    options = compiled_steps.compiler_options(name, compute.implementations, backend="gpu")
    # Pallas asks for the device's kind while it lowers.
    abstract = AbstractDevice(device_kind=gpu.name, num_cores=gpu.cores, platform="gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=abstract)):
        lowered = f.trace(*args).lower(lowering_platforms=("cuda",))
    return lowered.compile(options)


def main(device: str, tokens: str, layers: str = "5") -> None:
    start = time.monotonic()
    compiled = compile_step(GPUS[device], int(tokens), int(layers))
    memory = compiled.memory_analysis()
    assert memory is not None
    found = {"jax": jax.__version__, "device": GPUS[device].name, "tokens": int(tokens), "layers": int(layers)}
    found |= {"temp_bytes": memory.temp_size_in_bytes, "kernels": str(compiled.as_text()).count("__gpu$xla.gpu.triton")}
    print(json.dumps(found | {"seconds": round(time.monotonic() - start, 1)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
