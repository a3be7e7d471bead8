"""The formats that describe their units of 32 weights once for all kernels."""

from ds4jax import formats  # noqa: F401 (makes them known)
from pallas_kernels import formats as known

UNITS = tuple(name for name in known.names("experts") if hasattr(known.needs(name, "experts"), "units"))
