"""One server on several processes: it says what one process says, and none outlives another."""

import contextlib
import dataclasses
import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
import small
from host_groups import ROOT, complete, free_port, group, write_config

from ds4jax.engine import channel, hosts, messages
from ds4jax.engine.hosts import Follower, Leader, Patience, Place
from ds4jax.engine.types import Sampling
from ds4jax.errors import ConfigError, Ds4Error
from ds4jax.io.synthetic import RECIPES, write_synthetic
from ds4jax.io.tokenizer import byte_tokenizer

sys.path.insert(0, str(ROOT / "scripts"))
import serve_sharded  # noqa: E402

# ---- the server ------------------------------------------------------------------------------------------------------
ONE_LAYER = dataclasses.replace(small.CFG, n_layers=1, compress_ratios=(4,), swiglu_clamp=(10.0,), n_hash_layers=0)
PROMPT = "The quick brown fox jumps over the lazy dog. " * 6
PROMPTS = [PROMPT, PROMPT[:100], "A hen", PROMPT[3:90]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def config(folder):
    """Writes a config of a small model on a mesh."""
    path = folder / "model.gguf"
    write_synthetic(path, ONE_LAYER, 3, RECIPES["f32"], byte_tokenizer().to_metadata())

    def write(**mesh):
        name = "-".join(f"{axis}{n}" for axis, n in mesh.items())
        values = {"model": str(path), "ctx": 512, "batch": 2, "prefill_chunk": 32, "numerics": "plain", **mesh}
        return write_config(folder / f"{name}.toml", **values)

    return write


@pytest.fixture(scope="module")
def alone(folder, config):
    """What one process says."""
    with group(folder) as one:
        one.start(0, ["-m", "ds4jax.serve", f"--config={config(tp=1)}", "--port=0"])
        return [complete(one.url(), prompt)[0] for prompt in PROMPTS]


def asked(url):
    with ThreadPoolExecutor() as pool:
        return [text for text, _ in pool.map(lambda prompt: complete(url, prompt), PROMPTS)]


@pytest.mark.slow  # a minute
def test_two_processes_and_then_four(folder, config, alone):
    """They answer several requests at once, reuse prefixes, end when one is lost, and go on from the disk."""
    flags = [f"--kv_dir={folder / 'kv'}"]
    with group(folder) as two:
        two.serve(config(tp=2), 2, *flags)
        url = two.url()
        assert asked(url) == alone
        text, cached = complete(url, PROMPT)
        assert text == alone[0] and cached > 128
        two.hurt(1, signal.SIGKILL)
        assert two.all_end() == [1, -9]
        (error,) = two.errors(0)
        assert error.startswith("process 1 at 127.0.0.1:") and "its connection was closed" in error
    with group(folder) as four:
        four.serve(config(tp=2, ep=2), 4, *flags)
        url = four.url()
        text, cached = complete(url, PROMPT)
        assert text == alone[0] and cached >= 128
        assert asked(url) == alone
        with ThreadPoolExecutor() as pool:
            four.hurt(3, signal.SIGSTOP)
            answer = pool.submit(complete, url, PROMPTS[1])
            assert four.all_end(but=[3]) == [1, 1, 1]
            with pytest.raises(AssertionError, match="one of its processes is lost"):
                answer.result()
        (error,) = four.errors(0)
        assert error.startswith("process 3 at 127.0.0.1:") and "no sign of life" in error
        assert four.errors(1) == four.errors(2) == [error]


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "draft"), [({"tp": 2}, "off"), ({"tp": 2, "ep": 2}, "auto"), ({"ep": 2}, "auto")])
def test_the_embedded_model(folder, mesh, draft):
    """With drafts, too. One process is lost while it answers; then all start again and are told to stop."""
    values = {"model": "tiny", "ctx": 1024, "batch": 4, "draft": draft}
    with group(folder) as one:
        one.start(0, ["-m", "ds4jax.serve", f"--config={write_config(folder / 'one.toml', **values)}", "--port=0"])
        alone = asked(one.url()), complete(one.url(), 4 * PROMPT)[0]
    path, store = write_config(folder / "mesh.toml", **values, **mesh), f"--kv_dir={folder / 'store'}"
    n = int(np.prod(list(mesh.values())))
    with group(folder) as several, ThreadPoolExecutor() as pool:
        several.serve(path, n, store)
        assert (asked(url := several.url()), complete(url, 4 * PROMPT)[0]) == alone
        pool.submit(complete, url, PROMPT[7:], 500)
        time.sleep(2)
        several.hurt(n - 1, signal.SIGKILL)
        assert several.all_end() == [1] * (n - 1) + [-9]
        assert "process 1 at" in several.errors(0)[0] or n > 2
    with group(folder) as several:
        several.serve(path, n, store)
        text, cached = complete(several.url(), 4 * PROMPT)
        assert text == alone[1] and cached >= 128
        several.hurt(1, signal.SIGTERM)
        assert several.all_end() == [-signal.SIGTERM] + [0] * (n - 1)
        assert not several.errors(0) and not several.errors(1)


