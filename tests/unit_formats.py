"""The formats that describe their units of 32 weights once for all kernels, see `test_units.py`."""

from collections.abc import Iterable

import pytest

from ds4jax import formats  # noqa: F401 (makes them known)
from pallas_kernels import formats as known

UNITS = tuple(name for name in known.names("experts") if hasattr(known.needs(name, "experts"), "units"))


def mostly_slow(names: Iterable[str], *fast: str) -> list:
    """Parameters of a test: those that end in one of UNITS are slow, except some."""
    return [pytest.param(n, marks=[pytest.mark.slow] * (n.split()[-1] in UNITS and n not in fast)) for n in names]
