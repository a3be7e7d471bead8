"""The shapes of published model files, known without the files: for plans that are made before a download. No JAX."""

from __future__ import annotations

from ds4jax.io.recipes import RECIPES, Recipe
from ds4jax.io.synthetic import FULL, Synthetic
from ds4jax.settings import Settings

REPOSITORY = "antirez/deepseek-v4-gguf"

# What the files' names say of the routed experts → the recipe, of which the other types are all the same.
_EXPERTS: dict[str, Recipe] = {
    "-IQ2XXS-w2Q2K-": RECIPES["q2"],
    "-Q4KExperts-": RECIPES["q4"],
    "-Layers37-42Q4KExperts-": RECIPES["q2-q4"],
    "-MXFP4Experts-": RECIPES["mxfp4"],
}
# The published DSpark drafter, which goes beside DeepSeek-V4-Flash-0731: the bytes of its tensors, and its stages.
DRAFTER_BYTES, DRAFTER_STAGES = 5_989_108_652, 3


def published(settings: Settings) -> Synthetic | None:
    """Shapes and types of the file that the settings name, if it is one of DeepSeek-V4-Flash in `REPOSITORY`."""
    repo, file = settings.hf_file or ("", "")
    found = [recipe for part, recipe in _EXPERTS.items() if repo == REPOSITORY and part in file]
    return Synthetic(FULL, found[0]) if len(found) == 1 else None
