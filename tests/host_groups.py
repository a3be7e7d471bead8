"""Groups of processes that serve one model together, for tests: started, asked, hurt, and never left behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[1]
SERVING = re.compile(r"serving .* at (http://\S+)")
LONG = 300.0
"""Seconds that a busy machine may need to start a group."""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Group:
    """Processes, by number. folder: for their output, and for compiled programs, which groups share."""

    def __init__(self, folder: Path):
        self.folder, self.processes, self.coordinator = folder, {}, f"127.0.0.1:{free_port()}"
        self._began = time.monotonic()

    def start(self, number: int, command: Sequence[str], **environment: str) -> None:
        env = os.environ | {
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(self.folder),
        } | environment  # fmt: skip
        with open(self._output(number), "wb") as output:
            self.processes[number] = subprocess.Popen([sys.executable, *command], stdout=output, stderr=output, env=env)

    def serve(self, config: Path, processes: int, *flags: str, of: Sequence[int] | None = None) -> None:
        """Start `scripts/serve_sharded.py`, as all processes or as some of them."""
        for number in range(processes) if of is None else of:
            place = f"--coordinator={self.coordinator}", f"--num_processes={processes}", f"--process_id={number}"
            script = str(ROOT / "scripts/serve_sharded.py")
            patience = "--join_timeout=120", "--step_timeout=60"  # of a busy machine
            self.start(number, [script, f"--config={config}", "--port=0", *place, *patience, *flags])

    def _output(self, number: int) -> Path:
        return self.folder / f"output-{self.coordinator.rpartition(':')[2]}-{number}"

    def said(self, number: int) -> str:
        """What a process has written."""
        return self._output(number).read_text(errors="replace")

    def url(self) -> str:
        """The address of the server, once it serves."""
        deadline = time.monotonic() + LONG
        while not (found := SERVING.search(self.said(0))):
            assert time.monotonic() < deadline and self.processes[0].poll() is None, self._everything()
            time.sleep(0.1)
        return found[1]

    def hurt(self, number: int, how: signal.Signals) -> None:
        self._began = time.monotonic()
        self.processes[number].send_signal(how)

    def all_end(self, *, but: Sequence[int] = (), within: float = 30.0) -> list[int]:
        """The statuses of the processes, which end within so many seconds of `hurt` or the start."""
        found = []
        for number, process in self.processes.items():
            if number not in but:
                left = max(0.0, self._began + within - time.monotonic())
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(left)
                assert process.poll() is not None, f"process {number} still runs\n{self._everything()}"
                found.append(process.returncode)
        return found

    def errors(self, number: int) -> list[str]:
        """The lines of errors of a process, none of which may be of a stack trace."""
        text = self.said(number)
        assert not any(sign in text for sign in ("Traceback", "stack trace", '  File "')), text
        return [line.removeprefix("error: ") for line in text.splitlines() if line.startswith("error: ")]

    def _everything(self) -> str:
        return "\n".join(f"--- process {number}:\n{self.said(number)}" for number in self.processes)

    def kill(self) -> None:
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.wait()


@contextlib.contextmanager
def group(folder: Path) -> Iterator[Group]:
    """A group, all of whose processes are killed at the end."""
    made = Group(folder)
    try:
        yield made
    finally:
        made.kill()


def write_config(path: Path, **values) -> Path:
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    return path


def complete(url: str, prompt: str, tokens: int = 12) -> tuple[str, int]:
    """A greedy continuation, and how many tokens of the prompt were not computed."""
    body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "logit_bias": {"2": -100}}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    answer = response.json()
    return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]
