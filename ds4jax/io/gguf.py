"""GGUF files: a memory-mapped, strict reader and a streaming writer. No JAX here.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian):
magic, version, tensor count, key count; keys with typed values; one record per tensor (name, dims fastest first, type,
offset); padding; tensor data. Constants come from the `gguf` package, whose own reader believes every length it reads:
this one checks each against the bytes that remain before it allocates or loops, and raises nothing but GGUFError.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import secrets
import shutil
import stat
import struct
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import ml_dtypes
import numpy as np
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_VERSION,
    GGMLQuantizationType,
    GGUFValueType,
)

from ds4jax.errors import GGUFError, show

MAGIC = b"GGUF"
MAX_DIMS = 4
_T, _V = GGMLQuantizationType, GGUFValueType

# Tensor types that are plain arrays.
DTYPES = {
    _T.F32: np.dtype("<f4"),
    _T.F16: np.dtype("<f2"),
    _T.BF16: np.dtype(ml_dtypes.bfloat16),
    _T.I32: np.dtype("<i4"),
}
# All types of tensors: of matrices, as in `ds4jax.formats`, and of routing ids.
TYPES = (
    _T.F32, _T.F16, _T.BF16, _T.Q8_0, _T.Q4_K, _T.Q2_K, _T.IQ2_XXS, _T.MXFP4, _T.Q6_K, _T.Q5_K, _T.Q3_K, _T.IQ4_XS,
    _T.IQ4_NL, _T.IQ3_XXS, _T.IQ3_S, _T.IQ2_XS, _T.IQ2_S, _T.IQ1_S, _T.IQ1_M, _T.Q5_1, _T.Q5_0, _T.Q4_1, _T.Q4_0,
    _T.TQ2_0, _T.TQ1_0, _T.NVFP4, _T.I32,
)  # fmt: skip

# Metadata value types of fixed size.
_NUMBERS = {
    _V.UINT8: np.dtype("<u1"),
    _V.INT8: np.dtype("<i1"),
    _V.UINT16: np.dtype("<u2"),
    _V.INT16: np.dtype("<i2"),
    _V.UINT32: np.dtype("<u4"),
    _V.INT32: np.dtype("<i4"),
    _V.UINT64: np.dtype("<u8"),
    _V.INT64: np.dtype("<i8"),
    _V.FLOAT32: np.dtype("<f4"),
    _V.FLOAT64: np.dtype("<f8"),
    _V.BOOL: np.dtype("?"),
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

# The fewest bytes a key (key length, value type, one byte) and a tensor record (one dim, empty name) can take.
_MIN_KEY_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: row-major `shape`, storage `type`, `offset` from the start of the file, size in bytes."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    nbytes: int


class Typed(NamedTuple):
    """A metadata value for `write_gguf` with its type, or that of its elements, spelled out."""

    value: Any
    type: GGUFValueType


@dataclasses.dataclass(frozen=True)
class TensorData:
    """One tensor for `write_gguf`.

    shape: row-major. type: one of TYPES.
    data: called once, when its turn comes. Returns the tensor, or an iterable of consecutive pieces of it, as arrays of
        uint8 (packed as GGUF stores the type) or, for F32, F16, BF16 and I32, of that dtype.
    """

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    data: Callable[[], np.ndarray | Iterable[np.ndarray]]


def _nbytes(name: str, shape: tuple[int, ...], qtype: GGMLQuantizationType) -> int:
    """Bytes of a tensor; GGUFError if its rows (the last axis) are not whole blocks."""
    block, size = GGML_QUANT_SIZES[qtype]
    if shape[-1] % block:
        raise GGUFError(
            f"tensor {show(name)}: found rows of {shape[-1]} values, expected a multiple of {block} for {qtype.name}"
        )
    return math.prod(shape) // block * size


def _alignment(value: Any) -> int:
    if type(value) is not int or value < 8 or value & (value - 1):
        raise GGUFError(f"key 'general.alignment': found {show(value)}, expected a power of two of at least 8")
    return value


class Short(GGUFError):
    """A header that goes on where the bytes at hand end."""


class Header:
    """Parses everything before the tensor data. `pos` never passes `end`, whatever the file claims.

    buf: the file, or its first bytes. size: of the whole file. Raises GGUFError: Short if `buf` has not all of it.
    """

    def __init__(self, buf: mmap.mmap | bytes, size: int):
        self.buf, self.pos, self.end, self.size = buf, 0, len(buf), size
        self._magic()
        n_tensors, n_keys = self._u64("tensor count"), self._u64("key count")
        self._need(n_keys * _MIN_KEY_BYTES, f"{n_keys} keys")
        self.metadata = self._metadata(n_keys)
        self._need(n_tensors * _MIN_TENSOR_BYTES, f"{n_tensors} tensors")
        self.tensors = self._tensors(n_tensors)

    def _need(self, n: int, what: str) -> None:
        if n > self.end - self.pos:
            raise Short(f"{what}: needs at least {n} bytes at offset {self.pos}, found {self.end - self.pos}")

    def _u32(self, what: str) -> int:
        self._need(4, what)
        self.pos += 4
        return _U32.unpack_from(self.buf, self.pos - 4)[0]

    def _u64(self, what: str) -> int:
        self._need(8, what)
        self.pos += 8
        return _U64.unpack_from(self.buf, self.pos - 8)[0]

    def _string(self, what: str) -> str:
        return self._strings(1, what)[0]

    def _strings(self, count: int, what: str) -> list[str]:
        self._need(8 * count, what)
        # A vocabulary and its merges are 257,000 strings, so this loop is written out.
        buf, pos, end, out = self.buf, self.pos, self.end, []
        for _ in range(count):
            start = pos = pos + 8
            if start <= end:
                pos += _U64.unpack_from(buf, start - 8)[0]
            if pos > end:
                raise Short(f"{what}: string {len(out)} ends at byte {pos}, found {end} bytes")
            try:
                out.append(buf[start:pos].decode())
            except UnicodeDecodeError:
                raise GGUFError(f"{what}: string {len(out)} is {show(buf[start:pos])}, expected UTF-8") from None
        self.pos = pos
        return out

    def _numbers(self, value_type: GGUFValueType, count: int, what: str) -> np.ndarray:
        dtype = _NUMBERS[value_type]
        self._need(count * dtype.itemsize, what)
        values = np.frombuffer(self.buf, dtype, count, self.pos).copy()  # a view would keep the file mapped
        self.pos += values.nbytes
        if value_type == _V.BOOL and (largest := values.view(np.uint8).max(initial=0)) > 1:
            raise GGUFError(f"{what}: found the boolean {largest}, expected 0 or 1")
        return values

    def _value_type(self, what: str) -> GGUFValueType:
        number = self._u32(what)
        if number not in _V:
            raise GGUFError(f"{what}: found value type {number}, expected one of 0 to {max(_V)}")
        return _V(number)

    def _magic(self) -> None:
        if self.buf[:4] != MAGIC:
            raise GGUFError(f"magic: found {self.buf[:4]!r}, expected {MAGIC!r}; not a GGUF file")
        self.pos = 4
        self.version = self._u32("version")
        if self.version not in (2, 3):
            big = " (a big-endian file?)" if self.version >= 1 << 16 else ""
            raise GGUFError(f"version: found {self.version}{big}, expected 2 or 3")

    def _metadata(self, count: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for i in range(count):
            key = self._string(f"name of key {i}")
            what = f"key {show(key)}"
            if key in out:
                raise GGUFError(f"{what}: found twice, expected once")
            value_type = self._value_type(what)
            if value_type == _V.STRING:
                out[key] = self._string(what)
            elif value_type != _V.ARRAY:
                out[key] = self._numbers(value_type, 1, what)[0].item()
            else:
                element, n = self._value_type(what), self._u64(what)
                if element == _V.ARRAY:
                    raise GGUFError(f"{what}: found an array of arrays, expected numbers or strings")
                out[key] = self._strings(n, what) if element == _V.STRING else self._numbers(element, n, what)
        return out

    def _tensors(self, count: int) -> dict[str, TensorInfo]:
        alignment = _alignment(self.metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT))
        out: dict[str, TensorInfo] = {}
        for i in range(count):
            name = self._string(f"name of tensor {i}")
            what = f"tensor {show(name)}"
            if name in out:
                raise GGUFError(f"{what}: found twice, expected once")
            n_dims = self._u32(what)
            if not 1 <= n_dims <= MAX_DIMS:
                raise GGUFError(f"{what}: found {n_dims} dimensions, expected 1 to {MAX_DIMS}")
            shape = tuple(self._u64(what) for _ in range(n_dims))[::-1]
            if 0 in shape:
                raise GGUFError(f"{what}: found shape {shape}, expected no zero")
            number, offset = self._u32(what), self._u64(what)
            if number not in TYPES:
                known = _T(number).name if number in _T else number
                raise GGUFError(f"{what}: found type {known}, expected one of {', '.join(t.name for t in TYPES)}")
            if offset % alignment:
                raise GGUFError(f"{what}: found offset {offset}, expected a multiple of {alignment}")
            out[name] = TensorInfo(name, shape, _T(number), offset, _nbytes(name, shape, _T(number)))

        start = -(-self.pos // alignment) * alignment
        out = {name: dataclasses.replace(t, offset=start + t.offset) for name, t in out.items()}
        previous = None
        for t in sorted(out.values(), key=lambda t: t.offset):
            if t.offset + t.nbytes > self.size:
                raise GGUFError(
                    f"tensor {show(t.name)}: shape {t.shape} in {t.type.name} ends at byte {t.offset + t.nbytes}, "
                    f"found a file of {self.size} bytes; truncated?"
                )
            if previous and t.offset < previous.offset + previous.nbytes:
                raise GGUFError(f"tensor {show(t.name)}: overlaps tensor {show(previous.name)}")
            previous = t
        return out


class GGUFFile:
    """A GGUF file, mapped read-only. Nothing of the tensor data is read until it is touched.

    path, version.
    status: of the file that is mapped, whatever has that path later.
    parts: the files that it consists of: itself.
    metadata: key → int, float, bool, str, list[str] or, for arrays of numbers, a numpy array of their type.
    tensors: name → TensorInfo, in file order. Who opens a file may replace them, under other names for example.
    has_data: whether the tensors can be read, too. content: a hash of all of it, where that is known without reading.
    """

    has_data = True
    content: str | None = None

    def __init__(self, path: Path, buf: mmap.mmap, status: os.stat_result):
        header = Header(buf, len(buf))
        self.path, self.version, self.status = path, header.version, status
        self.metadata, self.tensors = header.metadata, header.tensors
        self.parts: list[GGUFFile] = [self]
        self._buf = buf

    @classmethod
    def open(cls, path: str | os.PathLike, part: bool = False) -> Self:
        """Maps and checks the file at `path`. part: it may be one of the parts of a split file.

        Raises GGUFError, naming the key or tensor, for a file that cannot be read or is not a sound GGUF container (all
        text must be UTF-8); memory stays proportional to the metadata present, whatever lengths it claims.
        """
        path = Path(path)
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block, a directory cannot be mapped
                raise GGUFError(f"{path}: not a regular file")
            with open(path, "rb") as file:
                size = (status := os.fstat(file.fileno())).st_size
                if size < len(MAGIC):
                    raise GGUFError(f"{path}: found {size} bytes, expected a GGUF file")
                buf = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise GGUFError(f"{path}: cannot be opened: {getattr(error, 'strerror', None) or error}") from None
        try:
            file = cls(path, buf, status)
            count = file.metadata.get("split.count", 1)
            if not part and (type(count) is not int or count > 1):
                raise GGUFError(f"key 'split.count': found {show(count)}, expected 1; merge the parts into one file")
            return file
        except GGUFError as error:
            buf.close()
            raise GGUFError(f"{path}: {error}") from None

    def info(self, name: str) -> TensorInfo:
        """The record of tensor `name`; GGUFError if the file has none."""
        if name not in self.tensors:
            raise GGUFError(f"{self.path}: tensor {show(name)}: not in the file")
        return self.tensors[name]

    def raw(self, name: str) -> np.ndarray:
        """The mapped bytes of a tensor, read-only, not copied: uint8 (*shape[:-1], bytes per row)."""
        t = self.info(name)
        return np.frombuffer(self._holder(t)._buf, np.uint8, t.nbytes, t.offset).reshape(*t.shape[:-1], -1)

    def array(self, name: str) -> np.ndarray:
        """A tensor of type F32, F16, BF16 or I32 as an array of its shape and dtype, read-only, not copied."""
        t = self.info(name)
        if t.type not in DTYPES:
            raise GGUFError(
                f"{self.path}: tensor {show(name)}: found type {t.type.name}, "
                f"expected one of {', '.join(q.name for q in DTYPES)}"
            )
        return self.raw(name).view(DTYPES[t.type])

    def will_need(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Has bytes [start, stop) of a tensor read from the disk in large pieces, without waiting for them."""
        self._advise(mmap.MADV_WILLNEED, name, start, stop)

    def drop_pages(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Gives the memory behind bytes [start, stop) of a tensor back to the system; reading them again still works.

        Rounds outwards to whole pages, so that consecutive ranges leave nothing behind.
        """
        self._advise(mmap.MADV_DONTNEED, name, start, stop)

    def _advise(self, advice: int, name: str, start: int, stop: int | None) -> None:
        t = self.info(name)
        first = (t.offset + start) // mmap.PAGESIZE * mmap.PAGESIZE
        end = t.offset + (t.nbytes if stop is None else stop)
        self._holder(t)._buf.madvise(advice, first, end - first)

    def _holder(self, tensor: TensorInfo) -> GGUFFile:
        """The part that a tensor is in."""
        return self

    def close(self) -> None:
        """Unmaps the file; if arrays still show it, that happens when the last of them is gone."""
        try:
            self._buf.close()
        except BufferError:
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def _utf8(text: str) -> bytes:
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise GGUFError(f"found {show(text)}, expected text that UTF-8 can encode") from None
    return _U64.pack(len(data)) + data


def _holds(value_type: GGUFValueType, values: list) -> bool:
    """Whether Python values fit `value_type` without loss, but for the precision of floats."""
    if value_type == _V.STRING:
        return all(isinstance(v, str) for v in values)
    dtype = _NUMBERS.get(value_type)
    if dtype is None:
        return False
    if dtype.kind == "b":
        return all(isinstance(v, bool) for v in values)
    if dtype.kind == "f":
        largest = float(np.finfo(dtype).max)
        return all(type(v) in (int, float) and not largest < abs(v) < math.inf for v in values)
    limits = np.iinfo(dtype)
    return all(type(v) is int and limits.min <= v <= limits.max for v in values)


def _encode(key: str, value: Any) -> bytes:
    """One metadata record; `write_gguf` says how types are chosen."""
    value, value_type = value if isinstance(value, Typed) else (value, None)
    if isinstance(value, np.ndarray | np.generic):
        value_type = value_type or {dtype: t for t, dtype in _NUMBERS.items()}.get(value.dtype)
        value = value.tolist()
    is_array = isinstance(value, list | tuple)
    values = list(value) if is_array else [value]
    # Readers expect arrays of integers, such as compress_ratios and token_type, as INT32.
    integers = (_V.INT32, _V.UINT32) if is_array else (_V.UINT32, _V.INT32)
    floats = (_V.FLOAT32,) if float in map(type, values) else ()
    inferred = (_V.BOOL, *integers, _V.UINT64, _V.INT64, *floats, _V.STRING) if values else ()
    candidates = inferred if value_type is None else (value_type,)
    value_type = next((t for t in candidates if _holds(t, values)), None)
    if value_type is None:
        names = ", ".join(t.name for t in candidates) or "Typed(value, element type), as it is empty"
        raise GGUFError(f"key {show(key)}: found {show(value)}, expected {names}")
    head = struct.pack("<IIQ", _V.ARRAY, value_type, len(values)) if is_array else _U32.pack(value_type)
    is_text = value_type == _V.STRING
    data = b"".join(map(_utf8, values)) if is_text else np.array(values, _NUMBERS[value_type]).tobytes()
    return _utf8(key) + head + data


def pieces(name: str, tensor: TensorData) -> Iterable[memoryview]:
    """The bytes of a tensor as a file holds them, piece by piece; GGUFError for a wrong dtype or a wrong total."""
    data, total = tensor.data(), 0
    expected = _nbytes(name, tensor.shape, tensor.type)
    for piece in (data,) if isinstance(data, np.ndarray) else data:
        if piece.dtype not in (np.dtype(np.uint8), DTYPES.get(tensor.type)):
            raise GGUFError(f"tensor {show(name)}: found data of {piece.dtype}, expected uint8 or {tensor.type.name}")
        total += piece.nbytes
        yield np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
    if total != expected:
        raise GGUFError(f"tensor {show(name)}: found {total} bytes of data, expected {expected}")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the bytes of a file go. Between tensors, and up to `size` at the end, there are zeros.

    header: everything before the tensor data. tensors: name → TensorInfo, in file order. size: of the whole file.
    """

    header: bytes
    tensors: dict[str, TensorInfo]
    size: int


def layout(metadata: Mapping[str, Any], tensors: Iterable[tuple[str, tuple[int, ...], GGMLQuantizationType]]) -> Layout:
    """The layout of a file of (name, row-major shape, type) in this order; for metadata and errors see `write_gguf`."""
    tensors = list(tensors)
    alignment = _alignment(metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT))

    def padded(n: int) -> int:
        return -(-n // alignment) * alignment

    header = [MAGIC, struct.pack("<IQQ", GGUF_VERSION, len(tensors), len(metadata))]
    header += [_encode(key, value) for key, value in metadata.items()]
    offset, infos = 0, {}
    for name, shape, qtype in tensors:
        if name in infos:
            raise GGUFError(f"tensor {show(name)}: given twice")
        if not 1 <= len(shape) <= MAX_DIMS or min(shape) < 1 or qtype not in TYPES:
            raise GGUFError(f"tensor {show(name)}: shape {shape} in {qtype!r} cannot be stored")
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        header.append(_utf8(name) + dims + struct.pack("<IQ", qtype, offset))
        infos[name] = TensorInfo(name, shape, qtype, offset, _nbytes(name, shape, qtype))
        offset += padded(infos[name].nbytes)
    joined = b"".join(header)
    start = padded(len(joined))
    infos = {name: dataclasses.replace(t, offset=start + t.offset) for name, t in infos.items()}
    return Layout(joined, infos, start + offset)


def write_gguf(
    path: str | os.PathLike,
    metadata: Mapping[str, Any],
    tensors: Iterable[tuple[str, TensorData]],
    threads: int = 1,
) -> None:
    """Writes a GGUF file (version 3). The same arguments give the same bytes.

    metadata: bool, int (UINT32, or the first of INT32, UINT64, INT64 that holds it), float (FLOAT32) or str; lists and
        tuples of them (ints: INT32 first); numpy arrays and scalars of their dtype; `Typed` for any other choice.
        ``general.alignment`` is obeyed.
    tensors: (name, TensorData), laid out in this order.
    threads: tensors that are made and written at a time, and so in memory.

    The file appears under its name only when complete and on disk: it is written to a temporary file beside it, which
    any failure removes. Raises GGUFError for values, shapes or data that do not fit their types, a disk without room,
    or a failed write.
    """
    path, tensors = Path(path), list(tensors)
    plan = layout(metadata, [(name, t.shape, t.type) for name, t in tensors])
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")

    def write(fd: int, name: str, tensor: TensorData) -> None:
        offset = plan.tensors[name].offset
        for piece in pieces(name, tensor):
            while piece:
                n = os.pwrite(fd, piece, offset)
                piece, offset = piece[n:], offset + n

    try:
        try:
            if (free := shutil.disk_usage(path.parent).free) < plan.size:
                raise GGUFError(f"{path}: found {free:,} bytes free on its disk, expected {plan.size:,}")
            with open(temporary, "xb") as file, ThreadPoolExecutor(threads) as pool:
                file.write(plan.header)
                file.truncate(plan.size)
                for _ in pool.map(lambda named: write(file.fileno(), *named), tensors):
                    pass
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            raise GGUFError(f"{path}: cannot be written: {error.strerror or error}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
