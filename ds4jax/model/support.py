"""Which combinations of formats, shapes, mesh and implementation there are, for every op."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp

from ds4jax.config import ModelConfig
from ds4jax.implementation import OPS, Implementation, Kernels, Op
from ds4jax.model import mtp, transformer
from ds4jax.model.cache import Cache
from ds4jax.model.compute import Compute
from ds4jax.model.weights import Weights
from pallas_kernels.common import Unsupported


def unsupported(cfg: ModelConfig, weights: Weights, cache: Cache, compute: Compute, tokens: int) -> dict[Op, str]:
    """The ops whose kernels cannot run, and why; empty if a step of `tokens` tokens a sequence can run as asked.

    weights, cache: of arrays or `jax.ShapeDtypeStruct`s. Each op is traced with its own implementation and the others
    in XLA, without compiling: the kernels' own checks decide. An MTP head is traced, too.
    """
    batch = cache.length.shape[0]
    ids, n = jax.ShapeDtypeStruct((batch, tokens), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.int32)
    found: dict[Op, str] = {}
    for op in OPS:
        if (own := compute.implementations[op]) == "xla":
            continue
        others: dict[str, Implementation] = {op: own}
        kernels = str(Kernels().using(**others))
        alone = Compute(compute.numerics, compute.dtype, compute.mesh, compute.query_blocks, kernels)
        try:
            jax.eval_shape(functools.partial(_step, cfg=cfg, compute=alone), weights, cache, ids, n)
        except Unsupported as error:
            found[op] = re.sub(r"^(compressor|hyper|indexer|latent|mla|router|topk): ", "", str(error))  # the kernel's
    return found


def _step(w: Weights, cache: Cache, tokens: jax.Array, n: jax.Array, *, cfg: ModelConfig, compute: Compute):
    X, moved = transformer.forward(w, cache, tokens, n, cfg, compute)
    drafted = mtp.draft(w, moved, X, tokens, cache.length, n, cfg, compute)[0] if cfg.n_mtp else None
    return transformer.logits(w, X, cfg, compute), drafted
