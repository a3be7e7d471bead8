"""What the server says about tokens, prompts and itself, in the forms of vLLM and llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ds4jax
from ds4jax.engine.async_engine import AsyncEngine
from ds4jax.engine.sequence import Sequence
from ds4jax.engine.types import Sampling
from ds4jax.server import conversation
from ds4jax.server.ask import Json
from ds4jax.server.errors import ApiError
from ds4jax.server.schemas import base


class Tokenize(base.Schema):
    """vLLM has a `prompt`, by default with BOS, llama.cpp has `content`, by default without; or a chat's messages."""

    prompt: str | None = None
    content: str | None = None
    messages: list[Any] | None = None
    add_special_tokens: bool | None = None
    add_special: bool | None = None
    parse_special: bool = True
    return_token_strs: bool = False
    with_pieces: bool = False


class Detokenize(base.Schema):
    tokens: base.Items[int]


def tokenize(engine: AsyncEngine, body: Json, chat_prompt: Callable[[Json], list[int]]) -> Json:
    """The ids of a text, in which control tokens are spelled unless parse_special is false, or of a chat's prompt."""
    asked, tokenizer = base.parse(Tokenize, body), engine.tokenizer
    given = [name for name in ("prompt", "content", "messages") if getattr(asked, name) is not None]
    if len(given) != 1:
        raise ApiError(f"body: found {' and '.join(given) or 'none'}, expected one of prompt, content and messages")
    if asked.messages is not None:
        own = Tokenize.model_fields.keys() - {"messages"}  # the others are no fields of a chat
        ids = chat_prompt({key: value for key, value in body.items() if key not in own})
    else:
        text = asked.prompt if asked.content is None else asked.content
        assert text is not None
        bos = asked.add_special_tokens if asked.add_special is None else asked.add_special
        with_bos = asked.content is None and tokenizer.add_bos if bos is None else bos
        ids = [tokenizer.bos_id] if with_bos else []
        ids += tokenizer.encode_spelled(text) if asked.parse_special else tokenizer.encode_text(text)
    pieces = [tokenizer.id_to_bytes(id) for id in ids]
    strings = [piece.decode("utf-8", "replace") for piece in pieces]
    return {
        "count": len(ids),
        "max_model_len": engine.ctx,
        "tokens": [
            {"id": id, "piece": list(piece) if "\ufffd" in string else string}
            for id, piece, string in zip(ids, pieces, strings, strict=True)
        ]
        if asked.with_pieces
        else ids,
        "token_strs": strings if asked.return_token_strs else None,
    }


def detokenize(engine: AsyncEngine, body: Json) -> Json:
    ids = base.parse(Detokenize, body).tokens
    conversation.check_ids(engine, ids, "tokens")
    text = engine.tokenizer.decode(ids)
    return {"content": text, "prompt": text}


def tokenizer_info(engine: AsyncEngine) -> Json:
    """In the words of Hugging Face's tokenizer_config.json."""
    tokenizer = engine.tokenizer
    ends = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.eos_id}
    return {
        "tokenizer_class": type(tokenizer).__name__,
        **{name: tokenizer.decode([id]) for name, id in ends.items()},
        "add_bos_token": tokenizer.add_bos,
        "add_eos_token": False,
        "chat_template": tokenizer.chat_template,
        "model_max_length": engine.ctx,
        "vocab_size": tokenizer.vocab_size,
    }


def props(engine: AsyncEngine) -> Json:
    """What llama.cpp's page asks for first."""
    info = tokenizer_info(engine)
    return {
        "default_generation_settings": {"n_ctx": engine.ctx, "params": _params(Sampling(), -1)},
        "total_slots": len(engine.slots()),
        "model_alias": engine.model_name,
        "model_path": engine.model_name,
        "profile": engine.profile.name,
        "modalities": {"vision": False, "audio": False},
        "chat_template": info["chat_template"] or "",
        "bos_token": info["bos_token"],
        "eos_token": info["eos_token"],
        "build_info": f"ds4jax-{ds4jax.__version__}",
        "is_sleeping": False,
    }


def slots(engine: AsyncEngine) -> list[Json]:
    return [_slot(engine.ctx, i, seq) for i, seq in enumerate(engine.slots())]


def _slot(ctx: int, id: int, seq: Sequence | None) -> Json:
    out = {"id": id, "n_ctx": ctx, "speculative": False, "is_processing": seq is not None}
    if seq is None:
        return out
    decoded = len(seq.tokens) - seq.prompt_len
    return out | {
        "n_prompt_tokens": seq.prompt_len,
        "n_prompt_tokens_cache": seq.cached,
        "n_prompt_tokens_processed": min(seq.computed, seq.prompt_len) - seq.cached,
        "params": _params(seq.request.sampling, seq.limit - seq.prompt_len),
        "next_token": [{"has_next_token": True, "n_decoded": decoded, "n_remain": seq.limit - len(seq.tokens)}],
    }


def _params(sampling: Sampling, max_tokens: int) -> Json:
    return {
        "seed": sampling.seed,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repeat_penalty": sampling.repetition_penalty,
        "max_tokens": max_tokens,
        "n_predict": max_tokens,
    }
