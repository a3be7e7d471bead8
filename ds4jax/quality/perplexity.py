"""How likely a model finds a text, and how far its distributions are from another model's.

A text is read in windows: BOS, then so many tokens. Every token of the text is scored once, also the first ones of a
window, which have little before them; or a window begins with tokens of the one before, as context, which are not
scored again. What a token costs is -ln of the probability that the model gave it, in nats: minus the log-likelihood of
lm-eval, of the server's prompt log-probabilities and of ``generate --dump_logprobs``.

Error bars are standard errors of a mean over tokens, sd / √n, as if tokens were independent. They say how well the text
measures the model, not how well the text stands for others.

The distributions of one model can be saved, to be compared with another's that does not fit beside it: for every
window a file ``distributions/NNNNNN.npy``, (scored tokens, vocab), of each logit less the largest of its row, which is
where float16 is finest. A reader normalises a row again, so that what was rounded is still a distribution.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import shutil
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.engine.model_runner import ModelRunner
from ds4jax.errors import Ds4Error, show
from ds4jax.files import write_whole
from ds4jax.io.tokenizer import Tokenizer
from ds4jax.quality.inputs import parse_json, parse_lines, read_input
from ds4jax.quality.journal import Journal
from ds4jax.quality.statistics import Estimate, mean

Array = jax.Array


# ---- texts and windows -----------------------------------------------------------------------------------------------
def read_texts(path: Path) -> list[str]:
    """The texts of a file, each to be read apart from the others.

    A ``.jsonl`` file has an object with ``text`` in each line, a ``.json`` file a list of such objects; any other file
    is one text. Raises Ds4Error if the file is not that, not UTF-8 or empty.
    """
    data = read_input(path)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise Ds4Error(f"{path}: found {data[error.start]:#04x} at byte {error.start}, expected UTF-8") from None
    if path.suffix == ".jsonl":
        items = parse_lines(path, data)
    elif path.suffix == ".json":
        listed = parse_json(path, data)
        if not isinstance(listed, list):
            raise Ds4Error(f"{path}: found {show(listed)}, expected a list of objects with text")
        items = [(f"{path} [{i}]", item) for i, item in enumerate(listed)]
    else:
        items = [(str(path), {"text": text})]
    texts = []
    for where, item in items:
        if not isinstance(item, dict) or not isinstance(item.get("text"), str):
            raise Ds4Error(f"{where}: found {show(item)}, expected an object with text")
        texts.append(item["text"])
    if not any(texts):
        raise Ds4Error(f"{path}: found no text")
    return texts


@dataclasses.dataclass(frozen=True)
class Window:
    """Tokens that are read together: ids, of which the first is BOS and the last `scored` ones are scored.

    text: number of the text that they are from. start: number of the first scored token among that text's tokens.
    """

    ids: tuple[int, ...]
    scored: int
    text: int
    start: int


def windows(
    texts: Sequence[str], tokenizer: Tokenizer, length: int, context: int = 0, most: int | None = None
) -> list[Window]:
    """The windows of some texts, of up to `length` tokens behind BOS, of which `context` repeat the window before.

    most: leave out the windows after so many. Raises Ds4Error if there are fewer than 2 tokens in all: one has no
    standard error.
    """
    if not 0 <= context < length:
        raise Ds4Error(f"context: found {context}, expected 0 to {length - 1} (the window has {length} tokens)")
    out = []
    for number, text in enumerate(texts):
        ids = tokenizer.encode_text(text)
        end = 0
        while end < len(ids):
            scored_from, start = end, max(0, end - context)
            end = min(len(ids), start + length)
            out.append(Window((tokenizer.bos_id, *ids[start:end]), end - scored_from, number, scored_from))
    out = out[:most]
    if (found := sum(window.scored for window in out)) < 2:
        raise Ds4Error(f"text: found {found} tokens, expected at least 2")
    return out


def vocabulary(tokenizer: Tokenizer) -> str:
    """What tells a tokenizer from those that give other ids."""
    metadata = tokenizer.to_metadata()
    metadata.pop("tokenizer.chat_template", None)
    return f"{tokenizer.vocab_size} tokens, {hashlib.sha256(json.dumps(metadata).encode()).hexdigest()[:16]}"


def text_key(texts: Sequence[str], tokenizer: Tokenizer, length: int, context: int) -> dict[str, Any]:
    """What must be the same for two models to be compared token by token."""
    digest = hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
    return {"text": digest, "vocabulary": vocabulary(tokenizer), "window": length, "context": context}


# ---- distributions on disk -------------------------------------------------------------------------------------------
class Distributions:
    """A model's distributions at every scored token of some windows, in a folder; see the head of this file."""

    def __init__(self, folder: Path, vocab: int, precision: str = "float32"):
        """precision: float16 or float32, of what is written."""
        self.folder, self.vocab, self.precision = folder, vocab, precision

    def nbytes(self, windows: Sequence[Window]) -> int:
        """Bytes that those of some windows take."""
        return sum(window.scored for window in windows) * self.vocab * np.dtype(self.precision).itemsize

    def check_disk(self, windows: Sequence[Window]) -> None:
        """Raises Ds4Error unless there is room for those of some windows."""
        free, need = shutil.disk_usage(self.folder).free, self.nbytes(windows)
        if free < need:
            half = "; --precision float16 takes half" if self.precision == "float32" else ""
            raise Ds4Error(
                f"{self.folder}: found {free / 1e9:.3g} GB free, expected {need / 1e9:.3g} GB for the distributions of "
                f"{sum(window.scored for window in windows)} tokens over {self.vocab} ({self.precision}){half}"
            )

    def write(self, number: int, scored: int, parts: Iterator[tuple[Array, slice]]) -> None:
        """Write those of a window: some rows of each part. Raises Ds4Error if that fails; then there is no file."""
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": np.dtype(self.precision).str, "fortran_order": False, "shape": (scored, self.vocab)}
        )

        def pieces() -> Iterator[bytes]:
            yield header.getvalue()
            for part, rows in parts:
                yield np.asarray(part)[rows].astype(self.precision).tobytes()

        path = self._path(number)
        try:
            path.parent.mkdir(exist_ok=True)
            write_whole(path, pieces())
        except OSError as error:
            raise Ds4Error(f"{path}: cannot be written: {error.strerror}") from None

    def read(self, number: int, scored: int) -> np.ndarray:
        """Those of a window: (scored, vocab), mapped. Raises Ds4Error if they are not there."""
        path = self._path(number)
        try:
            rows = np.lib.format.open_memmap(path, mode="r")
        except OSError as error:
            raise Ds4Error(f"{path}: cannot be read: {error.strerror}; was --save_logits interrupted?") from None
        except ValueError as error:
            raise Ds4Error(f"{path}: not a file of distributions: {error}") from None
        expected = (scored, self.vocab)
        if rows.shape != expected or rows.dtype not in (np.float16, np.float32):
            raise Ds4Error(f"{path}: found {rows.dtype} {rows.shape}, expected float16 or float32 {expected}")
        return rows

    def _path(self, number: int) -> Path:
        return self.folder / "distributions" / f"{number:06d}.npy"


