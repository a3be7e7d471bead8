"""Goldens of the independent implementation: which models and prompts, what is stored, how answers are compared.

`scripts/make_goldens.py` runs transformers and writes them; comparing needs only NumPy and the files. To keep them
small, a position stores its logits' norm and their products with 24 vectors of random signs: the mean square of an
error's products estimates its squared norm without bias and, for all but 1 position in 10,000, within a factor of 2 of
the norm (chi² with 24 degrees of freedom). At a few positions all logits are stored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gguf import GGUFReader

from ds4jax.config import ModelConfig
from ds4jax.io.checkpoint import open_checkpoint
from ds4jax.io.synthetic import RECIPES, synthetic_config, write_synthetic
from ds4jax.io.tokenizer import Tokenizer
from ds4jax.paths import embedded_model

DIRECTORY = Path(__file__).parent / "goldens"
LENGTHS = (
    5,
    130,
    640,
)  # a window not yet full; the first row of ratio 128; five of them, and the top-k bites everywhere
DIRECTIONS = 24
GREEDY_PROMPT, GREEDY_STEPS, GREEDY_TOP = 130, 8, 5

# `plain`: both sides compute in float32 and sum in another order, which moves these models' logits by 2e-6 to 4e-6.
# `official`: where a value lies within 1e-6 of the middle between two codes of E4M3 or E2M1, the two sides round it
# apart; a choice of the indexer or router sometimes follows, and the position moves. In an undamped random model that
# costs up to 50 %, and even two runs of the oracle, one of them with noise of 5e-7, differ by more than 1 % at a tenth
# of the positions; with `damping` none passes 1 %. Few positions are touched: the median moves by 1e-5, and the bound
# on it is what notices a missing round trip (1e-4 to 1e-2).
# A trained model is not damped, so it has no `official` golden: noise of 5e-7 moves single positions of `tiny` by 24 %.
TOLERANCE = {"plain": 1e-4, "official": 1e-2}
MEDIAN_TOLERANCE = {"plain": 2e-5, "official": 5e-5}
# Relative gap between the k-th and the next candidate below which float32 cannot tell which is chosen. `make_goldens`
# refuses a `plain` model with such a gap, so no position needs an exception.
NEAR_TIE = 3e-5


@dataclasses.dataclass(frozen=True)
class Case:
    """One random model: a shape and a recipe of `ds4jax.io.synthetic`, and the seed of its weights and prompts."""

    name: str
    shape: str
    recipe: str
    numerics: Literal["plain", "official"]
    seed: int

    @property
    def cfg(self) -> ModelConfig:
        return synthetic_config(self.shape)

    @property
    def kernels(self) -> bool:
        """Whether the kernels take the model: `official` numerics, and a shape of powers of two."""
        return self.numerics == "official" and self.shape == "kernel"

    @property
    def tolerances(self) -> tuple[float, float]:
        """The highest relative error of a position, and the highest median of the positions of a prompt."""
        return TOLERANCE[self.numerics], MEDIAN_TOLERANCE[self.numerics]

    def build(self, path: Path) -> None:
        """Writes the model's GGUF file."""
        damping = 1.0 if self.numerics == "plain" else 1 / 16
        write_synthetic(path, self.cfg, self.seed, RECIPES[self.recipe], damping=damping)

    def prompt(self, length: int) -> np.ndarray:
        """(length,) int32 random token ids."""
        words = np.random.Philox(key=self.seed * 1000 + length).random_raw(length)
        return (words % self.cfg.vocab_size).astype(np.int32)


CASES = (
    Case("base-q2", "base", "q2", "plain", 12),
    Case("base-mixed", "base", "mixed", "plain", 10),
    Case("odd-f32", "odd", "f32", "plain", 48),
    Case("base-q2-official", "base", "q2", "official", 4),
    Case("odd-q8-official", "odd", "q8", "official", 2),
    Case("kernel-q2-official", "kernel", "q2", "official", 1),
    Case("kernel-experts-official", "kernel", "mixed_experts", "official", 6),
)


@dataclasses.dataclass(frozen=True)
class Trained(Case):
    """An embedded model, with text that it was not trained on.

    shape: its name. recipe: means nothing here. seed: how many hundred characters in a prompt starts.
    """

    @property
    def cfg(self) -> ModelConfig:
        return open_checkpoint(embedded_model(self.shape)).cfg

    def build(self, path: Path) -> None:
        shutil.copy(embedded_model(self.shape), path)

    def prompt(self, length: int) -> np.ndarray:
        tokenizer = Tokenizer.from_metadata(open_checkpoint(embedded_model(self.shape)).file.metadata)
        texts = json.loads((DIRECTORY.parent / "tiny" / "heldout.json").read_text(encoding="utf-8"))
        text = "\n".join(text["text"] for text in texts)[100 * self.seed :]
        return np.array([tokenizer.bos_id, *tokenizer.encode_text(text[: 12 * length])[: length - 1]], np.int32)


