"""The body of Completions: a raw prompt, text after BOS, or token ids as they are."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from ds4jax.server.ask import Ask, Json
from ds4jax.server.schemas import base


def _only(prompt: Any) -> Any:
    """The prompt in a list of one prompt. Raises ApiError for several."""
    if not isinstance(prompt, list) or (prompt and all(type(id) is int for id in prompt)):
        return prompt
    if len(prompt) != 1:
        raise base.wrong("prompt", prompt, "one prompt: a string or a list of token ids")
    return prompt[0]


class Completions(base.Guided):
    prompt: Annotated[str | base.Some[int], BeforeValidator(_only)]
    max_tokens: base.Limit = 16  # as with OpenAI
    logprobs: base.TopLogprobs | None = None
    stop: base.Stops = []
    stream_options: base.StreamOptions = base.StreamOptions()
    n: Literal[1] = 1
    response_format: base.Unsupported = None
    best_of: Literal[1] = 1
    echo: Literal[False] = False
    suffix: Literal[""] = ""


def read(body: Json) -> Ask:
    """The `Ask` of `POST /v1/completions`. Raises Ds4Error."""
    completions = base.parse(Completions, body)
    return Ask(
        prompt=completions.prompt,
        form=completions.form(),
        max_tokens=completions.max_tokens,
        stop=base.stops(completions.stop),
        logprobs=completions.logprobs,
        include_usage=completions.stream_options.include_usage,
        **completions.common(),
    )
