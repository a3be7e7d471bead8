"""Compiled steps kept on disk."""

import os

import jax
import jax.numpy as jnp
import pytest

from ds4jax.engine import compiled


@pytest.fixture
def folder(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path / "steps"
    jax.config.update("jax_compilation_cache_dir", before)


def program():
    def step(x, state):
        return state["a"] * x, {"a": state["a"] + 1}

    args = jax.ShapeDtypeStruct((), jnp.float32), {"a": jax.ShapeDtypeStruct((4,), jnp.float32)}
    return jax.jit(step, donate_argnums=1).lower(*args).compile(), args


def test_nothing_is_kept_without_a_folder_or_for_a_cpu(folder, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    made, args = program()
    compiled.save("step", made)
    assert not folder.exists() and compiled.load("step", args, (0, args[1])) is None


def test_what_names_a_program(folder, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    path = compiled._path(("step", 1))
    assert path.parent == folder and path == compiled._path(("step", 1)) != compiled._path(("step", 2))
    compiled._surroundings.cache_clear()
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " ")
    assert compiled._path(("step", 1)) != path  # other flags, another program
    compiled._surroundings.cache_clear()


def test_a_damaged_file_is_no_program_and_the_oldest_go_first(folder, monkeypatch, caplog):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(compiled, "KEPT", 2)
    made, args = program()
    for i in range(3):
        compiled.save(i, made)
        os.utime(compiled._path(i), (i, i))
    compiled.save(3, made)
    assert {p.name for p in folder.iterdir()} == {compiled._path(i).name for i in (2, 3)}
    compiled._path(3).write_bytes(b"no program")
    assert compiled.load(3, args, (0, args[1])) is None and "cannot be used" in caplog.text


def test_a_folder_that_cannot_be_costs_no_more_than_a_compilation(folder, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    folder.touch()
    made, args = program()
    compiled.save("step", made)
    assert compiled.load("step", args, (0, args[1])) is None


@pytest.mark.gpu
def test_a_kept_program_runs_as_the_first_did(folder):
    made, args = program()
    compiled.save("step", made)
    again = compiled.load("step", args, (0, args[1]))
    for f in (made, again):
        y, state = f(jnp.float32(2), {"a": jnp.arange(4, dtype=jnp.float32)})
        assert y.tolist() == [0, 2, 4, 6] and state["a"].tolist() == [1, 2, 3, 4]
    assert again.memory_analysis().alias_size_in_bytes == made.memory_analysis().alias_size_in_bytes > 0
