"""Files that survive a crash: each is written whole or not at all, and is on disk when the call returns."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path


def write_whole(path: Path, pieces: Iterable[bytes | memoryview], mtime_ns: int | None = None) -> None:
    """Make a file of the pieces, for its owner only, in place of what was there; or leave no trace.

    Until it is complete it has the name of `path` with ``.tmp`` behind it, which only a killed process leaves. What has
    that name is replaced; a link is not followed.
    mtime_ns: its time of modification, nanoseconds since 1970. Raises OSError; then `path` is as it was, unless only
    the folder could not be synced.
    """
    tmp = path.with_name(f"{path.name}.tmp")
    try:
        tmp.unlink(missing_ok=True)
        with open(os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f:
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
