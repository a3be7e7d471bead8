"""Settings: the configs that come with ds4jax, and every refusal."""

import dataclasses
import os
import re

import pytest

from ds4jax import settings
from ds4jax.errors import ConfigError
from ds4jax.settings import Settings

KEYS = [field.name for field in dataclasses.fields(Settings)]


def config(tmp_path, text):
    path = tmp_path / "my.toml"
    path.write_text(text)
    return path


def test_the_configs_are_there():
    several = "h100x2", "h200x2", "h200x4", "rtx_pro_6000x2", "rtx_pro_6000x4", "sparkx2"
    one = "gpu24", "gpu32", "gpu48", "h100", "h200", "rtx_pro_6000", "spark", "tiny", "tiny_q2"
    assert settings.names() == sorted([*several, *one])


@pytest.mark.parametrize("name", settings.names())
def test_configs_load_and_explain_every_key(name):
    loaded = Settings.load(name)
    assert loaded.model == name or (loaded.hf_file or ("",))[0] == "antirez/deepseek-v4-gguf"
    text = (settings.CONFIG_DIR / f"{name}.toml").read_text()
    for key in KEYS:
        line = re.search(rf"(#.*\n)?{key} = .*", text)
        assert line and "#" in line[0], f"{key} is not explained"


def test_the_docstring_explains_every_key():
    explained = " ".join(re.findall(r"^    ([a-z_, ]+): ", Settings.__doc__ or "", re.M)).replace(",", "").split()
    assert sorted(explained) == sorted(KEYS)


def test_what_each_machine_needs():
    assert Settings.load("rtx_pro_6000").memory_fraction == 0.95
    assert not Settings.load("spark").preallocate
    assert [Settings.load(name).devices for name in ("h200", "h100x2", "rtx_pro_6000x4")] == [1, 2, 4]
    assert Settings("tiny", tp=2, ep=3, dp=4).devices == 24
    assert Settings.load("tiny").dtype == "float32"


def test_a_path_is_read_and_overrides_win(tmp_path):
    path = config(tmp_path, 'model = "m.gguf"\nctx = 100\nmemory_fraction = 1')
    assert Settings.load(path) == Settings("m.gguf", ctx=100, memory_fraction=1)
    assert Settings.load(str(path), ctx=7, model=None) == Settings("m.gguf", ctx=7, memory_fraction=1)


@pytest.mark.parametrize(
    "text, problem",
    [
        ("ctx = 10", "model: found nothing, expected tiny, tiny_q2, hf:OWNER/REPO/FILE or a path"),
        ('model = "tiny"\nctxx = 1', "found unknown key 'ctxx', expected one of model, ctx, batch"),
        ('model = "tiny"\nctx = "many"', "ctx: found 'many', expected a value of type int"),
        ('model = "tiny"\nctx = 10.0', "ctx: found 10.0, expected a value of type int"),
        ('model = "tiny"\ntp = true', "tp: found True, expected a value of type int"),
        ('model = "tiny"\nctx = 1', "ctx: found 1, expected 2 to 16777216"),
        ('model = "tiny"\ndp = 0', "dp: found 0, expected 1 to 1024"),
        ('model = "tiny"\nprefill_chunk = 0', "prefill_chunk: found 0, expected 1 to 1048576"),
        ('model = "tiny"\npreallocate = 1', "preallocate: found 1, expected a value of type bool"),
        ('model = "tiny"\nmemory_fraction = 1.5', "memory_fraction: found 1.5, expected a number above 0, at most 1"),
        ('model = "tiny"\nmemory_fraction = nan', "memory_fraction: found nan, expected"),
        ('model = "tiny"\nnumerics = "exact"', "numerics: found 'exact', expected 'official' or 'plain'"),
        (
            'model = "tiny"\nkernels = "pallas"\nnumerics = "plain"',
            "kernels: found 'pallas with numerics plain', expected numerics official, or kernels xla",
        ),
        ('model = "tiny"\ndtype = "float16"', "dtype: found 'float16', expected 'float32' or 'bfloat16'"),
        ('model = ""', "model: found '', expected tiny"),
        ('model = "hf:owner/repo"', "model: found 'hf:owner/repo', expected hf:OWNER/REPO/FILE"),
        ("model = tiny", "not a TOML file"),
    ],
)
def test_refusals_name_file_key_found_and_expected(tmp_path, text, problem):
    path = config(tmp_path, text)
    with pytest.raises(ConfigError, match=re.escape(f"{path}: {problem}")):
        Settings.load(path)


def test_unknown_names_and_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match="found 'huge', expected one of gpu24, gpu32, gpu48, h100, h100x2, h200, "):
        Settings.load("huge")
    with pytest.raises(ConfigError, match="none.toml: cannot be read: No such file"):
        Settings.load(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b'model = "\xe9"')
    with pytest.raises(ConfigError, match="latin.toml: not a TOML file"):
        Settings.load(tmp_path / "latin.toml")


def test_models_on_hugging_face():
    assert Settings("hf:owner/repo/dir/file.gguf").hf_file == ("owner/repo", "dir/file.gguf")
    assert Settings("hf/owner/repo/file.gguf").hf_file is None


def test_xla_is_told_unless_the_user_has(monkeypatch):
    names = ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"]
    found = {}
    for given in ({}, {names[0]: "0.5"}, {names[1]: "0.5", names[2]: "true"}):
        for name in names:
            monkeypatch.setenv(name, "")  # so that the end of the test removes whatever is set here
            monkeypatch.delenv(name)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        Settings("tiny", memory_fraction=0.9, preallocate=False).set_environment()
        found[len(found)] = {name: os.environ.get(name) for name in names}
    assert [list(env.values()) for env in found.values()] == [
        ["0.9", None, "false"],
        ["0.5", None, "false"],
        [None, "0.5", "true"],  # the deprecated name: XLA refuses to see both
    ]


def test_xla_may_have_host_memory_for_experts(monkeypatch):
    name = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)
    Settings("tiny").set_environment()
    assert name not in os.environ
    Settings("tiny", device_budget_gb=8.0).set_environment()
    assert int(os.environ[name]) > 73


def test_a_file_that_nests_too_deep_is_no_toml_file(tmp_path):
    (path := tmp_path / "deep.toml").write_text("x = " + "[" * 100_000)
    with pytest.raises(ConfigError, match="not a TOML file"):
        Settings.load(path)