def test_process_0_is_killed(folder):
    """JAX of the others says nothing, and does not abort them."""
    with group(folder) as three:
        for number in range(3):
            three.start(number, [str(ROOT / "tests/host_member.py"), three.coordinator, "3", str(number)])
        three.url()
        three.hurt(0, signal.SIGKILL)
        assert three.all_end() == [-9, 1, 1]
        for number in (1, 2):
            (error,) = three.errors(number)
            assert error.startswith(f"process 0 at {three.coordinator}: its connection was closed")


# ---- processes as threads --------------------------------------------------------------------------------------------
STARTED: list[Leader | Follower] = []
"""Those of a test, whose threads go on after it."""


@pytest.fixture
def ends(monkeypatch):
    """What processes say at their end, by number. They do not know JAX."""
    found = {}

    def end(self, message):
        if not self._over:
            self._over = True
            found[self.place.number] = message
            self._last_words(message)
        threading.Event().wait()

    monkeypatch.setattr(hosts._Member, "_end", end)
    monkeypatch.setattr(hosts._Member, "_initialize_jax", lambda self, address: None)
    monkeypatch.setattr(hosts, "SUSPECTED", 0.5)
    yield found
    while STARTED:  # so that none comes to the end that is no longer replaced, with all other tests
        STARTED.pop()._over = True


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def run(port, number, work=lambda member: None, facts=(), patience=None, processes=2, secret=b"s"):
    """Start a process as a thread; → it."""
    place, made = Place("127.0.0.1", port, number, processes), []

    def body():
        kind = Leader if number == 0 else Follower
        made.append(kind(place, {"ctx": 512, **dict(facts)}, patience or Patience(), secret))
        STARTED.append(made[0])
        made[0].start()
        work(made[0])

    threading.Thread(target=body, daemon=True).start()
    wait_for(lambda: made)
    return made[0]


class Calls:
    """A runner that only notes what it is told."""

    def __init__(self, seconds=0.0, error=None):
        self.made, self._seconds, self._error = [], seconds, error

    def prefill(self, *args, **kwargs):
        self.made.append((args, kwargs))
        time.sleep(self._seconds)
        if self._error:
            raise self._error


