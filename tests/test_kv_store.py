"""The disk store: what was put comes back bit for bit or not at all, whatever happens to process, disk and files."""

import contextlib
import errno
import itertools
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4jax import files as writing
from ds4jax.engine import kv_file
from ds4jax.engine import kv_store as module
from ds4jax.engine.keys import key_of
from ds4jax.engine.kv_index import Entry, Index
from ds4jax.engine.kv_store import KVStore
from ds4jax.errors import Ds4Error
from ds4jax.server.replay import Replay, split_budget

FP = {"model": "tiny", "layout": 1}
BIG = 1 << 30
DTYPES = [
    "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64",
    "complex64", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu,
    ml_dtypes.int4,
]  # fmt: skip


def content(tokens, size=500):
    """Planes and extra that belong to these tokens."""
    rng = np.random.default_rng([len(tokens), *map(int, tokens[-3:])])
    planes = {
        "window": rng.integers(0, 256, (3, size), np.uint8),
        "gate": rng.normal(size=7).astype(ml_dtypes.bfloat16),
    }
    return planes, {"length": len(tokens)}


def longest(store, tokens):
    entry = store.longest(tokens)
    assert entry is not None
    return entry


def same(loaded, expected):
    (planes, extra), (want, want_extra) = loaded, expected
    return (
        extra == want_extra
        and list(planes) == list(want)
        and all(
            (planes[k].dtype, planes[k].shape, planes[k].tobytes()) == (want[k].dtype, want[k].shape, want[k].tobytes())
            for k in want
        )
    )


def put(store, tokens, size=500):
    return store.put(tokens, *content(tokens, size))


def served(store, tokens, size=500):
    """Whether exactly these tokens are served; what is served must be right."""
    entry = store.longest(tokens)
    if entry is None or entry.length < len(tokens):
        return False
    loaded = store.load(entry)
    assert loaded is None or same(loaded, content(tokens, size))
    return loaded is not None


def disk(folder):
    return sum(f.stat().st_size for f in os.scandir(folder))


