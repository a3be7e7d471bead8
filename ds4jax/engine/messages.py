"""Messages between the processes of one server: JSON and the bytes of arrays, over a connection. No JAX, no pickle.

A message is its JSON's size and its arrays' (little-endian uint32 and uint64), the JSON, and the arrays' bytes in the
order in which the JSON names them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import socket
import struct
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from ds4jax.engine.types import Sampling

MOST_JSON = 64 << 20
"""Bytes: more than the tokens of the longest chunk take."""
MOST_DATA = 1 << 40
"""Bytes: more than any state takes."""
_SIZES = struct.Struct("<IQ")


class Malformed(Exception):
    """What is wrong with the bytes of a message."""


def pack(value: Any) -> list[bytes | memoryview]:
    """The pieces of a message: numbers, strings, lists, mappings, `Sampling` and arrays, nested at will.

    Tuples become lists. Raises TypeError for anything else.
    """
    arrays: list[np.ndarray] = []
    text = json.dumps(_plain(value, arrays)).encode()
    data = [np.asarray(x, order="C").reshape(-1).view(np.uint8).data for x in arrays]
    return [_SIZES.pack(len(text), sum(map(len, data))), text, *data]


def _plain(value: Any, arrays: list[np.ndarray]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, list | tuple):
        return [_plain(x, arrays) for x in value]
    if isinstance(value, Sampling):
        return {"sampling": dataclasses.asdict(value)}
    if isinstance(value, Mapping):
        return {"mapping": [[_plain(k, arrays), _plain(v, arrays)] for k, v in value.items()]}
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        arrays.append(value)
        return {"array": [value.dtype.name, list(value.shape)]}
    raise TypeError(f"a message: found {type(value).__name__}, expected numbers, strings, lists, mappings or arrays")


def read(
    sock: socket.socket,
    most_json: int = MOST_JSON,
    most_data: int = MOST_DATA,
    heard: Callable[[], object] = lambda: None,
) -> Any:
    """The next message of a connection. heard: called whenever something comes.

    Raises OSError where the connection has ended, and Malformed.
    """
    sizes = _SIZES.unpack(_read(sock, _SIZES.size, heard))
    for what, size, most in zip(("JSON", "arrays"), sizes, (most_json, most_data), strict=True):
        if size > most:
            raise Malformed(f"found {size} bytes of {what}, expected at most {most}")
    text, data = (_read(sock, size, heard) for size in sizes)
    try:
        value, end = _value(json.loads(text), data, 0)
        if end != len(data):
            raise ValueError(f"arrays of {end} bytes in {len(data)}")
        return value
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise Malformed(f"{type(error).__name__}: {error}") from error


def _read(sock: socket.socket, size: int, heard: Callable[[], object]) -> bytearray:
    try:
        data = bytearray(size)
    except MemoryError:
        raise Malformed(f"found {size} bytes, for which there is no memory") from None
    view = memoryview(data)
    while view:
        if not (n := sock.recv_into(view)):
            raise ConnectionError("the connection has ended")
        heard()
        view = view[n:]
    return data


def _value(plain: Any, data: bytearray, at: int) -> tuple[Any, int]:
    """What `_plain` has made JSON of. at: where in the data the next array begins; → also where the one after it."""
    if isinstance(plain, list):
        out = []
        for x in plain:
            value, at = _value(x, data, at)
            out.append(value)
        return out, at
    if not isinstance(plain, dict):
        return plain, at
    ((kind, inner),) = plain.items()
    if kind == "mapping":
        pairs, at = _value(inner, data, at)
        return dict(pairs), at
    if kind == "sampling":
        bias = tuple((id, by) for id, by in inner["logit_bias"])
        return Sampling(**{**inner, "logit_bias": bias}), at
    if kind != "array":
        raise ValueError(f"found a value of kind {kind!r}")
    name, shape = inner
    dtype, count = np.dtype(getattr(ml_dtypes, name, name)), math.prod(shape)
    if dtype.hasobject:
        raise ValueError(f"found an array of {name}")
    end = at + dtype.itemsize * count
    if end > len(data):
        raise ValueError(f"an array that ends at byte {end} of {len(data)}")
    return np.frombuffer(data, np.uint8)[at:end].view(dtype).reshape(shape), end
