"""Types of matrices that no GGUF file has: models of random weights alone have them. No JAX here."""

from __future__ import annotations

import enum

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType


class Unfiled(enum.IntEnum):
    """The types themselves; their numbers are larger than all of `GGMLQuantizationType`."""

    E4M3 = 1000


AnyType = GGMLQuantizationType | Unfiled
_SIZES: dict[AnyType, tuple[int, int]] = {Unfiled.E4M3: (128, 129)}


def sizes(qtype: AnyType) -> tuple[int, int]:
    """Weights of a block, and its bytes."""
    return _SIZES[qtype] if isinstance(qtype, Unfiled) else GGML_QUANT_SIZES[qtype]
