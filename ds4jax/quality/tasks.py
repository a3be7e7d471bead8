"""Questions whose answers can be checked by a pattern: read, asked, graded. No JAX here but in `ask`.

A file has a JSON object in each line: ``prompt`` (and perhaps ``system``) or ``messages``; how to know a right answer,
see `Question.right`; and perhaps ``id``, ``task`` (a name to report under, by default the file's), ``think``,
``max_tokens`` and ``samples``, which replace the settings.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import re
import signal
import string
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ds4jax.chat import parser
from ds4jax.chat import template as chat
from ds4jax.errors import Ds4Error, show
from ds4jax.profile import THINK_MODES
from ds4jax.quality.inputs import parse_lines, read_input
from ds4jax.quality.journal import Journal
from ds4jax.quality.statistics import Estimate, mean

if TYPE_CHECKING:
    from ds4jax.engine.engine import Engine
    from ds4jax.engine.types import Event, Sampling

log = logging.getLogger(__name__)
SECONDS = 10.0  # a regex may take on an answer: some take years
_KEYS: dict[str, Any] = {
    "prompt": str, "system": str, "messages": list, "exact": str | list, "regex": str, "choice": str, "choices": list,
    "id": str | int, "task": str, "think": str, "max_tokens": int, "samples": int,
}  # fmt: skip
_TYPES = {
    str: "a string", list: "a list", int: "a whole number", str | list: "a string or a list of strings",
    str | int: "a string or a whole number",
}  # fmt: skip
_RECORDED = {"question", "sample", "task", "right", "finish_reason", "tokens"}  # what a report needs of a record
_PRONOUN = r"I(?:['’]|\s+(?!is\b)[a-z])"


@dataclasses.dataclass(frozen=True)
class Question:
    """A line of a file, as its head says. exact, regex, choice, letters (of the choices): see `right`."""

    id: str | int
    task: str
    messages: list[dict[str, Any]]
    exact: tuple[str, ...] = ()
    regex: re.Pattern[str] | None = None
    choice: str | None = None
    letters: str = ""
    think: str | None = None
    max_tokens: int | None = None
    samples: int | None = None

    def right(self, answer: str) -> bool:
        """Whether an answer, without the thought before it, is right.

        exact alone: the answer without the white space around it is this, or one of these.
        regex alone: the pattern is found in it. regex and exact: what the pattern's last match has in its first group
        (in all, if it has none) is this, or one of these.
        choice: the letter that the answer names last is this one; a letter behind "answer", "option" or "choice" counts
        before others that stand alone, and the pronoun I is none.
        """
        if self.choice is not None:
            named = rf"(?i:answer|option|choice)(?i:\s+is)?[\s:*({{]*([{self.letters}])\b"
            found = re.findall(named, answer) or re.findall(rf"\b(?!{_PRONOUN})([{self.letters}])\b", answer)
            return bool(found) and found[-1] == self.choice
        if self.regex is None:
            return answer.strip() in self.exact
        matches = list(self.regex.finditer(answer))
        if not self.exact:
            return bool(matches)
        return bool(matches) and (matches[-1][1 if self.regex.groups else 0] or "").strip() in self.exact


# ---- reading ---------------------------------------------------------------------------------------------------------
def read_questions(path: Path) -> list[Question]:
    """The questions of a file. Raises Ds4Error naming the first line that is wrong."""
    questions: list[Question] = []
    places: dict[tuple[str, str | int], str] = {}
    for where, line in parse_lines(path, read_input(path)):
        try:
            question = _question(line, len(questions) + 1, path.stem)
        except Ds4Error as error:
            raise Ds4Error(f"{where}: {error}") from None
        first = places.setdefault((question.task, question.id), where)
        if first != where:
            raise Ds4Error(f"{where}: id: found {show(question.id)}, expected another than that of {first}")
        questions.append(question)
    if not questions:
        raise Ds4Error(f"{path}: found no questions")
    return questions


def fingerprint(questions: Sequence[Question]) -> str:
    """What tells some questions from others."""
    said = json.dumps([vars(question) for question in questions], default=lambda regex: regex.pattern)
    return hashlib.sha256(said.encode()).hexdigest()


def _question(line: Mapping[str, Any], number: int, task: str) -> Question:
    for key, value in line.items():
        if key not in _KEYS:
            raise Ds4Error(f"found the key {key!r}, expected some of {', '.join(_KEYS)}")
        if not isinstance(value, _KEYS[key]) or isinstance(value, bool):
            raise Ds4Error(f"{key}: found {show(value)}, expected {_TYPES[_KEYS[key]]}")
    if ("prompt" in line) == ("messages" in line) or ("messages" in line and line.keys() & {"system", "choices"}):
        raise Ds4Error("expected either prompt, perhaps with system and choices, or messages")
    if not line.keys() & {"exact", "regex", "choice"} or ("choice" in line and line.keys() & {"exact", "regex"}):
        raise Ds4Error("expected exact, regex, both of these, or choice, to know a right answer")
    for key in ("max_tokens", "samples"):
        if line.get(key, 1) < 1:
            raise Ds4Error(f"{key}: found {line[key]}, expected at least 1")
    if line.get("think", "on") not in THINK_MODES:
        raise Ds4Error(f"think: found {line['think']!r}, expected one of {', '.join(THINK_MODES)}")
    exact = [line["exact"]] if isinstance(line.get("exact"), str) else line.get("exact", [])
    choices = line.get("choices", [])
    if len(choices) > len(string.ascii_uppercase):
        raise Ds4Error(f"choices: found {len(choices)}, expected at most {len(string.ascii_uppercase)}")
    for key, texts in (("exact", exact), ("choices", choices)):
        if (key in line and not texts) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise Ds4Error(f"{key}: found {show(texts)}, expected strings that are not empty")
    try:
        regex = re.compile(line["regex"]) if "regex" in line else None
    except (re.error, RecursionError, OverflowError) as error:
        raise Ds4Error(f"regex: found {show(line['regex'])}, which does not compile: {error}") from None
    letters = string.ascii_uppercase[: len(choices) or 10]
    if (choice := line.get("choice")) is not None and (len(choice) != 1 or choice not in letters):
        raise Ds4Error(f"choice: found {show(choice)}, expected a letter from {letters[0]} to {letters[-1]}")
    messages = line.get("messages")
    if messages is None:
        options = [f"{letter}. {text}" for letter, text in zip(letters, choices, strict=False)]
        prompt = "\n".join([line["prompt"], *([""] if options else []), *options])
        messages = [{"role": "system", "content": line["system"]}] if line.get("system") else []
        messages.append({"role": "user", "content": prompt})
    chat.render(messages)  # raises what is wrong with them
    rest = {key: line.get(key) for key in ("think", "max_tokens", "samples")}
    id, task = line.get("id", number), line.get("task", task)
    return Question(id, task, messages, tuple(text.strip() for text in exact), regex, choice, letters, **rest)


# ---- asking ----------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class How:
    """What holds for every question that says nothing else. ctx and profile are for the prompt, see `chat.render`."""

    sampling: Sampling
    samples: int
    max_tokens: int
    think: str
    ctx: int
    profile: str

    def prompt(self, question: Question, tokenizer: Any) -> list[int]:
        """Token ids."""
        think = question.think or self.think
        return chat.render_ids(tokenizer, question.messages, think=think, profile=self.profile, ctx=self.ctx)

    def runs(self, questions: Sequence[Question]) -> list[tuple[int, int]]:
        """(number of the question, number of the sample) of all answers that are wanted."""
        return [(i, s) for i, question in enumerate(questions) for s in range(question.samples or self.samples)]


def ask(engine: Engine, questions: Sequence[Question], how: How, journal: Journal) -> Iterator[dict[str, Any]]:
    """Get the answers that are not in the journal yet, and put them there as they come; yields records, old ones too.

    A record: question and sample (numbers), id, task, right, finish_reason, tokens (of the answer), thought, text. An
    answer that its limit cuts off is graded as it is; a thought that is cut off leaves an empty text.
    Sample s has the seed s places on. Raises Ds4Error for a question that cannot be asked, or an answer that fails.
    """
    from ds4jax.engine.types import Failed, Finished, Request, Token

    wanted = set(how.runs(questions))
    if damaged := [record for record in journal.records if not _RECORDED <= record.keys()]:
        raise Ds4Error(f"{journal.path}: found the record {show(damaged[0])}; a damaged journal?")
    old = [record for record in journal.records if (record.get("question"), record.get("sample")) in wanted]
    yield from old
    wanted -= {(record["question"], record["sample"]) for record in old}
    tokenizer, done = engine.runner.tokenizer, []

    def take(i: int, s: int, ids: list[int], event: Event) -> None:
        if isinstance(event, Token):
            ids.append(event.id)
        elif isinstance(event, Finished):
            question = questions[i]
            thinking = chat.opens_thought(question.messages, think=question.think or how.think)
            message, _ = parser.parse(tokenizer, ids, end=event.reason, thinking=thinking)
            record = {"question": i, "sample": s, "id": question.id, "task": question.task}
            record |= {"right": _grade(question, message["content"]), "finish_reason": event.reason, "tokens": len(ids)}
            done.append(record | {"thought": message.get("reasoning_content", ""), "text": message["content"]})
        elif isinstance(event, Failed):
            raise Ds4Error(f"question {questions[i].id}: {event.error}")

    for i, s in sorted(wanted):
        question = questions[i]
        sampling = dataclasses.replace(how.sampling, seed=(how.sampling.seed + s) % 2**32)
        request = Request(how.prompt(question, tokenizer), question.max_tokens or how.max_tokens, sampling)
        try:
            engine.check(request)
        except Ds4Error as error:
            raise Ds4Error(f"question {question.id}: {error}") from None
        engine.add(request, functools.partial(take, i, s, []))
    while len(engine):
        engine.step()
        for record in done:
            journal.add(record)
            yield record
        done.clear()


def _grade(question: Question, answer: str) -> bool:
    """`Question.right`; not if that takes longer than SECONDS."""
    try:
        with _within(SECONDS):
            return question.right(answer)
    except TimeoutError:
        log.warning("question %s: found no end of the regex in %g s; the answer counts as wrong", question.id, SECONDS)
        return False


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raises TimeoutError where what is inside takes longer; only the main thread has an alarm."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def alarm(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- what it comes to ------------------------------------------------------------------------------------------------
def report(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By task, and for ``all``: questions, answers, pass_at_1, cut (answers that their limit ended), tokens."""
    tasks = {task: [r for r in records if r["task"] == task] for task in dict.fromkeys(r["task"] for r in records)}
    return {task: _line(of) for task, of in (tasks | ({"all": list(records)} if len(tasks) != 1 else {})).items()}


def _line(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "questions": len({record["question"] for record in records}),
        "answers": len(records),
        "pass_at_1": pass_at_1(records),
        "cut": sum(record["finish_reason"] == "length" for record in records),
        "tokens": sum(record["tokens"] for record in records),
    }


def pass_at_1(records: Sequence[Mapping[str, Any]]) -> Estimate:
    """The chance of a right answer: the mean over questions of the part of a question's samples that are right.

    Its error is that of a mean over questions, whose samples belong together; with a single question, over its samples.
    """
    samples: dict[int, list[bool]] = {}
    for record in records:
        samples.setdefault(record["question"], []).append(record["right"])
    parts = [np.mean(right) for right in samples.values()] if len(samples) > 1 else [*samples.values()][0]
    return mean(np.array(parts))
