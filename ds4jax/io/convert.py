"""GGUF files from a Hugging Face checkpoint of DeepSeek-V4, or from a GGUF file of other types.

Tensors pass through memory a slab at a time. The file grows as FILE.gguf.partial, beside it a journal; killed at any
moment, the same command goes on after the last tensor that was complete, and the result has the same bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

import ds4jax
from ds4jax.errors import Ds4Error, show
from ds4jax.formats import FORMATS
from ds4jax.formats.quantize import quantize
from ds4jax.io import gguf, hf, recipes, regguf
from ds4jax.io.gguf import Layout, TensorData, TensorInfo
from ds4jax.io.imatrix import Entry, Imatrix
from ds4jax.io.packed import MANIFEST
from ds4jax.io.recipes import Recipe, Type
from ds4jax.model.tensors import TensorSpec
from ds4jax.terminal import meter

SLAB = 1 << 23  # weights that are dequantized and quantized at once: 32 MiB in float32
MARGIN = 1 << 30  # bytes of disk that must stay free
_GIB, _READ = 1 << 30, 1 << 25


def drafter_path(out: str | Path) -> Path:
    """Where a drafter goes by default that is converted with a model: NAME-dspark.gguf beside NAME.gguf."""
    return Path(out).with_name(f"{Path(out).stem}-dspark.gguf")


def convert(
    source: str | Path,
    out: str | Path,
    recipe: Recipe,
    types: Mapping[str, Type] | None = None,
    imatrix: str | Path | None = None,
    draft: hf.Draft = "keep",
    restart: bool = False,
    progress: bool = False,
    draft_out: str | Path | None = None,
) -> list[Path]:
    """Convert a checkpoint folder or a GGUF file, `source`, to the GGUF file `out`; → the files written.

    A file that was begun is continued. A DSpark drafter in the checkpoint becomes a second file, `draft_out` or
    `drafter_path`, which is begun before the first is complete, so that the same call always goes on with both.

    recipe, types: see `recipes.choose`. imatrix: importances of the columns for the quantizers. draft: see
    `hf.open_sources`. restart: begin again even if there is a part of a file already. progress: what is left out, what
    has no importances, and a bar, on stderr. The same arguments give the same bytes on the same kind of device. Raises
    Ds4Error; all that can be known to be wrong before reading the weights' values is known before anything is written.
    """
    if (Path(source) / MANIFEST).exists():
        raise Ds4Error(
            f"{source}: found a folder of `ds4jax checkpoint`, expected a Hugging Face checkpoint or a GGUF file"
        )
    sources = (regguf if Path(source).is_file() else hf).open_sources(source, draft)
    outs = [Path(out), Path(draft_out or drafter_path(out))][: len(sources)]
    if draft_out and len(sources) < 2:
        raise Ds4Error(f"{source}: found no drafter to be written beside a model, expected one for {draft_out}")
    if len({path.absolute() for path in outs}) < len(outs):
        raise Ds4Error(f"{out}: found the same file for model and drafter, expected two")
    chosen = recipes.choose([spec for opened in sources for spec in opened.table], recipe, types or {})
    importances = Imatrix.read(imatrix) if imatrix else None
    entries = {spec.name: _entry(spec, importances) for opened in sources for spec in opened.table}
    if importances is not None and not any(entries.values()):
        raise Ds4Error(f"{imatrix}: found sums for none of the tensors, such as {next(reversed(entries))}")
    plans = []
    for opened in sources:
        metadata = opened.metadata() | (_of_imatrix(importances) if importances else {})
        plans.append(gguf.layout(metadata, [(spec.name, spec.shape, chosen[spec.name]) for spec in opened.table]))
    inputs = {
        "config, tokenizer or types": hashlib.sha256(b"".join(plan.header for plan in plans)).hexdigest(),
        "weights": hashlib.sha256("\n".join(sources[0].identity).encode()).hexdigest(),
        "importances": _file_sha256(imatrix) if imatrix else None,
        "software or device": f"ds4jax {ds4jax.__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}",
    }
    notes = [note for opened in sources for note in opened.notes] + _without_importances(entries, importances)
    if progress and notes:
        print(*notes, sep="\n", file=sys.stderr)
    jobs = list(zip(sources, plans, outs, strict=True))
    if not restart and outs[0].exists() and [Partial.begun(path) for path in outs] == [False, True]:
        jobs = jobs[1:]  # the model is complete, and its drafter was begun with it
    for _, _, path in jobs:
        if path.exists():
            raise Ds4Error(f"{path}: exists already, expected a new file")
    _check_disk([(path, plan.size) for _, plan, path in jobs])
    tensors = [info for _, plan, _ in jobs for info in plan.tensors.values()]
    size = sum(info.nbytes for info in tensors)
    with contextlib.ExitStack() as stack:
        partials = [stack.enter_context(Partial(path, plan, inputs, restart)) for _, plan, path in jobs]
        if progress and (done := sum(len(partial.done) for partial in partials)):
            print(f"going on after {done} of {len(tensors)} tensors", file=sys.stderr)
        bar = stack.enter_context(meter(size, "converting", "B", show=progress))
        for (opened, plan, _), partial in zip(jobs, partials, strict=True):
            for spec in opened.table:
                info = plan.tensors[spec.name]
                if spec.name not in partial.done:
                    pieces = functools.partial(_pieces, opened, spec, info.type, entries[spec.name])
                    partial.write(info, gguf.pieces(spec.name, TensorData(info.shape, info.type, pieces)))
                bar.update(info.nbytes)
            partial.finish()
    return outs


def _file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _entry(spec: TensorSpec, importances: Imatrix | None) -> Entry | None:
    if importances is None or spec.kind != "matrix":
        return None
    return importances.entry(spec.name, math.prod(spec.shape[:-2]), spec.shape[-1])


def _pieces(opened: hf.Source, spec: TensorSpec, qtype: Type, entry: Entry | None) -> Iterator[np.ndarray]:
    """Yield a tensor's bytes in the new file, piece by piece."""
    if spec.kind != "matrix":
        yield opened.values(spec)
        return
    means = entry and entry.means()
    for i, x in opened.slabs(spec, SLAB):
        try:
            yield quantize(x, FORMATS[qtype], None if means is None else means[i]).to_bytes()
        except Ds4Error as error:
            raise Ds4Error(f"tensor {show(spec.name)}: {error}") from None


