"""The hash of a model's file: of every byte, once for a file, and of no other than the one that was opened."""

import hashlib
import json
import os

import pytest

from ds4jax.engine import content as module
from ds4jax.engine.content import Changed, content, known


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
        found.add(content(file, file.stat()))
    assert len(found) == 50
    for n in (2049, 1800, 1, 0):
        file.write_bytes(whole[:n])
        found.add(content(file, file.stat()))
    assert len(found) == 54
    file.write_bytes(whole)
    pieces = [hashlib.sha256(whole[i : i + 300]).digest() for i in range(0, 2050, 300)]
    assert content(file, file.stat()) == hashlib.sha256(b"".join(pieces)).hexdigest()


def test_the_hash_of_a_large_file_is_kept_and_that_of_a_small_one_is_computed(file, cache):
    assert known(file, file.stat()) is None
    found = content(file, file.stat())
    assert known(file, file.stat()) == found
    (kept,) = cache.iterdir()
    assert kept.stat().st_mode & 0o777 == 0o600
    other = file.with_name("copy")
    other.write_bytes(file.read_bytes())
    assert known(other, other.stat()) is None and content(other, other.stat()) == found
    file.write_bytes(b"x" * 1000)
    assert known(file, file.stat()) == content(file, file.stat()) != found and len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("how", ["written", "written with its old time", "replaced"])
def test_a_kept_hash_is_of_the_file_as_it_was(file, how):
    before = file.stat()
    content(file, before)
    target = file.with_name("new") if how == "replaced" else file
    target.write_bytes(os.urandom(2050))
    os.utime(target, ns=(before.st_mtime_ns + (how == "written"), before.st_mtime_ns + (how == "written")))
    os.replace(target, file)
    assert known(file, file.stat()) is None
    for call in (known, content):
        with pytest.raises(Changed, match="model.gguf: it was replaced or changed"):
            call(file, before)


@pytest.mark.parametrize("kept", [b"", b"[]", b"{}", b"\xff", b'{"hash": "x"}', "hash 5"])
def test_what_is_kept_may_be_damaged(file, cache, kept):
    found = content(file, file.stat())
    (path,) = cache.iterdir()
    good = json.loads(path.read_bytes())
    path.write_bytes(json.dumps(good | {"hash": 5}).encode() if kept == "hash 5" else kept)
    assert known(file, file.stat()) is None and content(file, file.stat()) == found == known(file, file.stat())


@pytest.mark.parametrize("change", ["grows", "shrinks", "is written"])
def test_a_file_that_changes_meanwhile_has_no_hash(file, cache, change):
    status = file.stat()

    def meanwhile():
        os.truncate(file, 300) if change == "shrinks" else file.write_bytes(b"x" * (2050 + (change == "grows")))
        return False

    with pytest.raises(Changed, match="ends at byte|was replaced or changed"):
        content(file, status, meanwhile)
    assert not cache.exists()


def test_it_can_be_stopped(file, cache):
    with pytest.raises(InterruptedError):
        content(file, file.stat(), lambda: True)
    assert not cache.exists()


def test_without_a_cache_directory_it_is_computed_each_time(file, caplog, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert len(content(file, file.stat())) == 64 and "its hash is not kept" in caplog.text
    assert known(file, file.stat()) is None
