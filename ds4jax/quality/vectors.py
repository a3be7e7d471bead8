"""Reference vectors: prompts, the tokens that a model continued them with, and how likely these and others were.

Three layouts are read. No JAX here but in `replay`.

ds4's text (``*.vec``): lines ``case ID CTX STEPS PROMPT_FILE``, ``step INDEX TOKEN_IN_HEX NUMBER_OF_TOPS``,
``top TOKEN_IN_HEX LOGPROB`` and ``end``; a token is its bytes, the prompt a user's message with thinking off. What ds4
calls ``local-golden.vec`` has another layout and is left out.

ds4's JSON (schema ``ds4-official-logprobs-v1``): ``prompt``, ``request`` (``messages``, ``thinking``), ``usage`` and
``steps`` of ``token`` (``text``, ``bytes``), ``logprob`` and ``top_logprobs``.

This project's JSON: what ``generate --dump_logprobs`` writes, ``prompt_tokens`` and ``steps`` of ``id``, ``logprob``
and ``top`` (id, logit, logprob).
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ds4jax.chat import template as chat
from ds4jax.errors import Ds4Error, show
from ds4jax.io.tokenizer import Tokenizer
from ds4jax.quality.inputs import parse_json, read_input

if TYPE_CHECKING:
    from ds4jax.engine.model_runner import ModelRunner

log = logging.getLogger(__name__)
_NOT_TOLD = -1000.0
"""DeepSeek's API says -9999 where it does not tell; float32 log-probabilities of a model are not that low."""
_ROUNDED = 1e-3  # what certainty may come to in few digits


@dataclasses.dataclass(frozen=True)
class Step:
    """A token, and the log-probabilities that the reference gave to tokens in its place; none where it tells none."""

    token: int
    logprobs: Mapping[int, float]


@dataclasses.dataclass(frozen=True)
class Vector:
    """A prompt, and how a reference continued it.

    name: of the case. tokens: ids of the prompt. steps: the continuation. prompt_tokens: how many ids the reference
    says the prompt has, or None.
    """

    name: str
    tokens: Sequence[int]
    steps: tuple[Step, ...]
    prompt_tokens: int | None = None


# ---- reading ---------------------------------------------------------------------------------------------------------
def read_vectors(folder: Path, tokenizer: Tokenizer, raw: bool = False, **options: Any) -> list[Vector]:
    """The vectors in a folder and in the folders in it. A case that JSON files have is not read from ``.vec`` files.

    raw: prompts that are text are continued as they are, without the chat template. options: of `chat.render`.
    Raises Ds4Error for a folder without vectors, and for any that cannot be read.
    """
    if not folder.is_dir():
        raise Ds4Error(f"{folder}: found no such folder")
    reader = _Reader(tokenizer, raw, options)
    found: dict[str, Vector] = {}
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        for vector in reader.json_file(path):
            if vector.name in found:
                vector = dataclasses.replace(vector, name=str(path.relative_to(folder)))
            found[vector.name] = vector
    for path in sorted([*folder.glob("*.vec"), *folder.glob("*/*.vec")]):
        for vector in reader.vec_file(path):
            found.setdefault(vector.name, vector)
    if not found:
        raise Ds4Error(f"{folder}: found no vectors in *.json and *.vec")
    for vector in found.values():
        if not vector.tokens or not vector.steps:
            what = "steps" if vector.tokens else "tokens in the prompt"
            raise Ds4Error(f"{folder}: {vector.name}: found no {what}, expected at least one")
    return list(found.values())


