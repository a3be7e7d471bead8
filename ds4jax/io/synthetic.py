"""Random models: configs, random tensors in any mix of formats, and GGUF files of them. No JAX.

The same seed gives the same bytes on every machine and numpy version: each tensor draws from its own Philox stream
(keyed by seed and name, so order does not matter), whose raw integers numpy guarantees, and all arithmetic on them is
either on integers or a single rounding.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import quantize

from ds4jax.config import DrafterConfig, ModelConfig
from ds4jax.errors import ConfigError
from ds4jax.io import recipes
from ds4jax.io.gguf import TensorData, write_gguf
from ds4jax.io.recipes import MATRIX_TYPES, Recipe, Type, fits
from ds4jax.io.tokenizer import byte_tokenizer
from ds4jax.model.tensors import TensorSpec, model_table
from ds4jax.terminal import meter
from ds4jax.unfiled import AnyType, Unfiled

# DeepSeek-V4-Flash. Of this size, weights are made on a device, see `Synthetic`, or repeat themselves.
FULL = ModelConfig(
    n_layers=43,
    embed_dim=4096,
    vocab_size=129280,
    n_heads=64,
    head_dim=512,
    rope_dim=64,
    q_lora_rank=1024,
    o_lora_rank=1024,
    o_groups=8,
    window=128,
    compress_ratios=(0, 0, *(4, 128) * 20, 4),
    index_heads=64,
    index_head_dim=128,
    index_top_k=512,
    rope_base=10000.0,
    compress_rope_base=160000.0,
    yarn_factor=16.0,
    yarn_original_ctx=65536,
    yarn_beta_fast=32.0,
    yarn_beta_slow=1.0,
    n_experts=256,
    n_experts_used=6,
    n_shared_experts=1,
    expert_dim=2048,
    route_scale=1.5,
    route_norm=True,
    n_hash_layers=3,
    swiglu_clamp=(10.0,) * 43,
    n_streams=4,
    sinkhorn_iters=20,
    hc_eps=1e-6,
    norm_eps=1e-6,
)
# Three shapes that have every kind of layer. `base` keeps the published constants and has rows of 256, so that every
# format fits. `odd` changes every number that a careless implementation might have fixed. `kernel` is as small as the
# Pallas kernels take it.
BASE = dataclasses.replace(
    FULL, n_layers=5, embed_dim=256, vocab_size=512, n_heads=8, head_dim=192, q_lora_rank=256, o_lora_rank=128,
    o_groups=2, compress_ratios=(0, 0, 4, 128, 4), index_heads=16, index_top_k=8, n_experts=12, n_experts_used=3,
    expert_dim=256, swiglu_clamp=(10.0,) * 5,
)  # fmt: skip
ODD = ModelConfig(
    n_layers=4,
    embed_dim=128,
    vocab_size=320,
    n_heads=6,
    head_dim=96,
    rope_dim=32,
    q_lora_rank=96,
    o_lora_rank=32,
    o_groups=3,
    window=32,
    compress_ratios=(0, 4, 128, 4),
    index_heads=12,
    index_head_dim=64,
    index_top_k=16,
    rope_base=5000.0,
    compress_rope_base=40000.0,
    yarn_factor=8.0,
    yarn_original_ctx=256,
    yarn_beta_fast=24.0,
    yarn_beta_slow=2.0,
    n_experts=10,
    n_experts_used=4,
    n_shared_experts=1,
    expert_dim=96,
    route_scale=2.5,
    route_norm=True,
    n_hash_layers=1,
    swiglu_clamp=(1.0, 1.5, 2.0, 0.75),
    n_streams=2,
    sinkhorn_iters=7,
    hc_eps=1e-5,
    norm_eps=1e-5,
)
KERNEL = dataclasses.replace(
    BASE, n_layers=4, compress_ratios=(0, 4, 128, 4), swiglu_clamp=(10.0,) * 4, n_hash_layers=1, n_heads=16,
    head_dim=128, index_heads=32, index_head_dim=64, index_top_k=32, n_experts=16,
)  # fmt: skip
SHAPES = {"base": BASE, "odd": ODD, "kernel": KERNEL, "full": FULL}


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """A model without a file: `ModelRunner` makes its weights on the devices (`weights.init_random`).

    They have the shapes and types of a file's, not the bytes of `random_data`, which would come from the host.
    """

    cfg: ModelConfig
    recipe: Callable[[TensorSpec], AnyType]
    seed: int = 0

    def types(self, spec: TensorSpec) -> AnyType:
        """The type that a tensor is stored in."""
        return storage_type(spec, self.recipe)

    @property
    def drafter_types(self) -> Callable[[TensorSpec], AnyType] | None:
        """`types`, if there is a drafter."""
        return self.types if self.cfg.drafter else None

    def with_drafter(self) -> Synthetic:
        """The model with a drafter of the published one's numbers, which reads the last layers."""
        layers, last = tuple(range(self.cfg.n_layers))[-3:], self.cfg.vocab_size - 1
        drafter = DrafterConfig(3, 5, 256, min(128799, last), layers)
        return dataclasses.replace(self, cfg=dataclasses.replace(self.cfg, drafter=drafter))


