"""Text that the tiny model writes itself, for its drafter: ``python scripts/tiny_answers.py --data build/tiny``.

A drafter is used on what its model says, not on what others wrote. So each of these rows begins with one of
scripts/tiny_unseen.py, and the model goes on from there: one row in two with the likeliest token each time, the others
with tokens drawn from its distribution. The result is answers.npz in --data, in the format of rows.npz; all but the
first token, and what comes after an end token, is to be predicted.
"""

from __future__ import annotations

import functools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout works without being installed

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import tiny_data  # noqa: E402
from absl import flags  # noqa: E402

from ds4jax.config import ModelConfig  # noqa: E402
from ds4jax.io.load import load  # noqa: E402
from ds4jax.io.tokenizer import Tokenizer  # noqa: E402
from ds4jax.model import cache as kv  # noqa: E402
from ds4jax.model import transformer  # noqa: E402
from ds4jax.model.compute import Compute  # noqa: E402
from ds4jax.model.weights import Weights  # noqa: E402
from ds4jax.paths import embedded_model  # noqa: E402
from ds4jax.tools import cli  # noqa: E402

COMPUTE = Compute("official", "float32")
PROMPT = 256  # tokens; the model writes the rest of a row

FLAGS = flags.FlagValues()
flags.DEFINE_string("data", "build/tiny", "Folder that scripts/tiny_unseen.py wrote to.", flag_values=FLAGS)
flags.DEFINE_string("model", None, "Another GGUF file than the embedded model.", flag_values=FLAGS)
flags.DEFINE_integer("rows", 2048, "How many.", flag_values=FLAGS)
flags.DEFINE_integer("batch", 128, "Rows at once.", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Of the rows gone on from, and of what is drawn.", flag_values=FLAGS)


@functools.partial(jax.jit, static_argnames=("cfg", "n"))
def go_on(w: Weights, tokens: jax.Array, heat: jax.Array, key: jax.Array, *, cfg: ModelConfig, n: int) -> jax.Array:
    """The n tokens after each of tokens (B, T): the likeliest where heat (B,) is 0, drawn where it is 1."""
    B, T = tokens.shape
    whole = jnp.full((B,), T, jnp.int32)

    def choose(logits: jax.Array, key: jax.Array) -> jax.Array:
        noise = jax.random.gumbel(key, logits.shape, logits.dtype)
        return jnp.argmax(logits + heat[:, None] * noise, axis=-1).astype(jnp.int32)

    def step(carry: tuple[kv.Cache, jax.Array], key: jax.Array):
        cache, token = carry
        s, cache = transformer.run(w, cache, token[:, None], jnp.ones_like(token), cfg, COMPUTE)
        return (cache, choose(transformer.head(s, w.head, cfg, COMPUTE), key)), token

    first, key = jax.random.split(key)
    empty = kv.zeros(cfg, COMPUTE.numerics, COMPUTE.dtype, B, T + n)
    s, cache = transformer.run(w, empty, tokens, whole, cfg, COMPUTE)
    token = choose(transformer.head(transformer.last(s, whole), w.head, cfg, COMPUTE), first)
    return jax.lax.scan(step, (cache, token), jax.random.split(key, n))[1].T


def main() -> int:
    start, data, rng = time.monotonic(), Path(FLAGS.data), np.random.default_rng(FLAGS.seed)
    tokens, _ = tiny_data.load_rows(data / "unseen.npz")
    w, checkpoint = load(FLAGS.model or embedded_model("tiny"))
    tok = Tokenizer.from_metadata(checkpoint.file.metadata)
    heat, key = np.arange(FLAGS.batch) % 2, jax.random.key(FLAGS.seed)
    begun, written = tokens[rng.permutation(len(tokens))[: FLAGS.rows], :PROMPT], []
    for i in range(0, len(begun) - FLAGS.batch + 1, FLAGS.batch):
        given = jnp.asarray(begun[i : i + FLAGS.batch], jnp.int32)
        said = go_on(
            w, given, jnp.asarray(heat, jnp.float32), jax.random.fold_in(key, i), cfg=checkpoint.cfg,
            n=tiny_data.ROW - PROMPT,
        )  # fmt: skip
        written.append(np.concatenate([given, said], axis=1).astype(np.uint16))
        rows = np.concatenate(written)
        ended = np.cumsum(rows == tok.eos_id, axis=1) - (rows == tok.eos_id) > 0
        kept = ~ended & (np.arange(tiny_data.ROW) > 0)
        np.savez_compressed(data / "new.npz", tokens=rows, mask=np.packbits(kept, axis=1))
        (data / "new.npz").replace(data / "answers.npz")  # whole, whenever this is stopped
        print(f"{len(rows)} rows at {time.monotonic() - start:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