def follow(runner, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # which is for the main thread

    def work(member):
        member.meet({})
        member.follow(runner)
        member._connection.close(1.0)

    return work


def lead(member):
    member.meet({})
    member.tell("prefill", (1, [2, 3], Sampling(seed=4)), {"append": True})


def test_calls_arrive(ends, monkeypatch):
    port, runners = free_port(), [Calls(), Calls()]
    leader = run(port, 0, lead, processes=3)
    others = [run(port, n + 1, follow(runner, monkeypatch), processes=3) for n, runner in enumerate(runners)]
    wait_for(lambda: all(runner.made for runner in runners))
    assert runners[0].made == runners[1].made == [((1, [2, 3], Sampling(seed=4)), {"append": True})]
    wait_for(lambda: all(not other.told for other in leader._others.values()))
    leader.stop()
    assert not ends and all(other._over for other in others)


def test_what_differs_is_named(ends, monkeypatch):
    port = free_port()
    run(port, 0, lead)
    run(port, 1, facts={"ctx": 1024})
    wait_for(lambda: len(ends) == 2)
    assert ends[0] == ends[1] and ends[0].endswith("ctx: found 1024, expected 512 as in process 0")


def test_another_number_of_processes_is_named(ends):
    port = free_port()
    run(port, 0, lead)
    run(port, 1, processes=3)
    wait_for(lambda: len(ends) == 2)
    assert ends[0].endswith("num_processes: found 3, expected 2 as in process 0")


def test_the_same_number_twice(ends, caplog):
    port = free_port()
    leader = run(port, 0, lead, processes=3)
    run(port, 1, processes=3)
    wait_for(lambda: leader._others)
    run(port, 1, processes=3)
    wait_for(lambda: 1 in ends)
    assert ends == {1: f"process_id: found 1: {ends[1].split()[3]} is process 1"}
    assert "found process_id 1" in caplog.text


def test_who_comes_late_with_another_config_ends_alone(ends, monkeypatch):
    port = free_port()
    leader = run(port, 0, lead)
    run(port, 1, follow(Calls(), monkeypatch))
    wait_for(lambda: leader._deadline is None)
    run(port, 1, facts={"ctx": 1024})
    wait_for(lambda: ends)
    assert list(ends) == [1] and ends[1].endswith(" is process 1")


def test_who_never_comes_is_named(ends):
    port = free_port()
    run(port, 0, lead, patience=Patience(join=0.5), processes=3)
    wait_for(lambda: ends)
    assert ends[0] == f"process 1, 2: not there after 0.5 s (expected at 127.0.0.1:{port})"
    with pytest.raises(Ds4Error, match="process 0 at 127.0.0.1:.*: not there after 0.4 s: Connection refused"):
        Follower(Place("127.0.0.1", free_port(), 1, 2), {}, Patience(join=0.4), b"").start()


def test_who_does_not_know_the_secret_is_kept_out(ends, caplog):
    port = free_port()
    run(port, 0, lead, patience=Patience(join=2.0))
    with pytest.raises(Ds4Error, match=f"found another secret .{hosts.SECRET}"):
        Follower(Place("127.0.0.1", port, 1, 2), {}, Patience(), b"other").start()
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert sock.recv(1 << 16)
    wait_for(lambda: ends)
    assert ends[0].startswith("process 1: not there") and caplog.text.count("a connection was refused") >= 2


def test_others_need_a_secret(monkeypatch):
    monkeypatch.delenv(hosts.SECRET, raising=False)
    with pytest.raises(ConfigError, match=f"{hosts.SECRET}: found nothing"):
        Leader(Place("0.0.0.0", free_port(), 0, 2), {}, Patience(), b"")


def test_a_call_that_does_not_end_is_named(ends, monkeypatch):
    port = free_port()
    run(port, 0, lead, patience=Patience(step=1.0))
    run(port, 1, follow(Calls(seconds=30.0), monkeypatch))
    wait_for(lambda: len(ends) == 2)
    assert ends[0] == ends[1] and ends[0].startswith("process 1 at 127.0.0.1:")
    assert ends[0].endswith(": prefill has not ended after 1 s")


def test_a_call_that_fails_is_named(ends, monkeypatch):
    port = free_port()
    run(port, 0, lead)
    run(port, 1, follow(Calls(error=ValueError("no\nmemory")), monkeypatch))
    wait_for(lambda: len(ends) == 2)
    assert ends[0] == ends[1] and ends[0].endswith(": prefill failed: ValueError: no memory")


def test_who_leaves_says_why(ends, monkeypatch):
    port = free_port()
    run(port, 0, lead)
    run(port, 1, lambda member: member.leave("memory: found 1 GiB"))
    wait_for(lambda: 0 in ends)
    assert ends[0].endswith(": memory: found 1 GiB")


# ---- messages --------------------------------------------------------------------------------------------------------
def over_a_socket(data, **limits):
    one, other = socket.socketpair()
    with one, other:
        one.sendall(data)
        one.shutdown(socket.SHUT_WR)
        return messages.read(other, **limits)


def test_messages_arrive_as_they_were():
    planes = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "b": np.ones((2, 1), ml_dtypes.float8_e4m3fn),
        "none": np.zeros((0, 4), ml_dtypes.bfloat16),
    }
    value = [1, None, "x", 0.5, {3: None, 4: 5}, planes, Sampling(0.5, logit_bias=((3, 1.5),)), np.int32(7)]
    found = over_a_socket(b"".join(messages.pack(value)))
    assert found[:5] == value[:5] and found[6:] == value[6:]
    for name, plane in planes.items():
        assert found[5][name].dtype == plane.dtype and found[5][name].shape == plane.shape
        np.testing.assert_array_equal(found[5][name].astype(np.float32), plane.astype(np.float32))


@pytest.mark.parametrize(
    ("text", "data"),
    [(b"{", b""), (b'{"array": ["O", [1]]}', b"12345678"), (b'{"array": ["int32", [2]]}', b"1234"), (b"1", b"12"),
     (b'{"array": ["int32", [-1]]}', b"1234"), (b'{"object": 1}', b""), (b"{}", b""), (b"[" * 9999, b"")],
)  # fmt: skip
def test_what_is_no_message_is_refused(text, data):
    with pytest.raises(messages.Malformed):
        over_a_socket(messages._SIZES.pack(len(text), len(data)) + text + data)


