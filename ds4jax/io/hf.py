"""A Hugging Face checkpoint of DeepSeek-V4: safetensors shards, config.json, tokenizer.json.

Opened, every tensor of `ds4jax.model.tensors` is known to be there with the right shape and dtype; reading takes one
slab of rows at a time. A DSpark drafter, 0731's, becomes a file of its own. Names are DeepSeek's own
(``layers.3.attn.wq_a.weight``) or transformers' (``model.layers.3.self_attn.q_a_proj.weight``), with or without a
leading ``model.``, in any mixture: transformers itself writes one.

Weights are F32, F16 or BF16; or E4M3 with one scale per block of 128 × 128; or E2M1, two values a byte (the first in
the low nibble), with one scale per 32 values. The scales are powers of two (E8M0).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tokenizers

from ds4jax.config import DrafterConfig, ModelConfig
from ds4jax.errors import Ds4Error, show
from ds4jax.files import LARGE, read_small
from ds4jax.io import drafter
from ds4jax.io.checkpoint import MTP_ARCHITECTURE
from ds4jax.io.dialect import without_images_note
from ds4jax.io.tokenizer import Tokenizer
from ds4jax.model.tensors import TensorSpec, drafter_table, mtp_table, tensor_table
from ds4jax.profile import MARKER
from pallas_kernels.numerics import e2m1

Array = jax.Array
Draft = Literal["keep", "skip", "only"]  # what becomes of the MTP head, or of the DSpark drafter

INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100 << 20  # the format's own limit
_DTYPES = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
_FLOATS, _PACKED, _IDS = ("F32", "F16", "BF16"), ("I8", "U8"), ("I64", "I32")
_E2M1_BLOCK = (1, 32)
_LOST_SCALES = (
    "; copies in FP8 alone may have lost those of wo_a, which other engines hold in bfloat16: convert the original "
    "repository"
)

# ---- names: family of a tensor → DeepSeek's name, transformers' name (and what it writes when it saves) --------------
_COMPRESSOR = {
    "kv": ("wkv.weight", "kv_proj.weight"),
    "gate": ("wgate.weight", "gate_proj.weight"),
    "ape": ("ape", "position_bias"),
    "norm": ("norm.weight", "kv_norm.weight"),
}
_BLOCK: dict[str, tuple[str, ...]] = {
    "attn.norm": ("attn_norm.weight", "input_layernorm.weight"),
    "attn.q_a": ("attn.wq_a.weight", "self_attn.q_a_proj.weight"),
    "attn.q_a_norm": ("attn.q_norm.weight", "self_attn.q_a_norm.weight"),
    "attn.q_b": ("attn.wq_b.weight", "self_attn.q_b_proj.weight"),
    "attn.kv": ("attn.wkv.weight", "self_attn.kv_proj.weight"),
    "attn.kv_norm": ("attn.kv_norm.weight", "self_attn.kv_norm.weight", "attn.norm.weight"),
    "attn.sinks": ("attn.attn_sink", "self_attn.sinks"),
    "attn.o_a": ("attn.wo_a.weight", "self_attn.o_a_proj.weight"),
    "attn.o_b": ("attn.wo_b.weight", "self_attn.o_b_proj.weight"),
    "csa.indexer.q_b": ("attn.indexer.wq_b.weight", "self_attn.compressor.indexer.q_b_proj.weight"),
    "csa.indexer.proj": (
        "attn.indexer.weights_proj.weight",
        "self_attn.compressor.indexer.scorer.weights_proj.weight",
    ),
    "ffn.norm": ("ffn_norm.weight", "post_attention_layernorm.weight"),
    "ffn.router": ("ffn.gate.weight", "mlp.gate.weight"),
    "route.bias": ("ffn.gate.bias", "mlp.gate.e_score_correction_bias"),
    "hash.tid2eid": ("ffn.gate.tid2eid", "mlp.gate.tid2eid"),
    "ffn.shared.gate": ("ffn.shared_experts.w1.weight", "mlp.shared_experts.gate_proj.weight"),
    "ffn.shared.up": ("ffn.shared_experts.w3.weight", "mlp.shared_experts.up_proj.weight"),
    "ffn.shared.down": ("ffn.shared_experts.w2.weight", "mlp.shared_experts.down_proj.weight"),
}
for _leaf, (_own, _theirs) in _COMPRESSOR.items():
    for _family in ("csa.compressor", "hca.compressor"):
        _BLOCK[f"{_family}.{_leaf}"] = (f"attn.compressor.{_own}", f"self_attn.compressor.{_theirs}")
    _BLOCK[f"csa.indexer.compressor.{_leaf}"] = (
        f"attn.indexer.compressor.{_own}",
        f"self_attn.compressor.indexer.{_theirs}",
    )
for _sub in ("attn", "ffn"):
    for _leaf in ("fn", "base", "scale"):
        _BLOCK[f"{_sub}.hc.{_leaf}"] = (f"hc_{_sub}_{_leaf}", f"{_sub}_hc.{_leaf}")
_TOP = {
    "embed": ("embed.weight", "embed_tokens.weight"),
    "head.out": ("head.weight", "lm_head.weight"),
    "head.norm": ("norm.weight",),
    **{f"head.hc.{leaf}": (f"hc_head_{leaf}", f"hc_head.hc_{leaf}") for leaf in ("fn", "base", "scale")},
}
# DeepSeek has three tensors for each expert; transformers two for all of them, gate above up in one.
_EXPERTS = {
    "ffn.experts.gate": ("w1", "gate_up_proj", 0),
    "ffn.experts.up": ("w3", "gate_up_proj", 1),
    "ffn.experts.down": ("w2", "down_proj", 0),
}


def _names(spec: TensorSpec) -> tuple[str, ...]:
    """The names, less ``model.``, that a checkpoint may have for a tensor other than the routed experts'."""
    if spec.layer is not None:  # transformers has neither MTP head nor drafter
        return tuple(f"{_prefix(spec)}.{name}" for name in _BLOCK[spec.role][: 1 if spec.family != spec.role else None])
    if spec.family == spec.role:
        return _TOP[spec.role]
    return (spec.name.removesuffix(".weight") if spec.role.startswith("head.hc.") else spec.name,)


