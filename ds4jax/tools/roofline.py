"""What a step must read and compute, and where its time goes: ``ds4jax roofline --config h200``.

One decoded token of every sequence, or with --prefill a chunk of one sequence, after --ctx tokens. By component:

  bytes, FLOPs   counted from the weight tree and the cache, see `count`
  limit          the larger of bytes over the bandwidth of a copy and FLOPs over the rate of a bfloat16 matrix product,
                 both measured first
  time           of the component's kernels in a profile of the step, known by their names and scopes, see `attribute`
  lost           time beyond the limit, and its share of all that is lost

What no name tells is "rest"; "idle" is the step's time, measured without a profiler, in which no kernel runs. A profile
in which kernels are missing, so that a component beats its limit, is an error. Without a GPU only bytes and FLOPs are
shown, and nothing is allocated.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import math
import os
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from ds4jax.config import CSA_RATIO, HCA_RATIO
from ds4jax.errors import ConfigError
from ds4jax.settings import Settings
from ds4jax.tools import cli

if TYPE_CHECKING:  # JAX must not run before `Settings.set_environment`
    from ds4jax.engine.compiled_steps import CompiledSteps
    from ds4jax.engine.model_runner import ModelRunner
    from ds4jax.tools.limits import Device

FLAGS = flags.FlagValues()
cli.define_model(FLAGS)
cli.define_synthetic(FLAGS)
flags.DEFINE_integer("ctx", None, "Tokens before the step; by default 2048, or 0 for a prefill.", flag_values=FLAGS)
flags.DEFINE_integer(
    "room", None, "Tokens that the cache has room for, which kernels are made for; by default what is needed.",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_integer("batch", 1, "Sequences that decode together.", flag_values=FLAGS)
flags.DEFINE_integer("prefill", None, "Instead of decoding: prefill this many tokens in one call.", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Of what is in the cache.", flag_values=FLAGS)
flags.DEFINE_string("csv", None, "A file for the table.", flag_values=FLAGS)
flags.DEFINE_string("plot", None, "A PNG file; needs matplotlib.", flag_values=FLAGS)

WARM = 3  # calls until a program runs as a graph
BLOCKS = 4  # decoded in a row, timed and then profiled

# Families of weights → component; the longest beginning counts.
COMPONENTS = {
    "attn": "projections",
    "attn.hc": "streams",
    "attn.norm": "streams",
    "attn.kv_norm": "new rows",
    "attn.sinks": "attention",
    "csa": "compressors",
    "csa.indexer": "indexer",
    "csa.indexer.compressor": "compressors",
    "hca": "compressors",
    "ffn.hc": "streams",
    "ffn.norm": "streams",
    "ffn.router": "router",
    "hash": "router",
    "route": "router",
    "ffn.experts": "experts",
    "ffn.shared": "shared expert",
    "head": "head",
    "head.hc": "streams",
    "head.norm": "streams",
    "embed": "rest",
}
ORDER = (
    "projections", "new rows", "compressors", "indexer", "attention", "router", "experts", "shared expert", "streams",
    "head", "links", "rest", "idle",
)  # fmt: skip

# Beginnings of the names of kernels → component. Those of products are not here: see `product_names`.
KERNELS = {
    "latent": "new rows",
    "queries_attention": "new rows",
    "queries_index": "indexer",
    "compressor": "compressors",
    "indexer_scores": "indexer",
    "topk": "indexer",
    "mla_": "attention",
    "router": "router",
    "pack_": "experts",
    "experts_": "experts",
    "hyper_": "streams",
    "nccl": "links",
    "all_reduce": "links",
}
# Families whose products are one call for few tokens (ds4jax/model/fused.py); its name has k and the sum of n.
CALLS = (
    ("attn.q_a", "attn.kv"),
    ("hca.compressor.kv", "hca.compressor.gate", "csa.compressor.kv", "csa.compressor.gate",
     "csa.indexer.compressor.kv", "csa.indexer.compressor.gate", "csa.indexer.proj"),
    ("attn.q_b", "csa.indexer.q_b"),  # of one token; of more they are two calls
    ("csa.indexer.q_b",),
    ("attn.o_a",),
    ("attn.o_b",),
    ("ffn.shared.gate", "ffn.shared.up"),
    ("ffn.router",),
    ("ffn.shared.down",),
    ("head.out",),
)  # fmt: skip
NO_COLUMNS = "ffn.shared.up"  # part of gate's output
PRODUCT = re.compile("nvjet|gemm|cublas|cutlass")  # what XLA calls products that it makes itself

# Named scopes of the model → component; those that are not here are called as the component is.
SCOPES = {"latent": "new rows", "attend": "attention", "shared_expert": "shared expert"}
KERNEL = re.compile(r'^\s*(?:ROOT )?%(\S+) = .* (?:fusion|custom-call)\(.*op_name="([^"]+)"', re.M)

LEEWAY = 1.1  # a limit may be beaten by as much: what lies in a cache is faster than a copy


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step does with one weight, or with a part of the cache.

    layer, shape: of a weight, as the device has it; None and () of a part of the cache.
    """

    family: str
    component: str
    nbytes: float
    flops: float = 0.0
    layer: int | None = None
    shape: tuple[int, ...] = ()


