"""What a model needs of each device's memory, known before any is taken.

Weights and cache follow from their abstract trees; the workspace is what XLA has planned for each compiled step, on top
of both. Loading makes the same plan, and refuses a model that does not fit.
"""

from __future__ import annotations

import dataclasses
import math
import resource
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax

from ds4jax.config import HCA_RATIO
from ds4jax.engine import workspace
from ds4jax.engine.compiled_steps import CompiledSteps
from ds4jax.errors import ConfigError
from ds4jax.model import cache as kv
from ds4jax.model import residency

if TYPE_CHECKING:
    from ds4jax.engine.cards import Card
    from ds4jax.engine.routing_trace import Record
    from ds4jax.io.checkpoint import Checkpoint
    from ds4jax.io.synthetic import Synthetic
    from ds4jax.settings import Settings

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes on each device.

    device: its kind. limit: what JAX may take of it, or `budget` (GiB; 0: none), if that is less; None where there is
    no budget and JAX does not say (a CPU). ctx, batch: of the cache. weights: those that are always there. workspace:
    what the calls of each step need beside weights and cache; empty if that is not known. wide: whether experts are,
    see `Settings.expert_layout`. origin: where the workspace is from. programs: the compiled code. The driver keeps it
    outside of what JAX may take. residents: slots for routed experts, where all of these are in host memory and take
    `host` of it. slots: how many slots there are, and how many routed experts.
    """

    device: str
    limit: int | None
    ctx: int
    batch: int
    weights: int
    cache: int
    workspace: dict[str, int]
    programs: int
    origin: str = "compiled here"
    wide: bool = False
    budget: float = 0.0
    residents: int = 0
    host: int = 0
    slots: tuple[int, int] = (0, 0)

    @property
    def total(self) -> int:
        """What JAX has to take: steps run one at a time, so the largest workspace counts."""
        return self.weights + self.residents + self.cache + max(self.workspace.values(), default=0)

    @property
    def fits(self) -> bool:
        return self.limit is None or self.total <= self.limit

    @property
    def _limited(self) -> str:
        """What sets the limit."""
        if self.limit is None:
            return "JAX does not say here"
        budget = self.limit == int(self.budget * _GIB)
        return "device_budget_gb" if budget else "what JAX may take (memory_fraction)"

    def __str__(self) -> str:
        """The plan as a table."""
        steps = ", ".join([*(f"{name} {n / _GIB:.3f}" for name, n in self.workspace.items()), self.origin])
        some, every = self.slots
        held = f"room for {some} of {every} routed experts, {some / every:.1%}" if every else ""
        wide = "experts wide, see expert_layout" if self.wide else "all but the routed experts" if every else ""
        rows: list[tuple[str, int | None, str]] = [
            ("weights", self.weights, wide),
            *([("experts", self.residents, held)] if every else []),
            ("cache", self.cache, f"batch {self.batch}, ctx {self.ctx}"),
            ("workspace", max(self.workspace.values(), default=None), steps),
            ("together", self.total, ""),
            ("limit", self.limit, self._limited),
            *([("left", self.limit - self.total, "")] if self.limit else []),
            ("programs", self.programs or None, "compiled code, outside of the limit"),
            *([("host", self.host, "in host memory: the routed experts")] if every else []),
        ]
        lines = [f"{name:<10} {'?' if n is None else f'{n / _GIB:.3f}':>9}  {note}" for name, n, note in rows]
        return "\n".join([f"GiB on each device ({self.device})", *(line.rstrip() for line in lines)])


def steps(
    source: Checkpoint | Synthetic,
    settings: Settings,
    batch: int | None = None,
    progress: bool = False,
    card: Card | None = None,
    sizes: Iterable[int] = (),
    compiled: bool = True,
    acceptance: Sequence[float] = (),
    record: Record | None = None,
) -> CompiledSteps:
    """The steps of a model, with an `expert_layout` of auto decided: wide if that changes anything and all fits.

    It is for kernels on a GPU and several sequences: one alone is not faster (benchmarks/LOG.md). compiled: if it seems
    to fit, compile the steps that need the most memory, those of `sizes` among them, to know. The others: see
    `CompiledSteps`. Within a budget, as many routed experts are on the device as it has room for. Raises ConfigError
    with a plan for a budget that is too small for any.
    """
    asked = CompiledSteps(source, settings, batch, progress, card, acceptance, record=record)
    if settings.device_budget_gb:
        return _within_budget(asked, sizes, compiled and asked.can_compile)
    if settings.expert_layout != "auto" or asked.batch == 1 or asked.compute.implementations["experts"] != "pallas":
        return asked
    wide_settings = dataclasses.replace(settings, expert_layout="wide")
    wide = CompiledSteps(source, wide_settings, batch, progress, card, acceptance, record=record)
    found = plan(wide)
    if wide.tree == asked.tree or found.limit is None or not found.fits:
        return asked
    if compiled and wide.can_compile:
        wide.compile_largest(sizes)
    return wide if plan(wide).fits else asked


def _within_budget(asked: CompiledSteps, sizes: Iterable[int], compiled: bool) -> CompiledSteps:
    """`asked`, or, where that does not fit, the same with slots for as many routed experts as do.

    How many slots there is room for depends on the workspace, which is known only once the steps are compiled for some
    number of slots. So they are compiled for a guess. If that does not fit, or leaves a fiftieth of the budget, the
    number is corrected, and they are compiled again.
    """
    if compiled and plan(asked).fits:
        asked.compile_largest(sizes)
    found, tree, cfg = plan(asked), asked.tree, asked.cfg
    if found.limit is None or found.fits:
        return asked
    always = found.total - residency.on_host(tree) + residency.whole_layer(tree, cfg)
    unknown = 0 if found.workspace else max(workspace.predict(asked).values(), default=found.limit // 16)
    least = residency.least(tree, cfg)
    held = asked.with_slots(residency.slots_in(tree, cfg, max(found.limit - always - unknown, least)))
    if compiled and plan(held).fits:
        held.compile_largest(sizes)
    exact = plan(held)
    some = residency.slots_in(tree, cfg, least)
    smallest = dataclasses.replace(exact, residents=least, slots=(sum(some), exact.slots[1]))
    if not smallest.fits:
        raise ConfigError(
            f"device_budget_gb: found {found.limit / _GIB:.4g} GiB, expected at least "
            f"{math.ceil(100 * smallest.total / _GIB) / 100:g} GiB, with room for the experts of one token\n{smallest}"
        )
    left = found.limit - exact.total
    if exact.workspace and not 0 <= left < found.limit // 50:
        return asked.with_slots(residency.slots_in(tree, cfg, exact.residents + left))
    return held


def plan(programs: CompiledSteps) -> Plan:
    """The plan for `programs`, with the workspace of those that are compiled.

    If there are none, and they are for a card, its workspace is the one that `workspace.predict` tells.
    """
    card, code = programs.card, 0
    settings, cfg = programs.settings, programs.cfg
    needs: dict[str, int] = {}
    for (name, *_), program in programs.compiled.items():
        needs[name] = max(needed(programs, program), needs.get(name, 0))
        code += program.memory_analysis().generated_code_size_in_bytes
    if card is None:
        device = jax.local_devices()[0]
        kind, limit = device.device_kind, (device.memory_stats() or {}).get("bytes_limit")
        origin = "compiled here" if needs else "not compiled"
    else:
        kind, limit = card.kind, int(card.memory * settings.memory_fraction)
        drafts = ", without that of drafts" if programs.drafter else ""
        origin = f"compiled here for {card.name}" if needs else f"from {workspace.SOURCE}{drafts}"
        needs = needs or workspace.predict(programs)
        if programs.slots and not programs.compiled and needs:
            needs["prefill"] += residency.whole_layer(programs.tree, cfg)
        origin = origin if needs else "not known without compiling"
    if budget := int(settings.device_budget_gb * _GIB):
        limit = min(limit or budget, budget)
    return Plan(
        device=kind,
        limit=limit,
        ctx=settings.ctx,
        batch=programs.batch,
        weights=per_device(programs.device_weights),
        cache=_sequences(programs),
        workspace=needs,
        programs=code,
        origin=origin,
        wide=programs.wide,
        budget=settings.device_budget_gb,
        residents=per_device(programs.cache.experts) if programs.slots else 0,
        host=residency.on_host(programs.tree) if programs.slots else 0,
        slots=(sum(programs.slots), cfg.n_layers * cfg.n_experts) if programs.slots else (0, 0),
    )


def _sequences(programs: CompiledSteps) -> int:
    """Bytes on each device of what the cache has of sequences."""
    return per_device(kv.with_experts(programs.cache, None) if programs.slots else programs.cache)


def needed(programs: CompiledSteps, program: Any) -> int:
    """Bytes on each device that a compiled step's calls take beside weights and cache."""
    stats = program.memory_analysis()
    # Of the outputs, the cache takes the place of the old one, which was donated.
    return stats.temp_size_in_bytes + stats.output_size_in_bytes - per_device(programs.cache)


