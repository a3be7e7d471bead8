"""What goes into the engine and what comes out: sampling parameters, requests, events and errors. No JAX."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from ds4jax.errors import ConfigError, Ds4Error

if TYPE_CHECKING:
    import numpy as np

    from ds4jax.engine.grammar import Grammar

ALIGN = 128
"""State can be saved and reused at multiples of this position: there every window of every compressor is closed."""

MAX_LOGPROBS = 20
"""How many of the likeliest tokens a request can ask for."""

FinishReason = Literal["stop", "length"]
"""Why an answer is complete. stop: its last token ends it; length: max_tokens or the context ended it."""


# ---- requests --------------------------------------------------------------------------------------------------------
def seed_or_random(seed: int | None) -> int:
    """A seed for `Sampling`; in place of None, one that nobody can foresee."""
    return secrets.randbits(32) if seed is None else seed


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one sequence chooses its tokens.

    temperature: 0 takes the likeliest token, and nothing else matters then. top_k: 0 is off. top_p: 1 is off.
    min_p: 0 is off. seed: 0 to 2³² - 1. The same logits, seed and position draw the same token, in any batch.

    The rest edits the logits first. presence_penalty is taken off those of every token of the answer so far,
    frequency_penalty as often as the token occurs; the logit of every token of prompt and answer is divided by
    repetition_penalty if it is positive, else multiplied; logit_bias, (id, bias) pairs, is added. min_tokens: before
    that many, no token may end the answer.

    Raises ConfigError for a value out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.05
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0

    def __post_init__(self):
        for key, ok, expected in (
            ("temperature", 0 <= self.temperature < math.inf, "a number of at least 0"),
            ("top_k", 0 <= self.top_k < 2**31, "0 (off) or a positive integer"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0, at most 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "a number from 0 (off) to 1"),
            ("seed", 0 <= self.seed < 2**32, f"0 to {2**32 - 1}"),
            ("presence_penalty", abs(self.presence_penalty) < math.inf, "a number"),
            ("frequency_penalty", abs(self.frequency_penalty) < math.inf, "a number"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a number above 0"),
            ("logit_bias", all(abs(bias) < math.inf for _, bias in self.logit_bias), "finite numbers"),
            ("min_tokens", self.min_tokens >= 0, "a number of at least 0"),
        ):
            if not ok:
                raise ConfigError(f"{key}: found {getattr(self, key)}, expected {expected}")

    @property
    def edits_logits(self) -> bool:
        """Whether any parameter changes the logits before a token is drawn."""
        penalties = self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1
        return any(penalties) or bool(self.logit_bias) or self.min_tokens > 0


@dataclasses.dataclass(frozen=True)
class Budget:
    """An answer begins with a thought of at most so many tokens; then `close`, the token that ends it, is forced."""

    tokens: int
    close: int


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A prompt, BOS included, and how to continue it.

    max_tokens: of the answer; the context may end it earlier. With 0 the prompt is computed and nothing sampled.
    stop_ids: tokens that end the answer; None: the model's EOS. logprobs: None, or how many of the likeliest tokens to
    report beside each token's own; prompt_logprobs: the same for the tokens of the prompt, which are then computed even
    where a prefix is cached. grammar: what the answer must be. budget: of its thought. logits: whether every `Token`
    comes with the logits that it was drawn from. client: who asks; all clients have an equal share of the engine.
    """

    tokens: Sequence[int]
    max_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    budget: Budget | None = None
    logits: bool = False
    client: str = ""


# ---- events ----------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Started:
    """The request has a slot. cached_tokens: how many of the prompt's tokens need not be computed."""

    cached_tokens: int
    prompt_tokens: int


@dataclasses.dataclass(frozen=True)
class Prefilled:
    """The first `done` of the prompt's `total` tokens are computed."""

    done: int
    total: int


@dataclasses.dataclass(frozen=True)
class Token:
    """One token of the answer.

    logprob: of this token; top: (id, logprob) of the likeliest ones. Both are of the model's own distribution, and
    there if the request asks for logprobs. logits: float32 (vocab,), if the request asks for them.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    logits: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Scored:
    """The next tokens of the prompt with their log-probabilities. The first token of all has none, and never comes."""

    tokens: tuple[Token, ...]


@dataclasses.dataclass(frozen=True)
class Finished:
    """The answer is complete. No event follows."""

    reason: FinishReason


@dataclasses.dataclass(frozen=True)
class Failed:
    """The request cannot go on. No event follows."""

    error: Exception


Event = Started | Prefilled | Scored | Token | Finished | Failed


# ---- errors ----------------------------------------------------------------------------------------------------------
class ContextOverflow(Ds4Error):
    """The prompt leaves no room for an answer. prompt: its tokens; ctx: what a sequence can hold."""

    def __init__(self, prompt: int, ctx: int):
        super().__init__(f"prompt: found {prompt} tokens, expected at most {ctx - 1} (ctx is {ctx})")
        self.prompt, self.ctx = prompt, ctx


class Overloaded(Ds4Error):
    """Too many requests are waiting already, or this one has waited for too long."""


class TooMany(Ds4Error):
    """The client has too many requests waiting already."""


class Stopping(Ds4Error):
    """The engine is being closed."""


class StepFailed(Ds4Error):
    """What a step computed is lost or no number, by no fault of the request. The engine goes on."""


class EngineFailed(Ds4Error):
    """The model cannot run any more; only a restart helps."""
