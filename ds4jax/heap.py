"""The process's heap: what is free in it can go back to the system. No JAX here."""

from __future__ import annotations

import ctypes


def trim() -> None:
    """Return free memory that the allocator still holds to the system. Does nothing where that is not glibc's.

    Compiling and large bodies leave hundreds of MB. Takes some ten milliseconds. Thread-safe.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library, or none that can be loaded
        pass