@dataclasses.dataclass(frozen=True)
class Reference:
    """Another model's reading of the same windows: what `read` left in a folder with its distributions."""

    journal: Journal
    distributions: Distributions

    @classmethod
    def open(cls, folder: Path, key: Mapping[str, Any], windows: Sequence[Window], vocab: int) -> Reference:
        """Raises Ds4Error if the folder has no such reading, one of other tokens (key: of `text_key`), or not all."""
        journal = Journal.read(folder / JOURNAL)
        for name, expected in key.items():
            if (found := journal.key.get(name)) != expected:
                raise Ds4Error(f"{folder}: {name}: found {show(found)}, expected {show(expected)}, as here")
        _check_records(journal, windows)
        if len(journal.records) < len(windows):
            found = len(journal.records)
            raise Ds4Error(f"{folder}: found {found} windows, expected {len(windows)}; the same --save_logits goes on")
        return cls(journal, Distributions(folder, vocab))

    @property
    def key(self) -> str:
        """What tells it from others."""
        return hashlib.sha256(json.dumps(self.journal.key, sort_keys=True).encode()).hexdigest()[:16]


# ---- reading ---------------------------------------------------------------------------------------------------------
JOURNAL = "journal.jsonl"


def read(
    runner: ModelRunner,
    windows: Sequence[Window],
    journal: Journal,
    save: Distributions | None = None,
    reference: Reference | None = None,
) -> Iterator[dict[str, Any]]:
    """Read the windows that are not in the journal yet, and put them there; yields each one's record, old ones too.

    A record: window (its number); of every scored token nats (what it cost), top (id of the likeliest), and with a
    reference kl, the Kullback-Leibler divergence Σ p ln(p / q) of this model's distribution q from the reference's p.
    Raises Ds4Error for logits, or distributions of a reference, that are not finite.
    """
    names = ("nats", "top", *(["kl"] if reference else []))
    _check_records(journal, windows, names)
    yield from journal.records[: len(windows)]
    for number in range(len(journal.records), len(windows)):
        window = windows[number]
        given = None if reference is None else reference.distributions.read(number, window.scored)
        found: dict[str, list] = {name: [] for name in names}
        parts = _read(runner, window, given, found)
        if save is None:
            deque(parts, maxlen=0)
        else:
            save.write(number, window.scored, parts)
        if not all(map(math.isfinite, found["nats"])):
            raise Ds4Error(f"window {number}: found logits that are not finite; a damaged model?")
        if reference is not None and not all(map(math.isfinite, found["kl"])):
            raise Ds4Error(f"{reference.distributions.folder}: found numbers in window {number} that are not finite")
        journal.add({"window": number, **found})
        yield journal.records[-1]


