"""A model as planes on disk, in Orbax's format: the folder that `ds4jax checkpoint` makes of a GGUF file. No JAX here.

    manifest.json     all that is in the other files, see `Manifest`; written last
    headers/NAME      what a GGUF file has before its tensors, byte for byte: metadata, shapes and types
    ROLE/GROUP/       an Orbax checkpoint {tensor: {plane: array}}, which Orbax alone can restore, too

ROLE is model, mtp (a head from a file of its own) or drafter. A group has the tensors of a layer, or one tensor: a
layer's routed experts of one kind, or one that is in no layer. Each expert is a chunk of its own, and a large matrix is
cut into some eight, so that a device's part is read without the others'. Reading goes through tensorstore, as Orbax
itself does; Orbax's own restore would give whole tensors, each beside the stack that it belongs to. `io.pack` writes
such folders.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from ds4jax.errors import GGUFError, show
from ds4jax.files import write_whole
from ds4jax.io.gguf import DTYPES, GGUFFile, Header, TensorInfo
from ds4jax.terminal import meter

Role = Literal["model", "mtp", "drafter"]

VERSION = 1
MANIFEST = "manifest.json"
UNFINISHED = "conversion.json"
"""What a folder has instead of a manifest until it is complete."""
HEADERS = "headers"
_THREADS = 4


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder holds.

    sources: role → the GGUF files that it was made of, each {"name", "size", "hash"}, as `io.content_hash` has it.
    tensors: role → name in the GGUF file → {"group", "planes"}, the latter by name {"dtype", "shape", "nbytes",
        "sha256"}, of the bytes in row-major order.
    files: path within the folder → {"size", "sha256"}.
    """

    sources: dict[str, list[dict[str, Any]]]
    tensors: dict[str, dict[str, dict[str, Any]]]
    files: dict[str, dict[str, Any]]

    def write(self, folder: Path) -> None:
        """Make the folder a complete one. Raises OSError."""
        said = {"version": VERSION, **dataclasses.asdict(self)}
        write_whole(folder / MANIFEST, [json.dumps({"sha256": _digest(said), **said}, indent=1).encode()], mode=0o666)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The manifest of a folder. Raises GGUFError if there is none, or another version's, or a changed one."""
        path = folder / MANIFEST
        try:
            said = json.loads(path.read_bytes())
            digest, version = said.pop("sha256"), said.pop("version")
        except FileNotFoundError:
            if (folder / UNFINISHED).exists():
                raise GGUFError(
                    f"{folder}: found a conversion that was interrupted, expected {MANIFEST}; "
                    "the same `ds4jax checkpoint` goes on with it"
                ) from None
            raise GGUFError(
                f"{folder}: found no {MANIFEST}, expected a GGUF file or what `ds4jax checkpoint` makes of one"
            ) from None
        except NotADirectoryError:
            raise GGUFError(f"{folder}: found a file, expected a folder of `ds4jax checkpoint`") from None
        except OSError as error:
            raise GGUFError(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise GGUFError(f"{path}: found no manifest of `ds4jax checkpoint` in it, expected one") from None
        if version != VERSION:
            raise GGUFError(f"{path}: found version {show(version)}, expected {VERSION}; convert the GGUF file again")
        if digest != _digest({"version": version, **said}):
            raise GGUFError(f"{path}: found other content than was written, expected SHA-256 {show(digest)}")
        return cls(**said)

    def check_sizes(self, folder: Path) -> None:
        """Raises GGUFError naming the first file that is missing or of another size."""
        for name, file in self.files.items():
            try:
                size = os.stat(folder / name).st_size
            except OSError as error:
                raise GGUFError(f"{folder / name}: cannot be read: {error.strerror}") from None
            if size != file["size"]:
                raise GGUFError(f"{folder / name}: found {size} bytes, expected {file['size']}")


def _digest(said: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal digits. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path, progress: bool = False) -> Manifest:
    """Read every file of a folder whole, and compare it with the manifest.

    Raises GGUFError naming the files that are missing, or whose size or content is another. progress: a bar on stderr.
    """
    manifest = Manifest.read(folder)
    manifest.check_sizes(folder)
    wrong = []
    with (
        meter(sum(file["size"] for file in manifest.files.values()), "verifying", "B", show=progress) as bar,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        found = pool.map(lambda name: sha256(folder / name), manifest.files)
        for (name, file), digest in zip(manifest.files.items(), found, strict=True):
            bar.update(file["size"])
            wrong += [name] if digest != file["sha256"] else []
    if wrong:
        some = ", ".join(wrong[:5]) + (", ..." if len(wrong) > 5 else "")
        raise GGUFError(f"{folder}: found {len(wrong)} files of other content than was written: {some}")
    return manifest


class PackedFile(GGUFFile):
    """One of the GGUF files that a folder was made of: its header, and its planes instead of its bytes.

    path: that of the GGUF file if it were in the folder; its name tells something of the model. content: its hash.
    roles: of all such files in the folder.
    """

    def __init__(self, folder: Path, manifest: Manifest, role: Role):
        sources = manifest.sources[role]
        headers = [_header(folder / HEADERS / part["name"], part["size"]) for part in sources]
        self.path, self.version = folder / sources[0]["name"], headers[0].version
        self.status = os.stat(folder / MANIFEST)
        self.metadata = headers[0].metadata
        self.parts: list[GGUFFile] = [self]
        self.tensors = {name: tensor for header in headers for name, tensor in header.tensors.items()}
        self.content = " ".join(part["hash"] for part in sources)
        self.roles = frozenset(manifest.sources)
        self._folder, self._manifest, self._role = folder, manifest, role
        self._context, self._stores = shared(), dict[tuple[str, str], Any]()

    @classmethod
    def open_folder(cls, folder: str | os.PathLike) -> Self:
        """The model in a folder; the sizes of all files in it are checked. Raises GGUFError."""
        folder = Path(folder).absolute()
        manifest = Manifest.read(folder)
        manifest.check_sizes(folder)
        return cls(folder, manifest, "model")

    def beside(self, role: Role) -> Self:
        """Another file in the same folder, one of `roles`."""
        return type(self)(self._folder, self._manifest, role)

    def raw(self, name: str) -> np.ndarray:
        raise GGUFError(f"{self._folder}: found a folder of `ds4jax checkpoint`, expected a GGUF file")

    def array(self, name: str) -> np.ndarray:
        info = self.info(name)
        out = np.empty(info.shape, DTYPES[info.type])
        self.read(name, tuple((0, n) for n in info.shape[:-1]), {"values": out})
        return out

    def read(
        self,
        name: str,
        rows: tuple[tuple[int, int], ...],
        out: Mapping[str, np.ndarray],
        part: tuple[int, int] = (0, 1),
    ) -> None:
        """Read some rows of a tensor's planes into arrays, whose dtypes may be wider than the planes'.

        rows: (start, stop) on all axes but the last. part: (i, n) for the i-th of n equal parts of the columns. Raises
        GGUFError if they cannot be read.
        """
        import tensorstore as ts

        stored, (i, n) = self.info(name).name, part
        try:
            pending = []
            for plane, array in out.items():
                store = self._store(stored, plane)
                columns = store.shape[-1] // n
                box = (*(slice(*r) for r in rows), slice(i * columns, (i + 1) * columns))
                pending.append(ts.array(array).write(ts.cast(store[box], array.dtype)))
            for written in pending:
                written.result()
        except (ValueError, OSError) as error:
            what = str(error).split("\n")[0]
            raise GGUFError(f"{self._folder}: tensor {show(stored)}: cannot be read: {what[:300]}") from None

    def _store(self, tensor: str, plane: str) -> Any:
        """A plane as an open tensorstore."""
        if found := self._stores.get((tensor, plane)):
            return found
        known = self._manifest.tensors[self._role].get(tensor, {"group": "", "planes": {}})
        if plane not in known["planes"]:
            planes = ", ".join(known["planes"]) or "nothing"
            raise GGUFError(f"{self._folder}: tensor {show(tensor)}: found {planes}, expected a plane {plane!r}")
        expected = known["planes"][plane]
        store = open_plane(self._folder / self._role / known["group"], tensor, plane, self._context)
        found = {"dtype": store.dtype.name, "shape": list(store.shape)}
        if any(found[key] != expected[key] for key in found):
            raise GGUFError(f"{self._folder}: tensor {show(tensor)}: found plane {plane!r} of {found}, not {expected}")
        self._stores[tensor, plane] = store
        return store

    def will_need(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Does nothing: reads are large."""

    def drop_pages(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Does nothing: no file is mapped."""

    def _holder(self, tensor: TensorInfo) -> GGUFFile:
        return self

    def close(self) -> None:
        self._stores.clear()


def open_plane(group: Path, tensor: str, plane: str, context: Any) -> Any:
    """A plane in an Orbax checkpoint, for reading, as a tensorstore. context: see `shared`. Raises ValueError."""
    import tensorstore as ts

    kvstore = {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": f"{group}/"},
        "path": f"{tensor}.{plane}/",
        "cache_pool": "cache_pool#ocdbt",
    }
    return ts.open({"driver": "zarr3", "kvstore": kvstore}, open=True, read=True, context=context).result()


def shared() -> Any:
    """What planes of unchanging folders share: a cache for the trees that say where chunks are, none for chunks.

    Files are mapped, so that a chunk is copied once, from where it lies to where it goes.
    """
    import tensorstore as ts

    return ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": 100_000_000}, "file_io_mode": {"mode": "memmap"}})


def _header(path: Path, size: int) -> Header:
    """The header of a GGUF file of `size` bytes, from a file of its own. Raises GGUFError."""
    try:
        return Header(path.read_bytes(), size)
    except OSError as error:
        raise GGUFError(f"{path}: cannot be read: {error.strerror}") from None
    except GGUFError as error:
        raise GGUFError(f"{path}: {error}") from None
