"""Checks and times the kernels at their real shapes, and sweeps their tile sizes.

    python scripts/autotune.py --minutes 8 --out kernels.json            # every kernel, on the GPU
    python scripts/autotune.py --ops matmul,topk --shapes 'decode*' --write
    python scripts/autotune.py --gpus 0,1,2,3 --write                    # the same, dealt out to four GPUs

A kernel is a module of `pallas_kernels` with SHAPES, a call is `op(*shape.inputs(key), **shape.static, config=c)`. The
default config of every shape comes first, then, while time is left, its other configs in random order, every shape with
an equal share of the time. A config that cannot be compiled or run is a line of the table, too.

How a call is timed: one compiled program is a loop, whose body makes as many calls as it takes to read 512 MiB (at
most 64), each on its own copy of the inputs, so that none finds them in a cache. They run one after the other, recorded
as one CUDA graph. Results take the place of the last ones, as a launch whose results lie elsewhere has to write every
node of the graph anew, 10 to 20 µs each on the host; and the loop is as long as takes some 20 ms. The time of a call is
the median of a few rounds of launches over the number of calls, with nothing subtracted. "cached" marks shapes so small
that all their copies may stay in the cache after all. Errors are ‖result - reference‖ / ‖reference‖, or the share of
integers that differ, of the first launch's results. "repeats" is whether all copies gave the same result. The floor is
the larger of the bytes over the bandwidth and the FLOPs over the rate of a bfloat16 matrix product, both measured
first.

A shape with `in_place`, (number of an argument, number of the result that takes its place, or None for the whole
result), has a call that updates memory: each call then takes what the one before it left, and so does the reference.
Where a part of a result means nothing, `shape.defined(result, inputs)` has something in place of it.
"""

from __future__ import annotations

import dataclasses
import datetime
import fnmatch
import functools
import importlib
import json
import math
import os
import pkgutil
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import batched
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from absl import flags

from ds4jax.errors import ConfigError
from ds4jax.tools import cli

if TYPE_CHECKING:  # JAX comes late, so that --help is quick and --gpus has no device of its own
    from ds4jax.tools.limits import Device

ROTATE_BYTES = 512 * 2**20  # four times the largest level-2 cache, 128 MiB
MOST_CALLS = 64
MEMORY = 24 * 2**30  # for the copies of the inputs and the results
LAUNCH = 0.02  # seconds, about
KERNEL = 3e-6  # seconds of a kernel that does nothing
MOST_TURNS = 200
COMPILE_AT_ONCE = 16

FLAGS = flags.FlagValues()
flags.DEFINE_list("ops", [], "Modules of pallas_kernels, the most important first; by default all.", flag_values=FLAGS)
flags.DEFINE_list("shapes", ["*"], "Names of shapes, or patterns.", flag_values=FLAGS)
flags.DEFINE_string("out", None, "A JSON file for all results, written as they come.", flag_values=FLAGS)
flags.DEFINE_integer("repeats", 5, "Rounds per config.", flag_values=FLAGS)
flags.DEFINE_float("minutes", 8, "When to stop.", flag_values=FLAGS)
flags.DEFINE_bool("sweep", True, "Try other configs than the default ones.", flag_values=FLAGS)
flags.DEFINE_bool(
    "write", False, "Add each shape's fastest config to configs/tuned/DEVICE.json.", flag_values=FLAGS
)  # fmt: skip
flags.DEFINE_float("max_error", 0.02, "Of a config that may be written.", flag_values=FLAGS)
flags.DEFINE_list("gpus", [], "Numbers of GPUs; a process for each takes its share of the shapes.", flag_values=FLAGS)
flags.DEFINE_string("part", "0/1", "Which share of the shapes to take, of how many.", flag_values=FLAGS)


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape of one kernel: the kernel and the op's formula with its static arguments."""

    op_name: str
    name: str
    module: ModuleType
    shape: Any

    @property
    def op(self) -> Callable:
        """The function called ``op``, or as its module is; a product that a config leaves to XLA is XLA's."""
        kernel = getattr(self.module, "op", None) or getattr(self.module, self.op_name)

        def run(*inputs: Any, config: Any, interpret: bool = False, **static: Any) -> Any:
            if getattr(config, "fused", True):
                return kernel(*inputs, config=config, interpret=interpret, **static)
            from ds4jax.ops import check

            return check.left_to_xla(*inputs, **static)

        return run

    @property
    def in_place(self) -> tuple[int, int | None] | None:
        """See the top of this file."""
        return getattr(self.shape, "in_place", None)

    def defined(self, result: Any, inputs: Any) -> Any:
        """A result without what means nothing; see the top of this file."""
        return self.shape.defined(result, inputs) if hasattr(self.shape, "defined") else result

    def reference(self, *inputs: Any) -> Any:
        """What the op computes, in XLA."""
        from ds4jax.ops import check

        return check.formula(self.op_name)(*inputs, **self.shape.static)

    def candidates(self) -> list[Any]:
        """The configs to try besides the default one, in an order that makes any part of them a random sample."""
        default = self.module.default_config(self.shape)
        out = [c for c in self.module.configs(self.shape) if c != default]
        random.Random(0).shuffle(out)
        return out