def files(folder):
    return sorted(p.name for p in Path(folder).iterdir() if p.name != "lock")


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so; [1] is how far the clock on the wall is set wrong."""
    now = [1_000_000_000.0, 0.0]
    monkeypatch.setattr(module.time, "time_ns", lambda: int((now[0] + now[1]) * 1e9))
    monkeypatch.setattr(module.time, "monotonic_ns", lambda: int(now[0] * 1e9))
    return now


# ---- what is stored -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_round_trip_of_every_dtype(tmp_path, dtype):
    rng, dtype = np.random.default_rng(0), np.dtype(dtype)
    planes = {}
    for shape in [(3, 5, 7), (), (1,), (0, 4), (64,)]:
        count = int(np.prod(shape))
        if dtype in (np.dtype(bool), np.dtype(ml_dtypes.int4)):
            planes[str(shape)] = rng.integers(0, 2, shape).astype(dtype)
        else:  # any bits, NaNs too
            planes[str(shape)] = np.frombuffer(rng.bytes(count * dtype.itemsize), dtype).reshape(shape)
    planes["strided"] = planes["(3, 5, 7)"].transpose(2, 0, 1)[::2]
    extra = {"text": "ü\n\0", "nested": [1, 2.5, None, {"a": True}]}
    with KVStore(tmp_path, BIG, FP) as store:
        assert store.put([1, 2, 3], planes, extra)
    with KVStore(tmp_path, BIG, FP) as store:
        loaded = store.load(longest(store, [1, 2, 3]))
        assert loaded is not None
    assert same(loaded, (planes, extra))
    assert all(x.ctypes.data % 64 == 0 for x in loaded[0].values() if x.size)
    with pytest.raises(ValueError, match="read-only"):
        loaded[0]["(1,)"][0] = 0


@pytest.mark.parametrize("plane", [np.zeros(3, ">f4"), np.array([{}]), np.zeros(2, "i4,f4")])
def test_planes_that_could_not_come_back_are_refused(tmp_path, plane):
    with KVStore(tmp_path, BIG, FP) as store, pytest.raises(TypeError, match="plane p"):
        store.put([1], {"p": plane})


def test_no_tokens_no_snapshot(tmp_path):
    with KVStore(tmp_path, BIG, FP) as store:
        with pytest.raises(ValueError, match="at least one token"):
            store.put([], {})
        assert store.longest([]) is None


def test_the_same_tokens_again_renew_the_use_and_write_nothing(tmp_path, clock):
    with KVStore(tmp_path, BIG, FP) as store:
        put(store, [1, 2])
        before = store.nbytes
        clock[0] += 5
        assert store.put([1, 2], {}, "other")
        assert (len(store), store.nbytes) == (1, before) == (1, disk(tmp_path))
        assert served(store, [1, 2])
        assert longest(store, [1, 2]).used == clock[0] * 1e9


TOKENS = st.lists(st.integers(0, 1) | st.sampled_from([255, 256, 2**32 - 1]), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(stored=st.lists(TOKENS, max_size=12), queries=st.lists(TOKENS, max_size=12), gone=st.sets(st.integers(0, 11)))
def test_longest_prefix_is_that_of_a_naive_search(stored, queries, gone):
    index = Index()
    entries = {tuple(t): Entry(Path(), key_of(t), 1, 0) for t in stored}
    for entry in entries.values():
        index.insert(entry)
    for i, tokens in enumerate(list(entries)):
        if i in gone:
            index.remove(entries.pop(tokens))
    for query in queries + stored:
        best = max((t for t in entries if tuple(query[: len(t)]) == t), key=len, default=None)
        assert index.longest(key_of(query)) is (entries[best] if best else None)


def test_long_conversations_are_found_fast(tmp_path):
    rng = np.random.default_rng(1)
    shared = rng.integers(0, 129280, 10_000)
    talks = [np.concatenate([shared, rng.integers(0, 129280, 10_000)]) for _ in range(5)]
    with KVStore(tmp_path, BIG, FP) as store:
        for talk, n in itertools.product(talks, (128, 10_000, 10_128, 15_000, 19_968)):
            put(store, talk[:n])
        assert len(store) == 2 + 5 * 3
        start = time.process_time()
        for _ in range(20):
            for talk in talks:
                assert longest(store, talk).length == 19_968
                assert longest(store, talk[:19_967]).length == 15_000
                assert longest(store, shared).length == 10_000
                assert longest(store, shared[:9_999]).length == 128
                assert store.longest(shared[:127]) is None
        assert (time.process_time() - start) / 500 < 0.01


# ---- trouble with files -------------------------------------------------------------------------------------------
def one_file(folder, tokens=(1, 2, 3)):
    with KVStore(folder, BIG, FP) as store:
        put(store, list(tokens), size=40)
        return longest(store, tokens).path


@pytest.mark.parametrize("moment", ["before opening", "while open"])
def test_damage_anywhere_is_never_served(tmp_path, caplog, moment):
    """Each byte of the file flipped, and the file cut at each length: served is nothing, or what was put."""
    path = one_file(tmp_path)
    whole, rng = path.read_bytes(), random.Random(0)
    damages = [whole[:i] + bytes([whole[i] ^ (1 << rng.randrange(8))]) + whole[i + 1 :] for i in range(len(whole))]
    damages += [whole[:n] for n in range(0, len(whole), 7)] + [whole + b"\0", whole * 2, bytes(len(whole))]
    for damaged in rng.sample(damages[: len(whole)], 250) + damages[len(whole) :]:
        caplog.clear()
        path.write_bytes(whole if moment == "while open" else damaged)
        with KVStore(tmp_path, BIG, FP) as store:
            if moment == "while open":
                path.write_bytes(damaged)
            assert not served(store, [1, 2, 3], size=40)
            assert (len(store), store.nbytes, path.exists()) == (0, 0, False)
            assert [r.levelname for r in caplog.records] == ["WARNING"] and str(path) in caplog.text


def test_a_damaged_entry_makes_way_for_the_next_and_for_itself(tmp_path):
    with KVStore(tmp_path, BIG, FP) as store:
        put(store, [1])
        put(store, [1, 2])
        path = longest(store, [1, 2]).path
        path.write_bytes(path.read_bytes()[:-1])
        assert store.load(longest(store, [1, 2])) is None
        assert served(store, [1])
        assert put(store, [1, 2]) and served(store, [1, 2])


def test_entries_of_others_are_left_alone_while_there_is_room(tmp_path, caplog):
    with KVStore(tmp_path, BIG, {**FP, "model": "other"}) as store:
        for i in range(3):
            put(store, [1, i])
        before = files(tmp_path)
    with KVStore(tmp_path, BIG, FP) as store:
        assert len(store) == 0 and store.nbytes == disk(tmp_path)
        assert store.longest([1, 1]) is None
        assert put(store, [1, 1])
    assert set(before) < set(files(tmp_path))
    assert len(caplog.records) == 1
    assert "(and 2 more files): skipped, and deleted when room is needed: model is 'other', here 'tiny'" in caplog.text
    with KVStore(tmp_path, BIG, {**FP, "model": "other"}) as store:
        assert served(store, [1, 1])


def test_files_of_later_versions_and_strangers_are_left_alone(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(kv_file, "_VERSION", 2)
    path = one_file(tmp_path)
    monkeypatch.undo()
    (tmp_path / "README").write_text("mine")
    (tmp_path / f"{0:032x}.kv").mkdir()
    with KVStore(tmp_path, BIG, FP) as store:
        assert not len(store)
    assert path.exists() and (tmp_path / "README").exists()
    assert "version 2, here 1" in caplog.text


def test_an_entry_under_the_name_of_another_is_not_served(tmp_path, caplog):
    path = one_file(tmp_path)
    path.rename(path.with_name(f"{7:032x}.kv"))
    with KVStore(tmp_path, BIG, FP) as store:
        assert not len(store)
    assert "name does not fit" in caplog.text


def error(code):
    """A call that fails with that errno."""

    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    return fail


def rewritten(whole, change):
    """A file's bytes with its head's JSON text changed and the checksums made right."""
    magic, version, text, tokens = kv_file.PREAMBLE.unpack_from(whole)
    start = kv_file.PREAMBLE.size
    key, (_, _, at) = whole[start + text :][: 4 * tokens], kv_file.parse_head(whole)
    new = change(whole[start : start + text])
    before = kv_file.PREAMBLE.pack(magic, version, len(new), tokens) + new + key
    before += kv_file.digest(before)
    before += bytes(-len(before) % 64) + whole[at : -kv_file.DIGEST]
    return before + kv_file.digest(before)


WRONG = [
    None,
    True,
    -1,
    0,
    64,
    2**70,
    1.5,
    float("nan"),
    "",
    "object",
    "float32",
    "uint8",
    "V8",
    "finfo",
    "iinfo",
    [],
    {},
]
WRONG += [[1], [-1, -40], [0, 2**60, 2**60], ["uint8", [3, 40], 2**40], ["uint8", [120], 0], {"a": 1}, [[[]]]]
TEXTS = [b"", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"9" * 10_000, b'{"fingerprint": {}}', b"{} {}"]


def wrong_heads(count):
    """Changes of a head: other values anywhere in it, values left out, and texts that are no head at all."""

    def change(text):
        head = json.loads(text)
        for _ in range(rng.choice([1, 1, 2])):
            node: Any = head
            while True:
                at = rng.choice(sorted(node) if isinstance(node, dict) else range(len(node)))
                if not isinstance(node[at], dict | list) or not node[at] or rng.random() < 0.3:
                    break
                node = node[at]
            if rng.random() < 0.2:
                del node[at]
            else:
                node[at] = rng.choice(WRONG)
            if not head:
                break
        return json.dumps(head).encode()

    rng = random.Random(4)
    return [*((lambda _, t=t: t) for t in TEXTS), *[change] * count]


@pytest.mark.parametrize("moment", ["before opening", "while open"])
def test_malformed_content_behind_valid_checksums_is_skipped(tmp_path, caplog, moment):
    """What is served has the right planes, whatever a head says: only `extra` is anyone's guess."""
    path = one_file(tmp_path)
    whole, (planes, _) = path.read_bytes(), content([1, 2, 3], 40)
    described = {name: (x.dtype, x.shape) for name, x in planes.items()}

    def fits(length, planes):
        return length == 3 and {name: (x.dtype, x.shape) for name, x in planes.items()} == described

    skipped = 0
    for change in wrong_heads(300):
        caplog.clear()
        wrong = rewritten(whole, change)
        path.write_bytes(whole if moment == "while open" else wrong)
        with KVStore(tmp_path, BIG, FP, fits=fits) as store:
            if moment == "while open":
                path.write_bytes(wrong)
                longest(store, [1, 2, 3]).nbytes = len(wrong)
            entry = store.longest([1, 2, 3])
            loaded = entry and store.load(entry)
            assert store.nbytes == disk(tmp_path)
            if loaded:
                assert list(loaded[0]) == list(planes)
                assert all(loaded[0][name].tobytes() == planes[name].tobytes() for name in planes)
            else:
                skipped += 1
                assert store.longest([1, 2, 3]) is None and caplog.records[-1].levelname == "WARNING"
                assert len(caplog.text) < 1000
                assert put(store, [1, 2, 3], 40) and served(store, [1, 2, 3], 40) and store.nbytes == disk(tmp_path)
    assert skipped > 250


