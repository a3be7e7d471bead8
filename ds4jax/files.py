"""Files that survive a crash: each is written whole or not at all, and is on disk when the call returns. Also: reading
whole what should be small."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from ds4jax.errors import Ds4Error

SMALL = 1 << 20  # bytes: more than any config or list of keys has
LARGE = 1 << 30  # bytes: more than any text to continue or to learn from has


def read_small(path: str | os.PathLike, limit: int = SMALL) -> bytes:
    """The bytes of a file, a pipe or a device. Raises OSError, or Ds4Error if there are more than `limit`."""
    with open(path, "rb") as f:
        data = f.read(limit + 1)
    if len(data) > limit:
        raise Ds4Error(f"{path}: found more than {limit} bytes, expected at most that")
    return data


def write_whole(
    path: Path, pieces: Iterable[bytes | memoryview], mtime_ns: int | None = None, mode: int = 0o600
) -> None:
    """Make a file of the pieces, by default for its owner only, in place of what was there; or leave no trace.

    Until it is complete it has the name of `path` with ``.tmp`` behind it, which only a killed process leaves. What has
    that name is replaced; a link is not followed.
    mtime_ns: its time of modification, nanoseconds since 1970. mode: less the umask. Raises OSError; then `path`
    is as it was, unless only the folder could not be synced.
    """
    tmp = path.with_name(f"{path.name}.tmp")
    try:
        tmp.unlink(missing_ok=True)
        with open(os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as f:
            f.writelines(pieces)
            f.flush()
            if mtime_ns is not None:
                os.utime(f.fileno(), ns=(mtime_ns, mtime_ns))
            os.fsync(f.fileno())
        os.replace(tmp, path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            tmp.unlink()
        raise


def append(path: Path, data: bytes) -> None:
    """Append to a file, which is made for its owner only. Raises OSError; then a part may have been appended.

    A link is not followed, but an OSError.
    """
    new = not path.exists()
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600), "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    if new:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put the names of a folder's files on disk. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