@dataclasses.dataclass
class Result:
    """One config on one shape. us: microseconds, or None for what failed, with the reason."""

    op: str
    shape: str
    config: dict[str, Any]
    default: bool
    us: float | None = None
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    error: float | None = None
    floor_share: float | None = None
    repeats: bool | None = None
    cached: bool | None = None
    failed: str | None = None

    def line(self) -> str:
        """One line of the table."""
        config = " ".join(f"{key}={value}" for key, value in self.config.items()) + (" (default)" * self.default)
        if self.us is None:
            return f"    failed  {config}: {self.failed}"
        notes = [note for note, on in (("DOES NOT REPEAT", not self.repeats), ("cached", self.cached)) if on]
        return (
            f"{self.us:10.2f} µs {self.gb_per_s:8.1f} GB/s {self.tflop_per_s:7.2f} TFLOP/s  error {self.error:.1e}  "
            f"{self.floor_share:6.1%} of the floor  {'; '.join([config, *notes])}"
        )


def discover(names: Sequence[str], patterns: Sequence[str]) -> list[Case]:
    """The cases that flags ask for, in their order. Raises ConfigError where there is no such kernel or shape."""
    import ds4jax.formats  # noqa: F401 (the kernels learn of the weight formats)
    import pallas_kernels

    found = [m.name for m in pkgutil.iter_modules(pallas_kernels.__path__) if m.name != "common"]
    for name in names:
        if name not in found:
            raise ConfigError(f"ops: found {name!r}, expected some of {', '.join(found)}")
    cases = []
    for name in names or found:
        try:
            module = importlib.import_module(f"pallas_kernels.{name}")
        except Exception as error:  # one that is being worked on does not stop the others
            print(f"{name} cannot be imported: {_first_line(error)}")
            continue
        shapes = getattr(module, "SHAPES", {})
        cases += [
            Case(name, shape_name, module, shape)
            for shape_name, shape in shapes.items()
            if any(fnmatch.fnmatchcase(shape_name, pattern) for pattern in patterns)
        ]
    if not cases:
        raise ConfigError(f"shapes: found {', '.join(patterns)}, expected names or patterns of some shapes")
    return cases


