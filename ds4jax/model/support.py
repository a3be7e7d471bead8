"""Which combinations of formats, shapes, mesh and implementation there are, for every op."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ds4jax.config import ModelConfig
from ds4jax.formats import F16, Q2_K, Q4_K, Q8_0, Quantized
from ds4jax.implementation import OPS, Implementation, Kernels, Op
from ds4jax.model import dspark, mtp, transformer
from ds4jax.model.cache import Cache
from ds4jax.model.compute import Compute
from ds4jax.model.spread import FIRST, spread
from ds4jax.model.weights import Weights
from pallas_kernels.common import Unsupported, UnsupportedFormat


def unsupported(cfg: ModelConfig, weights: Weights, cache: Cache, compute: Compute, tokens: int) -> dict[Op, str]:
    """The ops whose kernels cannot run, and why; empty if a step of `tokens` tokens a sequence can run as asked.

    weights, cache: of arrays or `jax.ShapeDtypeStruct`s. Each op is traced with its own implementation and the others
    in XLA, without compiling: the kernels' own checks decide. An MTP head and a drafter are traced, too. Where the
    reason is the type of matrices, it ends with the command that writes them in another type.
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
            step = functools.partial(_step, cfg=cfg, compute=alone)
            jax.eval_shape(spread(step, compute.mesh, cfg, [FIRST] * 2, [FIRST] * 2), weights, cache, ids, n)
        except UnsupportedFormat as error:
            found[op] = str(error)
            if types := _replacements(weights, op, error.expected):
                command = f"ds4jax convert --source FILE.gguf --out NEW.gguf --types {types}"
                found[op] += f"; a file of types that have kernels is made by: {command}"
        except Unsupported as error:
            kernel = r"^(compressor|hyper|indexer|latent|mla|queries|router|topk): "  # the kernel's name
            found[op] = re.sub(kernel, "", str(error))
    return found


def _step(w: Weights, cache: Cache, tokens: jax.Array, n: jax.Array, *, cfg: ModelConfig, compute: Compute):
    X, moved = transformer.forward(w, cache, tokens, n, cfg, compute)
    drafted = [mtp.draft(w, moved, X, tokens, cache.length, n, cfg, compute)[0]] if cfg.n_mtp else []
    if w.dspark is not None and cfg.drafter is not None:
        features = jnp.zeros((*tokens.shape, len(cfg.drafter.target_layers) * cfg.embed_dim), X.dtype)
        moved = dspark.write(w.dspark, moved, features, cache.length, n, cfg, compute)
        drafted.append(dspark.draft(w, w.dspark, moved, tokens[:, 0], n > 0, cfg, compute).logits)
    return transformer.logits(w, X, cfg, compute), drafted, moved


def _replacements(weights: Weights, op: Op, takes: Sequence[str]) -> str:
    """FAMILY=TYPE,… for the op's matrices of other formats than its kernel takes.

    The type is the smallest one with at least as many bits, or else the largest.
    """
    found = {}
    leaves = jax.tree_util.tree_leaves_with_path(weights, is_leaf=lambda x: isinstance(x, Quantized))
    for path, matrix in leaves:
        names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey) and key.name != "groups"]
        family = ".".join(names)
        if not isinstance(matrix, Quantized) or type(matrix).__name__ in takes or _reader(family) != op:
            continue
        fitting = [f for f in (Q2_K, Q4_K, Q8_0, F16) if f.__name__ in takes and matrix.shape[-1] % f.block == 0]
        size = matrix.block_bytes / matrix.block
        large = [f for f in fitting if f.block_bytes / f.block >= size]
        if fitting:
            found[family] = (large or fitting[-1:])[0].__name__
    return ",".join(f"{family}={name}" for family, name in found.items())


def _reader(family: str) -> Op | None:
    """The op that multiplies with the matrices of a family."""
    if family == "embed":
        return None
    family = family.removeprefix("dspark.")
    if family.startswith("ffn.experts."):
        return "experts"
    others: dict[str, Op] = {"fn": "mhc", "ape": "compress"}
    return others.get(family.rpartition(".")[2], "linear")