def test_messages_have_limits():
    packed = b"".join(messages.pack("x" * 100))
    with pytest.raises(messages.Malformed, match="found 102 bytes of JSON, expected at most 50"):
        over_a_socket(packed, most_json=50)
    with pytest.raises(TypeError, match="found object"):
        messages.pack(object())


def test_the_end_of_a_connection_is_no_message():
    with pytest.raises(OSError):
        over_a_socket(b"\1\0")


def test_a_greeting_ends_in_time_whatever_comes(monkeypatch):
    monkeypatch.setattr(channel, "GREETING", 0.3)
    one, other = socket.socketpair()

    def trickle():
        one.sendall(messages._SIZES.pack(1000, 0))
        with contextlib.suppress(OSError):
            while True:
                one.sendall(b" ")
                time.sleep(0.02)

    with one, other:
        threading.Thread(target=trickle, daemon=True).start()
        with pytest.raises(TimeoutError):
            channel.answer(other, b"")


def test_a_pipe_does_not_pass_on_the_end():
    (one, inner), (other, outer) = socket.socketpair(), socket.socketpair()
    with one, inner, other, outer:
        channel.pipe(inner, outer)
        one.sendall(b"Hi")
        assert other.recv(9) == b"Hi"
        one.close()
        other.settimeout(0.3)
        with pytest.raises(TimeoutError):
            other.recv(9)


# ---- where the processes are -----------------------------------------------------------------------------------------
def placed(monkeypatch, flags, **environment):
    for name in [n for n in os.environ if n.startswith(("JAX_", "SLURM_"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    serve_sharded.FLAGS.unparse_flags()
    serve_sharded.FLAGS(["x", *flags])
    return serve_sharded.place()


SLURM = {"SLURM_JOB_ID": "4099", "SLURM_NTASKS": "8", "SLURM_PROCID": "3"}
JAX = {"JAX_COORDINATOR_ADDRESS": "[::1]:70", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "1"}


@pytest.mark.parametrize(
    ("flags", "environment", "expected"),
    [
        (["--coordinator=a:7", "--num_processes=2", "--process_id=1"], {**SLURM, **JAX}, Place("a", 7, 1, 2)),
        (["--process_id=2"], JAX, Place("::1", 70, 2, 3)),
        ([], {**SLURM, "SLURM_STEP_NODELIST": "n[007-011,13],x"}, Place("n007", 61443, 3, 8)),
        ([], {**SLURM, "SLURM_STEP_NODELIST": "gpu-7,gpu-9"}, Place("gpu-7", 61443, 3, 8)),
    ],
)
def test_places(monkeypatch, flags, environment, expected):
    assert placed(monkeypatch, flags, **environment) == expected


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        ([], {}, "coordinator: found nothing in the flags, the environment and Slurm's variables"),
        (["--coordinator=a"], JAX, "coordinator: found 'a', expected HOST:PORT"),
        (["--process_id=3"], JAX, "process_id: found 3 of 3, expected 0 to num_processes - 1"),
        ([], {**JAX, "JAX_PROCESS_ID": "x"}, "process_id: found x of 3"),
        ([], {**JAX, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, "found 0 of 1, .* of 2 processes or more"),
    ],
)
def test_places_that_cannot_be(monkeypatch, flags, environment, message):
    with pytest.raises(ConfigError, match=message):
        placed(monkeypatch, flags, **environment)


@pytest.mark.parametrize(
    ("mesh", "flags", "message"),
    [
        ({"dp": 2}, [], "dp: found 2 on several hosts, expected 1"),
        ({"tp": 3}, [], "is for 3 devices, expected a multiple of the 2 processes"),
        ({"tp": 2}, ["--trace_routing=x"], "trace_routing: found a file on several hosts"),
    ],
)
def test_what_several_hosts_cannot_do_is_refused(monkeypatch, tmp_path, mesh, flags, message):
    config = write_config(tmp_path / "a.toml", model="tiny", **mesh)
    place = placed(
        monkeypatch, [f"--config={config}", "--coordinator=a:7", "--num_processes=2", "--process_id=0", *flags]
    )
    serve_sharded.serve.FLAGS.mark_as_parsed()
    with pytest.raises(ConfigError, match=message):
        serve_sharded.refuse(serve_sharded.serve.settings(), place)