# ---- measuring -------------------------------------------------------------------------------------------------------
def measure(case: Case, configs: Sequence[Any], device: Device, repeats: int, deadline: float) -> list[Result]:
    """Check and time `configs` until `deadline` (of `time.monotonic`), but at least the first."""
    import jax

    default = case.module.default_config(case.shape)
    results = [Result(case.op_name, case.name, dataclasses.asdict(c), c == default) for c in configs]
    if not results:
        return []
    try:
        inputs = jax.block_until_ready(case.shape.inputs(jax.random.key(0)))
        sets = copies(case.shape, inputs, jax.eval_shape(case.reference, *inputs))
        n = turns(device.floor(case.shape.nbytes, case.shape.flops) * len(sets), len(sets))
        first = before(case.in_place, inputs, jax.eval_shape(case.reference, *inputs))
        again = n if case.in_place else 1
        reference = jax.jit(functools.partial(looped, case.reference, case.in_place, again), donate_argnums=0)
        (expected,) = jax.block_until_ready(reference([first], [inputs]))
    except Exception as error:  # whatever is wrong with one shape, the others go on
        return [dataclasses.replace(results[0], failed=f"reference: {_first_line(error)}")]

    done = 0
    for batch in batched(zip(results, configs, strict=True), COMPILE_AT_ONCE):
        if done and time.monotonic() > deadline:
            break
        programs = compile_all(case, [config for _, config in batch], sets, n)
        for (result, _), program in zip(batch, programs, strict=True):
            if done and time.monotonic() > deadline:
                break
            done += 1
            try:
                if isinstance(program, Exception):
                    raise program
                first = [before(case.in_place, x, out) for x, out in zip(sets, program.out_info, strict=True)]
                out = program(first, sets)
                said = [case.defined(x, inputs) for x in out]
                result.error = max(norm_error(x, case.defined(expected, inputs)) for x in (said[0], said[-1]))
                result.repeats = same_bits(said)
                t = relaunched(program, out, sets, repeats) / len(sets) / n
                del out
                result.us = t * 1e6
                result.gb_per_s = case.shape.nbytes / t / 1e9
                result.tflop_per_s = case.shape.flops / t / 1e12
                result.floor_share = device.floor(case.shape.nbytes, case.shape.flops) / t
                result.cached = len(sets) * case.shape.nbytes < ROTATE_BYTES / 2
            except Exception as error:
                result.failed = _first_line(error)
    return results[:done]


def relaunched(program: Callable, results: list[Any], sets: list[Any], repeats: int) -> float:
    """The time of a launch on the results of the launch before it."""
    from ds4jax.tools import limits

    def launch() -> list[Any]:
        nonlocal results
        results = program(results, sets)
        return results

    return limits.seconds(launch, repeats)


def copies(shape: Any, inputs: Any, outputs: Any) -> list[Any]:
    """The inputs, as many times as the timing wants and the memory has room for; no two share an array."""
    import jax

    each = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((inputs, outputs)))
    n = min(MOST_CALLS, math.ceil(ROTATE_BYTES / max(1, shape.nbytes)), MEMORY // each)
    again = jax.jit(lambda x: jax.tree.map(jax.numpy.copy, x))
    return [inputs, *(jax.block_until_ready(again(inputs)) for _ in range(max(1, n - 1)))]


def turns(floor: float, calls: int) -> int:
    """How often a loop goes round. floor: seconds that the calls of one turn take at least."""
    return max(2, min(MOST_TURNS, round(LAUNCH / (floor + calls * KERNEL))))


def before(in_place: Any, inputs: Any, results: Any) -> Any:
    """What a loop starts with: zeros in place of results, given their shapes; but a copy of what the call updates."""
    import jax
    import jax.numpy as jnp

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), results)
    if not in_place:
        return zeros
    argument, nth = in_place
    updated = jax.tree.map(jnp.copy, inputs[argument])
    return updated if nth is None else (*zeros[:nth], updated, *zeros[nth + 1 :])


def looped(call: Callable, in_place: Any, turns: int, results: list[Any], sets: list[Any]) -> list[Any]:
    """The last results of `turns` times a call on each of `sets`, to be jitted and `results`, by set, be donated."""
    from jax import lax

    def after(results: Any, inputs: Any) -> Any:
        """One more call. It depends on the last one's results, or XLA would make it once, before the loop."""
        inputs, results = lax.optimization_barrier((inputs, results))
        if in_place:
            argument, nth = in_place
            inputs = *inputs[:argument], results if nth is None else results[nth], *inputs[argument + 1 :]
        return call(*inputs)

    # The number of turns is static: one that the device knows would be copied to the host in every turn.
    return lax.fori_loop(0, turns, lambda _, results: list(map(after, results, sets)), results)


