"""The folder of a KV store: for one process at a time, and for nobody but its user. No JAX here."""

from __future__ import annotations

import fcntl
import logging
import os
import stat
from io import FileIO
from pathlib import Path

from ds4jax.errors import Ds4Error

log = logging.getLogger(__name__)


def lock_folder(folder: Path) -> FileIO:
    """Makes a folder if need be, and gives a file that keeps others out while it is open.

    A folder of the user's that others may use is made private, with a warning. Raises Ds4Error for one that is
    somebody else's or everybody's (as /tmp is), is in use, or is a file; OSError if it cannot be used.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError as e:
        raise Ds4Error(f"{folder}: a directory for snapshots is expected here, found a file") from e
    status = folder.stat()
    if status.st_mode & 0o077 and status.st_uid == os.geteuid() and not status.st_mode & stat.S_ISVTX:
        folder.chmod(0o700)
        log.warning("%s: its mode was %o, so that others could use it; made it 700", folder, status.st_mode & 0o7777)
        status = folder.stat()
    if status.st_mode & 0o077 or status.st_uid != os.geteuid():
        raise Ds4Error(
            f"{folder}: found a folder with mode {status.st_mode & 0o7777:o} of user {status.st_uid}, which others may "
            f"use; expected one of user {os.geteuid()} alone, such as {folder}/kv, which the server would make"
        )
    fd = os.open(folder / "lock", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    lock = FileIO(fd, "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        lock.close()
        raise Ds4Error(f"{folder}: in use by another process; give each server a folder of its own") from e
    return lock