def _check_records(journal: Journal, windows: Sequence[Window], names: Sequence[str] = ("nats", "top")) -> None:
    for number, (record, window) in enumerate(zip(journal.records, windows, strict=False)):
        lengths = {len(of) if isinstance(of := record.get(name), list) else 0 for name in names}
        if record.get("window") != number or lengths != {window.scored}:
            raise Ds4Error(f"{journal.path}: found another record for window {number}; a damaged journal?")


def _read(
    runner: ModelRunner, window: Window, given: np.ndarray | None, found: dict[str, list]
) -> Iterator[tuple[Array, slice]]:
    """Append to what was `found`; yields logits (rows, vocab) less the largest of each row, and which rows count."""
    context = len(window.ids) - 1 - window.scored  # rows that are not scored
    at = 0
    for logits, n in runner.logit_blocks(window.ids[:-1]):
        targets, reference = np.zeros(len(logits), np.int32), None
        targets[:n] = window.ids[at + 1 : at + 1 + n]
        rows = slice(min(n, max(0, context - at)), n)
        if given is not None:
            reference = np.zeros(logits.shape, given.dtype)
            reference[rows] = given[at + rows.start - context : at + n - context]
        *measured, relative = measure(logits, targets, reference)
        for name, values in zip(found, measured, strict=False):
            found[name] += np.asarray(values)[rows].tolist()
        yield relative, rows
        at += n


@jax.jit
def measure(logits: Array, targets: Array, reference: Array | None) -> tuple[Array, ...]:
    """logits, reference (rows, vocab), targets (rows,) → nats, top, kl (rows,), and logits less the largest."""
    logits = logits.astype(jnp.float32)
    relative = logits - logits.max(-1, keepdims=True)
    q = jax.nn.log_softmax(relative)
    nats = -jnp.take_along_axis(q, targets[:, None], axis=-1)[:, 0]
    top = jnp.argmax(logits, axis=-1)
    if reference is None:
        return nats, top, relative
    p = jax.nn.log_softmax(reference.astype(jnp.float32))
    return nats, top, (jnp.exp(p) * (p - q)).sum(-1), relative


# ---- what it comes to ------------------------------------------------------------------------------------------------
def _all(records: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    return np.concatenate([np.asarray(record[name], np.float64) for record in records])


def perplexity(nats: np.ndarray) -> Estimate:
    """exp of the mean, inf if that is too large; its error is the mean's, times its slope."""
    found = mean(nats)
    value = math.exp(found.value) if found.value < math.log(sys.float_info.max) else math.inf
    return Estimate(value, value * found.error)


def summary(
    records: Sequence[Mapping[str, Any]], windows: Sequence[Window], tokenizer: Tokenizer, reference: Reference | None
) -> dict[str, Any]:
    """The numbers of a reading: tokens, bytes (of the scored tokens), perplexity, bits_per_byte.

    With a reference: reference_perplexity, nats_more (than the reference's, per token, paired), kl, kl_median, kl_99 (a
    hundredth of the tokens has more), kl_max, and same_top (the part of the tokens where both find the same likeliest).
    """
    nats = _all(records, "nats")
    n = sum(len(tokenizer.id_to_bytes(i)) for window in windows for i in window.ids[-window.scored :])
    per_byte = len(nats) / n / math.log(2)
    found: dict[str, Any] = {
        "tokens": len(nats),
        "bytes": n,
        "perplexity": perplexity(nats),
        "bits_per_byte": Estimate(*(x * per_byte for x in mean(nats))),
    }
    if reference is not None:
        before = reference.journal.records[: len(records)]
        kl = _all(records, "kl")
        found |= {
            "reference_perplexity": perplexity(_all(before, "nats")),
            "nats_more": mean(nats - _all(before, "nats")),
            "kl": mean(kl),
            "kl_median": float(np.median(kl)),
            "kl_99": float(np.quantile(kl, 0.99)),
            "kl_max": float(kl.max()),
            "same_top": mean(_all(records, "top") == _all(before, "top")),
        }
    return found


def worst(
    records: Sequence[Mapping[str, Any]], windows: Sequence[Window], tokenizer: Tokenizer, n: int
) -> list[dict[str, Any]]:
    """The n positions with the largest divergence, or without a reference with the costliest tokens.

    Of each: text and token (numbers), nats, kl, before (the end of what the model had read), was (the token), and said
    (what the model found likeliest).
    """
    by = "kl" if records and "kl" in records[0] else "nats"
    values = _all(records, by)
    starts = np.cumsum([0, *(len(record["nats"]) for record in records)])
    out = []
    for at in np.argsort(-values, kind="stable")[:n]:
        number = int(np.searchsorted(starts, at, side="right")) - 1
        i = int(at - starts[number])
        record, window = records[number], windows[number]
        here = len(window.ids) - window.scored + i
        out.append(
            {
                "text": window.text,
                "token": window.start + i,
                **{name: record[name][i] for name in ("nats", "kl") if name in record},
                "before": tokenizer.pieces(window.ids[max(1, here - 20) : here]),
                "was": tokenizer.piece(window.ids[here]),
                "said": tokenizer.piece(record["top"][i]),
            }
        )
    return out
