"""Times loading: a file of the full shape from memory to the device, twice, and checks what arrives.

    python scripts/time_load.py --folder /dev/shm                    # needs 81 GiB there, and a GPU that holds them
    python scripts/time_load.py --folder /dev/shm --first_token      # and the start of a program to its first token
    python scripts/time_load.py --folder /tmp --layers 1 --config tiny       # 3.4 GiB, anywhere
    python scripts/time_load.py --folder /tmp --layers 1 --config tiny --checkpoint      # and as a checkpoint, too

Writes the file first, if it is not there, as `python -m ds4jax.synthetic` does. Where /dev/shm is too small for it,
`mount -o remount,size=90g /dev/shm` lets it grow. Host memory is that of the process beyond its start, page-locked
memory left out; on a CPU it has the weights in it, too. First "transfer alone" says what JAX's copy from ordinary host
memory can do at all, in arrays of the loader's size and number. With --first_token, the tool `ds4jax.generate` is timed
from its start to its end, which is after one token, with an empty cache of compiled programs and then with that of the
first run. Exits with status 1 if a tensor on the device is not the file's.
"""

from __future__ import annotations

import collections
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import flags

from ds4jax.errors import Ds4Error
from ds4jax.io.recipes import RECIPES
from ds4jax.io.synthetic import FULL, Synthetic, first_layers, write_repeating
from ds4jax.settings import Settings
from ds4jax.tools import cli

GIB = 2**30

FLAGS = flags.FlagValues()
flags.DEFINE_string("folder", "/dev/shm", "Where the file is, or is written to.", flag_values=FLAGS)
flags.DEFINE_string("config", "h200", "Config whose settings of memory are taken.", flag_values=FLAGS)
flags.DEFINE_integer("layers", FULL.n_layers, "Layers of the model.", flag_values=FLAGS)
flags.DEFINE_integer("check", 12, "Number of tensors to compare with the file, chosen at random.", flag_values=FLAGS)
flags.DEFINE_integer("slab_mib", None, "Another size of `load.SLAB_BYTES`.", flag_values=FLAGS)
flags.DEFINE_integer("in_flight", None, "Another `load.IN_FLIGHT`.", flag_values=FLAGS)
flags.DEFINE_bool("checkpoint", False, "Also make a checkpoint of the file, and time its loading.", flag_values=FLAGS)
flags.DEFINE_bool("first_token", False, "Also time the whole start of a program.", flag_values=FLAGS)


def main() -> int:
    """Run the tool as FLAGS say; → exit status. Raises Ds4Error."""
    path = Path(FLAGS.folder) / f"full-{FLAGS.layers}.gguf"
    if not path.exists():
        start = time.perf_counter()
        write_repeating(path, Synthetic(first_layers(FULL, FLAGS.layers), RECIPES["q2"]), progress=True)
        report("write", path.stat().st_size, time.perf_counter() - start)
    if FLAGS.first_token:
        with tempfile.TemporaryDirectory() as cache:
            for state in ("an empty", "the first run's"):
                seconds, last_line = first_token(path, cache)
                print(f"first token, {state} cache: {seconds:.1f} s; {last_line}", flush=True)

    Settings.load(FLAGS.config).set_environment()
    import jax  # not before its environment is set, nor while another process needs the device

    from ds4jax.io import load
    from ds4jax.io.checkpoint import open_checkpoint
    from ds4jax.io.pack import pack

    folder = path.with_suffix("")
    if FLAGS.checkpoint:
        start = time.perf_counter()
        pack(open_checkpoint(path), folder, progress=True)
        print(f"{folder}: made, or found, in {time.perf_counter() - start:.1f} s", flush=True)
    load.SLAB_BYTES = FLAGS.slab_mib * 2**20 if FLAGS.slab_mib else load.SLAB_BYTES
    load.IN_FLIGHT = FLAGS.in_flight or load.IN_FLIGHT
    device = jax.devices()[0]
    print(f"{device.device_kind}, {os.cpu_count()} cores; {load.IN_FLIGHT} slabs of {load.SLAB_BYTES >> 20} MiB")
    transfer_alone(load.SLAB_BYTES, load.IN_FLIGHT)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    values, nbytes = None, 0
    for source in [path, folder] if FLAGS.checkpoint else [path]:
        for _ in range(2):
            values = None  # the device has no room for two
            start, cpu = time.perf_counter(), time.process_time()
            values, _ = load.load(source, progress=True)
            taken, cpu = time.perf_counter() - start, time.process_time() - cpu
            nbytes = sum(x.nbytes for x in jax.tree.leaves(values))
            report(f"load {source.name}", nbytes, taken, f", {cpu:.1f} s of CPU")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(f"host memory at most {peak / GIB:.2f} GiB above the start")
    if stats := device.memory_stats():
        print(f"device memory at most {(stats['peak_bytes_in_use'] - nbytes) / GIB:.2f} GiB above the weights")
    return check(values, open_checkpoint(path))


