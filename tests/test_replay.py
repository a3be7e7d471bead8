"""Remembered turns: they come back as they were or not at all, whatever happens to process, disk and file."""

import contextlib
import os
import resource

import pytest
from test_kv_store import BIG, FP, disk, failing, files

from ds4jax.chat.template import SampledTurn
from ds4jax.engine.kv_store import KVStore
from ds4jax.server.replay import MAX_BYTES, NoteLog, Replay, split_budget

CALL = {"role": "assistant", "tool_calls": [{"id": "call_1", "function": {"name": "f", "arguments": "{}"}}]}


@contextlib.contextmanager
def opened(folder, room=MAX_BYTES):
    """The log beside a store."""
    with KVStore(folder, BIG, FP) as store:
        yield Replay.beside(store, room).notes


@pytest.mark.parametrize("on_disk", [False, True])
def test_turns_are_recalled_by_the_id_of_their_first_call(tmp_path, on_disk):
    turn = SampledTurn(True, CALL, (5, 6, 7))
    others = [{"role": "user", "content": "Hi"}, {"tool_calls": []}, {"tool_calls": [{"id": 5}]}, "text", None]
    with KVStore(tmp_path, BIG, FP) as store:
        replay = Replay.beside(store, MAX_BYTES) if on_disk else Replay()
        assert replay.recall([CALL]) == {}
        replay.remember(turn)
        assert replay.recall([*others, CALL]) == {"call_1": turn}
        assert (replay.nbytes > 0) == on_disk
    with KVStore(tmp_path, BIG, FP) as store:
        assert Replay.beside(store, MAX_BYTES).recall([CALL]) == ({"call_1": turn} if on_disk else {})
    with KVStore(tmp_path, BIG, {**FP, "model": "other"}) as store:
        assert Replay.beside(store, MAX_BYTES).recall([CALL]) == {}


def test_a_folder_is_shared_between_prefixes_and_turns():
    assert split_budget(1600) == (1500, 100) and split_budget(1 << 40) == ((1 << 40) - MAX_BYTES, MAX_BYTES)


def test_memory_alone_is_bounded_too():
    notes = NoteLog(None, 4000)
    for i in range(1000):
        notes.put(f"call_{i}", i)
        assert notes.get("call_0") == 0 and sum(map(len, notes._lines.values())) <= 2000
    assert notes.get("call_999") == 999 and notes.get("call_1") is None and notes.nbytes == 0


def test_a_leftover_is_deleted_at_start(tmp_path):
    (tmp_path / "log.tmp").write_bytes(b"half")
    NoteLog(tmp_path / "log", 1000)
    assert not (tmp_path / "log.tmp").exists()


def test_a_folder_that_vanishes_costs_no_turn(tmp_path, caplog):
    notes = NoteLog(tmp_path / "gone" / "log", 1 << 20)
    notes.put("a", [1])
    assert notes.get("a") == [1]
    assert [r.levelname for r in caplog.records] == ["WARNING"]


def test_notes_persist_and_the_last_one_counts(tmp_path):
    value = {"tokens": [1, 2, 3], "text": "<｜DSML｜>\n\r\u2028"}
    with opened(tmp_path) as store:
        store.put("ü \n", value)
        store.put("b", 1)
        store.put("b", None)
        store.put("b", 2)
        size = store.nbytes
        store.put("b", 2)
        assert store.nbytes == size == disk(tmp_path)
    with opened(tmp_path) as store:
        assert (store.get("ü \n"), store.get("b"), store.get("c")) == (value, 2, None)


def test_damaged_notes_are_never_served(tmp_path, caplog):
    with opened(tmp_path) as store:
        for i in range(5):
            store.put(f"call_{i}", i)
    (path,) = (p for p in tmp_path.iterdir() if p.name.startswith("notes"))
    whole = path.read_bytes()
    length = len(whole) // 5
    for i in range(0, len(whole), 3):
        caplog.clear()
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 16]) + whole[i + 1 :])
        with opened(tmp_path) as store:
            notes = [store.get(f"call_{j}") for j in range(5)]
            assert len(caplog.records) == 1 and str(path) in caplog.text
            assert all(n in (j, None) for j, n in enumerate(notes)) and notes.count(None) <= 2
            store.put("more", "x")
        caplog.clear()
        with opened(tmp_path) as store:  # the damage is gone
            assert store.get("more") == "x" and not caplog.records
    path.write_bytes(whole[:-5])
    with opened(tmp_path) as store:
        assert [store.get(f"call_{j}") for j in range(5)] == [0, 1, 2, 3, None]
        assert store.nbytes == 4 * length


def test_least_recently_used_notes_go_first(tmp_path):
    room = 16_000
    with opened(tmp_path, room) as store:
        for i in range(1000):
            store.put(f"call_{i}", i)
            assert store.get("call_0") == 0
            assert store.nbytes == disk(tmp_path) <= room // 2
        store.put("huge", "x" * room)
        assert store.get("huge") is None
    with opened(tmp_path, room) as store:
        kept = [i for i in range(1000) if store.get(f"call_{i}") is not None]
    assert kept[0] == 0 and kept[1:] == list(range(kept[1], 1000)) and 30 < len(kept) < 200


@pytest.mark.parametrize("call", ["write", "open", "fsync"])
def test_a_failing_note_is_served_from_memory_and_saved_later(tmp_path, caplog, monkeypatch, call):
    with opened(tmp_path) as store:
        store.put("a", "x" * 1000)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if call == "write":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
        else:
            monkeypatch.setattr(os, call, failing)
        try:
            store.put("b", "y" * 1000)
            store.put("c", "z" * 1000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            monkeypatch.undo()
        assert store.get("b") == "y" * 1000
        assert {r.levelname for r in caplog.records} == {"WARNING"}
        caplog.clear()
        store.put("d", 1)
    with opened(tmp_path) as store:
        assert [store.get(k) for k in "abcd"] == ["x" * 1000, "y" * 1000, "z" * 1000, 1]
    assert not caplog.records and len(files(tmp_path)) == 1
