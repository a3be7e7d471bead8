"""Which implementation each op runs: ``pallas``, ``xla``, or ``pallas,attend=xla`` for one op apart from the others."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, cast, get_args

from ds4jax.errors import ConfigError

Implementation = Literal["xla", "pallas", "pallas_interpret"]
Op = Literal["mhc", "linear", "latent", "compress", "index", "topk", "attend", "route", "experts"]
OPS: tuple[Op, ...] = get_args(Op)


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The implementation of every op: `default`, but for the ops named in `others`."""

    default: Implementation = "xla"
    others: tuple[tuple[Op, Implementation], ...] = ()

    def __getitem__(self, op: Op) -> Implementation:
        return dict(self.others).get(op, self.default)

    def __str__(self) -> str:
        return ",".join([self.default, *(f"{op}={implementation}" for op, implementation in self.others)])

    def using(self, **others: Implementation) -> Kernels:
        """The same but for some ops."""
        merged = dict(self.others) | others
        return Kernels(self.default, tuple((op, merged[op]) for op in OPS if op in merged))

    def uses(self, implementation: Implementation) -> bool:
        """Whether some op runs it."""
        return any(self[op] == implementation for op in OPS)

    @property
    def any_pallas(self) -> bool:
        """Whether some op runs a kernel."""
        return any(self[op] != "xla" for op in OPS)

    @property
    def all_pallas(self) -> bool:
        """Whether every op runs a kernel."""
        return all(self[op] != "xla" for op in OPS)


@functools.cache
def parse(text: str) -> Kernels:
    """``IMPLEMENTATION[,OP=IMPLEMENTATION…]`` → Kernels. Raises ConfigError."""
    default, *rest = text.split(",")
    names = get_args(Implementation)

    def implementation(name: str) -> Implementation:
        if name not in names:
            raise ConfigError(f"kernels: found {text!r}, expected one of {', '.join(names)}, then ,OP=IMPLEMENTATION")
        return cast(Implementation, name)

    others = {}
    for item in rest:
        op, _, name = item.partition("=")
        if op not in OPS or op in others:
            raise ConfigError(
                f"kernels: found {item!r} in {text!r}, expected OP=IMPLEMENTATION, OP of {', '.join(OPS)}"
            )
        others[op] = implementation(name)
    return Kernels(implementation(default)).using(**others)
