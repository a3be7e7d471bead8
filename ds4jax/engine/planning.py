"""A plan on any machine: without the model's file, and without the GPU that the config is for."""

from __future__ import annotations

from collections.abc import Callable

from ds4jax.config import HCA_RATIO
from ds4jax.engine import cards, links, memory, workspace
from ds4jax.engine.compiled_steps import CompiledSteps
from ds4jax.engine.memory import Plan
from ds4jax.engine.model_runner import open_model, with_drafter
from ds4jax.engine.routing_trace import Trace, replay
from ds4jax.errors import ConfigError, Ds4Error
from ds4jax.io import remote
from ds4jax.io.checkpoint import Checkpoint, open_checkpoint
from ds4jax.io.download import resolve_model
from ds4jax.io.drafter import with_drafter as checkpoint_with_drafter
from ds4jax.io.published import DRAFTER_BYTES, DRAFTER_STAGES, published
from ds4jax.io.synthetic import FULL, Synthetic
from ds4jax.model import cache as kv
from ds4jax.model import residency
from ds4jax.profile import choose
from ds4jax.settings import Settings

MOST_BATCH = 1024
LINK = 50e9
"""Assumed bytes per second from pinned host memory through 16 lanes of PCIe 5.0, whose limit is 64e9."""
Source = Checkpoint | Synthetic


def shapes(
    settings: Settings, synthetic: str | None = None, from_server: bool | None = False, recipe: str = "q2"
) -> tuple[Source, str]:
    """The tensors' shapes and types, drafter included, and a line that says where they are from.

    They are from the file on this machine; if it is not there, from what is known of it (`io.published`). Of a model
    that is named by an address, they are from the header of the file on its server.
    from_server: so they are of one named hf:OWNER/REPO/FILE; None: only if nothing else tells. recipe: of a synthetic
    model, see `open_model`. Raises Ds4Error.
    """
    source, origin = _shapes(settings, synthetic, from_server, recipe)
    if isinstance(source, Synthetic):
        drafts = synthetic or settings.draft != "auto" or _takes_drafter(source, settings)
        return with_drafter(source, settings) if drafts else source, origin
    return checkpoint_with_drafter(source, settings.draft), origin


def _shapes(settings: Settings, synthetic: str | None, from_server: bool | None, recipe: str) -> tuple[Source, str]:
    if synthetic:
        return open_model(settings, synthetic, recipe), f"shapes: {synthetic}, in the types of {recipe}"
    if remote.is_url(settings.model):
        return open_checkpoint(remote.open_url(settings.model)), f"shapes: the header of {settings.model}"
    if from_server:
        if settings.hf_file is None:
            raise ConfigError(f"remote: found model {settings.model!r}, expected hf:OWNER/REPO/FILE or an address")
        return open_checkpoint(remote.open_hf(*settings.hf_file)), f"shapes: the header of {settings.model}"
    try:
        path = resolve_model(settings)
    except Ds4Error as error:
        if known := published(settings):
            return known, f"shapes: known of {settings.model}, which is not on this machine"
        if from_server is None and settings.hf_file:
            return _shapes(settings, None, True, recipe)
        if settings.hf_file:
            raise Ds4Error(f"{error}, or read its header with --remote") from None
        raise
    return open_checkpoint(path), f"shapes: {path}"


def steps(source: Source, settings: Settings, compiled: bool = False) -> CompiledSteps:
    """The steps to plan for, on `settings.device`; compiled: see `memory.steps`. Raises Ds4Error."""
    card = None if settings.device == "here" else cards.find(settings.device)
    return memory.steps(source, settings, progress=True, card=None if card and card.here() else card, compiled=compiled)


