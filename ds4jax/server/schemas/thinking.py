"""The fields that say whether and how much the model thinks, under all the names that clients use for them."""

from __future__ import annotations

import json
from typing import Literal

from ds4jax.profile import EFFORTS
from ds4jax.server.schemas import base

type Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"]  # the keys of `EFFORTS`


class Thinking(base.Options):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: base.BudgetTokens | None = None

    @property
    def on(self) -> bool:
        return self.type != "disabled"


class TemplateKwargs(base.Options):
    """What vLLM and llama.cpp hand to a chat template; templates have two names for the same switch."""

    thinking: bool | None = None
    enable_thinking: bool | None = None
    reasoning_effort: Effort | None = None


class Reasoning(base.Options):
    without_effect = frozenset({"generate_summary"})

    effort: Effort | None = None
    enabled: bool | None = None
    max_tokens: base.BudgetTokens | None = None
    exclude: bool = False
    summary: str = "none"


class Thinks(base.Body):
    """The fields by which Chat Completions and Responses say whether and how much the model thinks."""

    thinking: bool | Thinking | None = None
    think: bool | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: TemplateKwargs = TemplateKwargs()
    reasoning: Reasoning = Reasoning()
    reasoning_effort: Effort | None = None
    thinking_token_budget: base.BudgetTokens | None = None
    thinking_budget_tokens: base.BudgetTokens | None = None

    def thinks(self) -> str:
        """The value of `Ask.think`. Raises ApiError if the fields that clients use for it contradict each other."""
        efforts: dict[str, Effort | None] = {
            "reasoning_effort": self.reasoning_effort,
            "reasoning.effort": self.reasoning.effort,
            "chat_template_kwargs.reasoning_effort": self.chat_template_kwargs.reasoning_effort,
        }
        switches = {
            "think": self.think,
            "thinking": self.thinking.on if isinstance(self.thinking, Thinking) else self.thinking,
            "enable_thinking": self.enable_thinking,
            "chat_template_kwargs.thinking": self.chat_template_kwargs.thinking,
            "chat_template_kwargs.enable_thinking": self.chat_template_kwargs.enable_thinking,
            "reasoning.enabled": self.reasoning.enabled,
        }
        (switched, switch), (where, effort) = _agreed(switches), _agreed(efforts)
        if effort is not None and switch is (effort == "none"):
            expected = "an effort: the model is to think" if switch else '"none": the model is not to think'
            raise base.wrong(where, effort, f"{expected}, as {switched} says")
        return think(switch, effort)

    def budget(self) -> int | None:
        """The value of `Ask.budget`. Raises ApiError if the fields for it contradict each other."""
        budgets = {
            "thinking.budget_tokens": self.thinking.budget_tokens if isinstance(self.thinking, Thinking) else None,
            "reasoning.max_tokens": self.reasoning.max_tokens,
            "thinking_token_budget": self.thinking_token_budget,
            "thinking_budget_tokens": self.thinking_budget_tokens,
        }
        _, budget = _agreed(budgets)
        return budget


def think(switch: bool | None, effort: Effort | None) -> str:
    """The value of `Ask.think` for a switch and an effort, either of which may be absent."""
    if switch is False:
        return "off"
    if effort is None:
        return "" if switch is None else "on"
    return EFFORTS[effort]


def _agreed[T](said: dict[str, T | None]) -> tuple[str, T | None]:
    """The first field that is given, and its value; ("", None) if none is. Raises ApiError if another one differs."""
    first, expected = next(((name, value) for name, value in said.items() if value is not None), ("", None))
    for name, value in said.items():
        if value is not None and value != expected:
            raise base.wrong(name, value, f"{json.dumps(expected)}, which {first} says")
    return first, expected
