"""The hash of a model's file: of every byte, once for a file, and of no other than the one that was opened."""

import hashlib
import json
import os
import threading

import pytest

from ds4jax.io import content_hash as module
from ds4jax.io.content_hash import Changed, compute, lookup


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where hashes are kept. Files are large from 1001 bytes on, and hashed in pieces of 300."""
    monkeypatch.setattr(module, "AT_ONCE", 1000)
    monkeypatch.setattr(module, "PIECE", 300)
    monkeypatch.setattr(module, "_READ", 128)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ds4jax"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(os.urandom(2050))
    return path


def test_every_byte_counts(file):
    whole, found = file.read_bytes(), set()
    for i in range(0, len(whole), 41):
        file.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        found.add(compute(file, file.stat()))
    assert len(found) == 50
    for n in (2049, 1800, 1, 0):
        file.write_bytes(whole[:n])
        found.add(compute(file, file.stat()))
    assert len(found) == 54
    file.write_bytes(whole)
    pieces = [hashlib.sha256(whole[i : i + 300]).digest() for i in range(0, 2050, 300)]
    assert compute(file, file.stat()) == hashlib.sha256(b"".join(pieces)).hexdigest()


def test_the_hash_of_a_large_file_is_kept_and_that_of_a_small_one_is_computed(file, cache):
    assert lookup(file, file.stat()) is None
    found = compute(file, file.stat())
    assert lookup(file, file.stat()) == found
    (kept,) = cache.iterdir()
    assert kept.stat().st_mode & 0o777 == 0o600
    other = file.with_name("copy")
    other.write_bytes(file.read_bytes())
    assert lookup(other, other.stat()) is None and compute(other, other.stat()) == found
    file.write_bytes(b"x" * 1000)
    assert lookup(file, file.stat()) == compute(file, file.stat()) != found and len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("how", ["written", "written with its old time", "replaced"])
def test_a_kept_hash_is_of_the_file_as_it_was(file, how):
    before = file.stat()
    compute(file, before)
    target = file.with_name("new") if how == "replaced" else file
    target.write_bytes(os.urandom(2050))
    os.utime(target, ns=(before.st_mtime_ns + (how == "written"), before.st_mtime_ns + (how == "written")))
    os.replace(target, file)
    assert lookup(file, file.stat()) is None
    for call in (lookup, compute):
        with pytest.raises(Changed, match="model.gguf: it was replaced or changed"):
            call(file, before)


@pytest.mark.parametrize("kept", [b"", b"[]", b"{}", b"\xff", b'{"hash": "x"}', "hash 5"])
def test_what_is_kept_may_be_damaged(file, cache, kept):
    found = compute(file, file.stat())
    (path,) = cache.iterdir()
    good = json.loads(path.read_bytes())
    path.write_bytes(json.dumps(good | {"hash": 5}).encode() if kept == "hash 5" else kept)
    assert lookup(file, file.stat()) is None and compute(file, file.stat()) == found == lookup(file, file.stat())


@pytest.mark.parametrize("change", ["grows", "shrinks", "is written"])
def test_a_file_that_changes_meanwhile_has_no_hash(file, cache, change):
    status = file.stat()

    def meanwhile():
        os.truncate(file, 300) if change == "shrinks" else file.write_bytes(b"x" * (2050 + (change == "grows")))
        return False

    with pytest.raises(Changed, match="ends at byte|was replaced or changed"):
        compute(file, status, meanwhile)
    assert not cache.exists()


def test_it_can_be_stopped(file, cache):
    with pytest.raises(InterruptedError):
        compute(file, file.stat(), lambda: True)
    assert not cache.exists()


def test_without_a_cache_directory_it_is_computed_each_time(file, caplog, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert len(compute(file, file.stat())) == 64 and "its hash is not kept" in caplog.text
    assert lookup(file, file.stat()) is None


def test_an_error_ends_all_threads(file, monkeypatch):
    """One of them finds a piece that cannot be read; the others do not go on to the end."""
    read, others = [], threading.Event()

    def preadv(fd, buffers, start):
        if start == 300:
            assert others.wait(10)
            raise OSError(5, "Input/output error")
        read.append(start)
        others.set()
        threading.Event().wait(0.01)
        return 1

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(OSError, match="Input/output error"):
        compute(file, file.stat())
    assert len(read) < 100


@pytest.mark.parametrize("more", [0, 1])
def test_threads_that_cannot_start_are_done_without(file, monkeypatch, more):
    found, start, started = compute(file, file.stat()), threading.Thread.start, []

    def fail(thread):
        if len(started) == more:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fail)
    assert compute(file, file.stat()) == found and len(started) == more