def test_a_head_that_claims_gigabytes_is_not_read(tmp_path):
    path = one_file(tmp_path)
    with open(path, "wb") as f:
        f.write(kv_file.PREAMBLE.pack(b"ds4jaxKV", 1, 1 << 30, 1 << 30))
        f.truncate(6 << 30)  # takes no room on the disk
    with KVStore(tmp_path, 8 << 30, FP) as store:
        assert len(store) == 0 and not path.exists()
        with pytest.raises(ValueError, match="extra and tokens"):
            store.put([1], {}, "x" * kv_file.MAX_HEAD)


def test_planes_that_do_not_fit_the_model_are_a_miss(tmp_path, caplog):
    one_file(tmp_path)
    with KVStore(tmp_path, BIG, FP, fits=lambda length, planes: length == 3 and len(planes) == 5) as store:
        assert store.load(longest(store, [1, 2, 3])) is None and store.longest([1, 2, 3]) is None
        assert "not the state" in caplog.text and store.nbytes == disk(tmp_path)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EIO])
def test_what_cannot_be_read_for_now_stays(tmp_path, caplog, monkeypatch, code):
    """A disk that fails three times in a row is not asked again; the file counts, and the next start may read it."""
    path = one_file(tmp_path)
    with KVStore(tmp_path, BIG, FP) as store:
        entry = longest(store, [1, 2, 3])
        for times in (2, 2, 5):
            for i in range(times):
                monkeypatch.setattr(kv_file, "open", error(code), False)
                caplog.clear()
                assert store.load(entry) is None and len(caplog.records) == 1 and os.strerror(code) in caplog.text
                monkeypatch.undo()
                assert store.longest([1, 2, 3]) is (None if code == errno.EIO and i >= 2 else entry)
                assert store.nbytes == disk(tmp_path)
            assert times == 5 or served(store, [1, 2, 3], size=40)
        assert path.exists() and served(store, [1, 2, 3], size=40) == (code == errno.EMFILE)
        assert put(store, [1, 2, 3], size=40) and served(store, [1, 2, 3], size=40) and store.nbytes == disk(tmp_path)
    monkeypatch.setattr(kv_file, "open", error(code), False)
    with KVStore(tmp_path, BIG, FP) as store:
        assert len(store) == 0 and store.nbytes == disk(tmp_path)
    monkeypatch.undo()
    with KVStore(tmp_path, BIG, FP) as store:
        assert served(store, [1, 2, 3], size=40)


