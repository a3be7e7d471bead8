"""From logits to the next token: greedy, temperature, top-k, top-p, min-p. Pure functions, run on the device.

Before all that a request may edit the logits (`Edits`): biases, penalties for what was said before, and the tokens that
a grammar allows. Log-probabilities that are reported are those of the model's own logits.

The logits are divided by the temperature; of the resulting distribution, top-k keeps the k likeliest tokens, top-p the
shortest run of those, renormalised, that reaches probability p, and min-p those at least min_p times as likely as the
likeliest. One token is drawn from what is left. (vLLM too has the temperature first; llama.cpp's default has it last.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt32

from ds4jax.engine.types import MAX_LOGPROBS, Sampling


@struct.dataclass
class Batch:
    """The `Sampling` of every sequence of a batch."""

    temperature: Float32[Array | np.ndarray, "B"]
    top_k: Int32[Array | np.ndarray, "B"]
    top_p: Float32[Array | np.ndarray, "B"]
    min_p: Float32[Array | np.ndarray, "B"]
    seed: UInt32[Array | np.ndarray, "B"]


def batch(params: Sequence[Sampling]) -> Batch:
    """One `Batch` (numpy, ready to be passed to a jitted function) from the parameters of its sequences."""
    dtypes = {"top_k": np.int32, "seed": np.uint32}
    names = [field.name for field in dataclasses.fields(Batch)]
    return Batch(**{n: np.array([getattr(p, n) for p in params], dtypes.get(n, np.float32)) for n in names})


def sample(logits: Float[Array, "B V"], params: Batch, position: Int32[Array, "B"]) -> Int32[Array, "B"]:
    """The next token of every sequence, at `position`.

    Draws by the Gumbel-max trick. The noise depends on seed, position and token id only, so a filter that leaves the
    drawn token in changes nothing. Of equal logits the lowest id is the likeliest. -1 if the largest logit is no finite
    number: then one of them is NaN or infinite.
    """
    logits = logits.astype(jnp.float32)
    finite = jnp.isfinite(logits.max(axis=-1))
    greedy = jnp.where(finite, jnp.argmax(logits, axis=-1).astype(jnp.int32), -1)

    def draw() -> Array:
        keys = jax.vmap(lambda seed, p: jax.random.fold_in(jax.random.key(seed), p))(params.seed, position)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:], jnp.float32))(keys)
        x = tempered(logits, params)
        ids = jnp.argmax(jnp.where(allowed(x, params), x + noise, -jnp.inf), axis=-1)
        return jnp.where(finite & (params.temperature != 0), ids.astype(jnp.int32), greedy)

    return lax.cond((params.temperature > 0).any(), draw, lambda: greedy)


@struct.dataclass
class Edits:
    """What every sequence of a batch changes in its logits: K of them, and which of all are allowed.

    ids: V or more for none. repeat, add: a positive logit is divided by `repeat`, others are multiplied; then `add` is
    added. allowed: bit i mod 32 of word i // 32 for id i.
    """

    ids: Int32[Array | np.ndarray, "B K"]
    repeat: Float32[Array | np.ndarray, "B K"]
    add: Float32[Array | np.ndarray, "B K"]
    allowed: UInt32[Array | np.ndarray, "B words"]


def edited(logits: Float[Array, "B V"], edits: Edits) -> Float32[Array, "B V"]:
    """The logits with the edits made; those of tokens that are not allowed are -inf."""
    logits = logits.astype(jnp.float32)
    at = jnp.arange(len(logits), dtype=jnp.int32)[:, None], edits.ids
    old = logits.at[at].get(mode="fill", fill_value=0)
    new = jnp.where(old > 0, old / edits.repeat, old * edits.repeat) + edits.add
    ids = jnp.arange(logits.shape[-1], dtype=jnp.uint32)
    bits = edits.allowed[:, ids // 32] >> (ids % 32) & 1
    return jnp.where(bits == 1, logits.at[at].set(new, mode="drop"), -jnp.inf)


def choose(
    logits: Float[Array, "B V"], edited: Float[Array, "B V"], params: Batch, position: Int32[Array, "B"]
) -> tuple[Int32[Array, "B"], Float32[Array, "B"], Int32[Array, "B top"], Float32[Array, "B top"]]:
    """`sample` of the edited logits, and log-probabilities of the logits as they are.

    → ids, their log-probability, and of the MAX_LOGPROBS likeliest the ids and log-probabilities, in order.
    """
    ids = sample(edited, params, position)
    return ids, *logprobs(logits, ids)


def logprobs(
    logits: Float[Array, "B V"], ids: Int32[Array, "B"]
) -> tuple[Float32[Array, "B"], Int32[Array, "B top"], Float32[Array, "B top"]]:
    """The log-probability of one token each, and the MAX_LOGPROBS likeliest ones with theirs, in order."""
    every = jax.nn.log_softmax(logits.astype(jnp.float32))
    top, top_ids = lax.top_k(every, min(MAX_LOGPROBS, logits.shape[-1]))
    return jnp.take_along_axis(every, ids[:, None], axis=-1)[:, 0], top_ids, top


def tempered(logits: Float[Array, "B V"], params: Batch) -> Float[Array, "B V"]:
    """The logits over the temperature, shifted so that the largest is 0: no temperature overflows."""
    smallest = jnp.finfo(jnp.float32).tiny
    return (logits - logits.max(-1, keepdims=True)) / jnp.maximum(params.temperature, smallest)[:, None]


def allowed(x: Float[Array, "B V"], params: Batch) -> Bool[Array, "B V"]:
    """Which tokens the filters leave, never none, of x from `tempered`.

    min-p compares likelihoods, which renormalising does not change: it needs no sort. The others do.
    """
    ranked = (params.top_k > 0) | (params.top_p < 1)
    everything = jnp.ones(x.shape, bool)
    return (x >= jnp.log(params.min_p)[:, None]) & lax.cond(ranked.any(), lambda: _top(x, params), lambda: everything)


def _top(x: Array, params: Batch) -> Array:
    order = jnp.argsort(x, axis=-1, descending=True, stable=True)
    ranked = jnp.take_along_axis(x, order, axis=-1)
    rank = jnp.arange(x.shape[-1], dtype=jnp.int32)
    top_k, top_p = params.top_k[:, None], params.top_p[:, None]
    kept = (top_k == 0) | (rank < top_k)
    p = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(p, axis=-1) - p
    kept &= (top_p == 1) | (before < top_p)  # off must mean off: the sum may round to 1 before the last token
    return jnp.zeros(x.shape, bool).at[jnp.arange(len(x), dtype=jnp.int32)[:, None], order].set(kept)