def report(what: str, nbytes: int, seconds: float, more: str = "") -> None:
    """A line with bytes, seconds and their quotient."""
    print(f"{what}: {nbytes / GIB:.2f} GiB in {seconds:.2f} s, {nbytes / seconds / 1e9:.2f} GB/s{more}", flush=True)


def first_token(path: Path, cache: str) -> tuple[float, str]:
    """Seconds that a new process takes to generate one token, with compiled programs kept in the folder `cache`.

    And the last line that it prints on stderr, about speed and memory.
    """
    argv = ["--config", FLAGS.config, "--model", str(path), "--prompt", "Hello", "--max_tokens", "1"]
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-m", "ds4jax.generate", *argv],
        env={**os.environ, "XDG_CACHE_HOME": cache},
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise Ds4Error(f"ds4jax.generate ended with status {run.returncode}: {run.stderr[-1000:]}")
    return time.perf_counter() - start, run.stderr.strip().splitlines()[-1]


def transfer_alone(nbytes: int, in_flight: int) -> None:
    """Copies one array again and again, `in_flight` at a time, after a first round."""
    import jax

    source, device = np.ones(nbytes, np.uint8), jax.devices()[0]
    jax.block_until_ready([jax.device_put(source, device) for _ in range(in_flight)])
    pending, rounds, start = collections.deque(), 8 * in_flight, time.perf_counter()
    for _ in range(rounds):
        if len(pending) == in_flight:
            pending.popleft().block_until_ready()
        pending.append(jax.device_put(source, device))
    jax.block_until_ready(list(pending))
    report("transfer alone", rounds * nbytes, time.perf_counter() - start)


def check(values, checkpoint) -> int:
    """Compare some tensors on the device with the file, at least one of each format; → exit status."""
    import jax

    from ds4jax.model import weights

    specs, treedef = jax.tree.flatten(weights.abstract(checkpoint.cfg, checkpoint.types))
    leaves = [(s, v) for s, v in zip(specs, treedef.flatten_up_to(values), strict=True) if s.quantized]
    random.seed(0)
    random.shuffle(leaves)
    firsts = {spec.format: i for i, (spec, _) in enumerate(leaves)}.values()
    leaves = [leaves[i] for i in firsts] + [leaf for i, leaf in enumerate(leaves) if i not in firsts]
    wrong = []
    for spec, value in leaves[: FLAGS.check]:
        nth = random.randrange(len(spec.tensors))
        name = spec.tensors[nth].name
        found = (value[nth] if spec.layered else value).to_bytes()
        same = np.array_equal(found, checkpoint.holder(name).raw(name))
        print(f"{'ok   ' if same else 'WRONG'} {name} {spec.format.__name__} {spec.tensors[nth].shape}", flush=True)
        wrong += [] if same else [name]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