def test_entries_survive_when_the_process_has_no_file_descriptors_left(tmp_path):
    with KVStore(tmp_path, BIG, FP) as store:
        put(store, [1])
        limits, held = resource.getrlimit(resource.RLIMIT_NOFILE), []
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
            with contextlib.suppress(OSError):
                while True:
                    held.append(os.dup(0))
            assert not served(store, [1]) and not put(store, [2]) and store.longest([1])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for fd in held:
                os.close(fd)
        assert served(store, [1]) and put(store, [2]) and served(store, [2]) and store.nbytes == disk(tmp_path)


CALLS = [(os, "open"), (os, "fsync"), (os, "replace"), (os, "unlink"), (os, "utime"), (kv_file, "open")]
CALLS += [(writing, "sync_folder"), (os, "scandir")]


@pytest.mark.parametrize("seed", range(8))
def test_faults_of_the_disk_lose_neither_entries_nor_counts(tmp_path, monkeypatch, seed):
    """Calls fail now and then: what is on disk is what is counted, within the budget, and what is known is there."""
    rng, budget = random.Random(seed), 40_000

    def paths():
        return {entry.path for entry in store._index._entries}

    with KVStore(tmp_path, budget, FP) as store:
        for _ in range(150):
            tokens = [rng.randrange(4) for _ in range(rng.randrange(1, 4))]
            for where, name in rng.sample(CALLS, rng.choice([0, 1, 1, 2, 3])):
                code = rng.choice([errno.EMFILE, errno.EIO, errno.EROFS, errno.ENOSPC])
                monkeypatch.setattr(where, name, error(code), raising=False)
            before = paths()
            if put(store, tokens, size=1000 * tokens[0]):
                assert exact(store, tokens)
            assert not any(path.exists() for path in before - paths())  # what was evicted is gone
            served(store, tokens, size=1000 * tokens[0])
            monkeypatch.undo()
            assert store.nbytes == disk(tmp_path) <= budget
            assert all(path.exists() for path in paths())
        assert len(store) > 3
        while store._index._unused:  # what is left of failures goes first
            store.budget = store.nbytes - 1
            store._make_room(0)
        known = paths()
        assert known == set(tmp_path.glob("*.kv*")) and store.nbytes == disk(tmp_path)
    with KVStore(tmp_path, budget, FP) as store:
        assert paths() == known


def test_a_half_written_file_that_cannot_be_deleted_counts(tmp_path, monkeypatch):
    with KVStore(tmp_path, BIG, FP) as store:
        fails = error(errno.EROFS)
        monkeypatch.setattr(os, "fsync", fails)
        monkeypatch.setattr(os, "unlink", lambda path, **_: fails() if Path(path).exists() else os.remove(path))
        assert not put(store, [1]) and store.nbytes == disk(tmp_path) > 0 and len(store) == 0
        assert [f.endswith(".kv.tmp") for f in files(tmp_path)] == [True]
        monkeypatch.undo()
        assert put(store, [1]) and served(store, [1]) and store.nbytes == disk(tmp_path)


def test_a_file_that_cannot_be_deleted_lets_others_make_room(tmp_path, monkeypatch, clock, caplog):
    with KVStore(tmp_path, BIG, FP) as store:
        for i in range(3):
            put(store, [i])
            clock[0] += 1
        store.budget, stuck = store.nbytes, longest(store, [0]).path
        monkeypatch.setattr(
            os, "unlink", lambda path, **_: os.remove(path) if Path(path) != stuck else error(errno.EPERM)()
        )
        assert put(store, [3]) and exact(store, [0]) and exact(store, [2]) and not exact(store, [1])
        monkeypatch.setattr(os, "unlink", error(errno.EROFS))
        assert not put(store, [4]) and len(store) == 3 and store.nbytes == disk(tmp_path) and "not saved" in caplog.text
        monkeypatch.undo()
        assert put(store, [4]) and not exact(store, [0])