def compile_all(case: Case, configs: Sequence[Any], sets: list[Any], turns: int) -> list[Any]:
    """A program per config that makes `turns` calls on each of `sets`, or the exception that came instead."""
    import jax

    cpu = jax.default_backend() == "cpu"
    options = dict(case.shape.static) | ({"interpret": True} if cpu else {})
    # Calls do not depend on each other, and must not run side by side.
    compiler_options = None if cpu else {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"}

    def lowered(config: Any) -> Any:
        try:
            call = functools.partial(case.op, **options, config=config)
            loop = jax.jit(functools.partial(looped, call, case.in_place, turns), donate_argnums=0)
            return loop.lower([jax.eval_shape(call, *inputs) for inputs in sets[:1]] * len(sets), sets)
        except Exception as error:
            return error

    def compiled(program: Any) -> Any:
        try:
            return program if isinstance(program, Exception) else program.compile(compiler_options)
        except Exception as error:
            return error

    with ThreadPoolExecutor() as pool:
        return list(pool.map(compiled, [lowered(config) for config in configs]))


def norm_error(found: Any, expected: Any) -> float:
    """The largest error of any array: ‖found - expected‖ / ‖expected‖ of floats, the share that differs of integers.

    Infinite where one is finite and the other is not, as -inf marks what must not be chosen. Raises ValueError if the
    arrays do not correspond.
    """
    import jax
    import jax.numpy as jnp

    def error(x: jax.Array, y: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == bool:
            return (x != y).mean()
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        finite = jnp.isfinite(y)
        special = jnp.where(finite, jnp.isfinite(x), (x == y) | (jnp.isnan(x) & jnp.isnan(y))).all()
        x, y = jnp.where(finite, x, 0), jnp.where(finite, y, 0)
        relative = jnp.linalg.norm((x - y).ravel()) / jnp.maximum(jnp.linalg.norm(y.ravel()), 1e-30)
        return jnp.where(special, relative, jnp.inf)

    xs, ys = jax.tree.leaves(found), jax.tree.leaves(expected)
    if [x.shape for x in xs] != [y.shape for y in ys]:
        raise ValueError(f"results {[x.shape for x in xs]} where the reference has {[y.shape for y in ys]}")
    return max(float(jax.jit(error)(x, y)) for x, y in zip(xs, ys, strict=True))


def same_bits(outs: list[Any]) -> bool:
    """Whether all results, of equal inputs, are equal; NaN equals NaN."""
    import jax
    import jax.numpy as jnp

    def equal(x: jax.Array, y: jax.Array) -> jax.Array:
        return ((x == y) | ((x != x) & (y != y))).all()

    compare = jax.jit(lambda a, b: jnp.array([equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)]))
    return all(compare(outs[0], out).all() for out in outs[1:])


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300]


# ---- the sweep -------------------------------------------------------------------------------------------------------
def main() -> int:
    """Run the tool as FLAGS say; → exit status: 1 if the default config of a shape failed. Raises Ds4Error."""
    start = time.monotonic()
    cases = discover(FLAGS.ops, FLAGS.shapes)
    report = fan_out() if FLAGS.gpus else run(cases, start + 60 * FLAGS.minutes)
    if FLAGS.out:
        save(Path(FLAGS.out), report)
    print(summary(report["results"]))
    if FLAGS.write:
        from ds4jax.ops import tuned

        path = tuned.path_of(report["device"])
        print(f"{write_winners(path, cases, report['results'], FLAGS.max_error)} configs written to {path}")
    return int(any(r["default"] and r["us"] is None for r in report["results"]))


def run(cases: list[Case], deadline: float) -> dict[str, Any]:
    """Everything on one device: → what the JSON file holds."""
    import jax

    from ds4jax.tools import limits

    part, parts = map(int, FLAGS.part.split("/"))
    cases, device = cases[part::parts], limits.measure()
    report = {
        "device": device.name,
        "bandwidth": device.bandwidth,
        "rate": device.rate,
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "command": " ".join(["python", "scripts/autotune.py", *sys.argv[1:]]),
        "results": [],
    }
    print(f"{device.name}, jax {jax.__version__}: {device.bandwidth / 1e9:.0f} GB/s, {device.rate / 1e12:.1f} TFLOP/s")

    def take(case: Case, configs: Sequence[Any], until: float) -> None:
        least = device.floor(case.shape.nbytes, case.shape.flops)
        floor = f"{case.shape.nbytes / 1e6:.2f} MB, {case.shape.flops / 1e9:.2f} GFLOP"
        print(f"{case.op_name}, {case.name}: {floor}, floor {least * 1e6:.2f} µs", flush=True)
        results = sorted(measure(case, configs, device, FLAGS.repeats, until), key=_time)
        print("\n".join(result.line() for result in results), flush=True)
        report["results"] += map(dataclasses.asdict, results)
        if FLAGS.out:
            save(Path(FLAGS.out), report)
        if any(result.failed for result in results):
            jax.block_until_ready(jax.numpy.arange(8) + 1)  # an illegal access takes the device from the whole process

    try:
        for case in cases:
            if time.monotonic() < deadline:
                take(case, [case.module.default_config(case.shape)], deadline)
        for i, case in enumerate(cases if FLAGS.sweep else []):
            now = time.monotonic()
            if now < deadline and (candidates := case.candidates()):
                take(case, candidates, now + (deadline - now) / (len(cases) - i))
    except jax.errors.JaxRuntimeError as error:
        print(f"the device is lost: {_first_line(error)}")
    return report