def describe(programs: CompiledSteps, trace: Trace | None = None, link: float = LINK) -> str:
    """The plan as a table, what fits besides, and, with experts in host memory, how fast that is.

    trace: of the model's routing. link: assumed bytes per second from host memory.
    """
    found = memory.plan(programs)
    lines, limit = [str(found)], found.limit
    if limit is not None:
        at = _total(programs, found)
        most = max(_most_ctx(programs), found.ctx)
        ctx = _largest(lambda n: at(n * HCA_RATIO, 1) <= limit, most // HCA_RATIO) * HCA_RATIO
        batch = _largest(lambda n: at(found.ctx, n) <= limit, MOST_BATCH)
        layout = ", experts wide" if found.wide else ", with room for a token's experts" if found.slots[1] else ""
        lines += [
            f"fits       {'yes' if found.fits else 'no':>9}{'' if found.workspace else '  without the workspace'}",
            f"context    {ctx or 'none':>9}  the largest that fits with batch 1{layout}",
            f"batch      {batch or 'none':>9}  the largest that fits with ctx {found.ctx}{layout}",
        ]
        if programs.drafter is None and _takes_drafter(programs.source, programs.settings):
            more = DRAFTER_BYTES + rings(programs)
            total = found.total - found.residents + _least(programs, found)
            fits = "yes" if total + more <= limit else "no"
            lines.append(f"drafter    {fits:>9}  {more / 2**30:.2f} GiB more: its weights and its rings")
    if programs.settings.devices > 1:
        chunk = programs.settings.prefill_chunk
        lines += [
            f"link       {'a token':>9}  {links.describe(programs, 1, 1)}",
            f"           {'a chunk':>9}  {links.describe(programs, chunk, 1)}",
        ]
    if found.slots[1]:
        lines += _speeds(programs, found, trace, link)
    return "\n".join(lines)


def _speeds(programs: CompiledSteps, found: Plan, trace: Trace | None, link: float) -> list[str]:
    """Lines of the plan: how many experts of a decoded token are on the device, and how fast decoding can then be.

    A token takes at least the time to read all its weights from the device's memory, and before that the experts that
    are not there from the host's.
    """
    some, every = found.slots
    cfg, used = programs.cfg, programs.cfg.n_layers * programs.cfg.n_experts_used
    expert = residency.total(programs.tree, cfg) / every
    read = found.weights - memory.per_device(programs.weights.embed) + used * expert
    bandwidth = programs.card.bandwidth if programs.card else None
    lines = []

    def add(hits: float, what: str) -> None:
        moved = (1 - hits) * used * expert
        lines.append(f"hits       {hits:>9.1%}  {what}: {moved / 1e9:.2f} GB a token from host memory")
        if bandwidth:
            rate = 1 / (read / bandwidth + moved / link)
            lines.append(
                f"speed      {rate:>9.1f}  tokens/s at most, one sequence, {link / 1e9:g} GB/s from host memory"
            )

    add(some / every, "if all experts are used alike")
    if trace:
        told = replay(trace, [kind.layers for kind in residency.kinds(programs.tree, cfg)], programs.slots)
        add(told.hit_rate, f"of {told.tokens} tokens decoded in the trace")
        if told.chunks:
            mean = told.streamed / told.chunks * expert
            lines.append(
                f"chunks     {told.chunks:>9}  of prompts in the trace: {mean / 1e9:.2f} GB each from host memory"
            )
    return lines


def rings(programs: CompiledSteps) -> int:
    """Bytes that a DSpark drafter keeps of the last tokens: per stage and slot what a layer has."""
    window = memory.per_device(programs.cache.window)
    return window // programs.cfg.n_layers * DRAFTER_STAGES


def _takes_drafter(source: Source, settings: Settings) -> bool:
    """Whether the model is DeepSeek-V4-Flash-0731, which the published drafter is of."""
    cfg = source.cfg
    if (cfg.n_layers, cfg.embed_dim, cfg.vocab_size) != (FULL.n_layers, FULL.embed_dim, FULL.vocab_size):
        return False
    file = ({}, settings.model) if isinstance(source, Synthetic) else (source.file.metadata, source.file.path.name)
    return choose(settings.profile, *file).name == "0731"


def _most_ctx(programs: CompiledSteps) -> int:
    """The context that the model was made for."""
    return int(programs.cfg.yarn_factor * programs.cfg.yarn_original_ctx)


def _total(programs: CompiledSteps, found: Plan) -> Callable[[int, int], int]:
    """What is needed with another ctx and batch: the workspace changes as `workspace.predict` says, or stays."""
    settings = programs.settings

    def predicted(**changes: int) -> int:
        return max(workspace.predict(programs, **changes).values(), default=0)

    unpredicted = found.total - found.cache - predicted()
    unpredicted += _least(programs, found) - found.residents

    def total(ctx: int, batch: int) -> int:
        cache = kv.nbytes(kv.abstract(programs.cfg, settings.numerics, settings.dtype, batch, ctx))
        return unpredicted + cache + predicted(ctx=ctx, batch=batch)

    return total


def _least(programs: CompiledSteps, found: Plan) -> int:
    """Bytes of the fewest slots for routed experts that a plan with slots can have; 0 for one without."""
    return residency.least(programs.tree, programs.cfg) if found.slots[1] else 0


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest n up to `most` with `fits(n)`, 0 if there is none. Above an n that does not fit, none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
