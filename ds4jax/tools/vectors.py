"""Compare a model with reference vectors: prompts, the tokens that follow, and how likely these and others were.

    ds4jax vectors --config NAME DIR [--max_gap 2] [--min_same 0.8] [--max_kl 0.5]

The first thing to run when a model's weights arrive: each prompt is prefilled and its tokens are decoded as the engine
does it, and every step compared. DIR has ds4's vectors (*.vec, *.json) or what ``generate --dump_logprobs`` wrote.

Prints a line for each vector. same: at how many steps the model's likeliest token is the vector's. gap: where it is
another, by how many nats it is likelier than the vector's, at most. KL: the mean divergence over the tokens that the
vector lists, and all others as one. off by: by how many nats the log-probability of a vector's token differs, at most.
A vector that tells of no probabilities has no KL and is not off.
The status is 1 beyond any of the bounds, or where a prompt has not as many tokens as the vector says.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from ds4jax.errors import ConfigError
from ds4jax.io.checkpoint import open_checkpoint
from ds4jax.io.download import resolve_model
from ds4jax.io.tokenizer import Tokenizer
from ds4jax.profile import choose
from ds4jax.settings import Settings
from ds4jax.tools import cli

if TYPE_CHECKING:  # JAX must not be imported before `Settings.set_environment`
    from ds4jax.quality.vectors import Agreement

FLAGS = flags.FlagValues()
ARGUMENT = "dir"
cli.define_model(FLAGS)
cli.define_profile(FLAGS)
flags.DEFINE_string("dir", None, "The folder of the vectors; the flag's name may be left out.", flag_values=FLAGS)
flags.DEFINE_bool("raw", False, "Continue prompts as they are, without the chat template.", flag_values=FLAGS)
# Wide enough for a file in few bits: tiny_q2 on vectors of tiny, answers to 20 questions: 120 of 120 steps the same, KL
# at most 0.0025; continuations of five texts: 26 of 30, gap at most 1.22, KL at most 0.124. No real weights have been
# run. Between two runs of one file, such as with and without kernels, the bounds can be far tighter.
text = "By how many nats another token may be likelier than the vector's: near ties may change places in a small file."
flags.DEFINE_float("max_gap", 2.0, text, flag_values=FLAGS)
text = "The part of all steps at which the likeliest token must be the vector's: near ties are few."
flags.DEFINE_float("min_same", 0.8, text, flag_values=FLAGS)
text = "The mean divergence that a vector may have, in nats: room for what few bits cost."
flags.DEFINE_float("max_kl", 0.5, text, flag_values=FLAGS)
cli.define_compute(FLAGS)


def main() -> int:
    """Run the tool as FLAGS say; → exit status. Raises Ds4Error."""
    if not FLAGS.dir:
        raise ConfigError("found no folder, expected ds4jax vectors DIR")
    for name, most in (("max_gap", float("inf")), ("min_same", 1.0), ("max_kl", float("inf"))):
        if not 0 <= (found := getattr(FLAGS, name)) <= most:
            raise ConfigError(f"{name}: found {found}, expected a number from 0 to {most}")
    overrides = {name: FLAGS[name].value for name in ("model", "profile", "numerics", "kernels")}
    settings = Settings.load(FLAGS.config, draft="off", **overrides)
    settings.set_environment()
    checkpoint = open_checkpoint(resolve_model(settings))
    tokenizer = Tokenizer.from_metadata(checkpoint.file.metadata)
    profile = choose(settings.profile, checkpoint.file.metadata, checkpoint.file.path.name).name

    from ds4jax.engine import compile_cache
    from ds4jax.engine.chunks import chunk_sizes
    from ds4jax.engine.model_runner import ModelRunner
    from ds4jax.quality.vectors import read_vectors, replay

    vectors = read_vectors(Path(FLAGS.dir), tokenizer, FLAGS.raw, profile=profile, ctx=settings.ctx)
    longest = max(len(vector.tokens) + len(vector.steps) for vector in vectors)
    settings = dataclasses.replace(settings, ctx=-(-(longest + 1) // 128) * 128)  # as much as they need
    compile_cache.keep_compilations()
    sizes = chunk_sizes((len(vector.tokens) for vector in vectors), settings.prefill_chunk)
    runner = ModelRunner(checkpoint, settings, batch=1, progress=True, sizes=sizes)

    width = max(len(vector.name) for vector in vectors)
    print(f"{'vector':<{width}} {'prompt':>7} {'same':>9} {'gap':>8} {'KL':>8} {'off by':>8}")
    found = []
    for vector in vectors:
        found.append(replay(vector, runner))
        told = (f"{'-' if x is None else format(x, '.4f'):>8}" for x in (found[-1].gap, found[-1].kl, found[-1].off))
        same = f"{found[-1].same} of {len(vector.steps)}"
        print(f"{vector.name:<{width}} {len(vector.tokens):>7} {same:>9} {' '.join(told)}", flush=True)
        cli.check_interrupt()
    same, steps = sum(one.same for one in found), sum(len(one.vector.steps) for one in found)
    print(
        f"{same} of {steps} steps the same; bounds: {FLAGS.min_same:.0%} of all steps the same, gap at most "
        f"{FLAGS.max_gap:g} nats, KL at most {FLAGS.max_kl:g} nats"
    )
    problems = _beyond(found)
    for problem in problems:
        print(f"beyond bounds: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _beyond(found: Sequence[Agreement]) -> list[str]:
    """What is beyond the bounds, a line each."""
    problems = []
    for one in found:
        name, n, given = one.vector.name, len(one.vector.tokens), one.vector.prompt_tokens
        if given not in (None, n) and not FLAGS.raw:
            problems.append(f"{name}: prompt: found {n} tokens, expected {given}; another template or tokenizer?")
        if one.gap > FLAGS.max_gap:
            problems.append(f"{name}: gap: found {one.gap:.4f} nats, expected at most {FLAGS.max_gap}")
        if one.kl is not None and one.kl > FLAGS.max_kl:
            problems.append(f"{name}: KL: found {one.kl:.4f} nats, expected at most {FLAGS.max_kl}")
    same, steps = sum(one.same for one in found), sum(len(one.vector.steps) for one in found)
    if same < FLAGS.min_same * steps:
        problems.append(f"same: found {same} of {steps} steps, expected at least {FLAGS.min_same:.0%} of them")
    return problems