def fan_out() -> dict[str, Any]:
    """A process for each of --gpus: → their reports as one."""
    with tempfile.TemporaryDirectory() as folder:
        names = ("ops", "shapes", "repeats", "minutes", "sweep")
        same = [f"--{n}={','.join(v) if isinstance(v := FLAGS[n].value, list) else v}" for n in names]
        children = []
        for i, gpu in enumerate(FLAGS.gpus):
            own = [f"--part={i}/{len(FLAGS.gpus)}", f"--out={folder}/{i}.json"]
            command = [sys.executable, __file__, *same, *own]
            children.append(subprocess.Popen(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu}))
        for child in children:
            child.wait()
        reports = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    if not reports:
        raise ConfigError(f"gpus: found {', '.join(FLAGS.gpus)}, and no result of any; see above")
    return reports[0] | {"results": [result for report in reports for result in report["results"]]}


def summary(results: list[dict[str, Any]]) -> str:
    """The fastest config of every shape, and what it gained over the default one."""
    lines = ["fastest:"]
    for (op, shape), group in _by_shape(results).items():
        best = min((r for r in group if r["us"] is not None), key=lambda r: r["us"], default=None)
        default = next((r["us"] for r in group if r["default"] and r["us"] is not None), None)
        gain = f", {default / best['us'] - 1:+.0%}" if best and default and not best["default"] else ""
        text = f"{best['us']:.2f} µs, {best['floor_share']:.0%} of the floor{gain}" if best else "all failed"
        lines.append(f"  {op}, {shape}: {text}")
    return "\n".join(lines)


def write_winners(path: Path, cases: Sequence[Case], results: list[dict[str, Any]], max_error: float) -> int:
    """Put each shape's fastest config that is correct and repeats into `path`, beside what is there; → how many.

    Shapes that `ds4jax.ops.tuned` cannot tell apart get one config, under the first one's name: the one with the
    smallest time, as a share of the default one's and averaged (geometrically) over the shapes that it was tried on.
    """
    from ds4jax.ops import tuned

    groups: dict[tuple[str, Any], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.op_name, tuned.key(case.shape)), []).append(case)
    by_shape, content, n = _by_shape(results), json.loads(path.read_text()) if path.exists() else {}, 0
    for (op, key), group in groups.items():
        shares: dict[str, list[float]] = {}
        for case in group:
            tried = by_shape.get((op, case.name), [])
            good = [r["us"] is not None and r["repeats"] and r["error"] <= max_error for r in tried]
            times = [r["us"] if ok else math.inf for r, ok in zip(tried, good, strict=True)]
            default = (t for r, t in zip(tried, times, strict=True) if r["default"] and t < math.inf)
            unit = next(default, min(times, default=math.inf))
            for r, t in zip(tried, times, strict=True):
                shares.setdefault(json.dumps(r["config"]), []).append(math.log(t / unit) if t < math.inf else math.inf)
        mean = {config: statistics.mean(of_shapes) for config, of_shapes in shares.items()}
        best = min(mean, key=mean.__getitem__, default=None)
        if best is not None and mean[best] < math.inf:
            names = [name for name, shape in group[0].module.SHAPES.items() if tuned.key(shape) == key]
            rest = {name: c for name, c in content.get(op, {}).items() if name not in names}
            content[op] = rest | {names[0]: json.loads(best)}
            n += 1
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, {op: dict(sorted(shapes.items())) for op, shapes in sorted(content.items())})
    return n


def save(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _time(result: Result) -> float:
    return math.inf if result.us is None else result.us


def _by_shape(results: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    out: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        out.setdefault((result["op"], result["shape"]), []).append(result)
    return out


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