class _Reader:
    """Reads files of any layout with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, raw: bool, options: dict[str, Any]):
        self._tokenizer, self._raw, self._options = tokenizer, raw, options
        control = tokenizer.control_ids
        in_order = [*control, *(i for i in range(tokenizer.vocab_size) if i not in control)]  # a text's bytes are text
        self._ids = {tokenizer.id_to_bytes(i): i for i in in_order}

    def token(self, data: bytes, where: str) -> int:
        """The id of a token's bytes. Raises Ds4Error if no token has them."""
        spelled = data.replace("｜｜".encode(), "｜".encode())  # so DeepSeek's API spells control tokens
        id = self._ids.get(data, self._ids.get(spelled))
        if id is None:
            raise Ds4Error(f"{where}: found no token {show(data)} in the vocabulary; vectors of another one?")
        return id

    def id(self, value: Any, where: str) -> int:
        """A token id from JSON. Raises Ds4Error if it is none of the vocabulary."""
        n = self._tokenizer.vocab_size
        if type(value) is not int or not 0 <= value < n:
            raise Ds4Error(f"{where}: found token id {show(value)}, expected 0 to {n - 1}")
        return value

    def prompt(self, messages: Sequence[Mapping[str, Any]], think: str) -> list[int]:
        if self._raw:
            return self._tokenizer.encode_raw("\n".join(str(message.get("content")) for message in messages))
        return chat.render_ids(self._tokenizer, messages, think=think, **self._options)

    def step(self, token: int, logprobs: Iterable[tuple[int, float]], where: str) -> Step:
        """A step; where nothing lies between certain and not told, the reference told of no probabilities."""
        told = {id: logprob for id, logprob in logprobs if not logprob <= _NOT_TOLD}
        if wrong := [logprob for logprob in told.values() if not logprob <= _ROUNDED]:
            raise Ds4Error(f"{where}: found the log-probability {wrong[0]}, expected none above 0")
        return Step(token, told if any(logprob < 0 for logprob in told.values()) else {})

    # JSON
    def json_file(self, path: Path) -> Iterable[Vector]:
        value = parse_json(path, read_input(path))
        if not isinstance(value, dict) or "manifest" in str(value.get("schema")):
            return []
        if "steps" not in value or not value.keys() & {"prompt_tokens", "prompt"}:
            raise Ds4Error(f"{path}: found the keys {show(list(value))}, expected prompt or prompt_tokens, and steps")
        try:
            return [self._own(path, value) if "prompt_tokens" in value else self._official(path, value)]
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            raise Ds4Error(f"{path}: found another layout than a vector's: {type(error).__name__} {error}") from None

    def _own(self, path: Path, value: dict[str, Any]) -> Vector:
        steps = []
        for number, step in enumerate(value["steps"]):
            where = f"{path} step {number}"
            listed = [(self.id(i, where), float(p)) for i, _, p in step["top"]]
            own = self.id(step["id"], where)
            steps.append(self.step(own, [*listed, (own, float(step["logprob"]))], where))
        tokens = [self.id(i, f"{path} prompt_tokens") for i in value["prompt_tokens"]]
        return Vector(str(value.get("id", path.stem)), tokens, tuple(steps))

    def _official(self, path: Path, value: dict[str, Any]) -> Vector:
        def entry(at: dict[str, Any], where: str) -> tuple[int, float]:
            token = at["token"]
            data = token["text"].encode() if token.get("bytes") is None else bytes(token["bytes"])
            return self.token(data, where), float(at["logprob"])

        steps = []
        for number, step in enumerate(value["steps"]):
            where = f"{path} step {number}"
            own = entry(step, where)
            listed = [entry(top, where) for top in step.get("top_logprobs") or ()]
            steps.append(self.step(own[0], [*listed, own], where))
        request = value.get("request") or {}
        messages = request.get("messages") or [{"role": "user", "content": value["prompt"]}]
        think = "off" if (request.get("thinking") or {"type": "disabled"}).get("type") == "disabled" else "on"
        given = (value.get("usage") or {}).get("prompt_tokens")
        return Vector(str(value.get("id", path.stem)), self.prompt(messages, think), tuple(steps), given)

    # ds4's text
    def vec_file(self, path: Path) -> Iterable[Vector]:
        cases: list[tuple[str, Path, list[tuple[int, list[tuple[int, float]]]]]] = []
        is_open, missing = False, 0  # missing: tops of the last step that are still to come
        lines = read_input(path).decode("utf-8", "replace").splitlines()
        if lines and "ds4-local-golden" in lines[0]:
            log.warning("%s: left out: logits of one of ds4's builds by rank, not the probabilities of tokens", path)
            return
        for number, line in enumerate(lines, 1):
            where = f"{path} line {number}"
            try:
                match line.split():
                    case []:
                        pass
                    case [word, *_] if word.startswith("#"):
                        pass
                    case ["case", name, _, _, *words] if words and not is_open:
                        cases.append((name, _beside(path, " ".join(words)), []))
                        is_open = True
                    case ["step", index, token, tops] if is_open and not missing and int(index) == len(cases[-1][2]):
                        cases[-1][2].append((self.token(bytes.fromhex(token), where), []))
                        missing = int(tops)
                    case ["top", token, logprob] if missing > 0:
                        cases[-1][2][-1][1].append((self.token(bytes.fromhex(token), where), float(logprob)))
                        missing -= 1
                    case ["end"] if is_open and not missing:
                        is_open = False
                    case _:
                        raise ValueError
            except ValueError:
                expected = f"{missing} more of top" if missing > 0 else "case, step, top and end, in this order"
                raise Ds4Error(f"{where}: found {show(line)}, expected {expected}") from None
        if is_open:
            raise Ds4Error(f"{path}: found no end of case {cases[-1][0]}; a file that was cut off?")
        for name, prompt, steps in cases:
            try:
                text = read_input(prompt).decode()
            except UnicodeDecodeError:
                raise Ds4Error(f"{prompt}: found bytes that are not UTF-8") from None
            tokens = self.prompt([{"role": "user", "content": text}], "off")
            yield Vector(name, tokens, tuple(self.step(*step, f"{path} case {name}") for step in steps))