def _of_imatrix(importances: Imatrix) -> dict[str, Any]:
    """Metadata, as llama.cpp notes it."""
    return {
        "quantize.imatrix.dataset": ", ".join(importances.datasets),
        "quantize.imatrix.entries_count": len(importances.entries),
        "quantize.imatrix.chunks_count": importances.chunks,
    }


def _without_importances(entries: Mapping[str, Entry | None], importances: Imatrix | None) -> list[str]:
    """Lines that name the routed experts whose columns count alike, as the importances say nothing of them."""
    if importances is None:
        return []
    experts = {name: entry for name, entry in entries.items() if "_exps." in name}
    lacking = [name for name, entry in experts.items() if entry is None]
    out = []
    if lacking:
        out.append(f"no importances for {len(lacking)} of {len(experts)} tensors of experts: {', '.join(lacking)}")
    for name, entry in experts.items():
        if entry is not None and (unused := np.flatnonzero(entry.counts == 0)).size:
            out.append(f"no importances for experts of {name}, which saw no token: {', '.join(map(str, unused))}")
    return out


class Partial:
    """A file that is being written, and a journal of the tensors that are complete.

    The journal, FILE.partial.json, has a line of JSON with what the file is made from, then a line for each complete
    tensor with the SHA-256 of its bytes. When the file is opened again, only what these confirm counts as written: so
    it does not matter at what moment a process, or the machine, came to its end.

    done: names of the complete tensors.
    """

    def __init__(self, out: Path, plan: Layout, inputs: Mapping[str, str | None], restart: bool):
        """Opens or creates FILE.partial; Ds4Error if it was begun with other inputs or is in use."""
        self._out, self._plan = out, plan
        self._path = _partial(out)
        self._journal_path = _journal(out)
        self.done: set[str] = set()
        with self._no_os_errors():
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            self._journal = open(self._journal_path, "a+b", buffering=0)
        try:
            with self._no_os_errors():
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._resume(inputs, restart)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def begun(out: Path) -> bool:
        """Whether there is a part of the file already."""
        return _partial(out).exists()

    def _resume(self, inputs: Mapping[str, str | None], restart: bool) -> None:
        self._journal.seek(0)
        lines = self._journal.read().splitlines(keepends=True)
        begun, *records = [_record(line) for line in lines] or [None]
        header, end = self._plan.header, 0
        if isinstance(begun, dict) and not restart:
            changed = [what for what in inputs if begun.get(what) != inputs[what]]
            if changed:
                raise Ds4Error(
                    f"{self._path}: was begun with other {', '.join(changed)}; give the same again, or --restart"
                )
            if os.pread(self._fd, len(header), 0) == header:
                end = len(header)
                for info, record in zip(self._plan.tensors.values(), records, strict=False):
                    if record != {"tensor": info.name, "sha256": self._sha256(info)}:
                        break
                    self.done.add(info.name)
                    end = info.offset + info.nbytes
        os.ftruncate(self._fd, end)
        self._journal.truncate(sum(map(len, lines[: 1 + len(self.done)])) if end else 0)
        if not end:
            self._write(0, header)
            self._note(inputs)

    def _sha256(self, info: TensorInfo) -> str:
        digest, end = hashlib.sha256(), info.offset + info.nbytes
        for start in range(info.offset, end, _READ):
            digest.update(os.pread(self._fd, min(_READ, end - start), start))
        return digest.hexdigest()

    def _write(self, offset: int, data: bytes | memoryview) -> int:
        """Write all of `data` at `offset`; → the offset after it."""
        data = memoryview(data)
        while data:
            n = os.pwrite(self._fd, data, offset)
            data, offset = data[n:], offset + n
        return offset

    def _note(self, record: Mapping[str, Any]) -> None:
        self._journal.write(json.dumps(record).encode() + b"\n")

    def write(self, info: TensorInfo, pieces: Iterable[memoryview]) -> None:
        """Write a tensor from its pieces, then note that it is complete."""
        digest, offset = hashlib.sha256(), info.offset
        with self._no_os_errors():
            for piece in pieces:
                offset = self._write(offset, piece)
                digest.update(piece)
            self._note({"tensor": info.name, "sha256": digest.hexdigest()})
        self.done.add(info.name)

    def finish(self) -> None:
        """Give the file its name, once all of it is on disk."""
        with self._no_os_errors():
            os.ftruncate(self._fd, self._plan.size)
            os.fsync(self._fd)
            os.replace(self._path, self._out)
            self._journal_path.unlink()

    @contextlib.contextmanager
    def _no_os_errors(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:
            raise Ds4Error(f"{self._path}: another process is writing this file") from None
        except OSError as error:
            raise Ds4Error(
                f"{self._path}: cannot be written: {error.strerror}; the same command will go on from here"
            ) from None

    def close(self) -> None:
        os.close(self._fd)
        self._journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def _record(line: bytes) -> Any:
    """The record in a line of the journal, or None if the line is damaged."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None


def _partial(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def _journal(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial.json")


def _check_disk(files: Sequence[tuple[Path, int]]) -> None:
    """Raises Ds4Error unless there is room for all of these, path and size, and MARGIN besides."""
    for folder in {path.parent for path, _ in files}:
        paths = [(_partial(path), size) for path, size in files if path.parent == folder]
        try:
            missing = sum(size - (p.stat().st_blocks * 512 if p.exists() else 0) for p, size in paths)
            free = shutil.disk_usage(folder).free
        except OSError as error:
            raise Ds4Error(f"{folder}: {error.strerror}, expected a folder for the new file") from None
        if free < missing + MARGIN:
            raise Ds4Error(
                f"{folder}: found {free / _GIB:.1f} GiB free, expected {missing / _GIB:.1f} GiB for the file "
                f"and {MARGIN / _GIB:.0f} GiB to spare"
            )
