"""How often the drafts of a DSpark drafter are accepted: ``python scripts/eval_dspark.py [--drafter FILE.gguf]``.

The tiny model goes on greedily after held-out text and after the beginnings of new dialogues, with drafts that are
verified and committed, and again without. Prints by slot how often a draft is accepted if all before it were, the
tokens per round, and how many of the answers differ, which only equally likely tokens may make them do.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout works without being installed

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import tiny_data  # noqa: E402
from absl import flags  # noqa: E402
from tiny_dialogues import HELD_OUT, Generator, held_out  # noqa: E402

from ds4jax.config import ModelConfig  # noqa: E402
from ds4jax.io.load import load, load_drafter  # noqa: E402
from ds4jax.io.tokenizer import Tokenizer  # noqa: E402
from ds4jax.model import cache as kv  # noqa: E402
from ds4jax.model import dspark, transformer  # noqa: E402
from ds4jax.model.cache import Cache  # noqa: E402
from ds4jax.model.compute import Compute  # noqa: E402
from ds4jax.model.verify import commit, verify  # noqa: E402
from ds4jax.model.weights import Dspark, Weights  # noqa: E402
from ds4jax.paths import embedded_drafter, embedded_model  # noqa: E402
from ds4jax.tools import cli  # noqa: E402

COMPUTE = Compute("official", "float32")
PROMPT = 128  # tokens

FLAGS = flags.FlagValues()
flags.DEFINE_string("drafter", None, "Another GGUF file than the embedded drafter.", flag_values=FLAGS)
flags.DEFINE_string("model", None, "Another GGUF file than the embedded model.", flag_values=FLAGS)
flags.DEFINE_string("data", str(HELD_OUT), "Folder with the heldout.json of scripts/tiny_data.py.", flag_values=FLAGS)
flags.DEFINE_integer("batch", 16, "Texts of each kind.", flag_values=FLAGS)
flags.DEFINE_integer("tokens", 64, "Tokens of an answer.", flag_values=FLAGS)


@functools.partial(jax.jit, static_argnames="cfg")
def begin(w: Weights, d: Dspark, tokens: jax.Array, *, cfg: ModelConfig) -> tuple[jax.Array, Cache]:
    """The first token after each prompt, and the cache."""
    B, T = tokens.shape
    n, taps = jnp.full((B,), T, jnp.int32), dspark.Taps(cfg)
    empty = kv.zeros(cfg, COMPUTE.numerics, COMPUTE.dtype, B, 4 * T)
    s, cache = transformer.run(w, empty, tokens, n, cfg, COMPUTE, taps)
    cache = dspark.write(d, cache, taps.features(B), empty.length, n, cfg, COMPUTE)
    return dspark.greedy(transformer.head(transformer.last(s, n), w.head, cfg, COMPUTE), 0), cache


@functools.partial(jax.jit, static_argnames="cfg")
def one_round(
    w: Weights, d: Dspark, cache: Cache, anchor: jax.Array, *, cfg: ModelConfig
) -> tuple[jax.Array, jax.Array, jax.Array, Cache]:
    """Draft, verify, accept → the tokens after the anchors, how many drafts were right, confidences, the cache.

    Of the tokens (B, slots + 1), the first 1 + right count; the last of them is the next anchor.
    """
    B = len(anchor)
    drafts = dspark.draft(w, d, cache, anchor, jnp.ones((B,), bool), cfg, COMPUTE)
    tokens, taps = jnp.concatenate([anchor[:, None], drafts.tokens], axis=1), dspark.Taps(cfg)
    logits, pending = verify(w, cache, tokens, jnp.full((B,), tokens.shape[1], jnp.int32), cfg, COMPUTE, taps)
    said = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    right = jnp.cumprod((said[:, :-1] == drafts.tokens).astype(jnp.int32), axis=1).sum(1, dtype=jnp.int32)
    moved = commit(pending, right + 1)
    moved = dspark.write(d, moved, taps.features(B), cache.length, right + 1, cfg, COMPUTE)
    return said, right, drafts.confidence, moved


@functools.partial(jax.jit, static_argnames=("cfg", "n"))
def plainly(w: Weights, cache: Cache, token: jax.Array, *, cfg: ModelConfig, n: int) -> jax.Array:
    """The n tokens from the first one after the prompts on, one at a time."""

    def step(carry: tuple[Cache, jax.Array], _):
        cache, token = carry
        s, cache = transformer.run(w, cache, token[:, None], jnp.ones_like(token), cfg, COMPUTE)
        following = dspark.greedy(transformer.head(s, w.head, cfg, COMPUTE), 0)
        return (cache, following), token

    return jax.lax.scan(step, (cache, token), length=n)[1].T


def measure(w: Weights, d: Dspark, cfg: ModelConfig, prompts: np.ndarray, n: int) -> dict[str, Any]:
    """What the module says, of n tokens after each prompt (B, PROMPT)."""
    anchor, cache = begin(w, d, prompts, cfg=cfg)
    expected = np.asarray(plainly(w, cache, anchor, cfg=cfg, n=n))
    out, rights, sure = [[int(token)] for token in anchor], [], []
    while min(map(len, out)) < n:
        said, right, confidence, cache = one_round(w, d, cache, anchor, cfg=cfg)
        said, right = np.asarray(said), np.asarray(right)
        going = [len(tokens) < n for tokens in out]
        for tokens, more, r in zip(out, said, right, strict=True):
            tokens.extend(more[: r + 1].tolist())
        anchor = jnp.asarray(said[np.arange(len(said)), right])
        rights += right[going].tolist()
        sure += np.asarray(confidence)[going].tolist()
    rights, sure = np.array(rights), np.array(sure)
    slots = range(sure.shape[1])
    reached = [int((rights >= j).sum()) for j in range(len(slots) + 1)]
    return {
        "accepted by slot": [round(reached[j + 1] / max(1, reached[j]), 3) for j in slots],
        "confidence by slot": [round(sure[rights >= j, j].sum() / max(1, reached[j]), 3) for j in slots],
        "tokens per round": round(1 + rights.mean(), 3),
        "rounds": len(rights),
        "answers that differ": sum(tokens[:n] != want.tolist() for tokens, want in zip(out, expected, strict=True)),
    }


def prompts(tok: Tokenizer, data: Path, batch: int) -> dict[str, np.ndarray]:
    """int32 (batch, PROMPT) of each kind."""
    rng = np.random.default_rng(0)
    held = [tok.encode_text(text["text"]) for text in json.loads((data / "heldout.json").read_text(encoding="utf-8"))]
    stream = np.concatenate([np.array(ids, np.int32) for ids in held])
    starts = rng.integers(0, len(stream) - PROMPT, batch)
    text = np.stack([stream[start : start + PROMPT] for start in starts])
    generator, dialogues = Generator(1_000_003, held_out()), []
    while len(dialogues) < batch:
        ids, _ = tiny_data.dialogue_document(generator.conversation(), tok)
        if len(ids) >= PROMPT + 64:
            dialogues.append(ids[:PROMPT])
    return {"held-out text": text, "new dialogues": np.array(dialogues, np.int32)}


def main() -> int:
    w, checkpoint = load(FLAGS.model or embedded_model("tiny"))
    d, cfg = load_drafter(FLAGS.drafter or embedded_drafter(), checkpoint)
    tok = Tokenizer.from_metadata(checkpoint.file.metadata)
    for kind, ids in prompts(tok, Path(FLAGS.data), FLAGS.batch).items():
        print(kind, json.dumps(measure(w, d, cfg, ids, FLAGS.tokens)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