def synthetic_config(shape: str | Mapping = "base") -> ModelConfig:
    """A ModelConfig: one of SHAPES by name, or BASE with the fields of a mapping replaced."""
    if not isinstance(shape, str):
        return dataclasses.replace(BASE, **shape)
    if shape not in SHAPES:
        raise ConfigError(f"synthetic shape: found {shape!r}, expected one of {', '.join(SHAPES)}")
    return SHAPES[shape]


def _mixed(spec: TensorSpec) -> Type:
    """A recipe that uses every format that fits, in turn: families start with different ones, layers move one on."""
    fitting = [t for t in MATRIX_TYPES if fits(spec, t)]
    return fitting[(zlib.crc32(spec.family.encode()) + (spec.layer or 0)) % len(fitting)]


# Gate and up share a type; kernels compute their activation in one go.
_EXPERTS = [(Type.IQ2_XXS, Type.Q2_K), (Type.Q4_K, Type.Q4_K), (Type.MXFP4, Type.MXFP4), (Type.Q8_0, Type.Q8_0)]


def _mixed_experts(spec: TensorSpec) -> Type:
    """The published types, but the routed experts' are others in each layer."""
    if not spec.family.startswith("ffn.experts."):
        return recipes.RECIPES["q2"](spec)
    gate_up, down = _EXPERTS[(spec.layer or 0) % len(_EXPERTS)]
    return down if spec.family.endswith("down") else gate_up


RECIPES: dict[str, Recipe] = {**recipes.RECIPES, "mixed": _mixed, "mixed_experts": _mixed_experts}


def storage_type[T: AnyType](spec: TensorSpec, types: Callable[[TensorSpec], T]) -> T | Type:
    """The type `spec` is stored in: `types` decides for matrices; F16 where a row is not a whole number of blocks."""
    if spec.kind != "matrix":
        return Type.F32 if spec.kind == "vector" else Type.I32
    qtype = types(spec)
    return qtype if fits(spec, qtype) else Type.F16