def _prefix(spec: TensorSpec) -> str:
    """What the names of a block's tensors begin with: ``layers.3``, or ``mtp.0`` as in the file to be written."""
    return ".".join(spec.name.replace("blk.", "layers.", 1).split(".")[:2])


# What only images need, in DeepSeek-V4-Flash-Vision-Exp: encoder, embeddings, and the routers' bias for their tokens.
_IMAGES = re.compile(r"(vision|aligner)\..*|image_(start|end|newline|pad)|(layers|mtp)\.\d+\.ffn\.gate\.bias_vl")


# ---- shards ----------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of a shard.

    dtype: as safetensors spells it. offset: from the start of the file, in bytes.
    """

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop), all axes but the last counting as one: (rows, last axis), read from disk now."""
        dtype, width = _DTYPES[self.dtype], self.shape[-1]
        stop = math.prod(self.shape[:-1]) if stop is None else stop
        row_bytes = width * dtype.itemsize
        try:
            raw = np.fromfile(self.path, np.uint8, (stop - start) * row_bytes, offset=self.offset + start * row_bytes)
        except OSError as error:
            raise Ds4Error(f"{self.path}: cannot be read: {error.strerror}") from None
        if raw.size != (stop - start) * row_bytes:
            raise Ds4Error(f"{self.path}: tensor {show(self.name)}: the file became shorter while it was read")
        return raw.view(dtype).reshape(stop - start, width)


