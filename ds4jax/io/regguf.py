"""A GGUF file as a source for `ds4jax.io.convert`, which writes its tensors in other types."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.config import ModelConfig
from ds4jax.errors import Ds4Error
from ds4jax.formats import FORMATS
from ds4jax.io.checkpoint import MTP_ARCHITECTURE, Checkpoint, open_checkpoint
from ds4jax.io.dialect import without_images_note
from ds4jax.io.gguf import GGUFFile
from ds4jax.io.hf import Draft, Source
from ds4jax.io.tokenizer import Tokenizer
from ds4jax.model.tensors import mtp_table, tensor_table
from ds4jax.profile import MARKER, choose


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Rows [first, first + rows) of a tensor, all axes but the last counting as one."""

    file: GGUFFile
    name: str
    rows: int
    first: int

    def read(self, start: int, stop: int) -> jax.Array:
        """Rows [start, stop), dequantized: float32 (stop - start, columns), exact."""
        start, stop = self.first + start, self.first + stop
        raw, fmt = self.file.raw(self.name), FORMATS[self.file.info(self.name).type]
        row_bytes = raw.shape[-1]
        planes = fmt.from_bytes(raw.reshape(-1, row_bytes)[start:stop])
        self.file.drop_pages(self.name, start * row_bytes, stop * row_bytes)
        return _dequantize(fmt(**{name: jnp.asarray(plane) for name, plane in planes.items()}))


_dequantize = jax.jit(lambda planes: planes.dequantize())


@dataclasses.dataclass(frozen=True)
class Plain:
    """A vector, or the table of expert ids."""

    file: GGUFFile
    name: str

    @property
    def path(self) -> Path:
        return self.file.path

    def read(self) -> np.ndarray:
        return self.file.array(self.name)


def open_sources(path: str | Path, draft: Draft = "keep") -> list[Source]:
    """Opens a GGUF model and checks all but the weights' values. draft: as for `hf.open_sources`. Raises Ds4Error."""
    checkpoint = open_checkpoint(path)
    cfg, file = checkpoint.cfg, checkpoint.file
    if draft == "only" and not checkpoint.mtp:
        raise Ds4Error(f"{path}: found no MTP head (--draft only)")
    if draft != "skip" and checkpoint.mtp == "nextn":
        raise Ds4Error(
            f"{path}: found an MTP head named blk.{cfg.n_layers}.nextn.*, expected mtp.0.* (--draft skip leaves it out)"
        )
    table = [] if draft == "only" else tensor_table(cfg)
    if draft == "skip":
        cfg = dataclasses.replace(cfg, n_mtp=0)
    elif checkpoint.mtp:
        table = table + mtp_table(cfg, checkpoint.mtp)
    matrices, plain = {}, {}
    for spec in table:
        if spec.kind != "matrix":
            plain[spec.name] = Plain(file, spec.name)
        else:
            rows = spec.shape[-2]
            count = math.prod(spec.shape[:-2])
            matrices[spec.name] = [Matrix(file, spec.name, rows, i * rows) for i in range(count)]
    identity = [f"{part.path.name} {part.status.st_size} {part.status.st_mtime_ns}" for part in file.parts]
    metadata = functools.partial(_metadata, checkpoint, cfg, draft)
    notes = [without_images_note(checkpoint.left_out)] if checkpoint.left_out else []
    return [Source(cfg, table, matrices, plain, identity, metadata, notes)]


def _metadata(checkpoint: Checkpoint, cfg: ModelConfig, draft: Draft) -> dict[str, Any]:
    """The new file's metadata, with the tokenizer and what the file says of its origin."""
    if draft == "only":
        return {"general.architecture": MTP_ARCHITECTURE}
    found = checkpoint.file.metadata
    marker = MARKER if choose("auto", found, checkpoint.file.path.name).name == "0731" else {}
    kept = ("name", "description", "license", "author", "url", "source.revision")
    said = {key: found[key] for name in kept if (key := f"general.{name}") in found}
    own = cfg.to_metadata() | {"general.quantization_version": 2}
    return own | said | marker | Tokenizer.from_metadata(found).to_metadata()
