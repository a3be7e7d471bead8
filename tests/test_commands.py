"""The command `ds4jax` and `python -m ds4jax.NAME`: every tool is there under both."""

import os
import pkgutil
import runpy
import signal
import subprocess
import sys
import time

import pytest

import ds4jax.tools
from ds4jax.__main__ import GROUPS, TOOLS, main
from ds4jax.tools import cli

LIBRARIES = {"cli", "limits", "markdown", "prompting"}  # modules of ds4jax.tools that are no tool


def test_every_tool_is_listed(capsys):
    assert set(TOOLS) == {module.name for module in pkgutil.iter_modules(ds4jax.tools.__path__)} - LIBRARIES
    for argv in [], ["--help"]:
        assert main(argv) == 0
        shown = capsys.readouterr().out
        assert all(f"  {name:<10} {what}\n" in shown for name, what in TOOLS.items())
        assert all(f"\n{title}:\n" in shown for title in GROUPS) and 'ds4jax generate "' in shown


@pytest.mark.parametrize("name", TOOLS)
def test_one_tool_has_two_names(name, capsys, monkeypatch):
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"ds4jax {name}" in shown
    monkeypatch.setattr(sys, "argv", ["python", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"ds4jax.{name}", run_name="__main__", alter_sys=True)
    assert stop.value.code == 0 and capsys.readouterr().out == shown


def test_an_unknown_tool_is_one_line(capsys):
    assert main(["generte"]) == 1
    assert capsys.readouterr() == ("", f"error: found the tool 'generte', expected one of {', '.join(TOOLS)}\n")


@pytest.mark.parametrize("argv", [["--help"], ["chat", "--help"], ["chat", "--config=x"]])
def test_nothing_imports_jax_before_it_is_needed(argv):
    code = f"import sys; from ds4jax.__main__ import main; main({argv}); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full"])
def test_a_stderr_that_takes_nothing_stops_no_tool(stderr):
    command = f"{sys.executable} -m ds4jax memory --config tiny {stderr}"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=os.environ)
    assert run.returncode == 0 and "weights" in run.stdout


def test_who_does_not_read_stderr_stops_nobody():
    r, w = os.pipe()
    with os.fdopen(w, "w") as pipe:
        stderr = cli.Lossy(pipe)
        begun = time.perf_counter()
        for i in range(5000):
            stderr.write(f"{i:>99}\n")
        assert time.perf_counter() - begun < 5
        read = os.read(r, 1 << 20)
        stderr.write("again ↯\n")
        stderr.flush()
        assert len(read) % 100 == 0 and read.splitlines()[-1] == b"%99d" % (len(read) // 100 - 1)  # whole lines
        assert os.read(r, 100).decode() == "again ↯\n"
    os.close(r)


def test_who_closes_the_guarded_stderr_closes_no_other(capfd):
    assert cli.exit_status(lambda: cli.exit_status(lambda: sys.stderr.close())) == 0
    print("still here", file=sys.stderr)
    assert capfd.readouterr().err == "still here\n"


def test_no_number_is_not_a_number(capsys):
    assert main(["serve", "--queue_timeout", "nan"]) == 1
    assert capsys.readouterr().err == "error: queue_timeout: found nan, expected a number\n"


def test_flags_may_have_hyphens_and_are_listed_in_groups(capsys):
    assert main(["serve", "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.index("\nFlags:") < shown.index("  --host:") < shown.index("\nModel:") < shown.index("  --config:")
    assert main(["serve", "--queue-timeout=-1"]) == 1 and "--queue_timeout=-1" in capsys.readouterr().err
    assert main(["serve", "--no-such-flag"]) == 1 and "no-such-flag" in capsys.readouterr().err


def test_ctrl_c_ends_a_process_that_python_cannot_interrupt():
    """As while XLA compiles: the main thread is in a function of C that takes its time."""
    work = "(print('begun', flush=True), hashlib.pbkdf2_hmac('sha256', b'', b'', 10**8))"
    code = f"import hashlib, sys; from ds4jax.tools import cli; sys.exit(cli.exit_status(lambda: {work}))"
    command = ["env", "--default-signal=INT", sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr and process.stdout.readline() == b"begun\n"
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(timeout=cli.ENDING + 1) == 130 and process.stderr.read() == b"interrupted\n"
        finally:
            process.kill()
