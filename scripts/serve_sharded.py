"""Serve one model on several processes, each with the GPUs of its host: the same command on every host.

    export DS4JAX_HOSTS_SECRET=...    # the same on every host
    python scripts/serve_sharded.py --config sparkx2 --coordinator 10.0.0.1:7000 --num_processes 2 --process_id 0
    python scripts/serve_sharded.py --config sparkx2 --coordinator 10.0.0.1:7000 --num_processes 2 --process_id 1

Process 0 is the server of `ds4jax serve`, whose flags all processes take; it must be at the coordinator's address. The
others follow it. Each loads its own part of the model from a copy of the file that it finds itself. The config's mesh,
tp × ep, has as many devices as all processes together.

The three flags can be left out: then JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID of the environment
are asked, and then Slurm (`srun python scripts/serve_sharded.py --config sparkx2`). The port of the coordinator is the
only one that this script opens between hosts, apart from --port; the devices' sums take those of NCCL, or of Gloo on
CPUs. The secret keeps strangers out, but nothing is encrypted: use a network that you trust.

If a process ends, hangs or never comes, all end with status 1 and a line that says which and why: let a supervisor
start all of them anew. With --kv_dir, which process 0 alone uses, what was computed is then read back from disk.
SIGTERM or Ctrl-C to any of them ends all in order.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from typing import TYPE_CHECKING

from absl import flags

from ds4jax.errors import ConfigError
from ds4jax.settings import Settings
from ds4jax.tools import cli, serve

if TYPE_CHECKING:  # JAX takes a second to import
    from ds4jax.engine.hosts import Place

FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, as the others reach it; it listens there.", flag_values=FLAGS
)
flags.DEFINE_integer("num_processes", None, "How many processes there are.", 2, 4096, flag_values=FLAGS)
flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", 0, 4095, flag_values=FLAGS)
flags.DEFINE_float(
    "join_timeout", 20.0, "Seconds that a process waits for the others at the start.", 1.0, 1e6, flag_values=FLAGS
)
flags.DEFINE_float(
    "silence_timeout", 12.0, "Seconds without a sign of life of a process, after which all end.", 2.0, 1e6,
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_float(
    "step_timeout", 20.0, "Seconds that a chunk of a prompt or a block of tokens may take, before all end.", 1.0, 1e6,
    flag_values=FLAGS,
)  # fmt: skip
FLAGS.append_flag_values(serve.FLAGS)


def main() -> int:
    """Run this process as FLAGS say; → exit status. Raises Ds4Error."""
    serve.FLAGS.mark_as_parsed()  # they are among FLAGS
    where, settings = place(), serve.settings()
    refuse(settings, where)
    settings.set_environment()
    import jax

    from ds4jax.engine import hosts
    from ds4jax.engine.fingerprint import of_hosts, of_runner
    from ds4jax.engine.model_runner import open_model, serving_runner

    model = open_model(settings, FLAGS.synthetic, FLAGS.recipe)
    facts = of_hosts(settings, model, FLAGS.max_seqs)
    patience = hosts.Patience(FLAGS.join_timeout, FLAGS.silence_timeout, FLAGS.step_timeout)
    with hosts.join(where, facts, patience) as joined:
        if (found := jax.device_count()) != settings.devices:
            mesh = f"tp={settings.tp} × ep={settings.ep}"
            raise ConfigError(f"mesh: {mesh} is for {settings.devices} devices, the processes have {found} together")
        if isinstance(joined, hosts.Leader):
            return serve.main(model, joined)
        runner = serving_runner(
            model, settings, FLAGS.max_seqs, progress=True, loaded=lambda runner: joined.meet(of_runner(runner))
        )
        joined.meet({})
        joined.follow(runner)
        return 0


def refuse(settings: Settings, where: Place) -> None:
    """Raises ConfigError for what needs all devices in one process."""
    if settings.dp > 1:
        raise ConfigError(f"dp: found {settings.dp} on several hosts, expected 1: process 0 has every sequence")
    if settings.devices % where.processes:
        raise ConfigError(
            f"mesh: tp={settings.tp} × ep={settings.ep} is for {settings.devices} devices, expected a multiple of the "
            f"{where.processes} processes"
        )
    if FLAGS.trace_routing:
        raise ConfigError("trace_routing: found a file on several hosts, expected none")


def place() -> Place:
    """Where this process is among the others, from FLAGS, the environment or Slurm. Raises ConfigError."""
    from ds4jax.engine.hosts import Place

    slurm = _slurm()
    found = {
        flag: FLAGS[flag].value if FLAGS[flag].value is not None else os.environ.get(variable, slurm.get(flag))
        for flag, variable in (
            ("coordinator", "JAX_COORDINATOR_ADDRESS"),
            ("num_processes", "JAX_NUM_PROCESSES"),
            ("process_id", "JAX_PROCESS_ID"),
        )
    }
    for flag, value in found.items():
        if value is None:
            raise ConfigError(f"{flag}: found nothing in the flags, the environment and Slurm's variables")
    host, _, port = str(found["coordinator"]).rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(f"coordinator: found {found['coordinator']!r}, expected HOST:PORT")
    try:
        number, processes = int(str(found["process_id"])), int(str(found["num_processes"]))
    except ValueError:
        number, processes = -1, 0
    if not 0 <= number < processes or processes < 2:
        found_them = f"found {found['process_id']} of {found['num_processes']}"
        raise ConfigError(f"process_id: {found_them}, expected 0 to num_processes - 1, of 2 processes or more")
    return Place(host.strip("[]"), int(port), number, processes)


def _slurm() -> dict[str, str]:
    """The flags that Slurm's variables stand for: the first host of the step, and a port by the number of the job."""
    env = os.environ
    if not {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID"} <= env.keys():
        return {}
    # node7, node7,other or node[007-011,13],other
    first = re.match(r"([^,\[]+)(?:\[(\d+))?", env["SLURM_STEP_NODELIST"])
    host = "".join(part for part in first.groups() if part) if first else ""
    port = 61440 + int(env["SLURM_JOB_ID"]) % 4096
    return {
        "coordinator": f"{host}:{port}",
        "num_processes": env["SLURM_NTASKS"],
        "process_id": env["SLURM_PROCID"],
    }


if __name__ == "__main__":
    status = 1
    try:
        status = cli.run(main, FLAGS, __doc__)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # at the interpreter's own end, JAX would wait for processes that may be gone