def test_leftovers_are_deleted_at_start(tmp_path, caplog):
    path = one_file(tmp_path)
    (tmp_path / f"{path.name}.tmp").write_bytes(b"half")
    (tmp_path / f"notes-{0:032x}.log.tmp").write_bytes(b"half")
    (tmp_path / "my.tmp").write_bytes(b"not ours")
    KVStore(tmp_path, BIG, FP).close()
    assert files(tmp_path) == sorted([path.name, "my.tmp"]) and not caplog.records


# ---- who else may use the folder ----------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", [0o755, 0o770, 0o707, 0o701])
def test_a_folder_open_to_others_is_made_private(tmp_path, caplog, mode):
    (tmp_path / "kv").mkdir()
    (tmp_path / "kv").chmod(mode)
    (tmp_path / "link").symlink_to("kv")
    for _ in range(2):
        with KVStore(tmp_path / "link", BIG, FP) as store:
            assert put(store, [1])
        assert (tmp_path / "kv").stat().st_mode & 0o7777 == 0o700
        assert all(file.stat().st_mode & 0o7777 == 0o600 for file in (tmp_path / "kv").iterdir())
    assert len(caplog.records) == 1 and f"its mode was {mode:o}" in caplog.text


def test_a_folder_of_others_is_refused_and_left_as_it_is(tmp_path, monkeypatch):
    everybodys = tmp_path / "tmp"
    everybodys.mkdir()
    everybodys.chmod(0o1777)
    with pytest.raises(Ds4Error, match=f"mode 1777 .* expected one of user {os.geteuid()} alone"):
        KVStore(everybodys, BIG, FP)
    everybodys.chmod(0o755)
    monkeypatch.setattr(os, "geteuid", lambda: everybodys.stat().st_uid + 1)
    with pytest.raises(Ds4Error, match="mode 755 of user"):
        KVStore(everybodys, BIG, FP)
    assert everybodys.stat().st_mode & 0o7777 == 0o755 and not list(everybodys.iterdir())
    everybodys.chmod(0o700)  # which root may use, too
    with pytest.raises(Ds4Error, match="mode 700 of user"):
        KVStore(everybodys, BIG, FP)
    everybodys.chmod(0o755)
    monkeypatch.undo()
    monkeypatch.setattr(os, "chmod", lambda *_, **__: None)  # a file system without modes
    with pytest.raises(Ds4Error, match="mode 755 of user"):
        KVStore(everybodys, BIG, FP)


def test_links_are_not_followed(tmp_path):
    kv, victim = tmp_path / "kv", tmp_path / "victim"
    victim.write_text("mine")
    path = one_file(kv)
    path.unlink()
    with KVStore(kv, BIG, FP) as store:
        path.with_name(f"{path.name}.tmp").symlink_to(victim)
        assert put(store, [1, 2, 3]) and served(store, [1, 2, 3]) and not path.is_symlink()
        store.notes.symlink_to(victim)
        notes = Replay.beside(store, 1 << 20).notes
        notes.put("a", 1)
        notes.put("b", 2)
        assert not store.notes.is_symlink() and Replay.beside(store, 1 << 20).notes.get("b") == 2
    path.with_name(f"{path.name}.tmp").symlink_to(victim)
    path.with_name(f"{7:032x}.kv").symlink_to(victim)
    with KVStore(kv, BIG, FP) as store:
        assert len(store) == 1 and not path.with_name(f"{path.name}.tmp").is_symlink()
    (kv / "lock").unlink()
    (kv / "lock").symlink_to(victim)
    with pytest.raises(Ds4Error, match="cannot be used as a store"):
        KVStore(kv, BIG, FP)
    with pytest.raises(OSError, match="symbolic links"):
        writing.append(kv / "lock", b"more")
    assert victim.read_text() == "mine"


def test_one_process_at_a_time(tmp_path):
    code = "import sys; from ds4jax.engine.kv_store import KVStore; KVStore(sys.argv[1], 1 << 20, {})"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with KVStore(tmp_path, BIG, FP):
        other = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        assert other.returncode == 1 and "Ds4Error" in other.stderr and "in use by another process" in other.stderr
        with pytest.raises(Ds4Error, match="in use"):
            KVStore(tmp_path, BIG, FP)
    KVStore(tmp_path, BIG, FP).close()


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "f").touch()
    with pytest.raises(Ds4Error, match="a directory for snapshots is expected"):
        KVStore(tmp_path / "f", BIG, FP)
    with pytest.raises(Ds4Error, match="cannot be used as a store"):
        KVStore(tmp_path / "f" / "g", BIG, FP)


