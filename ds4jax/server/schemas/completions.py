"""The body of Completions: a raw prompt, text after BOS, or token ids as they are."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from ds4jax.server.ask import Ask, Json
from ds4jax.server.schemas.base import (
    Body,
    Limit,
    Some,
    Stops,
    StreamOptions,
    TopLogprobs,
    parse,
    stops,
    wrong,
)


def _only(prompt: Any) -> Any:
    """The prompt in a list of one prompt. Raises ApiError for several."""
    if not isinstance(prompt, list) or (prompt and all(type(id) is int for id in prompt)):
        return prompt
    if len(prompt) != 1:
        raise wrong("prompt", prompt, "one prompt: a string or a list of token ids")
    return prompt[0]


class Completions(Body):
    prompt: Annotated[str | Some[int], BeforeValidator(_only)]
    max_tokens: Limit = 16  # as with OpenAI
    logprobs: TopLogprobs | None = None
    stop: Stops = []
    stream_options: StreamOptions = StreamOptions()
    n: Literal[1] = 1
    best_of: Literal[1] = 1
    echo: Literal[False] = False
    suffix: Literal[""] = ""


def read(body: Json) -> Ask:
    """The `Ask` of `POST /v1/completions`. Raises Ds4Error."""
    completions = parse(Completions, body)
    return Ask(
        prompt=completions.prompt,
        max_tokens=completions.max_tokens,
        stop=stops(completions.stop),
        logprobs=completions.logprobs,
        include_usage=completions.stream_options.include_usage,
        **completions.common(),
    )