CASES = (
    *CASES,
    Trained("tiny", "tiny", "q4", "plain", 12),
)


def fingerprint(path: Path) -> str:
    """SHA-256 over every tensor's name, type, dims and bytes as the gguf package reads them, in the file's order."""
    digest = hashlib.sha256()
    for t in GGUFReader(path).tensors:
        digest.update(f"{t.name} {t.tensor_type.name} {[int(n) for n in t.shape]}\n".encode())
        digest.update(np.ascontiguousarray(t.data))
    return digest.hexdigest()


def full_positions(length: int) -> list[int]:
    """Positions whose logits are stored whole: both ends, and around the first rows of ratio 4 and 128."""
    return sorted({t for t in (0, 3, 4, 126, 127, 128, length - 1) if t < length})


def directions(vocab: int) -> np.ndarray:
    """(vocab, DIRECTIONS) float64 of random signs."""
    words = np.random.Philox(key=vocab).random_raw(vocab * DIRECTIONS)
    return (words & 1).astype(np.float64).reshape(vocab, DIRECTIONS) * 2 - 1


def record(logits: np.ndarray) -> dict[str, np.ndarray]:
    """What a golden keeps of logits (S, vocab): norm (S,), projection (S, DIRECTIONS), full (positions, vocab)."""
    return {
        "norm": np.linalg.norm(logits.astype(np.float64), axis=1).astype(np.float32),
        "projection": (logits @ directions(logits.shape[1])).astype(np.float32),
        "full": logits[full_positions(len(logits))],
    }


@dataclasses.dataclass(frozen=True)
class Golden:
    """One case's stored answers.

    meta: ``sha256`` of the model's tensors (see `fingerprint`) and the versions of the packages that answered.
    arrays, for each prompt length: ``{length}/tokens``; what `record` keeps; ``{length}/index_gap`` and
        ``router_gap`` (S,), the smallest relative gaps at a top-k over the layers that choose rows or experts, inf
        where all candidates are taken. And ``greedy/tokens`` (GREEDY_PROMPT + GREEDY_STEPS,), ``greedy/ids`` and
        ``greedy/logits`` (GREEDY_STEPS, GREEDY_TOP): the best of each step, largest first.
    """

    case: Case
    meta: dict[str, str]
    arrays: dict[str, Any]

    def save(self) -> Path:
        path = DIRECTORY / f"{self.case.name}.npz"
        np.savez_compressed(path, meta=json.dumps(self.meta, sort_keys=True), **self.arrays)
        return path

    @staticmethod
    def load(case: Case) -> Golden:
        with np.load(DIRECTORY / f"{case.name}.npz") as f:
            return Golden(case, json.loads(str(f["meta"])), {k: f[k] for k in f.files if k != "meta"})

    def errors(self, length: int, logits: np.ndarray) -> np.ndarray:
        """(length,) relative L2 error of `logits` (length, vocab) at each position; exact at `full_positions`."""
        norm, projection, full = (self.arrays[f"{length}/{k}"] for k in ("norm", "projection", "full"))
        errors = np.sqrt(np.mean((logits @ directions(logits.shape[1]) - projection) ** 2, axis=1)) / norm
        at = full_positions(length)
        errors[at] = np.linalg.norm(logits[at] - full, axis=1) / norm[at]
        return errors

    def failures(self, length: int, logits: np.ndarray) -> list[str]:
        """What is wrong with `logits` (length, vocab), one line per finding; empty when they agree."""
        errors = self.errors(length, logits)
        limit, median_limit = self.case.tolerances
        gaps = {k: self.arrays[f"{length}/{k}_gap"] for k in ("index", "router")}
        found = [
            f"{self.case.name}, {length} tokens, position {t}: error {errors[t]:.1e} > {limit:.0e} "
            f"(relative gap at the top-k of rows {gaps['index'][t]:.1e}, of experts {gaps['router'][t]:.1e})"
            for t in np.flatnonzero(~(errors <= limit))  # negated so that NaN counts
        ]
        if not np.median(errors) <= median_limit:
            found.append(
                f"{self.case.name}, {length} tokens: median error {np.median(errors):.1e} > {median_limit:.0e}"
            )
        return found
