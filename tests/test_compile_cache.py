"""Compiled steps kept on disk."""

import os

import jax
import jax.numpy as jnp
import pytest

from ds4jax.engine import compile_cache


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


def path_of(what):
    path = compile_cache._path(what)
    assert path is not None
    return path


def test_nothing_is_kept_without_a_folder_or_for_a_cpu(folder, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    made, args = program()
    compile_cache.save("step", made)
    assert not folder.exists() and compile_cache.load("step", args, (0, args[1])) is None


def test_what_names_a_program(folder, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    path = path_of(("step", 1))
    assert path.parent == folder and path == path_of(("step", 1)) != path_of(("step", 2))
    compile_cache._surroundings.cache_clear()
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " ")
    assert path_of(("step", 1)) != path  # other flags, another program
    compile_cache._surroundings.cache_clear()


def test_a_damaged_file_is_no_program_and_the_oldest_go_first(folder, monkeypatch, caplog):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(compile_cache, "KEPT", 2)
    made, args = program()
    for i in range(3):
        compile_cache.save(i, made)
        os.utime(path_of(i), (i, i))
    compile_cache.save(3, made)
    assert {p.name for p in folder.iterdir()} == {path_of(i).name for i in (2, 3)}
    path_of(3).write_bytes(b"no program")
    assert compile_cache.load(3, args, (0, args[1])) is None and "cannot be used" in caplog.text


def test_a_folder_that_cannot_be_costs_no_more_than_a_compilation(folder, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    folder.touch()
    made, args = program()
    compile_cache.save("step", made)
    assert compile_cache.load("step", args, (0, args[1])) is None


@pytest.mark.gpu
def test_a_kept_program_runs_as_the_first_did(folder):
    made, args = program()
    compile_cache.save("step", made)
    again = compile_cache.load("step", args, (0, args[1]))
    assert again is not None
    for f in (made, again):
        y, state = f(jnp.float32(2), {"a": jnp.arange(4, dtype=jnp.float32)})
        assert y.tolist() == [0, 2, 4, 6] and state["a"].tolist() == [1, 2, 3, 4]
    one, other = (f.memory_analysis() for f in (made, again))
    assert one is not None and other is not None and one.alias_size_in_bytes == other.alias_size_in_bytes > 0


def test_compiled_programs_are_kept_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    try:
        jax.config.update("jax_compilation_cache_dir", "elsewhere")
        compile_cache.keep_compilations()
        assert jax.config.jax_compilation_cache_dir == "elsewhere"
        jax.config.update("jax_compilation_cache_dir", None)
        compile_cache.keep_compilations()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "ds4jax" / "xla")
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