def per_device(tree: Any) -> int:
    """Bytes that one device holds of a tree of `jax.ShapeDtypeStruct`s; without a sharding it holds all."""

    def shape(x: jax.ShapeDtypeStruct) -> tuple[int, ...]:
        return x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)

    return sum(math.prod(shape(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def check(programs: CompiledSteps, sizes: Iterable[int] = ()) -> Plan:
    """Plan the memory of a model before it is loaded; its steps are compiled if the device says how much memory it has.

    Raises ConfigError with the plan, and with the ctx or batch that would fit, if it does not.
    """
    found = plan(programs)
    if found.limit is None:
        return found
    if found.fits:  # else there is no need to compile
        programs.compile_largest(sizes)
        found = plan(programs)
    if found.limit is None or found.fits:
        return found
    raise ConfigError(
        f"memory: found {found.limit / _GIB:.1f} GiB, expected at least {found.total / _GIB:.1f} GiB\n"
        f"{found}\n{advice(programs)}"
    )


def advice(programs: CompiledSteps) -> str:
    """What would fit, of the same model on the same device, where `programs` does not. May have to compile."""
    ctx, batch = (largest(programs, key, step) for key, step in (("ctx", HCA_RATIO), ("batch", 1)))
    ways = [f"ctx {ctx} with batch {programs.batch}"] if ctx else []
    ways += [f"batch {batch} with ctx {programs.settings.ctx}"] if batch else []
    if ways:
        return f"would fit: {', or '.join(ways)}"
    if plan(programs).workspace:
        return "no smaller ctx or batch alone would fit; a smaller prefill_chunk needs less workspace"
    ways = (
        "more devices (tp, ep), a smaller file, a larger memory_fraction or experts in host memory (device_budget_gb)"
    )
    return f"no ctx or batch would fit: {ways} might"


def largest(programs: CompiledSteps, key: str, step: int) -> int | None:
    """The largest `key` (ctx or batch; a multiple of `step`) below that of `programs` with which the plan fits.

    None if none does. The workspace of a larger call serves as the bound for smaller ones, so that at most a few have
    to be compiled; where it alone is too much, the result may not be the very largest.
    """
    found, asked = plan(programs), getattr(programs, key)

    def fits(steps: int) -> bool:
        return dataclasses.replace(found, cache=_sequences(programs.but(key, steps * step))).fits

    low, high = 0, (asked - 1) // step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    n = low * step
    if n and found.workspace:
        return n
    if not n:
        n = asked // 8 // step * step
        if not found.workspace or not n:
            return None
    smaller = programs.but(key, n)
    smaller.compile_largest()
    return n if plan(smaller).fits else largest(smaller, key, step)


def peak_memory() -> tuple[int, str]:
    """The most memory in use so far: bytes, and of what (the first GPU, or the process where JAX cannot tell)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"], "device memory"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "process memory"


def describe_peak(programs: CompiledSteps) -> str:
    """`peak_memory` in words, beside the plan for `programs` where the two can be compared."""
    peak, of = peak_memory()
    text, planned = f"peak {of}: {peak / 2**30:.2f} GiB", plan(programs)
    if planned.limit is None or of != "device memory":
        return text
    return f"{text}, planned {planned.total / 2**30:.2f} GiB ({peak / planned.total - 1:+.1%})"
