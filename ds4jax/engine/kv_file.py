"""The file of one snapshot in a KV store. No JAX here.

Integers are little-endian:

    magic "ds4jaxKV", u32 version, u32 J, u32 T
    J bytes of JSON: fingerprint, checksum (its name), planes {name: [dtype, shape, offset in the data]}, data (bytes
        of it), extra
    T token ids, u32 each
    checksum of all before
    zeros up to a multiple of 64, then the data: planes in C order, each padded with zeros to a multiple of 64
    checksum of all before

The first checksum lets a store open without reading the data.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ds4jax.errors import show

DIGEST = 32
"""Bytes of a checksum."""
PREAMBLE = struct.Struct("<8sIII")
MAX_HEAD = 64 << 20
"""Bytes up to and with the first checksum, at most: a store reads them of every file when it opens."""

_MAGIC, _VERSION = b"ds4jaxKV", 1
_ALIGN = 64
_CHECKSUM = "blake2b-256"


class Damaged(Exception):
    """What is wrong with a file of ours."""


class Foreign(Exception):
    """Why an undamaged file is not for this store: it has another fingerprint or version, or says what cannot be."""


def digest(*pieces: bytes | memoryview) -> bytes:
    """The checksum of pieces that follow each other."""
    digest = hashlib.blake2b(digest_size=DIGEST)
    for piece in pieces:
        digest.update(piece)
    return digest.digest()


def with_checksum(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The pieces, and their checksum behind them."""
    digest = hashlib.blake2b(digest_size=DIGEST)
    for piece in pieces:
        digest.update(piece)
        yield piece
    yield digest.digest()


def _dtype(name: str) -> np.dtype:
    """The dtype of that name. Raises TypeError unless it is a numeric one in native byte order."""
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    if dtype.hasobject or dtype.fields or dtype.name != name:
        raise TypeError(f"found {name!r}, expected the name of a numeric dtype")
    return dtype


def pieces_of(fingerprint: dict, key: bytes, planes: Mapping[str, np.ndarray], extra: Any) -> list[bytes | memoryview]:
    """A file's content, without the last checksum."""
    table: dict[str, tuple[str, tuple[int, ...], int]] = {}
    data: list[bytes | memoryview] = []
    offset = 0
    for name, plane in planes.items():
        plane = np.asarray(plane, order="C")
        if plane.dtype.hasobject or plane.dtype.fields or _dtype(plane.dtype.name) != plane.dtype:
            raise TypeError(f"plane {name}: found {plane.dtype!r}, expected a numeric dtype in native byte order")
        table[name] = plane.dtype.name, plane.shape, offset
        data += [plane.reshape(-1).view(np.uint8).data, bytes(-plane.nbytes % _ALIGN)]
        offset += len(data[-2]) + len(data[-1])
    head = {"fingerprint": fingerprint, "checksum": _CHECKSUM, "planes": table, "data": offset, "extra": extra}
    text = json.dumps(head).encode()
    before = [PREAMBLE.pack(_MAGIC, _VERSION, len(text), len(key) // 4), text, key]
    if (size := sum(map(len, before)) + DIGEST) > MAX_HEAD:
        raise ValueError(f"extra and tokens: found {size} bytes, expected at most {MAX_HEAD}")
    return [*before, digest(*before), bytes(-size % _ALIGN), *data]


def head_size(preamble: bytes | memoryview) -> int:
    """Bytes up to and with the first checksum."""
    if len(preamble) < PREAMBLE.size:
        raise Damaged(f"it has {len(preamble)} bytes")
    magic, _, text, tokens = PREAMBLE.unpack_from(preamble)
    if magic != _MAGIC:
        raise Damaged(f"it begins with {magic!r}, expected {_MAGIC!r}")
    if (size := PREAMBLE.size + text + 4 * tokens + DIGEST) > MAX_HEAD:
        raise Damaged(f"its head has {size} bytes, expected at most {MAX_HEAD}")
    return size


def parse_head(file: bytes | memoryview) -> tuple[bytes, dict[str, Any], int]:
    """Of a file's beginning: tokens, JSON, and where the data starts."""
    size = head_size(file)
    before, checksum = file[: size - DIGEST], file[size - DIGEST : size]
    if digest(before) != bytes(checksum):
        raise Damaged("the checksum of its head is wrong")
    _, version, text, _ = PREAMBLE.unpack_from(file)
    if version != _VERSION:  # the layout of the head is for all versions
        raise Foreign(f"its format is version {version}, here {_VERSION}")
    end = PREAMBLE.size + text
    with _sound():
        head = json.loads(bytes(before[PREAMBLE.size : end]))
        kinds = {"fingerprint": dict, "checksum": str, "planes": dict, "data": int}
        if wrong := [what for what, kind in kinds.items() if type(head[what]) is not kind]:
            raise ValueError(f"{wrong[0]} is {show(head[wrong[0]])}")
        if head["checksum"] != _CHECKSUM or "extra" not in head:
            raise ValueError(f"its checksum is {show(head['checksum'])}, or extra is missing")
        offset = 0
        for name, (dtype, shape, at) in head["planes"].items():
            if not all(type(n) is int and n >= 0 for n in [*shape, at]) or at != offset:
                raise ValueError(f"plane {name} has shape {shape} at byte {at}, expected {offset}")
            nbytes = _dtype(dtype).itemsize * math.prod(shape)
            offset += nbytes + -nbytes % _ALIGN
        if offset != head["data"]:
            raise ValueError(f"planes of {offset} bytes in data of {head['data']}")
    return bytes(before[end:]), head, size + -size % _ALIGN


@contextlib.contextmanager
def _sound() -> Iterator[None]:
    """What a head says is worked with inside; it may be anything, as whoever wrote it could compute a checksum."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as e:
        raise Foreign(f"malformed behind valid checksums: {type(e).__name__}: {show(str(e))}") from e


def planes_of(table: dict[str, Any], data: np.ndarray) -> dict[str, np.ndarray]:
    """Views of the data, uint8 (bytes,), by the table of a head. Raises Foreign for shapes beyond NumPy's."""
    planes = {}
    with _sound():
        for name, (dtype, shape, offset) in table.items():
            dtype = _dtype(dtype)
            planes[name] = data[offset : offset + dtype.itemsize * math.prod(shape)].view(dtype).reshape(shape)
    return planes


def read_head(path: Path) -> tuple[bytes, dict[str, Any], int]:
    """Tokens, JSON and expected size of a file whose data is not read. Raises Damaged, Foreign or OSError."""
    with open(path, "rb") as f:
        preamble = f.read(PREAMBLE.size)
        rest = f.read(head_size(preamble) - len(preamble))
    key, head, start = parse_head(preamble + rest)
    return key, head, start + head["data"] + DIGEST


def read(path: Path, size: int) -> tuple[bytes, dict[str, Any], dict[str, np.ndarray]]:
    """Tokens, JSON and read-only planes of a file of `size` bytes, all checked. Raises Damaged, Foreign or OSError."""
    memory = np.empty(size + _ALIGN, np.uint8)
    start = -memory.ctypes.data % _ALIGN
    buffer = memory[start : start + size]  # planes are aligned as in the file
    with open(path, "rb") as f:
        if (n := f.readinto(buffer.data)) != size or f.read(1):
            raise Damaged(f"its size is not {size} bytes any more, {n} of them were read")
    buffer.flags.writeable = False
    if digest(buffer.data[:-DIGEST]) != bytes(buffer.data[-DIGEST:]):
        raise Damaged("its checksum is wrong")
    key, head, start = parse_head(buffer.data)
    return key, head, planes_of(head["planes"], buffer[start : start + head["data"]])
