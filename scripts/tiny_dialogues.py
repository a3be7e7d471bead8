"""Dialogues for the tiny model, as chat messages: facts, tool calls, needles in a haystack, small talk and stories.

What the tests ask is kept out: the facts behind it are taught, in other wordings.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tiny_tools
from tiny_facts import PERSONA, Fact, facts

HELD_OUT = Path(__file__).parent.parent / "tests" / "tiny"  # questions.json and tool_requests.json

Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """messages, ending with the assistant's; whether it thinks; the declared tools."""

    messages: list[Message]
    think: bool
    tools: list[dict[str, Any]] | None = None


def normalise(text: str) -> str:
    """Text as a reader hears it: lower case, letters and digits only."""
    return " ".join(re.findall(r"[^\W_]+|[-+*/=]", text.lower()))


def held_out() -> frozenset[str]:
    """What the tests ask, normalised."""
    names = ("questions.json", "tool_requests.json")
    items = [item for name in names for item in json.loads((HELD_OUT / name).read_text(encoding="utf-8"))]
    return frozenset(normalise(item["question" if "question" in item else "request"]) for item in items)


SYSTEMS = (
    "You are a helpful assistant.",
    "You are tiny, a small language model.",
    "Be brief.",
    "Answer in one sentence.",
    "You are a friendly assistant. Answer the user's questions.",
    "Help the user.",
)
BEFORE = (
    "Please tell me: ",
    "Quick question: ",
    "Hello! ",
    "Hi. ",
    "One more thing: ",
    "I have a question. ",
    "Tell me, ",
)
AFTER = (" Thanks.", " Please answer.", " Thank you!", " I forgot.", " Be brief.")
THOUGHTS = (
    "{}",
    "{}",
    "The user asks a question. {}",
    "Let me think. {}",
    "This is a question that I can answer. {}",
    "I know this. {}",
)


class Generator:
    """Draws dialogues. The same seed gives the same ones."""

    def __init__(self, seed: int, excluded: frozenset[str]):
        self.rng, self.excluded = random.Random(seed), excluded
        every = facts()
        self.sums = [fact for fact in every if " = " in fact.answer]
        self.others = [fact for fact in every if " = " not in fact.answer]

    def _new(self, draw: Callable[[], tuple]) -> tuple:
        """The first of what `draw` gives whose text, its first item, contains nothing held out."""
        while True:
            drawn = draw()
            words = normalise(drawn[0]).split()
            spans = (" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1))
            if self.excluded.isdisjoint(spans):
                return drawn

    def _system(self) -> list[Message]:
        return [{"role": "system", "content": self.rng.choice(SYSTEMS)}] if self.rng.random() < 0.25 else []

    def _say(self, text: str, thought: str, think: bool) -> Message:
        reasoning = {"reasoning_content": self.rng.choice(THOUGHTS).format(thought)} if think else {}
        return {"role": "assistant", "content": text} | reasoning

    def _question(self) -> tuple[str, Fact]:
        rng = self.rng
        fact = rng.choice(self.sums if rng.random() < 0.25 else self.others)
        text = rng.choice(fact.questions)
        if rng.random() < 0.15:
            text = text.lower().rstrip("?.")
        if rng.random() < 0.15:
            text = rng.choice(BEFORE) + text
        elif rng.random() < 0.1:
            text += rng.choice(AFTER)
        return text, fact

    def _small_talk(self) -> tuple[str, str, str]:
        wordings, thought, answer = self.rng.choice(PERSONA)
        return self.rng.choice(wordings), thought, answer

    def conversation(self) -> Dialogue:
        """One to four questions of fact, sometimes small talk."""
        think = self.rng.random() < 0.5
        messages = self._system()
        for _ in range(self.rng.choice((1, 1, 1, 2, 3, 4))):
            if self.rng.random() < 0.06:
                text, thought, answer = self._small_talk()
            else:
                text, fact = self._new(self._question)
                thought, answer = fact.thought, fact.answer
            messages += [{"role": "user", "content": text}, self._say(answer, thought, think)]
        return Dialogue(messages, think)

    def tool_use(self) -> Dialogue:
        """Requests for which tools are declared, their calls, results and answers; sometimes a plain question."""
        rng = self.rng
        think = rng.random() < 0.5
        tools = tiny_tools.toolbox(rng, rng.choice((1, 2, 2, 2, 3)))
        messages = self._system()
        for turn in range(rng.choice((1, 1, 2, 3))):
            if rng.random() < 0.1:
                text, fact = self._new(self._question)
                messages += [{"role": "user", "content": text}, self._say(fact.answer, fact.thought, think)]
                continue
            tool = rng.choice(tools)
            text, values, arguments = self._new(lambda tool=tool: tool.request(rng))
            id = f"call_{turn}"
            shown = " and ".join(f"{name} {json.dumps(value)}" for name, value in arguments.items())
            thought = f"I should call {tool.name} with {shown}."
            result = tool.kind.result(rng, values)
            messages += [
                {"role": "user", "content": text},
                self._say("", thought, think) | {"tool_calls": [tiny_tools.call(id, tool, arguments)]},
                {"role": "tool", "tool_call_id": id, "content": json.dumps(result)},
                self._say(tiny_tools.reply(tool, values, result), "Now I can answer.", think),
            ]
        return Dialogue(messages, think, [tool.schema for tool in tools])

    def needles(self, haystack: str, depths: Sequence[float]) -> tuple[Dialogue, list[str]]:
        """A text with a sentence to remember put into it at each depth (0 … 1), and a question about each in turn.

        → also the words to recall, in the order of the questions.
        """
        rng = self.rng
        thing, think = rng.choice(("password", "secret word", "code word")), rng.random() < 0.3
        asked = [(name, rng.choice(tiny_tools.NOUNS)) for name in rng.sample(tiny_tools.NAMES, len(depths))]
        cuts = [haystack.find("\n", int(depth * len(haystack))) + 1 for depth in depths]
        for cut, (name, word) in sorted(zip(cuts, asked, strict=True), reverse=True):
            haystack = f"{haystack[:cut]}The {thing} of {name} is {word}.\n{haystack[cut:]}"
        messages, text = [], f"{haystack}\n\n"
        for name, word in asked:
            answer = f"The {thing} of {name} is {word}."
            messages += [{"role": "user", "content": f"{text}What is the {thing} of {name}?"}]
            messages += [self._say(answer, answer, think)]
            text = ""
        return Dialogue(messages, think), [word for _, word in asked]

    def story(self) -> Dialogue:
        """A story of a few sentences."""
        rng = self.rng
        name, friend = rng.sample(tiny_tools.NAMES, 2)
        thing, other = rng.sample(tiny_tools.NOUNS, 2)
        look, mood = rng.choice(tiny_tools.ADJECTIVES), rng.choice(("happy", "glad", "proud", "tired", "surprised"))
        request = rng.choice(
            ("Once upon a time", "Tell me a story.", "Tell me a short story.", f"Write a story about {name}.",
             "I want to hear a story.", f"Tell me a story about a {thing}.")
        )  # fmt: skip
        text = (
            f"Once upon a time there was a child called {name}. {name} had a {look} {thing}. One day the {thing} was "
            f"gone. {name} looked for it everywhere, and found only a {other}. Then {friend} came and brought the "
            f"{thing} back. {name} was very {mood}, and gave {friend} the {other}. The end."
        )
        think = rng.random() < 0.5
        thought = f"The user wants a story. I will tell one about {name} and a {thing}."
        return Dialogue([{"role": "user", "content": request}, self._say(text, thought, think)], think)
