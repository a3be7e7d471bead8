"""The body of Completions: raw prompts, text after BOS, or token ids as they are."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from ds4jax.server.ask import Ask, Json
from ds4jax.server.schemas import base


def _several(prompt: Any) -> Any:
    """A list of prompts, of which a string or a list of token ids is one."""
    if isinstance(prompt, str) or isinstance(prompt, list) and prompt and all(type(id) is int for id in prompt):
        return [prompt]
    return prompt


class Completions(base.Choosing):
    prompt: Annotated[base.Some[str | base.Some[int]], BeforeValidator(_several)]
    max_tokens: base.LimitOrZero = 16  # as with OpenAI
    logprobs: base.TopLogprobs | None = None
    best_of: Literal[1] = 1
    echo: bool = False
    suffix: Literal[""] = ""


def read(body: Json) -> Ask:
    """The `Ask` of `POST /v1/completions`. Raises Ds4Error."""
    completions = base.parse(Completions, body)
    return Ask(
        prompt=completions.prompt[0],
        other_prompts=tuple(completions.prompt[1:]),
        n=base.answers(completions.n, len(completions.prompt)),
        echo_prompt=completions.echo,
        max_tokens=completions.max_tokens,
        logprobs=completions.logprobs,
        **completions.common(),
    )