def _raw(seed: int, name: str, n_bytes: int) -> np.ndarray:
    """(n_bytes,) uint8, uniform, a function of the seed and the tensor's name only."""
    key = np.frombuffer(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "<u8")
    words = np.random.Philox(key=key).random_raw(-(-n_bytes // 8))
    return words.astype("<u8", copy=False).view(np.uint8)[:n_bytes]


def _gaussian(raw: np.ndarray) -> np.ndarray:
    """(n,) float32 of mean 0 and standard deviation 1 from 8n random bytes: sums of four uniforms."""
    u = raw.view("<u2").astype(np.int32)
    total = u[0::4] + u[1::4] + u[2::4] + u[3::4] - 131070
    return total.astype(np.float32) * np.float32(math.sqrt(3) / 65536)


# The matrices through which a sub-layer adds to the residual streams; `damping` scales them.
SUBLAYER_OUTPUTS = ("attn.o_b", "ffn.shared.down", "ffn.experts.down")


def _moments(spec: TensorSpec, damping: float) -> tuple[float, float]:
    """(mean, standard deviation): activations stay near 1, and no part of the model is negligible."""
    leaf = spec.family.rsplit(".", 1)[-1]
    if spec.kind == "vector":
        if leaf.endswith("norm"):
            return 1.0, 0.1
        return {"scale": (1.0, 0.2), "base": (0.0, 0.5), "sinks": (0.0, 1.0), "bias": (0.0, 0.1)}[leaf]
    if leaf in ("embed", "ape"):
        return 0.0, 1.0 if leaf == "embed" else 0.5
    return 0.0, (damping if spec.role in SUBLAYER_OUTPUTS else 1.0) / math.sqrt(spec.shape[-1])


def _store_half(blocks: np.ndarray, at: int, values: np.ndarray) -> None:
    blocks[:, at : at + 2] = values.astype("<f2")[:, None].view(np.uint8)


def _jitter(blocks: np.ndarray, at: int) -> np.ndarray:
    """(n,) float32 in [0.75, 1.25) from byte `at` of each block, so that no two blocks share a scale."""
    return blocks[:, at].astype(np.float32) / 512 + np.float32(0.75)


def _offset(codes: np.ndarray, noise: np.ndarray, step: int, top: int) -> np.ndarray:
    """Codes of the subtracted minimum: those of the scale, moved by -step, 0, 0 or +step by two bits of `noise`."""
    move = (noise & 1).astype(np.int16) - (noise >> 1 & 1)
    return np.clip(codes + step * move, 0, top).astype(np.uint8)


def _random_blocks(raw: np.ndarray, qtype: Type, std: float) -> np.ndarray:
    """(n, block bytes) uint8: random codes and block scales whose values have mean ~0 and deviation ~std.

    The divisors are the deviation of the codes alone, e.g. of (scale code)·(code) - (min code) for the K formats.
    """
    blocks = raw.reshape(-1, GGML_QUANT_SIZES[qtype][1]).copy()
    if qtype == Type.MXFP4:  # 1 exponent byte, 32 codes of 4 bits (deviation 5.85); two scales in the right proportion
        mantissa, exponent = math.frexp(std / 5.85)
        blocks[:, 0] = 127 + exponent + (blocks[:, 0] < 256 * (4 * mantissa**2 - 1) / 3)
    elif qtype == Type.IQ2_XXS:  # d; 8 x (4 grid bytes, 28 sign bits, 4 scale bits)
        _store_half(blocks, 0, np.float32(std / 53.4) * _jitter(blocks, 0))
    elif qtype == Type.Q2_K:  # 16 x (4 bit scale, 4 bit min), 64 bytes of codes 0..3 (mean 1.5), d, dmin
        scales = blocks[:, :16] & 15
        blocks[:, :16] = scales | _offset(scales, blocks[:, :16] >> 4, 1, 15) << 4
        d = np.float32(std / 9.9) * _jitter(blocks, 80)
        _store_half(blocks, 80, d)
        _store_half(blocks, 82, np.float32(1.5) * d)
    else:  # Q4_K: d, dmin, 8 x (6 bit scale, 6 bit min) in 12 bytes, 128 bytes of codes 0..15 (mean 7.5)
        scales, noise = blocks[:, 4:12] & 63, blocks[:, 4:12] >> 6
        mins = _offset(scales, noise, 4, 63)
        blocks[:, 4:8] = scales[:, :4] | scales[:, 4:] >> 4 << 6
        blocks[:, 8:12] = mins[:, :4] | mins[:, 4:] >> 4 << 6
        blocks[:, 12:16] = scales[:, 4:] & 15 | mins[:, 4:] << 4
        d = np.float32(std / 170) * _jitter(blocks, 0)
        _store_half(blocks, 0, d)
        _store_half(blocks, 2, np.float32(7.5) * d)
    return blocks


def random_data(cfg: ModelConfig, seed: int, spec: TensorSpec, qtype: Type, damping: float = 1.0) -> np.ndarray:
    """One random tensor as GGUF stores it: uint8 of shape (*spec.shape[:-1], bytes per row).

    Matrices have deviation 1/√in around 0 (those of SUBLAYER_OUTPUTS times `damping`), norms 1 ± 0.1; the K formats,
    IQ2_XXS and MXFP4 are random codes rather than quantized Gaussians. tid2eid rows are distinct experts.
    """
    size = math.prod(spec.shape)
    mean, std = _moments(spec, damping)
    if spec.kind == "ids":
        keys = _raw(seed, spec.name, 8 * spec.shape[0] * cfg.n_experts).view("<u8").reshape(spec.shape[0], -1)
        data = np.argsort(keys, axis=1, kind="stable")[:, : spec.shape[1]].astype("<i4")
    elif qtype in (Type.MXFP4, Type.IQ2_XXS, Type.Q2_K, Type.Q4_K):
        block, n_bytes = GGML_QUANT_SIZES[qtype]
        data = _random_blocks(_raw(seed, spec.name, size // block * n_bytes), qtype, std)
    else:
        values = np.float32(std) * _gaussian(_raw(seed, spec.name, 8 * size)) + np.float32(mean)
        data = quantize(values.reshape(spec.shape), qtype)
    return np.ascontiguousarray(data).view(np.uint8).reshape(*spec.shape[:-1], -1)


def random_tensors(
    cfg: ModelConfig, seed: int, types: Recipe, damping: float = 1.0
) -> Iterator[tuple[TensorSpec, np.ndarray, Type]]:
    """Yields (spec, `random_data`, type) for every tensor of `model_table(cfg)`, in its order.

    types: one of RECIPES' values, or any function of a TensorSpec; see `storage_type` for what it cannot choose.
    """
    for spec in model_table(cfg):
        qtype = storage_type(spec, types)
        yield spec, random_data(cfg, seed, spec, qtype, damping), qtype


def write_synthetic(
    path: str | Path,
    cfg: ModelConfig,
    seed: int,
    types: Recipe,
    tokenizer_metadata: Mapping | None = None,
    damping: float = 1.0,
) -> None:
    """Writes `random_tensors` as a GGUF file, one tensor in memory at a time.

    tokenizer_metadata: ``tokenizer.ggml.*`` keys to add; without them the file has no tokenizer.
    damping: with 1, one rounding or top-k choice that falls the other way moves the logits by up to 20 %; below, each
        sub-layer adds less to the residual streams, as in a trained deep model, and so does what goes wrong in it.
    """
    tensors = []
    for spec in model_table(cfg):
        qtype = storage_type(spec, types)
        data = functools.partial(random_data, cfg, seed, spec, qtype, damping)
        tensors.append((spec.name, TensorData(spec.shape, qtype, data)))
    write_gguf(path, {**cfg.to_metadata(), **(tokenizer_metadata or {})}, tensors)


PIECE_BYTES = 2**20


def write_repeating(path: str | Path, model: Synthetic, progress: bool = False) -> None:
    """Writes a GGUF file of a model of any size, with a tokenizer, at gigabytes per second.

    Every family has about PIECE_BYTES of `random_data`, an odd number of rows, which all of its tensors repeat. Each
    layer begins elsewhere in them, and no round number of rows is a multiple of theirs, so that data which end up in a
    wrong place are the wrong data. progress: a bar on stderr. Raises GGUFError, also if there is no room.
    """
    cfg = model.cfg

    @functools.cache
    def some_rows(family: TensorSpec, qtype: Type) -> np.ndarray:
        return random_data(cfg, model.seed, family, qtype)

    def pieces(spec: TensorSpec, qtype: Type) -> Iterator[np.ndarray]:
        rows, columns = math.prod(spec.shape[:-1]), spec.shape[-1]
        block, block_bytes = GGML_QUANT_SIZES[qtype]
        period = min(rows, PIECE_BYTES // (columns // block * block_bytes) | 1)
        family = dataclasses.replace(spec, layer=None, name=spec.family, shape=(period, columns))
        data, at = some_rows(family, qtype), (spec.layer or 0) * 7 % period
        while rows:
            piece = data[at : at + rows]
            yield piece
            with counting:
                bar.update(piece.nbytes)
            rows, at = rows - len(piece), 0

    counting, tensors = threading.Lock(), []
    for spec in model_table(cfg):
        qtype = model.types(spec)
        if isinstance(qtype, Unfiled):
            raise ConfigError(f"recipe: found {qtype.name} for {spec.name}, expected types that GGUF files have")
        tensors.append((spec.name, TensorData(spec.shape, qtype, functools.partial(pieces, spec, qtype))))
    about = {"general.name": "random weights", "general.quantization_version": 2}
    metadata = {**cfg.to_metadata(), **about, **byte_tokenizer(cfg.vocab_size).to_metadata()}
    size = sum(math.prod(t.shape) // GGML_QUANT_SIZES[t.type][0] * GGML_QUANT_SIZES[t.type][1] for _, t in tensors)
    with meter(size, "writing", "B", show=progress) as bar:
        write_gguf(path, metadata, tensors, threads=os.cpu_count() or 1)


def first_layers(cfg: ModelConfig, n: int) -> ModelConfig:
    """The model of the first n layers of `cfg`. Raises ConfigError unless there are as many."""
    if not 1 <= n <= cfg.n_layers:
        raise ConfigError(f"layers: found {n}, expected 1 to {cfg.n_layers}")
    return dataclasses.replace(
        cfg,
        n_layers=n,
        compress_ratios=cfg.compress_ratios[:n],
        swiglu_clamp=cfg.swiglu_clamp[:n],
        n_hash_layers=min(n, cfg.n_hash_layers),
    )
