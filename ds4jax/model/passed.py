"""The state of sequences in the middle of a pass: what their rings hold after some of its tokens.

A ring keeps the last rows alone, so the state at an earlier token cannot be read from it when the pass has ended. The
compressed rows can: more are added, and none is changed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxtyping import Array, Int32

from ds4jax.config import ModelConfig
from ds4jax.model.attention import nth_of_ratio
from ds4jax.model.cache import Cache
from ds4jax.ops import ring


class Passed:
    """A tap that stores the first n tokens of a pass of more than SPARE in the rings of `cache`, as it is before them.

    Afterwards `cache` has the length of that state, and its rings; its compressed rows are those before the pass.
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
            for kind, fed in value().items():
                kept = getattr(self.cache, kind)
                rings = ring.store(fed, {"z": kept.z, "g": kept.g}, nth, self._length, self.n)
                self.cache = dataclasses.replace(self.cache, **{kind: dataclasses.replace(kept, **rings)})
