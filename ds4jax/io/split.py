"""Split GGUF files: NAME-00001-of-00003.gguf and so on, as llama.cpp's tools and the `gguf` package write them.

Each part is a GGUF file. Its keys ``split.no`` (from 0), ``split.count`` and ``split.tensors.count`` (of all parts
together) say which part of what it is. The metadata is in the first one; tensors may be in any. No JAX here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ds4jax.errors import GGUFError, show
from ds4jax.io.gguf import GGUFFile, TensorInfo

_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def part_names(name: str) -> list[str]:
    """The names of all parts of the file that `name` is a part of; `name` alone if it is no part's name."""
    found = _NAME.fullmatch(name)
    if not found or not 1 <= int(found[2]) <= int(found[3]):
        return [name]
    return [f"{found[1]}-{i:05}-of-{found[3]}.gguf" for i in range(1, int(found[3]) + 1)]


class SplitFile(GGUFFile):
    """The parts of a split file as one: the metadata of the first, the tensors of all."""

    def __init__(self, parts: Sequence[GGUFFile]):
        first = parts[0]
        self.path, self.version, self.status, self.metadata = first.path, first.version, first.status, first.metadata
        self.parts, self.has_data = list(parts), first.has_data
        self.tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
        self._parts = {name: part for part in parts for name in part.tensors}

    def _holder(self, tensor: TensorInfo) -> GGUFFile:
        return self._parts[tensor.name]

    def close(self) -> None:
        for part in self.parts:
            part.close()


def open_file(path: str | os.PathLike) -> GGUFFile:
    """Opens a GGUF file, whole or split. path: of any of the parts; the others are beside it.

    Raises GGUFError as `GGUFFile.open` does, and naming the parts that are missing or that belong to another file.
    """
    path = Path(path)
    file = GGUFFile.open(path, part=True)
    count = file.metadata.get("split.count", 1)
    if type(count) is int and count in (0, 1):  # 0: what llama.cpp writes when it merges the parts
        return file
    file.close()
    paths = [path.with_name(name) for name in part_names(path.name)]
    if type(count) is not int or count != len(paths):
        expected = f"{len(paths)}, as its name says" if len(paths) > 1 else "1, or a name like NAME-00001-of-00002.gguf"
        raise GGUFError(f"{path}: key 'split.count': found {show(count)}, expected {expected}")
    missing = [p.name for p in paths if not p.exists()]
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise GGUFError(f"{path}: found {count - len(missing)} of its {count} parts, expected {some} beside it")
    parts: list[GGUFFile] = []
    try:
        for p in paths:
            parts.append(GGUFFile.open(p, part=True))
        check(parts)
    except GGUFError:
        for part in parts:
            part.close()
        raise
    return SplitFile(parts)


def check(parts: Sequence[GGUFFile]) -> None:
    """Raises GGUFError unless these are all parts of one file, in order."""
    first, holders = parts[0], dict[str, GGUFFile]()
    for number, part in enumerate(parts):
        total = first.metadata.get("split.tensors.count")
        said = {"split.no": number, "split.count": len(parts), "split.tensors.count": total}
        for key in first.metadata.keys() & part.metadata.keys() - said.keys() - {"general.alignment"}:
            said[key] = first.metadata[key]
        for key, expected in sorted(said.items()):
            found = part.metadata.get(key)
            if type(found) is not type(expected) or not np.array_equal(np.asarray(found), np.asarray(expected)):
                found = "nothing" if found is None else show(found)
                raise GGUFError(
                    f"{part.path}: key {show(key)}: found {found}, expected {show(expected)}; a foreign part?"
                )
        for name in part.tensors:
            if name in holders:
                raise GGUFError(f"{part.path}: tensor {show(name)}: found in {holders[name].path.name} too")
            holders[name] = part
    total = first.metadata.get("split.tensors.count")
    if type(total) is not int or total != len(holders):
        raise GGUFError(
            f"{first.path}: key 'split.tensors.count': found {'nothing' if total is None else show(total)}, "
            f"expected {len(holders)}, the tensors in all {len(parts)} parts"
        )