def _object(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object. Raises Ds4Error."""
    try:
        contents = json.loads(read_small(path, LARGE).decode())
    except OSError as error:
        raise Ds4Error(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise Ds4Error(f"{path}: not JSON: {error}") from None
    if not isinstance(contents, dict):
        raise Ds4Error(f"{path}: found {show(contents)}, expected an object")
    return contents


def read_shard(path: Path) -> tuple[dict[str, Stored], str]:
    """The tensors of a safetensors file by name, and what tells the file from another: size, time and header's hash.

    Layout: header length (u64), header (JSON: name → dtype, shape, data_offsets), data. Raises Ds4Error.
    """
    try:
        with open(path, "rb") as file:
            stat = path.stat()
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 2 <= length <= min(_MAX_HEADER, stat.st_size - 8):
                raise Ds4Error(f"{path}: found a header of {length} bytes in a file of {stat.st_size}; truncated?")
            raw = file.read(length)
        header = json.loads(raw)
    except OSError as error:
        raise Ds4Error(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise Ds4Error(f"{path}: the header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise Ds4Error(f"{path}: found the header {show(header)}, expected an object")
    header.pop("__metadata__", None)
    out = {name: _stored(path, name, entry, 8 + length, stat.st_size) for name, entry in header.items()}
    return out, f"{path.name} {stat.st_size} {stat.st_mtime_ns} {hashlib.sha256(raw).hexdigest()}"


def _stored(path: Path, name: str, entry: Any, start: int, size: int) -> Stored:
    """The tensor that a header's entry describes, checked against the size of the file. Raises Ds4Error."""
    what = f"{path}: tensor {show(name)}"
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if (
            0 <= begin <= end and all(type(n) is int and n >= 0 for n in shape)
        ):
            pass
        case _:
            raise Ds4Error(f"{what}: found {show(entry)}, expected dtype, shape and data_offsets")
    if dtype in _DTYPES and end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise Ds4Error(f"{what}: found {end - begin} bytes for {dtype} of shape {tuple(shape)}")
    if start + end > size:
        raise Ds4Error(f"{what} ends at byte {start + end}, found a file of {size} bytes; truncated?")
    return Stored(name, path, dtype, tuple(shape), start + begin)


def read_shards(folder: Path) -> tuple[dict[str, Stored], list[str]]:
    """All tensors of a folder, by name, and what identifies its shards. Raises Ds4Error."""
    index = folder / INDEX
    listed = None
    if index.exists():
        listed = _object(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
            raise Ds4Error(f"{index}: key 'weight_map': found {show(listed)}, expected tensor names and their files")
        files = sorted(set(listed.values()))
        for file in files:
            if not (folder / file).is_file():
                raise Ds4Error(f"{index}: names the file {show(file)}, found no such file in {folder}")
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        if not files:
            raise Ds4Error(f"{folder}: found no *.safetensors, expected a Hugging Face checkpoint")
    out, identity = {}, []
    for file in files:
        tensors, which = read_shard(folder / file)
        identity.append(which)
        for name, stored in tensors.items():
            if listed is None and name in out:
                raise Ds4Error(f"{folder}: tensor {show(name)}: found in {out[name].path.name} and in {file}")
            if listed is None or listed.get(name) == file:
                out[name] = stored
    for name, file in (listed or {}).items():
        if name not in out:
            raise Ds4Error(f"{index}: says that {file} has tensor {show(name)}, found none there")
    return out, identity


# ---- the checkpoint --------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Matrix:
    """Where one matrix (one expert's, say) lies: rows [first, first + rows) of a stored tensor, and its scales.

    Where several matrices are stored one above the other, scales count from the top: scale_first is the first row of
    scales there, and offset our first row. block: (rows, columns) that share a scale.
    """

    weight: Stored
    rows: int
    first: int = 0
    scale: Stored | None = None
    scale_first: int = 0
    offset: int = 0
    block: tuple[int, int] = (1, 1)

    def read(self, start: int, stop: int) -> Array:
        """Rows [start, stop), dequantized: float32 (stop - start, columns), exact."""
        raw = self.weight.read(self.first + start, self.first + stop)
        if self.scale is None:
            return jnp.asarray(raw).astype(jnp.float32)
        if self.weight.dtype in _PACKED:
            raw = raw.view(np.uint8)
        groups = (self.offset + np.arange(start, stop)) // self.block[0]
        scale = self.scale.read(self.scale_first + groups[0], self.scale_first + groups[-1] + 1)
        return _dequantize(raw, scale.astype(np.float32)[groups - groups[0]], self.block[1])


@functools.partial(jax.jit, static_argnames="columns")
def _dequantize(codes: Array, scale: Array, columns: int) -> Array:
    """codes: E4M3 (rows, n), or pairs of E2M1, uint8 (rows, n/2). scale: float32, one per `columns`. → (rows, n)."""
    if codes.dtype == jnp.uint8:
        nibbles = codes[..., None] >> jnp.array([0, 4], jnp.uint8) & 15
        values = e2m1.decode(nibbles.reshape(len(codes), -1), jnp.float32)
    else:
        values = codes.astype(jnp.float32)
    return values * jnp.repeat(scale, columns, axis=1)[:, : values.shape[1]]


@dataclasses.dataclass(frozen=True)
class Source:
    """An open checkpoint.

    cfg: the model's, with n_mtp = 1 if the table has the head. table: every tensor of the file to be written, in its
    order. matrices: name → a tensor's matrices, one or one per expert. plain: name → vectors and ids, as they are
    stored. identity: what tells the files from others. metadata: reads that of the file to be written, with tokenizer
    and origin. notes: lines that say what is left out.
    """

    cfg: ModelConfig
    table: list[TensorSpec]
    matrices: Mapping[str, Sequence[Matrix]]
    plain: Mapping[str, Stored]
    identity: list[str]
    metadata: Callable[[], dict[str, Any]]
    notes: Sequence[str] = ()

    def slabs(self, spec: TensorSpec, weights: int) -> Iterator[tuple[int, Array]]:
        """A matrix tensor in order: (index of the matrix, float32 rows of it), each of about `weights` values."""
        step = max(1, weights // spec.shape[-1])
        for i, matrix in enumerate(self.matrices[spec.name]):
            for start in range(0, matrix.rows, step):
                yield i, matrix.read(start, min(start + step, matrix.rows))

    def values(self, spec: TensorSpec) -> np.ndarray:
        """A vector in float32, or ids in int32. Raises Ds4Error for values that cannot be."""
        stored = self.plain[spec.name]
        values = stored.read().reshape(spec.shape)
        good = (0 <= values) & (values < self.cfg.n_experts) if spec.kind == "ids" else np.isfinite(values)
        if not good.all():
            expected = f"experts 0 to {self.cfg.n_experts - 1}" if spec.kind == "ids" else "finite numbers"
            raise Ds4Error(f"{stored.path}: tensor {show(stored.name)}: found {values[~good][0]}, expected {expected}")
        return values.astype(np.int32 if spec.kind == "ids" else np.float32)


def open_sources(folder: str | Path, draft: Draft = "keep") -> list[Source]:
    """Opens a checkpoint and checks all but the weights' values; → what each file is made from that shall be written.

    draft: a one-layer MTP head (``mtp.0.e_proj``) is kept with the model, a DSpark drafter (``mtp.0.main_proj``) in a
        file of its own, the second; ``skip`` leaves either out, and ``only`` takes nothing else. Raises Ds4Error naming
        the file, key or tensor, what was found and what was expected.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise Ds4Error(f"{folder}: no such folder, expected a Hugging Face checkpoint")
    config = _object(folder / "config.json")
    _refuse_nvfp4(folder, config)
    try:
        cfg = ModelConfig.from_hf(config)
    except Ds4Error as error:
        raise Ds4Error(f"{folder / 'config.json'}: {error}") from None
    stored, identity = read_shards(folder)
    finder = _Finder(folder, config, stored)
    in_mtp = [name for name in finder.stored if name.startswith("mtp.")]
    with_drafter = any(key.startswith("dspark_") for key in config) or "mtp.0.main_proj.weight" in in_mtp
    if draft == "only" and not in_mtp:
        raise Ds4Error(f"{folder}: found no tensor mtp.0.*, expected an MTP head or a drafter (--draft only)")
    table = [] if draft == "only" else tensor_table(cfg)
    drafter_cfg = None
    if in_mtp and draft != "skip":
        if with_drafter:
            stages = 1 + max((int(found[1]) for name in in_mtp if (found := _STAGE.match(name))), default=0)
            try:
                drafter_cfg = DrafterConfig.from_hf(config, stages, cfg)
            except Ds4Error as error:
                raise Ds4Error(f"{folder / 'config.json'}: {error} (--draft skip leaves the drafter out)") from None
        else:
            cfg = dataclasses.replace(cfg, n_mtp=1)
            table = table + mtp_table(cfg, "mtp")
    origin = _origin(folder)

    def of_model() -> dict[str, Any]:
        if draft == "only":
            return {"general.architecture": MTP_ARCHITECTURE}
        tokenizer = read_tokenizer(folder, cfg.vocab_size).to_metadata()
        return cfg.to_metadata() | _QUANTIZED | tokenizer | (MARKER if with_drafter else {}) | origin

    def of_drafter() -> dict[str, Any]:
        assert drafter_cfg
        hashes = {f"{name}_sha256": file for name, file in (("config", "config.json"), ("index", INDEX))}
        hashes = {name: _sha256(folder / file) for name, file in hashes.items() if (folder / file).exists()}
        said = {f"dspark.source.{name.removeprefix('general.source.')}": v for name, v in (origin | hashes).items()}
        return drafter.to_metadata(drafter_cfg) | _QUANTIZED | MARKER | said

    out = []
    if table:
        out.append(Source(cfg, table, *finder.find_all(table), identity, of_model))
    if drafter_cfg:
        table = drafter_table(cfg, drafter_cfg)
        out.append(Source(cfg, table, *finder.find_all(table), identity, of_drafter))
    notes = []
    if only_for_images := finder.check_no_others(draft):
        notes.append(without_images_note(only_for_images))
    if with_drafter and not in_mtp and draft == "keep":
        notes.append(f"no drafter: {folder / 'config.json'} tells of one, but there are no tensors mtp.*")
    return [dataclasses.replace(out[0], notes=notes), *out[1:]]


_STAGE = re.compile(r"mtp\.(\d{1,2})\.")
_QUANTIZED = {"general.quantization_version": 2}


def _refuse_nvfp4(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises Ds4Error for NVIDIA's FP4, whose scales are of another kind, as ModelOpt or llm-compressor write it."""
    own = folder / "hf_quant_config.json"
    said = {folder / "config.json": config.get("quantization_config")} | ({own: _object(own)} if own.exists() else {})
    for path, options in said.items():
        if "nvfp4" in json.dumps(options).lower():
            raise Ds4Error(
                f"{path}: found weights in NVFP4, expected DeepSeek's FP8 and FP4, or bfloat16; convert the original "
                "repository, such as deepseek-ai/DeepSeek-V4-Flash-0731"
            )


def _origin(folder: Path) -> dict[str, str]:
    """Metadata with the revision of a repository that Hugging Face's tools fetched, as they note it; else nothing."""
    note = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    line = read_small(note, LARGE).split(b"\n")[0].decode("ascii", "replace") if note.is_file() else ""
    revision = folder.resolve().name if folder.resolve().parent.name == "snapshots" else line
    return {"general.source.revision": revision} if re.fullmatch("[0-9a-f]{40}", revision) else {}


def _sha256(path: Path) -> str:
    return hashlib.sha256(read_small(path, LARGE)).hexdigest()


class _Finder:
    """Finds tensors under any of their names, checks them, and keeps account of which were asked for."""

    def __init__(self, folder: Path, config: Mapping[str, Any], stored: Mapping[str, Stored]):
        self.folder, self.config = folder, config
        self.stored = {name.removeprefix("model."): tensor for name, tensor in stored.items()}
        self.used: set[str] = set()
        if len(self.stored) < len(stored):
            twice = next(name for name in stored if f"model.{name}" in stored)
            raise Ds4Error(f"{folder}: found both {show(twice)} and {show('model.' + twice)}, expected one of them")

    def find(self, names: Sequence[str], shape: tuple[int, ...]) -> Stored:
        found = [name for name in names if name in self.stored]
        if len(found) > 1:
            raise Ds4Error(f"{self.folder}: found both {show(found[0])} and {show(found[1])}, expected one of them")
        if not found:
            other = f" or {show(names[1])}" if len(names) > 1 else ""
            hint = " (--draft skip leaves head or drafter out)" if names[0].startswith("mtp.") else ""
            raise Ds4Error(f"{self.folder}: found no tensor {show(names[0])}{other}, expected shape {shape}{hint}")
        self.used.add(found[0])
        return self.stored[found[0]]

    def check(self, tensor: Stored, shape: tuple[int, ...], dtypes: Sequence[str]) -> Stored:
        if tensor.shape != shape or tensor.dtype not in dtypes:
            raise Ds4Error(
                f"{tensor.path}: tensor {show(tensor.name)}: found {tensor.dtype} of shape {tensor.shape}, "
                f"expected {' or '.join(dtypes)} of shape {shape}"
            )
        return tensor

    def find_all(self, table: Sequence[TensorSpec]) -> tuple[dict[str, Sequence[Matrix]], dict[str, Stored]]:
        """The matrices and the plain tensors of a table, by name."""
        plain = {spec.name: self.plain(spec) for spec in table if spec.kind != "matrix"}
        matrices: dict[str, Sequence[Matrix]] = {}
        for spec in table:
            if spec.kind == "matrix":
                matrices[spec.name] = (
                    self.experts(spec) if spec.role in _EXPERTS else [self.matrix(_names(spec), spec.shape)]
                )
        return matrices, plain

    def plain(self, spec: TensorSpec) -> Stored:
        return self.check(self.find(_names(spec), spec.shape), spec.shape, _IDS if spec.kind == "ids" else _FLOATS)

    def matrix(self, names: Sequence[str], shape: tuple[int, ...]) -> Matrix:
        """A matrix, or a stack of them, that fills its stored tensor."""
        weight = self.find(names, shape)
        rows = math.prod(shape[:-1])
        if weight.dtype in _FLOATS:
            return Matrix(self.check(weight, shape, _FLOATS), rows)
        packed = weight.dtype in _PACKED
        self.check(weight, (*shape[:-1], shape[-1] // 2) if packed else shape, (*_FLOATS, "F8_E4M3", *_PACKED))
        block = _E2M1_BLOCK if packed else self.fp8_block
        scale_shape = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
        name = weight.name.removeprefix("model.")
        stem = name.removesuffix(".weight")
        names = [f"{stem}.scale", f"{stem}.weight_scale_inv"] if stem != name else [f"{name}_scale_inv"]
        if not self.stored.keys() & set(names):
            raise Ds4Error(
                f"{weight.path}: found no tensor {' or '.join(map(show, names))}, expected shape {scale_shape}: "
                f"{show(weight.name)} is {weight.dtype}, which means nothing without its scales"
                f"{_LOST_SCALES if '.wo_a.' in name else ''}"
            )
        scale = self.find(names, scale_shape)
        self.check(scale, scale_shape, ("F8_E8M0", "F32", "BF16"))
        return Matrix(weight, rows, scale=scale, block=block)

    def experts(self, spec: TensorSpec) -> list[Matrix]:
        own, theirs, half = _EXPERTS[spec.role]
        n, rows, columns = spec.shape
        prefix = _prefix(spec)
        fused = f"{prefix}.mlp.experts.{theirs}"
        if fused not in self.stored:
            each = (f"{prefix}.ffn.experts.{e}.{own}.weight" for e in range(n))
            return [self.matrix([name], (rows, columns)) for name in each]
        tall = 2 * rows if theirs == "gate_up_proj" else rows
        whole = self.matrix([fused], (n, tall, columns))
        scale_rows = -(-tall // whole.block[0])
        return [
            dataclasses.replace(
                whole, rows=rows, first=e * tall + half * rows, scale_first=e * scale_rows, offset=half * rows
            )
            for e in range(n)
        ]

    @functools.cached_property
    def fp8_block(self) -> tuple[int, int]:
        options = self.config.get("quantization_config")
        block = options.get("weight_block_size") if isinstance(options, dict) else None
        if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
            raise Ds4Error(
                f"{self.folder / 'config.json'}: key 'quantization_config.weight_block_size': found {show(block)}, "
                "expected two numbers, as there are E4M3 weights"
            )
        return block[0], block[1]

    def check_no_others(self, draft: Draft) -> list[str]:
        """Raises unless every tensor is used that `draft` does not leave out; → those that only images need."""
        drafts = {"keep": (True, False), "skip": (False,), "only": (True,)}[draft]
        others = sorted(n for n in self.stored.keys() - self.used if n.startswith("mtp.") in drafts)
        only_for_images = [n for n in others if _IMAGES.fullmatch(n)]
        if others := [n for n in others if not _IMAGES.fullmatch(n)]:
            some = ", ".join(map(show, others[:3])) + (", ..." if len(others) > 3 else "")
            raise Ds4Error(f"{self.folder}: {len(others)} tensors that belong to no known part of the model: {some}")
        return only_for_images


# ---- tokenizer -------------------------------------------------------------------------------------------------------
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama.cpp's llama_token_type

# Text on which another pre-tokenizer than DeepSeek-V4's gives other tokens.
_PROBE = (
    "The quick  brown fox can't jump; it's 3.14159 or 12345678.\n\n \t x=a_b['k']+1;//ok\r\n  深度求索カナ한국어 "
    "Größe, naïve—“quotes”… cafe\u0301 नमस्ते ١٢٣ 🙂👍🏽!!??\n   def f(x):\n\t\treturn x**2  \n"
)


def read_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of tokenizer.json and tokenizer_config.json, with as many tokens as the model has embeddings.

    Ids without a token become unused ones, as llama.cpp's converter does. Raises Ds4Error, also for a pre-tokenizer
    that is not DeepSeek-V4's.
    """
    path = folder / "tokenizer.json"
    contents, options = _object(path), _object(folder / "tokenizer_config.json")
    try:
        tokenizer = _tokenizer(contents, options, vocab_size, _chat_template(folder, options))
        expected = tokenizers.Tokenizer.from_file(str(path)).encode(_PROBE, add_special_tokens=False).ids
    except Ds4Error as error:
        raise Ds4Error(f"{path}: {error}") from None
    except Exception as error:  # the tokenizers package raises nothing more specific; and keys may be missing
        raise Ds4Error(f"{path}: not a tokenizer that can be read: {type(error).__name__}: {error}") from None
    if tokenizer.encode_text(_PROBE) != expected:
        raise Ds4Error(f"{path}: key 'pre_tokenizer': found one that splits text in another way than DeepSeek-V4's")
    return tokenizer


def _tokenizer(contents: dict, options: dict, vocab_size: int, chat_template: str | None) -> Tokenizer:
    model = contents["model"]
    if model["type"] != "BPE":
        raise Ds4Error(f"key 'model.type': found {show(model['type'])}, expected 'BPE'")
    tokens = {id: (token, _NORMAL) for token, id in model["vocab"].items()}
    for added in contents["added_tokens"]:
        # Some control tokens are not marked as special, but all that are spelled like one are.
        control = added["special"] or re.fullmatch(r"<[|｜].*[|｜]>", added["content"])
        tokens[added["id"]] = added["content"], _CONTROL if control else _USER_DEFINED
    if max(tokens) >= vocab_size:
        raise Ds4Error(f"found token id {max(tokens)}, expected less than the model's vocab_size, {vocab_size}")
    listed = [tokens.get(i, (f"[PAD{i}]", _UNUSED)) for i in range(vocab_size)]
    ids = {token: i for i, (token, _) in tokens.items()}

    def special(key: str) -> int:
        token = options.get(key)
        token = token["content"] if isinstance(token, dict) else token
        if token not in ids:
            raise Ds4Error(f"key {key!r} of tokenizer_config.json: found {show(token)}, expected one of the tokens")
        return ids[token]

    return Tokenizer(
        [token for token, _ in listed],
        [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        [kind for _, kind in listed],
        bos_id=special("bos_token"),
        eos_id=special("eos_token"),
        add_bos=bool(options.get("add_bos_token", True)),
        chat_template=chat_template,
    )


def _chat_template(folder: Path, options: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return read_small(file).decode()
    template = options.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((t.get("template") for t in template if t.get("name") == "default"), None)
    return template
