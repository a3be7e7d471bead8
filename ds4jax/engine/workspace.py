"""The workspace of the steps, predicted where they cannot be compiled.

A step needs the most at one of a few moments, at each of which it is a + b·n + c·ctx bytes: n are the tokens of a
padded chunk, or the sequences that are decoded. Beside other sequences, prefill works on a copy of its slot, with so
many bytes more per token of ctx. ``configs/workspace.json`` has these numbers by card, and the rows that
`scripts/measure_workspace.py` fits them to: what XLA planned for programs that it compiled. These have
DeepSeek-V4-Flash's shape, the kernels and the q2 file's types; chunks below 1024 tokens and other types were not
compiled.
"""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING

from ds4jax.engine import cards
from ds4jax.engine.chunks import pad
from ds4jax.io.synthetic import FULL
from ds4jax.settings import CONFIG_DIR

if TYPE_CHECKING:
    from ds4jax.engine.compiled_steps import CompiledSteps

PATH = CONFIG_DIR / "workspace.json"
SOURCE = f"{CONFIG_DIR.name}/{PATH.name}"


def predict(programs: CompiledSteps, ctx: int | None = None, batch: int | None = None) -> dict[str, int]:
    """Bytes that each step needs beside weights and cache, with another ctx or batch if given.

    The card is the one that the steps are for, or else this machine's. Empty where the formula does not hold: another
    shape, other numerics, no kernels, several devices, no card.
    """
    card, settings, cfg = programs.card or cards.here(), programs.settings, programs.cfg
    like = settings.numerics, settings.dtype, settings.kernels, settings.devices
    same = (cfg.n_layers, cfg.embed_dim, cfg.n_heads, cfg.vocab_size, cfg.n_experts, cfg.n_mtp)
    expected = (FULL.n_layers, FULL.embed_dim, FULL.n_heads, FULL.vocab_size, FULL.n_experts, FULL.n_mtp)
    if card is None or like != ("official", "bfloat16", "pallas", 1) or same != expected:
        return {}
    ctx, batch = ctx or settings.ctx, batch or programs.batch
    padded, _ = pad([0] * min(settings.prefill_chunk, ctx - 1))
    numbers = _table()[card.name]
    copy = numbers["copy"] * ctx if batch > 1 else 0
    return {
        "prefill": int(_most(numbers["prefill"], padded.shape[1], ctx) + copy),
        "decode": int(_most(numbers["decode"], batch, ctx)),
    }


def _most(moments: list[list[float]], n: int, ctx: int) -> float:
    return max(a + b * n + c * ctx for a, b, c in moments)


@functools.cache
def _table() -> dict[str, dict]:
    """Card → the numbers of its steps."""
    return json.loads(PATH.read_text())["cards"]
