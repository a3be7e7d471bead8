"""Prefill and decode speed over context: ``ds4jax bench --config h200 --synthetic full --csv F``.

At each frontier (ctx_start, times step_mul, ..., and ctx_max): the tokens since the last frontier are prefilled, a
snapshot is taken, gen_tokens are generated greedily, whatever they are, and the snapshot is put back. One line of CSV
each, with ds4's columns; ctx_tokens are those of one sequence, everything else is summed over the batch:

  prefill_tokens, prefill_tps   tokens since the last frontier; and per second
  gen_tokens, gen_tps           tokens generated from there; and per second
  kvcache_bytes                 of the snapshot

With a drafter, --draft, a table for each frontier goes to stderr: what a round of drafts takes, in plain steps; how
many tokens a sequence gets of it; how often a draft must be accepted, if all those before it are, so that a round is
worth the steps it takes; and what the rule of the engine makes of it. Random tokens are no text to draft, nor do random
weights: --acceptance decides instead which drafts count as accepted.

The bench drives the model runner, not the engine, so that it times calls of the model and nothing else. Seconds are
the caller's, everything included but compilation and three calls of every shape before. Prompts are random tokens.
Progress, start-up time and memory go to stderr.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from ds4jax.config import HCA_RATIO, ModelConfig
from ds4jax.errors import ConfigError
from ds4jax.settings import Settings
from ds4jax.tools import cli

if TYPE_CHECKING:  # JAX must not run before `Settings.set_environment`
    from ds4jax.engine.model_runner import ModelRunner
    from ds4jax.model.cache import Cache
    from ds4jax.model.compute import Compute
    from ds4jax.model.weights import Route

TIMED = 5  # calls with drafts that are timed
MOST_DRAFTED = 8 * 8 * 17  # tokens that a sequence may get meanwhile: rounds of WARM + TIMED calls
WARM = 3  # calls before anything is timed: XLA runs a program op by op first, and records it as a graph then

FLAGS = flags.FlagValues()
cli.define_model(FLAGS)
cli.define_synthetic(FLAGS)
cli.define_drafts(FLAGS)
cli.define_budget(FLAGS)
flags.DEFINE_list(
    "acceptance", None, "How likely a draft counts as accepted if those before it do: one probability, or one for each "
    "place, 0.83,0.73,…; by default as the model says.", flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_float(
    "skew", 0.0, "Make some experts popular: that of rank n is used in proportion to 1 / n to this power (Zipf's law). "
    "For random weights, which use all alike.", 0.0, 4.0, flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_integer("ctx_start", 2048, "The first frontier.", flag_values=FLAGS)
flags.DEFINE_integer("ctx_max", 28672, "The last frontier.", flag_values=FLAGS)
flags.DEFINE_float("step_mul", 2, "From one frontier to the next.", flag_values=FLAGS)
flags.DEFINE_integer("gen_tokens", 128, "Tokens to generate at each frontier, by each sequence.", flag_values=FLAGS)
flags.DEFINE_integer(
    "fill", None, "Instead of the sweep: fill the cache with random rows up to this many tokens, and generate there.",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_integer("batch", 1, "Sequences, each of its own tokens.", flag_values=FLAGS)
flags.DEFINE_integer("ctx", None, "Tokens that the cache has room for; by default what is needed.", flag_values=FLAGS)
flags.DEFINE_integer("prefill_chunk", None, "Tokens per prefill call; by default the config's.", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Of the prompts and of a filled cache.", flag_values=FLAGS)
flags.DEFINE_string("csv", None, "Where the table goes; by default stdout.", flag_values=FLAGS)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; see the top of this file."""

    ctx_tokens: int
    prefill_tokens: int
    prefill_tps: float
    gen_tokens: int
    gen_tps: float
    kvcache_bytes: int

    def cells(self) -> list[str]:
        """As text, in order."""
        return [f"{x:.2f}" if isinstance(x, float) else str(x) for x in dataclasses.astuple(self)]


COLUMNS = [field.name for field in dataclasses.fields(Row)]


def frontiers(start: int, stop: int, factor: float) -> list[int]:
    """start, start·factor, …, and exactly `stop`. Raises ConfigError."""
    if not 1 <= start <= stop:
        raise ConfigError(f"ctx_start: found {start}, expected 1 to {stop} (ctx_max)")
    if not factor > 1:
        raise ConfigError(f"step_mul: found {factor:g}, expected more than 1")
    points = [start]
    while points[-1] < stop:
        points.append(min(stop, max(points[-1] + 1, int(points[-1] * factor))))
    return points


