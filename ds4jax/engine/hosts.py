"""One server on several processes, each with some of the devices of one mesh: how they start, work and end together.

Process 0 schedules. Every call of its model runner that starts a program of all devices goes to the other processes
first, as the method's name and arguments (`model_runner.TOGETHER`), and they call the same method of theirs: so all
processes run the same programs in the same order. What the programs return for the host is the same on all devices, and
only process 0 reads it. It alone has the prefixes and their folder; a state that is put back travels in the call.

Messages have TCP connections of their own (`channel`), apart from the devices' sums. JAX's coordination service listens
at loopback alone; the others reach it through more connections to the same port. If process 0 dies, theirs to that
service stay open, since JAX would otherwise end them with a stack trace.

Whatever ends one of the processes, or keeps it from going on, ends all of them, with one line that says which and why.
A program that waits for a dead process cannot be stopped, so they end with `os._exit`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import ipaddress
import logging
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import jax

from ds4jax.engine import channel, messages
from ds4jax.engine.channel import Connection, Refused
from ds4jax.engine.messages import Malformed
from ds4jax.engine.model_runner import TOGETHER, Block, Rounds
from ds4jax.errors import ConfigError, Ds4Error, show

if TYPE_CHECKING:
    from ds4jax.engine.model_runner import ModelRunner

SECRET = "DS4JAX_HOSTS_SECRET"
"""The environment's variable with the secret by which the processes know each other."""
TICK = 0.25
SUSPECTED = 3.0
"""Seconds from a failure to the end that it causes: if another process has died, that is the reason to name."""
STRANGERS = 64
"""The most connections at once whose owners process 0 does not know yet; more have to wait."""
SAVING = 8.0
"""Seconds in which process 0 writes prefixes to disk before it ends."""

type Facts = dict[str, str | int | float | bool]
"""What must agree between the processes, by the name that a user knows it by."""

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Place:
    """Which of the processes this is, how many there are, and where process 0 listens."""

    host: str
    port: int
    number: int
    processes: int

    @property
    def address(self) -> str:
        return channel.address((self.host, self.port))


@dataclasses.dataclass(frozen=True)
class Patience:
    """Seconds after which all processes end: join: until all have come. silence: without a sign of life of one.
    step: that one needs for one call."""

    join: float = 20.0
    silence: float = 12.0
    step: float = 20.0


@contextlib.contextmanager
def join(place: Place, facts: Facts, patience: Patience) -> Iterator[Leader | Follower]:
    """What process 0, or another one, has of all processes, once they have come and JAX knows all devices.

    An exception inside ends the others, too. Afterwards the process has to end with `os._exit`: JAX would wait for
    processes that may be gone. Raises Ds4Error without a secret, and if nobody can listen at the address.
    """
    secret = os.environ.get(SECRET, "").encode()
    kind = Leader if place.number == 0 else Follower
    hosts = kind(place, facts, patience, secret)
    try:
        hosts.start()
        yield hosts
    except BaseException as error:
        first = str(error).partition("\n")[0]
        if not isinstance(error, Ds4Error):
            first = "it was interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {first}"
        hosts.leave(first)
        raise


def check_secret(sock: socket.socket, secret: bytes) -> None:
    """Raises ConfigError, and closes the socket, if others than this machine can reach it, and there is no secret."""
    if not secret and not _local(sock):
        sock.close()
        raise ConfigError(f"{SECRET}: found nothing, expected the same secret in the environment of every process")


def _local(sock: socket.socket) -> bool:
    """Whether only this machine can reach a socket."""
    return ipaddress.ip_address(sock.getsockname()[0]).is_loopback