# ---- counting --------------------------------------------------------------------------------------------------------
def count(programs: CompiledSteps, context: int, tokens: int, sequences: int) -> list[Work]:
    """One device's work in a step that appends `tokens` to each of `sequences`, which have `context` tokens.

    Weights are read once, of the routed experts as many as independent uniform choices touch, of tables the rows used;
    stored rows once per sequence, but in decoding only those seen; a compressor's open window is written and read once.
    Of activations only the streams count, read and written at every boundary; the others are small beside these, or
    their products are bound by the tensor cores. FLOPs are those of matrix products. On a mesh, "links" has what the
    device sends: for sums, which a ring of the devices makes, and for the logits.
    """
    from ds4jax.engine import links
    from ds4jax.sharding import share

    sent = [Work(e.what, "links", e.sent) for e in links.exchanges(programs, tokens, sequences) for _ in range(e.count)]
    sequences = share(programs.compute.mesh, sequences)
    return [*_weights(programs, tokens, sequences), *_cache(programs, context, tokens, sequences), *sent]


def chooses(programs: CompiledSteps) -> bool:
    """Whether CSA layers choose rows, rather than take all that there is room for."""
    return next(iter(programs.cache.csa.rows.values())).shape[2] > programs.cfg.index_top_k


def _weights(programs: CompiledSteps, tokens: int, sequences: int) -> Iterable[Work]:
    import jax

    from ds4jax.sharding import parts

    cfg, S, choice = programs.cfg, tokens * sequences, ("csa.indexer.q_b", "csa.indexer.proj")
    mesh = programs.compute.mesh
    for spec in jax.tree.leaves(programs.tree):  # a leaf is a stack
        cut = parts(mesh, *spec.axes)
        for t in spec.tensors:
            family = t.family
            if family.startswith("mtp.") or (t.layer or 0) >= cfg.n_layers:
                continue
            if family in choice and not chooses(programs):
                continue
            names = family.split(".")
            component = next(c for i in range(len(names), 0, -1) if (c := COMPONENTS.get(".".join(names[:i]))))
            nbytes, rows = spec.nbytes / len(spec.tensors) / cut, sequences if family.startswith("head.") else S
            if t.kind == "ids" or family == "embed":
                nbytes *= min(1, S / t.shape[0])
            elif family.endswith(".ape"):
                nbytes *= min(1, tokens / t.shape[0])
            elif family.startswith("ffn.experts."):
                share = cfg.n_experts_used / cfg.n_experts
                nbytes, rows = nbytes * (1 - (1 - share) ** S), S * share
            product = t.kind == "matrix" and family != "embed" and not family.endswith(".ape")
            flops = 2.0 * rows * math.prod(t.shape) / cut if product else 0.0
            shape = tuple(n // parts(mesh, a) for n, a in zip(t.shape, t.axes, strict=True))
            yield Work(family, component, nbytes, flops, t.layer, shape)


def _cache(programs: CompiledSteps, context: int, tokens: int, sequences: int) -> Iterable[Work]:
    import numpy as np

    from ds4jax.sharding import parts

    cfg, cache = programs.cfg, programs.cache
    at = context + np.arange(tokens)  # positions of the new tokens
    near = np.minimum(at + 1, cfg.window)
    row = _row(cache.window)
    itemsize = np.dtype(programs.compute.dtype).itemsize
    streams = tokens * sequences * cfg.n_streams * cfg.embed_dim * itemsize
    for _ in range(2 * cfg.n_layers + 1):
        yield Work("streams", "streams", 2 * streams)
    for layer in range(cfg.n_layers):
        ratio = cfg.ratio(layer)
        seen = (at + 1) // ratio if ratio else 0 * at
        read = near + (np.minimum(seen, cfg.index_top_k) if ratio == CSA_RATIO and chooses(programs) else seen)
        rows = read.sum() if tokens == 1 else min(context, cfg.window) + tokens + seen[-1]
        flops = 4.0 * cfg.n_heads / parts(programs.compute.mesh, "heads") * cfg.head_dim * read.sum()
        yield Work("rows", "attention", sequences * row * float(rows), sequences * flops)
        yield Work("rows", "new rows", sequences * row * float(min(tokens, cfg.window)))
        kinds = {CSA_RATIO: (cache.csa, cache.index), HCA_RATIO: (cache.hca,)}.get(ratio, ())
        for kind in kinds:
            token = sum(x.shape[-1] * x.dtype.itemsize for x in (kind.z, kind.g))
            yield Work("window", "compressors", sequences * tokens * (2.0 * token + _row(kind.rows) / ratio))
        if ratio == CSA_RATIO and chooses(programs):
            flops = 2.0 * cfg.index_heads * cfg.index_head_dim * seen.sum()
            yield Work("keys", "indexer", sequences * _row(cache.index.rows) * float(seen[-1]), sequences * flops)


def _row(planes: Mapping[str, Any]) -> int:
    """Bytes of one stored row."""
    return sum(x.shape[-1] * x.dtype.itemsize for x in planes.values())


# ---- the profile -----------------------------------------------------------------------------------------------------
Shares = dict[str, dict[str, float]]  # name → component → its share of what the name does


def product_names(works: Iterable[Work]) -> tuple[Shares, dict[str, float]]:
    """Names of our product kernels → the components they serve, by bytes; and those that XLA's serve, by FLOPs."""
    layers: dict[int | None, dict[str, Work]] = defaultdict(dict)
    for w in works:
        if w.shape and w.flops:
            layers[w.layer][w.family] = w
    names: Shares = defaultdict(lambda: defaultdict(float))
    dense: dict[str, float] = defaultdict(float)
    for families in layers.values():
        for call in CALLS:
            found = [families[f] for f in call if f in families]
            if not found:
                continue
            k, n = found[0].shape[-1], sum(w.shape[-2] for w in found if w.family != NO_COLUMNS)
            for w in found:
                for kind in ("matmul", "matmul_combine"):
                    names[f"{kind}_{k}_{n}"][w.component] += w.nbytes
        for w in families.values():  # of many tokens
            names[f"grouped_{w.shape[-1]}_{w.shape[-2]}"][w.component] += w.flops
            if any(w.family in call for call in CALLS):
                dense[w.component] += w.flops
    for name, parts in names.items():
        if "experts" in parts:  # a matrix of the shared expert has the same name, if it is not left to XLA
            names[name] = {"experts": 1.0}
    return {name: _normal(parts) for name, parts in names.items()}, _normal(dense)


def _normal(parts: Mapping[str, float]) -> dict[str, float]:
    total = sum(parts.values())
    return {name: x / total for name, x in parts.items()}


def scopes(program: str) -> dict[str, str]:
    """Kernels that XLA made itself, by name → component, by the named scope that the text of a program tells."""
    out = {}
    for name, where in KERNEL.findall(program):
        component = next((SCOPES.get(part, part) for part in where.split("/") if SCOPES.get(part, part) in ORDER), None)
        if component:
            out[name.replace(".", "_").replace("-", "_")] = component
    return out


def attribute(
    times: Mapping[str, float], works: list[Work], scoped: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Seconds by kernel → seconds by component. What serves several components is shared out by what each must do.

    XLA appends __1, __2, … to equal names. scoped: what `scopes` says of the others.
    """
    products, dense = product_names(works)
    out: dict[str, float] = defaultdict(float)
    for name, seconds in times.items():
        inside = (scoped or {}).get(name)
        name = name.split("__")[0]
        known = next((c for start, c in KERNELS.items() if name.startswith(start)), inside)
        parts = products.get(name) or (dense if not inside and PRODUCT.search(name) else {known or "rest": 1.0})
        for component, share in parts.items():
            out[component] += seconds * share
    return dict(out)


def kernel_times(trace: Path, steps: int) -> dict[str, float]:
    """Seconds per step of every kernel and copy on the first GPU, from what the profiler left in a folder.

    Kernels that run side by side share that time equally, so that all of them take as long as the GPU was busy.
    """
    import jax

    edges: list[tuple[float, int, str]] = []
    for path in trace.glob("**/*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines if "GPU:0" in plane.name else ():
                for event in line.events if line.name.startswith("Stream") else ():
                    edges.append((event.start_ns, 1, event.name))
                    edges.append((event.start_ns + event.duration_ns, -1, event.name))
    times: dict[str, float] = defaultdict(float)
    running: Counter[str] = Counter()
    last = 0.0
    for at, change, name in sorted(edges):  # ends come first
        for one, n in running.items():
            times[one] += (at - last) * n / running.total()
        running[name] += change
        running += Counter()  # without the zeros
        last = at
    return {name: ns * 1e-9 / steps for name, ns in times.items()}


def measure(runner: ModelRunner, context: int, prefill: int | None, seed: int) -> tuple[float, dict[str, float]]:
    """The time of a step, and its kernels' times."""
    import jax
    import numpy as np

    from ds4jax.engine.compiled_steps import BLOCK
    from ds4jax.engine.types import Sampling
    from ds4jax.tools.bench import random_sequence

    greedy = Sampling(temperature=0.0)
    tokens = np.random.default_rng(seed).integers(runner.cfg.vocab_size, size=prefill or runner.batch).tolist()
    saved = random_sequence(runner, context, seed) if context else None

    def run(around: Any = None) -> float:
        """Seconds of some steps, all of them at this context or a little beyond. around: a context manager."""
        if saved is not None:
            for slot in range(runner.batch):
                runner.restore(slot, saved, greedy)
        jax.block_until_ready(runner.cache)
        with around or contextlib.nullcontext():
            start = time.perf_counter()
            if prefill:
                runner.prefill(0, tokens, greedy, append=context > 0)
            else:
                given, blocks = dict(enumerate(tokens)), []
                for _ in range(BLOCKS):  # the device is a block ahead of the host
                    blocks.append(runner.decode_block(given, BLOCK))
                    if len(blocks) > 1:
                        blocks.pop(0).tokens()
                    given = dict.fromkeys(given)
                blocks.pop().tokens()
            return time.perf_counter() - start

    steps = 1 if prefill else BLOCKS * BLOCK
    for _ in range(WARM):
        run()
    seconds = min(run() for _ in range(3)) / steps
    with tempfile.TemporaryDirectory() as folder:
        run(jax.profiler.trace(folder))
        return seconds, kernel_times(Path(folder), steps)


def check(found: list[Row], seconds: float) -> None:
    """Refuse a measured table that contradicts itself. seconds: of the step. Raises ConfigError."""
    *parts, total = found
    busy = sum(row.seconds for row in parts if row.component != "idle")
    if busy > LEEWAY * seconds:
        raise ConfigError(
            f"profile: found {busy * 1e3:.3f} ms of kernels, expected at most a step's {seconds * 1e3:.3f} ms"
        )
    for row in parts:
        if row.limit > LEEWAY * row.seconds and row.limit > total.limit / 100:
            raise ConfigError(
                f"profile: found {row.seconds * 1e3:.3f} ms of {row.component}, expected at least its limit, "
                f"{row.limit * 1e3:.3f} ms: kernels are missing"
            )


# ---- the table -------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Row:
    """One component: what it must do and, if that was measured, its limit and its time in seconds."""

    component: str
    nbytes: float
    flops: float
    measured: bool = False
    limit: float = 0.0
    seconds: float = 0.0

    @property
    def lost(self) -> float:
        return self.seconds - self.limit

    def cells(self, lost: float) -> list[str]:
        """The cells of COLUMNS; the first three if nothing was measured. lost: by all components."""
        out = [self.component, f"{self.nbytes / 1e6:.2f}", f"{self.flops / 1e9:.3f}"]
        if not self.measured:
            return out
        rates = (0.0, 0.0) if not self.seconds else (self.nbytes / self.seconds / 1e9, self.flops / self.seconds / 1e12)
        share = self.limit / self.seconds if self.seconds else 0.0
        return out + [
            f"{self.limit * 1e3:.4f}", f"{self.seconds * 1e3:.4f}", f"{rates[0]:.1f}", f"{rates[1]:.2f}",
            f"{share:.1%}", f"{self.lost * 1e3:.4f}", f"{self.lost / lost if lost else 0:.1%}",
        ]  # fmt: skip


COLUMNS = ("component", "MB", "GFLOP", "limit_ms", "ms", "GB/s", "TFLOP/s", "of_limit", "lost_ms", "of_lost")


def rows(
    works: list[Work],
    device: Device | None = None,
    seconds: float = 0.0,
    by_component: Mapping[str, float] | None = None,
) -> list[Row]:
    """A row for every component, in order, and their sum. seconds: of the step."""
    nbytes = {c: sum(w.nbytes for w in works if w.component == c) for c in ORDER}
    flops = {c: sum(w.flops for w in works if w.component == c) for c in ORDER}
    counted = {w.component for w in works}
    if device is None or by_component is None:
        out = [Row(c, nbytes[c], flops[c]) for c in ORDER if c in counted]
    else:
        times = {**by_component, "idle": max(0.0, seconds - sum(by_component.values()))}
        out = [
            Row(c, nbytes[c], flops[c], True, device.floor(nbytes[c], flops[c]), times.get(c, 0.0))
            for c in ORDER
            if c in counted or c in times
        ]
    nbytes_in_all, flops_in_all, limit, spent = (
        sum(getattr(row, name) for row in out) for name in ("nbytes", "flops", "limit", "seconds")
    )
    return [*out, Row("total", nbytes_in_all, flops_in_all, out[-1].measured, limit, spent)]


def table(found: list[Row]) -> list[list[str]]:
    """The header and the cells of all rows."""
    cells = [row.cells(found[-1].lost) for row in found]
    return [list(COLUMNS[: len(cells[0])]), *cells]


def text(cells: list[list[str]]) -> str:
    """Cells in columns."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        for line in cells
    ]
    return "\n".join("  ".join(line) for line in lines)


def plot(path: Path, found: list[Row], title: str) -> None:
    """A PNG of every component's limit and of the time beyond it. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "plot: found no matplotlib, expected it to be installed (pip install 'ds4jax[plot]')"
        ) from None
    shown = sorted((row for row in found[:-1] if row.seconds), key=lambda row: row.seconds)
    figure = Figure(figsize=(9, 0.4 * len(shown) + 1.6), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots()
    names = [row.component for row in shown]
    limits = [min(row.limit, row.seconds) * 1e3 for row in shown]
    axes.barh(names, limits, label="limit")
    axes.barh(names, [max(row.lost, 0) * 1e3 for row in shown], left=limits, label="beyond it", alpha=0.5)
    for row in shown:
        axes.annotate(f" {row.limit / row.seconds:.0%}", (row.seconds * 1e3, row.component), va="center")
    axes.set_xlabel("ms per step")
    axes.set_title(title)
    axes.margins(x=0.1)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run the tool as FLAGS say. Raises Ds4Error."""
    for name, least in (("ctx", 0 if FLAGS.prefill else 1), ("batch", 1), ("prefill", 2), ("seed", 0)):
        value = FLAGS[name].value
        if value is not None and value < least:
            raise ConfigError(f"{name}: found {value}, expected at least {least}")
    if FLAGS.prefill and FLAGS.batch > 1:
        raise ConfigError(f"batch: found {FLAGS.batch}, expected 1 with prefill, which takes one sequence at a time")
    for name in ("csv", "plot"):
        path = FLAGS[name].value
        if path and not Path(path).parent.is_dir():
            raise ConfigError(f"{name}: found {path}, expected a file in an existing directory")
    context = FLAGS.ctx if FLAGS.ctx is not None else 0 if FLAGS.prefill else 2048
    overrides = {"model": FLAGS.model, "batch": FLAGS.batch, "prefill_chunk": FLAGS.prefill, "draft": "off"}
    settings = Settings.load(FLAGS.config, **overrides)
    if settings.device_budget_gb:
        raise ConfigError(
            f"device_budget_gb: found {settings.device_budget_gb:g}, expected 0: all weights are read from the device"
        )
    settings.set_environment()
    import jax

    from ds4jax.engine import cards, compile_cache, memory, model_runner
    from ds4jax.engine.compiled_steps import BLOCK
    from ds4jax.tools import limits

    need = context + (FLAGS.prefill + 1 if FLAGS.prefill else BLOCKS * BLOCK)
    room = -(-need // HCA_RATIO) * HCA_RATIO if FLAGS.room is None else FLAGS.room
    if room < need:
        raise ConfigError(f"room: found {room}, expected at least {need}")
    settings = dataclasses.replace(settings, ctx=room)
    source, tokens = model_runner.open_model(settings, FLAGS.synthetic, FLAGS.recipe), FLAGS.prefill or 1
    if jax.default_backend() != "gpu":
        kind, card = jax.devices()[0].device_kind, None if settings.device == "here" else cards.find(settings.device)
        of = f", those of {card.name}" if card else ""
        print(f"no GPU here, {kind}: only bytes and FLOPs{of}, nothing is measured", file=sys.stderr)
        if FLAGS.plot:
            raise ConfigError("plot: found nothing to show, expected a GPU to measure on")
        programs = memory.steps(source, settings, card=card, compiled=False)
        _report(rows(count(programs, context, tokens, FLAGS.batch)), programs, tokens)
        return
    device = limits.measure()
    print(f"{device.name}: {device.bandwidth / 1e9:.0f} GB/s, {device.rate / 1e12:.1f} TFLOP/s", file=sys.stderr)
    compile_cache.keep_compilations()
    loaded = model_runner.ModelRunner(source, settings, progress=True)
    works = count(loaded.steps, context, tokens, FLAGS.batch)
    seconds, times = measure(loaded, context, FLAGS.prefill, FLAGS.seed)
    scoped = scopes("\n".join(str(program.as_text()) for program in loaded.steps.compiled.values()))
    found = rows(works, device, seconds, attribute(times, works, scoped))
    check(found, seconds)
    what = f"prefill of {tokens}" if FLAGS.prefill else f"decoding, {FLAGS.batch} at once"
    n = tokens * FLAGS.batch
    title = f"{device.name}, {what} after {context} tokens: {n / seconds:.1f} tokens/s, limit {n / found[-1].limit:.1f}"
    print(title)
    _report(found, loaded.steps, tokens)
    unknown = {name: t for name, t in times.items() if set(attribute({name: t}, works, scoped)) == {"rest"}}
    print(
        "longest of the rest: " + ", ".join(f"{name} {t * 1e3:.4f} ms" for name, t in Counter(unknown).most_common(8))
    )
    if FLAGS.plot:
        plot(Path(FLAGS.plot), found, title)


def _report(found: list[Row], programs: CompiledSteps, tokens: int) -> None:
    from ds4jax.engine import links

    cells = table(found)
    print(text(cells))
    if programs.settings.devices > 1:
        print(f"each device sends {links.describe(programs, tokens, FLAGS.batch)}")
    if FLAGS.csv:
        partial = Path(f"{FLAGS.csv}.{os.getpid()}")
        with open(partial, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(cells)
        os.replace(partial, FLAGS.csv)
