"""What the embedded models can do: ``python scripts/eval_tiny.py`` prints the table of their cards.

One column per model: tiny_q2 and tiny as they are shipped and, where scripts/train_tiny.py has left its float32
weights, what can be made of them: those of tiny as they are; tiny_q2 quantized without its importance matrix; and tiny
in the types of tiny_q2, without and with the matrix, with no training after that. All answers are greedy, and what they
are asked was held out of training. Some minutes per column on a CPU.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout works without being installed

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import tiny_data  # noqa: E402
from absl import flags  # noqa: E402
from tiny_dialogues import HELD_OUT, Generator, held_out  # noqa: E402

from ds4jax.chat import template as chat  # noqa: E402
from ds4jax.config import ModelConfig  # noqa: E402
from ds4jax.io import recipes  # noqa: E402
from ds4jax.io.convert import convert  # noqa: E402
from ds4jax.io.load import load  # noqa: E402
from ds4jax.io.tokenizer import Special, Tokenizer  # noqa: E402
from ds4jax.model import cache as kv  # noqa: E402
from ds4jax.model import mtp  # noqa: E402
from ds4jax.model.compute import Compute  # noqa: E402
from ds4jax.model.transformer import (  # noqa: E402
    bucket,  # noqa: E402
    decode_step,
    forward,
    logits,
    prefill,
)
from ds4jax.model.weights import Weights  # noqa: E402
from ds4jax.paths import EMBEDDED, embedded_model  # noqa: E402
from ds4jax.tools import cli  # noqa: E402

FLAGS = flags.FlagValues()
flags.DEFINE_list("models", None, "GGUF files or names of embedded models, instead.", flag_values=FLAGS)
flags.DEFINE_string("weights", "build/run", "Where the float32 weights are, if anywhere.", flag_values=FLAGS)
flags.DEFINE_bool("verbose", False, "Print what was answered wrong.", flag_values=FLAGS)
flags.DEFINE_integer("batch", 40, "Sequences at once.", flag_values=FLAGS)

COMPUTE = Compute("official", "float32")
LONGEST_ANSWER = 200
NEEDLES, NEEDLE_DISTANCE = 100, 800  # how many, and how many tokens back
DIALOGUES = 200  # new ones, for the MTP head


@dataclasses.dataclass(frozen=True)
class Model:
    weights: Weights
    cfg: ModelConfig
    tok: Tokenizer


# ---- running the model -----------------------------------------------------------------------------------------------
def _padded(
    sequences: Sequence[Sequence[int]], batch: int, more: int = 0
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """`batch` sequences at a time, padded to a bucket and `more`: number of the first, int32 (batch, T), lengths."""
    for start in range(0, len(sequences), batch):
        part = sequences[start : start + batch]
        ids = np.zeros((batch, bucket(max(map(len, part)) - more, 1 << 20) + more), np.int32)
        for row, sequence in zip(ids, part, strict=False):
            row[: len(sequence)] = sequence
        yield start, ids, np.array([len(s) for s in part] + [0] * (batch - len(part)), np.int32)


def answer(model: Model, prompts: Sequence[Sequence[int]], batch: int) -> list[list[int]]:
    """The greedy answers to prompts, without the end token; one that does not end has LONGEST_ANSWER tokens."""
    out: list[list[int]] = [[] for _ in prompts]
    run = {"cfg": model.cfg, "compute": COMPUTE}
    for start, ids, n in _padded(prompts, batch):
        cache = kv.empty(model.cfg, COMPUTE.numerics, COMPUTE.dtype, batch, ids.shape[1] + LONGEST_ANSWER)
        scores, cache = prefill(model.weights, cache, jnp.asarray(ids), jnp.asarray(n), **run)
        going = n > 0
        for _ in range(LONGEST_ANSWER):
            tokens = np.asarray(jnp.argmax(scores, axis=-1), np.int32)
            going &= tokens != model.tok.eos_id
            if not going.any():
                break
            for b in np.flatnonzero(going):
                out[start + b].append(int(tokens[b]))
            scores, cache = decode_step(model.weights, cache, jnp.asarray(tokens), jnp.asarray(going), **run)
    return out


@functools.partial(jax.jit, static_argnames="cfg")
def _observe(w: Weights, ids: jax.Array, n: jax.Array, *, cfg: ModelConfig) -> tuple[jax.Array, ...]:
    """ids (B, T + 1) → nats of each next token (B, T), and the first choice of the model and of its MTP head (B, T)."""
    ids, following = ids[:, :-1], ids[:, 1:]
    cache = kv.zeros(cfg, COMPUTE.numerics, COMPUTE.dtype, *ids.shape)
    X, after = forward(w, cache, ids, n, cfg, COMPUTE)
    main = logits(w, X, cfg)
    nats = -jnp.take_along_axis(jax.nn.log_softmax(main), following[..., None], axis=-1)[..., 0]
    drafted, _, _ = mtp.draft(w, after, X, following, cache.length, n, cfg, COMPUTE)
    return nats, jnp.argmax(main, axis=-1), jnp.argmax(drafted, axis=-1)


def observe(model: Model, documents: Sequence[tiny_data.Document], batch: int) -> tuple[float, float]:
    """Documents → Σ nats over the tokens to be predicted, and how often the head agrees with the model on them.

    The head, at t, and the model, at t + 1, both say what comes at t + 2.
    """
    nats, same = 0.0, []
    for start, ids, n in _padded([ids for ids, _ in documents], batch, more=1):
        n = jnp.asarray(np.maximum(n - 1, 0))
        found, main, drafted = map(np.asarray, _observe(model.weights, jnp.asarray(ids), n, cfg=model.cfg))
        for b, (_, mask) in enumerate(documents[start : start + batch]):
            last = len(mask) - 1
            nats += found[b, :last][mask[1:]].sum()
            same += (main[b, 1:last] == drafted[b, : last - 1])[mask[2:]].tolist()
    return nats, float(np.mean(same))


# ---- what is asked ---------------------------------------------------------------------------------------------------
def contains(text: str, expected: str) -> bool:
    """Whether a text has the expected words, as words."""
    return re.search(rf"(?<!\w){re.escape(expected)}(?!\w)", text, re.IGNORECASE) is not None


def thinks(ids: Sequence[int], tok: Tokenizer) -> bool:
    """Whether an answer to ``<think>`` is a thought, ``</think>``, and then something else."""
    open_, close = tok.special(Special.THINK_OPEN), tok.special(Special.THINK_CLOSE)
    return (
        len(ids) < LONGEST_ANSWER and open_ not in ids and ids.count(close) == 1 and 0 < ids.index(close) < len(ids) - 1
    )


_PARAMETER = re.compile(
    rf'{chat.PARAMETER_OPEN}([^"\n]*)" string="(true|false)">'
    rf"((?:(?!{chat.PARAMETER_CLOSE}).)*){chat.PARAMETER_CLOSE}\n",
    re.DOTALL,
)
_CALL = re.compile(
    rf"{chat.CALLS_OPEN}\n{re.escape(chat.INVOKE_OPEN)}([^\"\n]*)\">\n((?:{_PARAMETER.pattern})*)\n?"
    rf"{chat.INVOKE_CLOSE}\n{chat.CALLS_CLOSE}",
    re.DOTALL,
)


def parse_call(text: str) -> tuple[str, dict[str, Any]] | None:
    """The name and arguments of a text that is one well-formed call and nothing else."""
    call = _CALL.fullmatch(text.strip())
    if call is None:
        return None
    try:
        arguments = {
            name: value if string == "true" else json.loads(value)
            for name, string, value in _PARAMETER.findall(call[2])
        }
    except ValueError:
        return None
    return call[1], arguments


class Column(dict[str, str]):
    """Of the table; says on stderr what is put in."""

    def __init__(self, model: Path):
        super().__init__()
        self._model = model

    def __setitem__(self, name: str, value: str) -> None:
        print(f"{self._model}: {name}: {value}", file=sys.stderr, flush=True)
        super().__setitem__(name, value)


def evaluate(path: Path, texts: list[dict[str, str]], batch: int) -> Column:
    """One column of the table."""
    weights, checkpoint = load(path)
    tok = Tokenizer.from_metadata(checkpoint.file.metadata)
    model = Model(weights, checkpoint.cfg, tok)

    def ask(items: list[Item], think: str) -> list[list[int]]:
        prompts = [chat.render_ids(tok, item.messages, think=think, tools=item.tools) for item in items]
        return answer(model, prompts, batch)

    def said(ids: list[int]) -> str:
        """What comes after the thought."""
        close = tok.special(Special.THINK_CLOSE)
        return tok.decode(ids[ids.index(close) + 1 :] if close in ids else ids)

    row = Column(path)
    row["size"] = f"{path.stat().st_size / 1e6:.2f} MB"
    pieces = list(itertools.chain.from_iterable(tiny_data.text_documents(t["text"], tok) for t in texts))
    nats, agreement = observe(model, [d for d in pieces if len(d[0]) > 2], min(batch, 8))
    row["bits per byte, held-out text"] = f"{nats / math.log(2) / sum(len(t['text'].encode()) for t in texts):.4f}"
    row["MTP head agrees, held-out text"] = f"{100 * agreement:.1f} %"
    _, agreement = observe(model, new_dialogues(tok), min(batch, 8))
    row["MTP head agrees, new dialogues"] = f"{100 * agreement:.1f} %"

    exam = {"questions": questions(), "tool calls": tool_requests()}
    shaped = []
    for (name, items), think in itertools.product(exam.items(), ("off", "on")):
        answers = ask(items, think)
        right = [item.right(said(ids)) for item, ids in zip(items, answers, strict=True)]
        row[f"{name} right, thinking {think}"] = _share(right)
        shaped += [thinks(ids, tok) for ids in answers] if think == "on" else []
        for item, ids, ok in zip(items, answers, right, strict=True):
            if not ok and FLAGS.verbose:
                print(f"{path}, thinking {think}: {item.messages[-1]['content']!r} → {said(ids)!r}", file=sys.stderr)
    row["shape of thinking"] = _share(shaped)
    hidden = needles(tok, texts)
    right = [item.right(said(ids)) for item, ids in zip(hidden, ask(hidden, "off"), strict=True)]
    row[f"needle {NEEDLE_DISTANCE} tokens back"] = _share(right)
    return row


def _share(good: list[bool]) -> str:
    return f"{100 * sum(good) / len(good):.1f} % of {len(good)}"


@dataclasses.dataclass(frozen=True)
class Item:
    """messages and tools to be answered; right: whether an answer is."""

    messages: list[dict[str, Any]]
    right: Callable[[str], bool]
    tools: list[dict[str, Any]] | None = None


def _held_out(name: str) -> list[dict[str, Any]]:
    return json.loads((HELD_OUT / f"{name}.json").read_text(encoding="utf-8"))


def _user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def questions() -> list[Item]:
    return [
        Item(_user(q["question"]), functools.partial(contains, expected=q["answer"])) for q in _held_out("questions")
    ]


def tool_requests() -> list[Item]:
    def right(text: str, request: dict[str, Any]) -> bool:
        return parse_call(text) == (request["name"], request["arguments"])

    return [
        Item(_user(r["request"]), functools.partial(right, request=r), r["tools"]) for r in _held_out("tool_requests")
    ]


def new_dialogues(tok: Tokenizer) -> list[tiny_data.Document]:
    """Dialogues as in training, from another seed."""
    generator = Generator(1_000_003, held_out())
    drawn = [kind() for _ in range(DIALOGUES // 2) for kind in (generator.conversation, generator.tool_use)]
    documents = [tiny_data.dialogue_document(dialogue, tok) for dialogue in drawn]
    return [document for document in documents if len(document[0]) <= tiny_data.ROW]


def needles(tok: Tokenizer, texts: list[dict[str, str]]) -> list[Item]:
    """Held-out text with a word to remember in it, and NEEDLE_DISTANCE tokens after that the question."""
    generator, rng = Generator(1_000_033, held_out()), random.Random(0)
    ids = tok.encode_text("\n".join(t["text"] for t in texts))
    out = []
    for _ in range(NEEDLES):
        at = rng.randrange(100, len(ids) - NEEDLE_DISTANCE)
        before, after = tok.decode(ids[at - 100 : at]), tok.decode(ids[at : at + NEEDLE_DISTANCE])
        haystack = f"{before}\n{after}"
        dialogue, (word,) = generator.needles(haystack, [len(before) / len(haystack)])
        out.append(Item(dialogue.messages[:1], functools.partial(contains, expected=word)))
    return out


Q2_TYPES = ("mtp.ffn.experts.gate=IQ2_XXS", "mtp.ffn.experts.up=IQ2_XXS", "mtp.ffn.experts.down=Q2_K")


def models(folder: Path) -> dict[str, Path]:
    """Name of a column → its file; those that are not shipped are made in `folder`."""
    if FLAGS.models:
        return {Path(m).stem: embedded_model(m) if m in EMBEDDED else Path(m) for m in FLAGS.models}
    out = {name: embedded_model(name) for name in reversed(EMBEDDED)}
    trained = Path(FLAGS.weights) / "tiny-f32.gguf"
    if not trained.exists():
        return out
    out["float32"] = trained
    for name, source, imatrix in (
        ("tiny_q2, no imatrix", trained.with_stem("tiny_q2-f32"), None),
        ("float32 in q2, no imatrix", trained, None),
        ("float32 in q2, imatrix", trained, HELD_OUT / "tiny.imatrix.gguf"),
    ):
        out[name] = folder / f"{name}.gguf"
        convert(source, out[name], recipes.RECIPES["q2"], recipes.parse_types(Q2_TYPES), imatrix)
    return out


def main() -> None:
    texts = _held_out("heldout")
    with tempfile.TemporaryDirectory() as folder:
        columns = {name: evaluate(path, texts, FLAGS.batch) for name, path in models(Path(folder)).items()}
    print("| | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for name in next(iter(columns.values())):
        print(f"| {name} | " + " | ".join(column[name] for column in columns.values()) + " |")


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
