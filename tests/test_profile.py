"""ds4jax.profile: which release a model file is, and what each release is told of an effort."""

from typing import get_args

import numpy as np
import pytest
from test_chat import BOS, P1, P2, system, text, user

from ds4jax import profile
from ds4jax.errors import Ds4Error
from ds4jax.profile import EFFORTS, THINK_MODES, Profile, choose, effort_prefix
from ds4jax.server.schemas import thinking
from ds4jax.settings import Settings

# As published: Jinja, the tags put together from a variable.
TEMPLATE = "{%- set dsml_token = '｜DSML｜' -%}{{- '<' + dsml_token + 'tool_calls>' -}} {#- final tool calls or #}"
FIRST = TEMPLATE + "{{- 'Reasoning Effort: Absolute maximum' -}}"
FILE = "DeepSeek-V4-Flash-IQ2XXS-w2Q2K-AProjQ8-SExpQ8-OutQ8-chat-v2-imatrix"
KEY, RATIOS = "tokenizer.chat_template", "deepseek4.attention.compress_ratios"


@pytest.mark.parametrize(
    ("metadata", "file", "sign"),
    [
        ({KEY: TEMPLATE + "{%- set effort_max = 'Reasoning Effort: Beyond maximum — ' -%}"}, "m.gguf", KEY),
        ({"general.version": "0731"}, "m.gguf", "general.version"),
        ({"general.name": "DeepSeek V4 Flash 0731"}, "m.gguf", "general.name"),
        ({"general.basename": "DeepSeek-V4-Flash-0731"}, "m.gguf", "general.basename"),
        ({"general.source": "deepseek-ai/DeepSeek-V4-Flash-0731"}, "m.gguf", "general.source"),
        (
            {"general.source.url": "https://huggingface.co/deepseek-ai/DeepSeek-V4-Flash-0731"},
            "m.gguf",
            "general.source.url",
        ),
        ({}, "DeepSeek-V4-Flash-Vision-Exp-Q4_K_M.gguf", "file name"),
        ({"general.base_model.0.name": "DeepSeek V4 Flash 0731"}, "m.gguf", "general.base_model.0.name"),
        ({RATIOS: np.zeros(46, np.int32), "deepseek4.block_count": 43}, "m.gguf", RATIOS),
        ({"deepseek4.dspark.block_size": 5}, "m.gguf", "deepseek4.dspark.block_size"),
        ({}, FILE + "-0731.gguf", "file name"),
        ({}, "deepseek_v4_flash_0731-00001-of-00004.gguf", "file name"),
        ({KEY: FIRST, "general.name": "DeepSeek V4 Flash"}, FILE + "-0731.gguf", "file name"),  # not the new template
    ],
)
def test_signs_of_0731(metadata, file, sign):
    assert choose("auto", metadata, file) == Profile("0731", sign)
    assert choose("original", metadata, file) == Profile("original", "setting")


@pytest.mark.parametrize(
    ("metadata", "file"),
    [
        ({}, ""),
        ({KEY: FIRST, "general.name": "DeepSeek V4 Flash", "general.version": "preview"}, FILE + ".gguf"),
        ({"general.source.revision": "9f0731ab", "general.version": "10731"}, "20731.gguf"),
        ({"general.version": 731, "general.description": "not 0731", "general.names": "0731"}, "0731b.gguf"),
        ({KEY: ["Reasoning Effort: Beyond maximum"]}, "m.gguf"),
        ({RATIOS: np.zeros(44, np.int32), "deepseek4.block_count": 43}, "visionexp.gguf"),  # 44: with an MTP head
    ],
)
def test_no_sign_of_0731(metadata, file):
    assert choose("auto", metadata, file) == Profile("original", "no sign of 0731")
    assert choose("0731", metadata, file) == Profile("0731", "setting")


def test_the_marker_is_a_sign():
    assert choose("auto", profile.MARKER, "").name == "0731"


@pytest.mark.parametrize("setting", ["auto", "original", "0731"])
def test_the_format_of_v4_1_is_refused(setting):
    for newer in (
        "{{- '<｜DSML｜ calls>' -}}",
        "{{- '\\n\\n<' + dsml_token + ' calls>\\n' -}}",
        "{{- ' (range 1-100, ' -}}",
    ):
        with pytest.raises(Ds4Error, match=r"tokenizer.chat_template: found DeepSeek-V4.1's format"):
            choose(setting, {KEY: TEMPLATE + newer}, "m.gguf")


@pytest.mark.parametrize(("name", "prefixes"), [("original", ["", "", "", "", P1]), ("0731", ["", P1, "", P1, P2])])
def test_effort_prefixes(name, prefixes):
    assert THINK_MODES == ("off", "on", "low", "high", "max")
    assert [effort_prefix(think, name) for think in THINK_MODES] == prefixes
    assert [effort_prefix(think, name, ctx=393216) for think in THINK_MODES] == prefixes
    small = [effort_prefix(think, name, ctx=393215) for think in THINK_MODES]
    assert small == ([""] * 5 if name == "original" else prefixes)
    for think, prefix in zip(THINK_MODES, prefixes, strict=True):
        tag = "</think>" if think == "off" else "<think>"
        prompt = text([system("S"), user("Q")], think=think, profile=name)
        assert prompt == f"{BOS}{prefix}S<｜User｜>Q<｜Assistant｜>{tag}"


def test_every_effort_is_a_think_mode():
    assert list(EFFORTS) == list(get_args(thinking.Effort.__value__)) and set(EFFORTS.values()) < set(THINK_MODES)


def test_settings_know_the_releases():
    assert Settings("m").profile == "auto"
    assert [Settings("m", profile=name).profile for name in get_args(profile.ReleaseName)] == ["original", "0731"]