def _is_name(host: str) -> bool:
    """Whether a host is given by its name, not by its address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return True
    return False


def differs(found: Facts, expected: Facts) -> str:
    """The first fact that is not as process 0 has it, in words; or ""."""
    for name in expected | found:
        if found.get(name) != expected.get(name):
            return f"{name}: found {show(found.get(name))}, expected {show(expected.get(name))} as in process 0"
    return ""


class _Member:
    """What both kinds of processes have: a watch, and an end."""

    def __init__(self, place: Place, facts: Facts, patience: Patience, secret: bytes):
        self.place, self._facts, self._patience, self._secret = place, facts, patience, secret
        self._over = False
        self._ending = threading.Lock()

    def _watch(self) -> None:
        """Call `_check` now and then, with the time since when this process has been running without a break."""
        awake = before = time.monotonic()
        while not self._over:
            time.sleep(TICK)
            now = time.monotonic()
            if now - before > self._patience.silence / 3:  # stopped, or starved: others may have said something since
                awake = now
            before = now
            self._check(now, awake)

    def _check(self, now: float, awake: float) -> None:
        raise NotImplementedError

    def _silent(self, connection: Connection, now: float, awake: float) -> str:
        quiet = now - max(connection.heard, awake)
        return f"no sign of life for {quiet:.0f} s" if quiet > self._patience.silence else ""

    def _end(self, message: str) -> NoReturn:
        """Say why, and end this process."""
        self._ending.acquire()  # never released: whoever comes second waits for the end
        if self._over:
            _wait_for_ever()
        self._over = True
        with contextlib.suppress(OSError):
            os.write(2, f"error: {message}\n".encode())
        self._last_words(message)
        os._exit(1)

    def _last_words(self, message: str) -> None:
        """What is to be done between the message and the end."""

    def _initialize_jax(self, address: str) -> None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            coordinator_address=address,
            coordinator_bind_address=address,
            num_processes=self.place.processes,
            process_id=self.place.number,
            cluster_detection_method="deactivate",
        )


def _wait_for_ever() -> NoReturn:
    while True:
        time.sleep(60)


# ---- process 0 -------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class _Other:
    """What process 0 knows of another.

    told: name and time of the calls that it has not finished. done: how many calls it has finished. since: when it
    finished the last of these. facts: what it has called `meet` with, while it waits there; else None.
    """

    number: int
    connection: Connection
    told: collections.deque[tuple[str, float]] = dataclasses.field(default_factory=collections.deque)
    done: int = 0
    since: float = 0.0
    facts: Facts | None = None

    @property
    def oldest(self) -> tuple[str, float] | None:
        """The first call that it has not finished. Thread-safe."""
        try:
            return self.told[0]
        except IndexError:
            return None

    def __str__(self) -> str:
        return f"process {self.number} at {self.connection.peer}"


class Leader(_Member):
    """Process 0. save: called before the process ends because of another, for what is worth keeping."""

    def __init__(self, place: Place, facts: Facts, patience: Patience, secret: bytes):
        super().__init__(place, facts, patience, secret)
        try:
            self._socket = channel.listen(place.host, place.port)
        except OSError as error:
            raise Ds4Error(f"coordinator: {place.address}: cannot listen there: {error.strerror or error}") from None
        check_secret(self._socket, secret)
        if place.host != "localhost" and _is_name(place.host) and _local(self._socket):
            log.warning("coordinator: %s is this machine's loopback here, which other hosts do not reach", place.host)
        with channel.listen("127.0.0.1", 0) as free:
            self._jax_port = free.getsockname()[1]
        self.save: Callable[[], object] = lambda: None
        self._others: dict[int, _Other] = {}
        self._changed = threading.Condition()
        self._strangers = threading.Semaphore(STRANGERS)
        self._suspected: tuple[str, int, float] | None = None  # a message, of which process, and when it came
        self._deadline: float | None = time.monotonic() + patience.join

    def start(self) -> None:
        """Wait for the others, and let JAX find them."""
        for work in (self._accept, self._watch):
            threading.Thread(target=work, name=f"hosts-{work.__name__}", daemon=True).start()
        self._until(lambda: len(self._others) == self.place.processes - 1)
        self._deadline = None
        for other in self._others.values():
            other.connection.send({"start": True})
        self._initialize_jax(f"127.0.0.1:{self._jax_port}")

    def meet(self, facts: Facts) -> None:
        """Wait until the others have come as far. facts: what must agree, of what is known by now."""
        self._until(lambda: all(other.facts is not None for other in self._others.values()))
        for other in self._others.values():
            if problem := differs(other.facts or {}, facts):
                self._end(f"{other}: {problem}")
            other.facts = None
        for other in self._others.values():
            other.connection.send({"met": True})

    def _until(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            while not self._changed.wait_for(condition, timeout=1.0):  # so that Ctrl-C is noticed
                pass

    def tell(self, name: str, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Let the others call a method of their runners; see `ModelRunner.tell`."""
        packed, now = messages.pack({"call": [name, args, kwargs]}), time.monotonic()
        for other in self._others.values():
            other.told.append((name, now))
            other.connection.post(packed)

    def fail(self, error: BaseException) -> NoReturn:
        """A step has failed here: end all processes, with this as the reason unless another has died."""
        self._suspect(0, f"process 0 at {self.place.address}: a step failed: {_one_line(error)}")
        _wait_for_ever()

    def stop(self) -> None:
        """End the others in order, and wait for that."""
        self._over = True
        deadline = time.monotonic() + self._patience.silence
        for other in list(self._others.values()):  # they go from it when they have ended
            other.connection.send({"stop": True})
        with self._changed:
            self._changed.wait_for(lambda: not self._others, timeout=max(0.0, deadline - time.monotonic()))
        for other in list(self._others.values()):
            log.warning("%s does not end", other)

    def leave(self, why: str) -> None:
        """This process ends; the others are to end as well."""
        self._over = True
        self._tell_the_end(f"process 0 at {self.place.address}: {why}")

    def _last_words(self, message: str) -> None:
        self._tell_the_end(message)

        def save() -> None:
            try:
                self.save()
            except Exception as error:
                log.warning("prefixes are not saved: %s", _one_line(error))

        saving = threading.Thread(target=save, daemon=True)
        saving.start()
        saving.join(SAVING)

    def _tell_the_end(self, message: str) -> None:
        deadline = time.monotonic() + 1.0
        others = list(self._others.values())
        for other in others:
            other.connection.send({"end": message})
        for other in others:  # one that hangs takes nothing
            other.connection.close(deadline - time.monotonic())

    # ---- others come and go --------------------------------------------------------------------------------------
    def _accept(self) -> None:
        while True:
            self._strangers.acquire()
            try:
                sock, peer = self._socket.accept()
            except OSError:
                self._strangers.release()
                time.sleep(TICK)
                continue
            threading.Thread(target=self._admit, args=(sock, channel.address(peer)), daemon=True).start()

    def _admit(self, sock: socket.socket, peer: str) -> None:
        try:
            match channel.answer(sock, self._secret):
                case {"for": "jax"}:
                    return channel.pipe(sock, _connect_to_jax(self._jax_port))
                case {"number": int(number), "processes": int(found), "facts": dict(facts)}:
                    connection = Connection(
                        sock, lambda x: self._receive(other, x), lambda why: self._lost(other, why),
                        limits=channel.SMALL,
                    )  # fmt: skip
                case _:
                    raise Refused("found no process of a server")
        except (Refused, Malformed, OSError) as error:
            log.warning("%s: a connection was refused: %s", peer, _one_line(error))
            return sock.close()
        finally:
            self._strangers.release()
        other = _Other(number, connection)
        connection.start()
        problem = f"num_processes: found {found}, expected {self.place.processes} as in process 0"
        problem = problem if found != self.place.processes else differs(facts, self._facts)
        if problem and self._deadline is not None:  # one that comes when all are there ends alone, below
            connection.send({"end": f"{other}: {problem}"})
            connection.close(1.0)
            self._end(f"{other}: {problem}")
        with self._changed:
            if not 0 < number < self.place.processes or number in self._others:
                who = self._others[number].connection.peer if number in self._others else ""
                there = f": {who} is process {number}" if who else f" of {self.place.processes} processes"
                log.warning("%s: a connection was refused: found process_id %s%s", peer, number, there)
                connection.send({"end": f"process_id: found {number}{there}"})
                return connection.close(1.0)
            self._others[number] = other
            self._changed.notify_all()

    def _receive(self, other: _Other, message: Any) -> None:
        match message:
            case {"done": int(done)}:
                while other.told and other.done < done:
                    other.told.popleft()
                    other.done, other.since = other.done + 1, time.monotonic()
            case {"meet": facts}:
                with self._changed:
                    other.facts = facts
                    self._changed.notify_all()
            case {"failed": str(why)}:
                self._suspect(other.number, f"{other}: {why}")
            case {"asked": _} if callable(signal.getsignal(signal.SIGTERM)):  # a server that is not stopping yet
                os.kill(os.getpid(), signal.SIGTERM)

    def _lost(self, other: _Other, why: str) -> None:
        with self._changed:
            known = self._others.get(other.number) is other
            if known and self._over:
                del self._others[other.number]
                self._changed.notify_all()
        if known and not self._over:
            message, number, _ = self._suspected or ("", 0, 0.0)
            self._end(message if number == other.number else f"{other}: {why}")

    def _suspect(self, number: int, message: str) -> None:
        self._suspected = self._suspected or (message, number, time.monotonic())

    def _check(self, now: float, awake: float) -> None:
        if self._deadline is not None and now > self._deadline:
            missing = [n for n in range(1, self.place.processes) if n not in self._others]
            if missing:
                who = "process " + ", ".join(map(str, missing))
                self._end(f"{who}: not there after {self._patience.join:g} s (expected at {self.place.address})")
        for other in list(self._others.values()):
            if why := self._silent(other.connection, now, awake):
                self._end(f"{other}: {why}: it hangs, or its host does")
            name, began = other.oldest or ("", now)
            if (seconds := now - max(began, awake, other.since)) > self._patience.step and not other.connection.writes:
                self._end(f"{other}: {name} has not ended after {seconds:.0f} s")
        if self._suspected and now - self._suspected[2] > SUSPECTED:
            self._end(self._suspected[0])