def _beside(path: Path, name: str) -> Path:
    """The file that a vector names by a path from somewhere above: of its last parts that are beside the vector."""
    parts = Path(name).parts
    places = [path.parent.joinpath(*parts[i:]) for i in range(len(parts))]
    return next((place for place in places if place.is_file()), places[-1])


# ---- replaying -------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far a model is from one vector.

    same: at how many steps its likeliest token is the vector's. gap: by how many nats its likeliest token is likelier
    than the vector's, the largest of the steps. kl: the mean divergence of the model from the reference at the steps
    that tell of probabilities, over the tokens that the reference lists and all others as one; that over all tokens is
    no smaller. off: the largest difference of a token's own log-probability. Both are None if no step tells.
    """

    vector: Vector
    same: int
    gap: float
    kl: float | None
    off: float | None


def replay(vector: Vector, runner: ModelRunner) -> Agreement:
    """Prefill a vector's prompt and decode its tokens, whatever the model would have chosen. Raises Ds4Error."""
    from ds4jax.engine.types import Sampling

    rows = []
    try:
        sampled = runner.prefill(0, vector.tokens, Sampling(temperature=0.0))
        for i, step in enumerate(vector.steps):
            if i:
                sampled = runner.decode({0: vector.steps[i - 1].token})[0]
            rows.append(agreement(sampled.logits, step))
    except Ds4Error as error:
        raise Ds4Error(f"{vector.name}: {error}") from None
    same, gaps, kls, offs = zip(*rows, strict=True) if rows else ((), (), (), ())
    kls, offs = ([x for x in values if x is not None] for values in (kls, offs))
    kl = sum(kls) / len(kls) if kls else None
    return Agreement(vector, sum(same), max(gaps, default=0.0), kl, max(offs, default=None))


def agreement(logits: np.ndarray, step: Step) -> tuple[bool, float, float | None, float | None]:
    """Of one step: whether the likeliest token is the vector's, gap, kl and off as in `Agreement`.

    logits: (vocab,). Raises Ds4Error if they are not finite.
    """
    if not np.isfinite(logits).all():
        raise Ds4Error("found logits that are not finite; a damaged model?")
    wide = logits.astype(np.float64) - logits.max()
    q = wide - math.log(np.exp(wide).sum())
    gap = float(q.max() - q[step.token])
    if not step.logprobs:
        return gap == 0, gap, None, None
    ids, p = np.array(list(step.logprobs)), np.array(list(step.logprobs.values()))
    others_p, others_q = (max(0.0, 1 - float(np.exp(x).sum())) for x in (p, q[ids]))
    kl = float((np.exp(p) * (p - q[ids])).sum())
    if others_p:
        kl += others_p * math.log(others_p / max(others_q, 1e-300))
    off = abs(float(q[step.token]) - step.logprobs[step.token]) if step.token in step.logprobs else None
    return gap == 0, gap, max(kl, 0.0), off
