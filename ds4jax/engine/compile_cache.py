"""Compiled programs kept on disk, in JAX's own compilation cache and beside it.

JAX finds a program by its lowered code. A whole step is also kept under the names of all that it depends on, so that
a start that finds it traces and lowers nothing.

A file's name is a hash of all that the program depends on: what the caller names, the sources of this package and of
the kernels, their tuned tiles, the versions, the device and XLA's flags. Files are executable code, read by pickle:
the folder is the user's own cache, as trusted as the sources beside it. Whatever goes wrong here costs a compilation.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

import ds4jax
import pallas_kernels
from ds4jax.errors import Ds4Error
from ds4jax.paths import cache_dir
from ds4jax.settings import CONFIG_DIR

KEPT = 48  # files; those used longest ago go first

log = logging.getLogger(__name__)


def sources() -> bytes:
    """A hash of the sources of this package and of the kernels, and of their tuned tiles."""
    digest = hashlib.sha256()
    folders = [(Path(package.__path__[0]), "*.py") for package in (ds4jax, pallas_kernels)]
    for folder, pattern in [*folders, (CONFIG_DIR / "tuned", "*.json")]:
        for path in sorted(folder.rglob(pattern)):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.digest()


@functools.cache
def _surroundings() -> bytes:
    """A hash of what every program depends on."""
    digest = hashlib.sha256(sources())
    device = jax.devices()[0]
    facts = jax.__version__, device.device_kind, jax.device_count(), device.client.platform_version
    flags = os.environ.get("XLA_FLAGS", ""), jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision
    digest.update(repr((*facts, *flags)).encode())
    return digest.digest()


def _path(what: Any) -> Path | None:
    folder = jax.config.jax_compilation_cache_dir
    if not folder or jax.default_backend() != "gpu":  # jaxlib 0.11 cannot run what it has read back for a CPU
        return None
    if jax.process_count() > 1:
        return None
    return Path(folder) / "steps" / hashlib.sha256(_surroundings() + repr(what).encode()).hexdigest()


def load(what: Any, args: tuple, out: Any) -> jax.stages.Compiled | None:
    """The program kept for `what`, whose repr says all that is particular to it; None if there is none.

    args: its arguments, out: its results, as trees of anything.
    """
    path = _path(what)
    if path is None or not path.exists():
        return None
    try:
        in_tree = jax.tree.structure((args, {}))
        program = serialize_executable.deserialize_and_load(path.read_bytes(), in_tree, jax.tree.structure(out))
        os.utime(path)
        return program
    except Exception as error:  # of another make, damaged, …
        log.warning("%s: a compiled program cannot be used: %s", path, error)
        return None


def save(what: Any, program: jax.stages.Compiled) -> None:
    """Keep a program for `load`, whole or not at all."""
    path = _path(what)
    if path is None:
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(serialize_executable.serialize(program)[0])
        os.replace(partial, path)
        oldest_last = sorted(path.parent.glob("[!.]*"), key=lambda p: p.stat().st_mtime, reverse=True)
        for old in oldest_last[KEPT:]:
            old.unlink(missing_ok=True)
    except Exception as error:  # no room, or programs of a kind that cannot be kept
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        log.info("%s: a compiled program is not kept: %s", path, error)


def keep_compilations() -> None:
    """Let JAX keep compiled programs in the user's cache, for a quicker next start, unless it has been told where.

    Not those of several processes for GPUs: these search for the fastest products together, and would wait in vain for
    one that has found the program on its disk.
    """
    if jax.distributed.is_initialized() and jax.default_backend() == "gpu":
        return jax.config.update("jax_enable_compilation_cache", False)
    if jax.config.jax_compilation_cache_dir is None:
        try:
            jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # many small ones add up, too
        except Ds4Error:
            pass  # not writable: every start compiles