def main() -> None:
    """Run the tool as FLAGS say. Raises Ds4Error."""
    points = frontiers(FLAGS.ctx_start, FLAGS.ctx_max, FLAGS.step_mul) if FLAGS.fill is None else [FLAGS.fill]
    for name, least in (("gen_tokens", 1), ("fill", 1), ("seed", 0)):
        value = FLAGS[name].value
        if value is not None and value < least:
            raise ConfigError(f"{name}: found {value}, expected at least {least}")
    acceptance = _probabilities(FLAGS.acceptance or [])
    overrides = {key: FLAGS[key].value for key in ("model", "batch", "prefill_chunk", "device_budget_gb", *cli.DRAFTS)}
    settings = Settings.load(FLAGS.config, **overrides)
    drafts = settings.draft != "off"
    if acceptance and not drafts:
        raise ConfigError("acceptance: found it without drafts, expected --draft auto or a drafter's file")
    need = points[-1] + max(FLAGS.gen_tokens, MOST_DRAFTED if drafts else 0)
    ctx = -(-need // HCA_RATIO) * HCA_RATIO if FLAGS.ctx is None else FLAGS.ctx
    if ctx < need:
        raise ConfigError(f"ctx: found {ctx}, expected at least {need} for this table")
    path = Path(FLAGS.csv) if FLAGS.csv else None
    if path and not path.parent.is_dir():
        raise ConfigError(f"csv: found {path}, expected a file in an existing directory")
    settings = dataclasses.replace(settings, ctx=ctx)
    settings.set_environment()
    from ds4jax.engine import compile_cache, memory, model_runner
    from ds4jax.engine.chunks import chunk_sizes

    compile_cache.keep_compilations()
    start = time.perf_counter()
    prefills = () if FLAGS.fill else chunks(points, settings.prefill_chunk)
    sizes = chunk_sizes(prefills, settings.prefill_chunk)
    source = model_runner.open_model(settings, FLAGS.synthetic, FLAGS.recipe)
    forced: dict[str, Any] = {"acceptance": acceptance} if acceptance else {}
    loaded = model_runner.ModelRunner(source, settings, progress=True, sizes=sizes, **forced)
    if FLAGS.skew:
        route = skewed(loaded.weights.route, FLAGS.skew, FLAGS.seed)
        loaded.weights = dataclasses.replace(loaded.weights, route=route)
    if FLAGS.fill is None:
        rows = sweep(loaded, points, FLAGS.gen_tokens, FLAGS.seed)
    else:
        rows = filled(loaded, FLAGS.fill, FLAGS.gen_tokens, FLAGS.seed)
    done = []
    for row in rows:
        if not done:
            total, compiling = time.perf_counter() - start, loaded.stats.compile_seconds
            print(f"first row after {total:.1f} s, of which compilation {compiling:.1f} s", file=sys.stderr)
        done.append(row)
        print("  ".join(f"{name} {cell}" for name, cell in zip(COLUMNS, row.cells(), strict=True)), file=sys.stderr)
        if path:  # whole at any time, and not lost with what comes after
            write(path, done)
    if not path:
        _write(sys.stdout, done)
    if sum(brought := loaded.brought):
        print(f"experts of decoded tokens on the device: {brought[0] / sum(brought):.1%}", file=sys.stderr)
    print(memory.describe_peak(loaded.steps), file=sys.stderr)


SPREAD = 0.14
"""What a rank's logarithm is multiplied with before it is added to an expert's score. The scores are √softplus(x) of
normal x, and six of 256 experts are chosen; with this factor each is chosen about as often as Zipf's law says."""


def skewed(route: Route, exponent: float, seed: int) -> Route:
    """A router that prefers some experts, in each layer other ones. Layers that route by token id stay as they are."""
    import jax
    import numpy as np

    rng = np.random.default_rng(seed)

    def preferences(bias: jax.Array) -> jax.Array:
        rank = rng.permuted(np.broadcast_to(np.arange(1, bias.shape[1] + 1), bias.shape), axis=1)
        return jax.device_put((-SPREAD * exponent * np.log(rank)).astype(np.float32), bias.sharding)

    bias = dataclasses.replace(route.bias, groups=tuple(map(preferences, route.bias.groups)))
    return dataclasses.replace(route, bias=bias)


# ---- measuring -------------------------------------------------------------------------------------------------------
def sweep(runner: ModelRunner, points: list[int], gen_tokens: int, seed: int) -> Iterator[Row]:
    """A row for every frontier; all of the runner's slots go there together."""
    import numpy as np

    from ds4jax.engine.types import Sampling

    greedy, slots = Sampling(temperature=0.0), range(runner.batch)
    tokens = np.random.default_rng(seed).integers(runner.cfg.vocab_size, size=(runner.batch, points[-1])).tolist()
    for size in sorted(chunks(points, runner.settings.prefill_chunk)):
        print(f"warming up: prefill of {size} tokens ...", file=sys.stderr)
        for _ in range(WARM):
            runner.prefill(0, tokens[0][:size], greedy)
    _warm_decode(runner)

    before = 0
    for point in points:
        new = [row[before:point] for row in tokens]
        start = time.perf_counter()
        last = {slot: runner.prefill(slot, new[slot], greedy, append=before > 0).token for slot in slots}
        seconds = time.perf_counter() - start
        n = runner.batch * (point - before)
        yield Row(point, n, n / seconds, *_generate(runner, last, gen_tokens))
        print(*drafted(runner, last), sep="\n", end="", file=sys.stderr)
        before = point


def chunks(points: list[int], chunk: int) -> set[int]:
    """The numbers of tokens in the prefill calls that lead from frontier to frontier."""
    from ds4jax.engine.chunks import chunk_lengths

    return chunk_lengths((b - a for a, b in zip([0, *points], points, strict=False)), chunk)


def filled(runner: ModelRunner, length: int, gen_tokens: int, seed: int) -> Iterator[Row]:
    """One row, with nothing prefilled: every slot gets a `random_sequence`."""
    from ds4jax.engine.types import Sampling

    def fill() -> None:
        for slot in range(runner.batch):
            runner.restore(slot, random_sequence(runner, length, seed + slot), Sampling(temperature=0.0))

    fill()
    _warm_decode(runner)
    fill()
    last = dict.fromkeys(range(runner.batch), 0)
    yield Row(length, 0, 0.0, *_generate(runner, last, gen_tokens))
    print(*drafted(runner, last), sep="\n", end="", file=sys.stderr)


def _warm_decode(runner: ModelRunner) -> None:
    print("warming up: decoding ...", file=sys.stderr)
    for _ in range(WARM):
        runner.decode(dict.fromkeys(range(runner.batch), 0))


def _generate(runner: ModelRunner, tokens: dict[int, int], n: int) -> tuple[int, float, int]:
    """n greedy tokens in every slot from the given ones on, then taken back: → tokens, per second, bytes of cache."""
    import jax

    from ds4jax.engine.compiled_steps import BLOCK
    from ds4jax.engine.types import Sampling
    from ds4jax.model import cache

    saved = jax.block_until_ready([runner.snapshot(slot) for slot in range(runner.batch)])
    start = time.perf_counter()
    running = []
    for done in range(0, n, BLOCK):  # the device is a block ahead of the host
        running.append(runner.decode_block(tokens if done == 0 else dict.fromkeys(tokens), min(BLOCK, n - done)))
        if len(running) > 1:
            running.pop(0).tokens()
    running.pop().tokens()
    seconds = time.perf_counter() - start
    for slot, state in enumerate(saved):
        runner.restore(slot, state, Sampling(temperature=0.0))
    total = n * runner.batch
    return total, total / seconds, sum(cache.nbytes(state) for state in saved)


def drafted(runner: ModelRunner, tokens: dict[int, int]) -> list[str]:
    """Plain steps and rounds of drafts from the given tokens on, timed, then taken back: → a table as lines."""
    import jax

    from ds4jax.engine.compiled_steps import ROUNDS
    from ds4jax.engine.speculation import Speculation
    from ds4jax.engine.types import Sampling

    if not runner.steps.draft_counts:
        return []
    rule, size, length = Speculation(runner.steps.draft_counts), len(tokens), runner.lengths[0]
    gained: dict[int, list[float]] = {n: [] for n in rule.counts}
    saved = jax.block_until_ready([runner.snapshot(slot) for slot in range(runner.batch)])
    for n in (0, *rule.counts):
        given: dict[int, int | None] = dict(tokens)
        for _ in range(WARM + TIMED):
            if n:
                room = {slot: runner.settings.ctx - runner.lengths[slot] for slot in tokens}
                call = runner.speculate(given, room, n, ROUNDS)
                call.tokens()
                rule.ran(size, n, call.kept().tolist(), list(room.values()), call.seconds)
                gained[n].append(call.kept().mean())
            else:
                block = runner.decode_block(given, ROUNDS)
                block.tokens()
                rule.plain(size, ROUNDS, block.seconds)
            given = dict.fromkeys(tokens)
        for slot, state in enumerate(saved):
            runner.restore(slot, state, Sampling(temperature=0.0))
    (_, plain), *others = rule.table().items()
    lines = [f"drafts after {length} tokens, {size} sequences: a plain step takes {plain * 1e3:.3f} ms"]
    for (n, _), seconds in others:
        steps, tokens_each = seconds / plain, sum(gained[n]) / len(gained[n])
        lines.append(
            f"  {n} drafts: a round {seconds * 1e3:.3f} ms, {steps:.2f} steps; {tokens_each:.2f} tokens, "
            f"{tokens_each / steps:.2f} times as fast; worth it from {break_even(steps, n)}"
        )
    return [*lines, f"  {rule}; the engine would draft {rule.choose(size) or 'none'}", ""]


def break_even(steps: float, n: int) -> str:
    """The probability, the same for n drafts, with which a round gives as many tokens as it takes plain steps."""
    if steps > 1 + n:
        return "no acceptance on"
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**j for j in range(n + 1)) < steps else (low, middle)
    return f"an acceptance of {high:.2f} on"


