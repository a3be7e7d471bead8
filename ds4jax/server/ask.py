"""A request in this project's own terms, whichever of the four APIs it came by."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ds4jax.chat.calls import Calling
from ds4jax.engine.form import Form
from ds4jax.engine.types import Sampling

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Ask:
    """What a client wants.

    model: the name the client used; any will do. stream: whether events are wanted.
    messages: in Chat Completions' form, for `template.render`; or None for a raw `prompt`, text or token ids.
    continues: the model goes on with the last message, an assistant's, and the answer is what it adds.
    tools: those the model may call. custom_tools: names of those that take free text; namespaces: (namespace, name) of
        those that have one, by the name that the model sees (Responses).
    think: one of `ds4jax.profile.THINK_MODES`, or "" where the request does not say. budget: the most tokens of
        the thought, or None.
    form: what the reply must be, unless it is calls; calling: which calls it may have. max_tokens: None for all the
        room there is. stop_ids: tokens that end the reply, beside EOS, and are nothing of it.
    logprobs: None, or how many of the likeliest tokens to report beside each token of the text.
    other_prompts: to be continued too; n: how many answers to each prompt; echo_prompt: whether these begin with the
        prompt (Completions; n in Chat Completions, too).
    include_usage: whether a last chunk has the usage; token_ids: whether the reply has those of prompt and answer (both
        in Chat Completions and Completions). progress: whether chunks say how much of the prompt is computed (Chat
        Completions). summary: whether thoughts are shown.
    echo: fields that Responses repeats in its answer. keep: the input that is to be kept with it, or None.
    ignored: fields of the body that are not known here, by their paths, and which may have been meant to change the
        reply; with their values.
    client: the name of the key that came with it, or "".
    """

    model: str
    stream: bool
    sampling: Sampling
    messages: list[Json] | None = None
    prompt: str | list[int] | None = None
    continues: bool = False
    tools: list[Json] | None = None
    custom_tools: frozenset[str] = frozenset()
    namespaces: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    think: str = ""
    budget: int | None = None
    form: Form | None = None
    calling: Calling = Calling()
    max_tokens: int | None = None
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    other_prompts: tuple[str | list[int], ...] = ()
    n: int = 1
    echo_prompt: bool = False
    include_usage: bool = False
    token_ids: bool = False
    progress: bool = False
    summary: bool = False
    echo: Json = dataclasses.field(default_factory=dict)
    keep: list[Json] | None = None
    ignored: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    client: str = ""

    def choices(self) -> list[Ask]:
        """An `Ask` for every single answer: to one prompt after the other, each with a seed of its own."""
        return [
            dataclasses.replace(self, prompt=prompt, sampling=dataclasses.replace(self.sampling, seed=seed % 2**32))
            for prompt in (self.prompt, *self.other_prompts)
            for seed in range(self.sampling.seed, self.sampling.seed + self.n)
        ]
