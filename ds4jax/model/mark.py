"""The state of sequences at a mark: after some of the tokens of a pass, which goes on to later ones.

A ring keeps only its last rows, so when a pass has ended, the rings no longer tell of an earlier token. Compressed rows
do: a pass adds to them, and changes none.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxtyping import Array, Int32

from ds4jax.config import ModelConfig
from ds4jax.model.attention import nth_of_ratio
from ds4jax.model.cache import Cache
from ds4jax.ops import compress, ring


class AtMark:
    """A tap of a pass of more than SPARE tokens, which stores the first n of them in rings of its own.

    Attributes: n; cache. `cache` is given as it is before the pass, and after it has the length and the rings of the
    state at the mark. Its compressed rows stay those from before the pass.
    """

    def __init__(self, cache: Cache, n: Int32[Array, "B"], cfg: ModelConfig):
        self.cache = dataclasses.replace(cache, length=cache.length + n)
        self.n, self._length, self._cfg = n, cache.length, cfg

    def __call__(self, layer: int, name: str, value: Any) -> None:
        if name == "window":
            rings = ring.store(value(), self.cache.window, layer, self._length, self.n)
            self.cache = dataclasses.replace(self.cache, window=rings)
        if name == "compressors":
            nth = nth_of_ratio(self._cfg, layer)
            for kind, compressor in value.items():
                kept = getattr(self.cache, kind)
                fed = compress.fed(compressor, self._length, self._cfg.ratio(layer), kept.z.dtype)
                rings = ring.store(fed, {"z": kept.z, "g": kept.g}, nth, self._length, self.n)
                self.cache = dataclasses.replace(self.cache, **{kind: dataclasses.replace(kept, **rings)})