def _probabilities(given: list[str]) -> tuple[float, ...]:
    """Of --acceptance, for as many places as there can be. Raises ConfigError."""
    try:
        found = [float(x) for x in given]
    except ValueError:
        found = [math.nan]
    if not all(0 <= x <= 1 for x in found):
        raise ConfigError(f"acceptance: found {','.join(given)!r}, expected probabilities, 0.83,0.73,… or one for all")
    return (*found, *found[-1:] * 16)


def random_sequence(runner: ModelRunner, length: int, seed: int) -> Cache:
    """A cache as if one sequence of `length` tokens had been through the model: Gaussian rows, stored as rows are."""
    import jax

    return _sequence_maker(runner.cfg, runner.steps.compute, length)(jax.random.key(seed))


@functools.cache
def _sequence_maker(cfg: ModelConfig, compute: Compute, length: int) -> Callable[[Any], Cache]:
    import jax
    import jax.numpy as jnp

    from ds4jax.model import cache
    from ds4jax.numerics import rows as numerics

    dtype, fields = jnp.dtype(compute.dtype), ("z", "g")
    kv_row, index_row = (row(cfg, compute.numerics, dtype) for row in (numerics.kv_row, numerics.index_row))
    form = cache.abstract(cfg, compute.numerics, dtype, 1, length)

    @jax.jit
    def make(key: jax.Array) -> Cache:
        keys = iter(jax.random.split(key, 4 * (1 + len(fields)) + 1))

        def normal(x: jax.ShapeDtypeStruct) -> jax.Array:
            return jax.random.normal(next(keys), x.shape, x.dtype)

        def rows(fmt: numerics.RowFormat, planes: numerics.Rows) -> numerics.Rows:
            layers, _, n, _ = next(iter(planes.values())).shape

            def layer(key: jax.Array) -> numerics.Rows:  # one at a time: unrounded rows are up to eight times as large
                return fmt.encode(jax.random.normal(key, (1, n, fmt.dim), dtype))

            return jax.lax.map(layer, jax.random.split(next(keys), layers))

        def compressed(fmt: numerics.RowFormat, like: cache.Compressed) -> cache.Compressed:
            return cache.Compressed(rows=rows(fmt, like.rows), **{f: normal(getattr(like, f)) for f in fields})

        return cache.Cache(
            length=jnp.full((1,), length, jnp.int32),
            window=rows(kv_row, form.window),
            carry=jax.tree.map(normal, form.carry),
            csa=compressed(kv_row, form.csa),
            index=compressed(index_row, form.index),
            hca=compressed(kv_row, form.hca),
        )

    return make


# ---- the table -------------------------------------------------------------------------------------------------------
def write(path: Path, rows: list[Row]) -> None:
    """Write the whole table, in place of what was there. Raises ConfigError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "w", encoding="utf-8", newline="") as file:
            _write(file, rows)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"csv: {path} cannot be written: {error.strerror}") from None


def _write(file, rows: list[Row]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(row.cells() for row in rows)