def _connect_to_jax(port: int) -> socket.socket:
    """A connection to JAX's coordination service, which may be about to start."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=1)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:297] + '...'}"


# ---- the others ------------------------------------------------------------------------------------------------------
class Follower(_Member):
    """Any process but 0."""

    def __init__(self, place: Place, facts: Facts, patience: Patience, secret: bytes):
        super().__init__(place, facts, patience, secret)
        self._calls: queue.SimpleQueue[tuple[str, list, dict] | None] = queue.SimpleQueue()
        self._running: collections.deque[Any] = collections.deque()  # results of calls, the oldest first; None: ended
        self._done = 0
        self._started, self._met = threading.Event(), threading.Semaphore(0)

    def start(self) -> None:
        """Find process 0, wait for the others, and let JAX find all."""
        hello = {"number": self.place.number, "processes": self.place.processes, "facts": self._facts}
        self._connection = Connection(self._connect(hello), self._receive, self._lost, self._beat)
        self._connection.start()
        threading.Thread(target=self._watch, name="hosts-watch", daemon=True).start()
        while not self._started.wait(timeout=1.0):  # so that Ctrl-C is noticed
            pass
        here = channel.listen("127.0.0.1", 0)
        threading.Thread(target=self._serve_jax, args=[here], name="hosts-jax", daemon=True).start()
        self._initialize_jax(channel.address(here.getsockname()))

    def _connect(self, hello: Any) -> socket.socket:
        deadline, patience = time.monotonic() + self._patience.join, f"{self._patience.join:g} s"
        while True:
            try:
                sock = socket.create_connection((self.place.host, self.place.port), timeout=channel.GREETING)
                check_secret(sock, self._secret)
                with channel.closed_by_errors(sock):
                    channel.introduce(sock, self._secret, hello)
                return sock
            except Refused as error:
                raise Ds4Error(f"process 0 at {self.place.address}: {error} ({SECRET})") from None
            except (OSError, Malformed) as error:
                if time.monotonic() > deadline:
                    why = getattr(error, "strerror", None) or error
                    raise Ds4Error(f"process 0 at {self.place.address}: not there after {patience}: {why}") from None
                time.sleep(0.2)

    def _serve_jax(self, here: socket.socket) -> None:
        """Pass on what JAX of this process has to say to that of process 0."""
        while True:
            sock, _ = here.accept()
            with contextlib.suppress(Ds4Error), channel.closed_by_errors(sock):
                channel.pipe(sock, self._connect({"for": "jax"}))

    def meet(self, facts: Facts) -> None:
        """See `Leader.meet`."""
        self._connection.send({"meet": facts})
        while not self._met.acquire(timeout=1.0):
            pass

    def follow(self, runner: ModelRunner) -> None:
        """Do what process 0 says, until it says that this is all."""

        def ask() -> None:
            self._connection.send({"asked": "to stop"})

        signal.signal(signal.SIGTERM, lambda *_: ask())
        # Ctrl-C may be for all processes of a terminal: process 0 is to hear of its own first, and need not be asked.
        signal.signal(signal.SIGINT, lambda *_: threading.Timer(1.0, ask).start())
        while (call := self._calls.get()) is not None:
            name, args, kwargs = call
            try:
                result = getattr(runner, name)(*args, **kwargs)
                if isinstance(result, Rounds):
                    result.tokens()  # they tell how long the sequences have become
            except Exception as error:
                if self._over:
                    self._ending.acquire()  # where another thread ends this process, this one waits for it
                    return  # told to stop while the call waited for a process that has ended since
                self._connection.send({"failed": f"{name} failed: {_one_line(error)}"})
                time.sleep(2 * SUSPECTED)  # process 0 may know a better reason
                self._end(f"process {self.place.number}: {name} failed: {_one_line(error)}")
            self._running.append(result.sampled if isinstance(result, Block) else None)

    def leave(self, why: str) -> None:
        """This process ends; the others are to end as well."""
        self._over = True
        if hasattr(self, "_connection"):
            self._connection.send({"failed": why})
            self._connection.close(1.0)

    def _beat(self) -> Any:
        while self._running and (self._running[0] is None or self._running[0].is_ready()):
            self._running.popleft()
            self._done += 1
        return {"done": self._done}

    def _receive(self, message: Any) -> None:
        match message:
            case {"call": [str(name), list(args), dict(kwargs)]} if name in TOGETHER:
                self._calls.put((name, args, kwargs))
            case {"start": _}:
                self._started.set()
            case {"met": _}:
                self._met.release()
            case {"stop": _}:
                self._over = True
                self._calls.put(None)
            case {"end": str(why)}:
                self._end(why)
            case _:
                self._end(f"process 0 at {self.place.address}: found a message that has no meaning: {show(message)}")

    def _lost(self, why: str) -> None:
        if not self._over:
            self._end(f"process 0 at {self.place.address}: {why}")

    def _check(self, now: float, awake: float) -> None:
        if why := self._silent(self._connection, now, awake):
            self._end(f"process 0 at {self.place.address}: {why}: it hangs, or its host does")