# ---- trouble with the disk ----------------------------------------------------------------------------------------
def failing(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["write", "open", "fsync", "replace", "utime", "sync_folder"])
def test_a_failing_put_leaves_nothing_behind(tmp_path, caplog, monkeypatch, call):
    with KVStore(tmp_path, BIG, FP) as store:
        put(store, [1])
        before = files(tmp_path), store.nbytes
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if call == "write":  # a real one: it fails after the first 64 KiB
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
        else:
            monkeypatch.setattr(writing if call == "sync_folder" else os, call, failing)
        try:
            assert not put(store, [1, 2], size=100_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            monkeypatch.undo()
        if call != "sync_folder":  # then the file is there, and counts
            assert (files(tmp_path), store.nbytes) == before
        assert store.nbytes == disk(tmp_path)
        assert [r.levelname for r in caplog.records] == ["WARNING"] and "not saved" in caplog.text
        assert served(store, [1]) and put(store, [1, 2]) and served(store, [1, 2])


def test_a_folder_that_vanishes(tmp_path, caplog):
    with KVStore(tmp_path / "kv", BIG, FP) as store:
        put(store, [1])
        shutil.rmtree(tmp_path / "kv")
        assert not served(store, [1]) and not put(store, [1])
    assert [r.levelname for r in caplog.records] == ["WARNING"] * 2


# ---- the budget ---------------------------------------------------------------------------------------------------
def test_the_budget_is_never_exceeded(tmp_path, monkeypatch):
    """Looked at whenever something is about to be on disk for good, the files not yet renamed included."""
    peak, fsync, rng = [0], os.fsync, random.Random(2)
    monkeypatch.setattr(os, "fsync", lambda fd: (peak.__setitem__(0, max(peak[0], disk(tmp_path))), fsync(fd)))
    budget = 60_000
    with KVStore(tmp_path, budget, FP) as store:
        for _ in range(150):
            tokens = [rng.randrange(3) for _ in range(rng.randrange(1, 9))]
            put(store, tokens, size=rng.randrange(6000))
            assert store.nbytes == disk(tmp_path) <= budget
            assert store.longest(tokens)
        assert len(store) > 3
    assert 0.8 * budget < peak[0] <= budget
    with KVStore(tmp_path, budget // 3, FP) as store:
        assert 0 < store.nbytes <= budget // 3 and disk(tmp_path) == store.nbytes


def test_files_of_other_fingerprints_count_and_go_first_oldest_first(tmp_path, clock):
    """Entries, notes, and files of another version alike."""
    names = []
    for i, model in enumerate(["old", "older", "new"]):
        clock[0] += 1
        with KVStore(tmp_path, BIG, {**FP, "model": model}) as store:
            put(store, [1])
            names.append(longest(store, [1]).path)
            if not i:
                Replay.beside(store, 1 << 20).notes.put("a", "x" * 1000)
                names.insert(0, store.notes)
                os.utime(store.notes, (clock[0] - 1, clock[0] - 1))
    clock[0] += 1
    with KVStore(tmp_path, BIG, FP) as store:
        Replay.beside(store, 1 << 20).notes.put("own", 1)
        own = store.notes.stat().st_size
        put(store, [5])
        put(store, [6])
        assert store.nbytes == disk(tmp_path) - own
        for i, name in enumerate(names):
            assert [p.exists() for p in names] == [False] * i + [True] * (len(names) - i)
            store.budget = store.nbytes + 100  # the first to go makes room
            assert put(store, [7 + i], size=0 if name == names[0] else 500) and len(store) == 3 + i
        assert store.nbytes == disk(tmp_path) - own <= store.budget and store.notes.exists()
    with KVStore(tmp_path, 2000, {**FP, "model": "last"}) as store:
        assert store.nbytes == disk(tmp_path) <= 2000 and not len(store)


def test_before_the_content_is_known_nothing_is_found_or_stored(tmp_path):
    with KVStore(tmp_path, BIG, FP, "a") as store:
        put(store, [1])
    with KVStore(tmp_path, BIG, FP, None) as store:
        assert not store.ready and not put(store, [2]) and store.longest([1]) is None and store.shared([1]) == 0
        assert store.nbytes == disk(tmp_path)
        store.begin("a")
        assert store.ready and served(store, [1]) and put(store, [2])
    with KVStore(tmp_path, BIG, FP, None) as store:
        store.begin("b")
        assert store.ready and store.longest([1]) is None and put(store, [1]) and len(files(tmp_path)) == 3
    store = KVStore(tmp_path, BIG, FP, None)
    store.close()
    store.begin("a")  # too late: the folder may be another's
    assert not store.ready and len(files(tmp_path)) == 3
    with KVStore(tmp_path, 4000, FP, None) as store:  # the budget holds at once
        assert store.nbytes == disk(tmp_path) <= 4000 and len(files(tmp_path)) == 2
        store.begin("a")
        assert len(store) == 1 and store.nbytes == disk(tmp_path)


def test_before_the_content_is_known_what_may_be_of_use_goes_last(tmp_path, clock):
    for model, tokens in (("tiny", [1]), ("tiny", [2]), ("other", [3]), ("tiny", [4])):
        clock[0] += 1
        with KVStore(tmp_path, BIG, {**FP, "model": model}, "b" if tokens == [4] else "a") as store:
            put(store, tokens)
            one = longest(store, tokens).nbytes
    for room, left in ((3, [[1], [2]]), (2, [[2]])):  # the file of another model went first, [4] may have been of use
        with KVStore(tmp_path, one * room + 500, FP, None) as store:
            assert store.nbytes == disk(tmp_path) and len(files(tmp_path)) == room
            store.begin("a")
            assert [t for t in ([1], [2]) if store.longest(t)] == left
    with KVStore(tmp_path, BIG, FP, "b") as store:
        assert exact(store, [4])


def test_what_cannot_make_room_at_the_start_is_a_warning(tmp_path, monkeypatch, caplog):
    path = one_file(tmp_path)
    monkeypatch.setattr(os, "unlink", error(errno.EROFS))
    with KVStore(tmp_path, 10, FP) as store:
        assert path.exists() and store.nbytes == disk(tmp_path) and "exceed the budget" in caplog.text


def test_what_exceeds_the_budget_is_refused_and_evicts_nothing(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with KVStore(tmp_path, 8000, FP) as store:
        assert put(store, [1])
        assert not put(store, [2], size=3000)
        assert served(store, [1]) and len(files(tmp_path)) == 1
    assert [r.levelname for r in caplog.records] == ["INFO"] and "exceeds the budget" in caplog.text


def evicted_in_order(store, probes):
    """The order in which entries go as one after the other is evicted."""
    order = []
    while len(store):
        store.budget = store.nbytes - 1
        store._make_room(0)
        order += [name for name, t in probes.items() if name not in order and not exact(store, t)]
    return order


def exact(store, tokens):
    entry = store.longest(tokens)
    return entry is not None and entry.length == len(tokens)


@pytest.mark.parametrize("reopened", [False, True])
def test_least_recently_used_first(tmp_path, clock, reopened):
    probes = {name: [ord(name)] * 8 for name in "abcd"}
    store = KVStore(tmp_path, BIG, FP)
    for tokens in probes.values():
        put(store, tokens)
        clock[0] += 1
    for name in "ca":
        assert served(store, probes[name])
        clock[0] += 1
    if reopened:  # the last use is kept on disk
        store.close()
        store = KVStore(tmp_path, BIG, FP)
    assert evicted_in_order(store, probes) == ["b", "d", "c", "a"]
    store.close()


def test_tokens_per_byte_weigh_against_recency(tmp_path, clock):
    probes = {"long": [1] * 1024, "dear": [2] * 64, "cheap": [3] * 64}
    with KVStore(tmp_path, BIG, FP) as store:
        put(store, probes["long"], size=20_000)
        clock[0] += 6 * 3600
        put(store, probes["cheap"], size=20_000)
        put(store, probes["dear"], size=60_000)
        # 16 times the tokens per byte, one half-life older; a third of them at the same age.
        assert evicted_in_order(store, probes) == ["dear", "cheap", "long"]


def test_superseded_entries_go_before_others_unless_shared(tmp_path, clock):
    system, talk = [1] * 64, [1] * 64 + [2] * 8
    probes = {"other": [9] * 72, "system": system, "talk": talk, "next turn": talk + [3] * 8}
    with KVStore(tmp_path, BIG, FP) as store:
        for tokens in probes.values():
            put(store, tokens)
            clock[0] += 1
        assert evicted_in_order(store, probes) == ["system", "talk", "other", "next turn"]
    probes["other talk"] = [1] * 64 + [4] * 8
    with KVStore(tmp_path, BIG, FP) as store:
        for tokens in probes.values():
            put(store, tokens)
            clock[0] += 1
        order = evicted_in_order(store, probes)
        assert order[0] == "talk" and order.index("system") > 0
        assert served(store, probes["next turn"]) is False
    with KVStore(tmp_path, BIG, FP) as store:  # one that was used after its continuation was saved is not superseded
        put(store, system)
        put(store, talk)
        clock[0] += 6 * 3600
        assert served(store, system)
        assert evicted_in_order(store, {"system": system, "talk": talk}) == ["talk", "system"]


def test_an_entry_makes_way_for_its_own_continuation(tmp_path, clock):
    with KVStore(tmp_path, BIG, FP) as store:
        for tokens in ([9] * 64, [1] * 64):
            put(store, tokens)
            clock[0] += 1
        store.budget = store.nbytes + 100
        put(store, [1] * 65)
        assert exact(store, [9] * 64) and exact(store, [1] * 65) and store.longest([1] * 64) is None


def test_a_clock_that_was_ahead_leaves_no_immortals(tmp_path, clock):
    probes = {"ahead": [1] * 8, "now": [2] * 8}
    clock[0] += 1e9
    with KVStore(tmp_path, BIG, FP) as store:
        put(store, probes["ahead"])
    clock[0] -= 1e9
    with KVStore(tmp_path, BIG, FP) as store:
        clock[0] += 1
        put(store, probes["now"])
        assert evicted_in_order(store, probes) == ["ahead", "now"]


@pytest.mark.parametrize("reopened", [False, True])
@pytest.mark.parametrize("wrong", [-1e8, -5000.0, 1e8])
def test_a_clock_set_wrong_in_between_changes_no_order(tmp_path, clock, wrong, reopened):
    """Set wrong after `b` was put, and right again before `e` is: the order of uses stays, on disk too."""
    probes = {name: [ord(name)] * 8 for name in "abcde"}
    store = KVStore(tmp_path, BIG, FP)
    for name in "abcde":
        clock[1] = wrong if name in "cd" else 0.0
        if reopened:
            store.close()
            store = KVStore(tmp_path, BIG, FP)
        clock[0] += 1
        put(store, probes[name])
        if name == "d":
            clock[0] += 1
            assert served(store, probes["a"])
    store.close()
    with KVStore(tmp_path, BIG, FP) as store:
        assert evicted_in_order(store, probes) == ["b", "c", "d", "a", "e"]


# ---- threads and kills --------------------------------------------------------------------------------------------
def test_threads_put_find_and_load(tmp_path):
    failures, stop = [], threading.Event()

    def read():
        rng = random.Random(threading.get_ident())
        try:
            while not stop.is_set():
                if entry := store.longest([rng.randrange(4) for _ in range(6)]):
                    loaded = store.load(entry)
                    tokens = np.frombuffer(entry.key, "<u4").tolist()
                    assert loaded is None or same(loaded, content(tokens))
        except BaseException as e:
            failures.append(e)

    with KVStore(tmp_path, 30_000, FP) as store:
        threads = [threading.Thread(target=read) for _ in range(3)]
        for t in threads:
            t.start()
        rng = random.Random(3)
        for _ in range(80):
            assert put(store, [rng.randrange(4) for _ in range(rng.randrange(1, 5))])
        stop.set()
        for t in threads:
            t.join()
        assert store.nbytes == disk(tmp_path) <= 30_000
    assert not failures


def writer(folder, budget, first, fingerprint, pipe):
    """Puts one snapshot and one note after the other, serves them, and says so, until it is killed."""
    budget, room = split_budget(budget)
    with KVStore(folder, budget, fingerprint) as store:
        notes = Replay.beside(store, room).notes

        def serve():
            rng = random.Random(first)
            while True:
                served(store, [7, i := rng.randrange(first + 50)], size=i * 997 % 50_000)
                time.sleep(0.001)

        threading.Thread(target=serve, daemon=True).start()
        for i in itertools.count(first):
            os.write(pipe, b"s")
            assert put(store, [7, i], size=i * 997 % 50_000)
            notes.put(f"call_{i}", [i] * 20)
            os.write(pipe, b"e")


def kill_many(folder, budget, kills):
    """Kills a writer at random moments, of one model and now and then of another; → how often amid its work."""
    rng, n, middle = random.Random(budget), 0, 0
    for kill in range(kills):
        fingerprint = {**FP, "model": "other" if kill % 5 == 4 else "tiny"}
        r, w = os.pipe()
        if not (child := os.fork()):
            try:
                writer(folder, budget, n, fingerprint, w)
            finally:
                os._exit(1)
        os.close(w)
        said = b"".join(os.read(r, 1) for _ in range(rng.randrange(1, 8)))  # so far it gets, on any machine
        time.sleep(rng.random() * 0.004)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        said += os.read(r, 1 << 20)
        os.close(r)
        finished = n + said.count(b"e")
        middle += said.endswith(b"s")
        assert disk(folder) <= budget
        prefixes, room = split_budget(budget)
        with KVStore(folder, prefixes, fingerprint) as store:
            notes = Replay.beside(store, room).notes
            assert store.nbytes + notes.nbytes == disk(folder) <= budget
            assert not [f for f in files(folder) if f.endswith(".tmp")]
            for i in range(max(n, finished - 20), finished + 1):
                there = served(store, [7, i], size=i * 997 % 50_000)
                assert there or i == finished or budget < BIG, f"snapshot {i} of {finished} is lost"
                note = notes.get(f"call_{i}")
                assert note == [i] * 20 or (note is None and i == finished), f"note {i} of {finished}: {note}"
        n = finished
    return middle, n


@pytest.mark.parametrize("kills", [pytest.param(100, marks=pytest.mark.slow), 20])
@pytest.mark.parametrize("budget", [BIG, 300_000])
def test_kill_at_any_moment(tmp_path, budget, kills):
    """In a process of its own, as it forks. A small budget: so that kills also fall into evictions and rewriting."""
    code = f"import test_kv_store; print(*test_kv_store.kill_many({str(tmp_path / 'kv')!r}, {budget}, {kills}))"
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    middle, n = map(int, done.stdout.split())
    assert middle > kills // 4 and n > kills // 2
    # Nothing was ever under its name before it was whole: no warnings but of the other model's files.
    assert all("model is" in line for line in done.stderr.splitlines() if ".kv" in line), done.stderr
