"""Ask a model questions and count the right answers.

    ds4jax eval --tasks F.jsonl [--samples 4] [--think on] [--out DIR]

F has a JSON object in each line: "prompt" (and "system") or "messages", and how to know a right answer: "exact" (a
text, or several), "regex" (a Python pattern to be found in the answer; with "exact", what its first group must be), or
"choice" (a letter; with "choices", which are shown under the prompt). Optional: "id", "task" (a name to report under),
"think", "max_tokens", "samples". Thoughts are not graded.

Prints for each task pass@1, the chance that an answer is right, with its standard error over questions. With --out,
what is done is kept: the same command goes on where it was interrupted, or asks for more samples. DIR has
transcript.jsonl, every answer as it came, and report.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Any

from absl import flags

from ds4jax.errors import ConfigError, Ds4Error
from ds4jax.io.drafter import open_with_drafter
from ds4jax.settings import Settings
from ds4jax.terminal import meter
from ds4jax.tools import cli

FLAGS = flags.FlagValues()
cli.define_model(FLAGS)
cli.define_profile(FLAGS)
flags.DEFINE_string("tasks", None, "The file of questions, JSON lines.", flag_values=FLAGS)
flags.DEFINE_integer("samples", 1, "Answers to each question.", flag_values=FLAGS)
flags.DEFINE_string(
    "out", None, "A folder for transcript and report; the same command goes on there.", flag_values=FLAGS
)
cli.define_answers(FLAGS)
flags.DEFINE_integer("batch", None, "Questions at once; by default the config's.", flag_values=FLAGS)
cli.define_sampling(FLAGS)
cli.define_compute(FLAGS)


def main() -> None:
    """Run the tool as FLAGS say. Raises Ds4Error."""
    if not FLAGS.tasks:
        raise ConfigError("tasks: found nothing, expected --tasks FILE")
    if FLAGS.samples < 1:
        raise ConfigError(f"samples: found {FLAGS.samples}, expected at least 1")
    if FLAGS.samples > 1 and FLAGS.temperature == 0:
        raise ConfigError(f"samples: found {FLAGS.samples} with temperature 0, at which all are alike, expected 1")
    names = "model", "profile", "max_tokens", "ctx", "batch", "numerics", "kernels"
    settings = Settings.load(FLAGS.config, **{name: FLAGS[name].value for name in names})
    settings.set_environment()

    from ds4jax.engine import compile_cache, model_runner
    from ds4jax.engine.chunks import chunk_sizes
    from ds4jax.engine.engine import Engine
    from ds4jax.engine.types import Sampling
    from ds4jax.io.tokenizer import Tokenizer
    from ds4jax.profile import choose
    from ds4jax.quality import tasks as library
    from ds4jax.quality.journal import Journal, model_key

    questions = library.read_questions(Path(FLAGS.tasks))
    checkpoint = open_with_drafter(settings)
    metadata = checkpoint.file.metadata
    tokenizer = Tokenizer.from_metadata(metadata)
    profile = choose(settings.profile, metadata, checkpoint.file.path.name).name
    params: dict[str, Any] = {name: FLAGS[name].value for name in cli.SAMPLING}
    sampling = Sampling(**params)
    how = library.How(sampling, FLAGS.samples, settings.max_tokens, FLAGS.think, settings.ctx, profile)
    compile_cache.keep_compilations()
    lengths = [len(how.prompt(question, tokenizer)) for question in questions]
    for question, length in zip(questions, lengths, strict=True):
        if length >= settings.ctx:
            raise Ds4Error(f"question {question.id}: found {length} tokens, expected at most {settings.ctx - 1} (ctx)")
    sizes = chunk_sizes(lengths, settings.prefill_chunk)
    runner = model_runner.ModelRunner(checkpoint, settings, settings.batch, progress=True, sizes=sizes)

    folder = Path(FLAGS.out) if FLAGS.out else None
    key = {"journal": "eval", "tasks": library.fingerprint(questions), **model_key(runner)}
    key |= {field.name: getattr(how, field.name) for field in dataclasses.fields(how)}
    key |= params
    del key["sampling"], key["samples"]  # there may be more samples next time
    if folder is not None:
        cli.make_folder(folder)
    records, right = [], 0
    with (
        contextlib.closing(Journal(folder / "transcript.jsonl" if folder else None, key)) as journal,
        meter(len(how.runs(questions)), checkpoint.file.path.name, "answer") as bar,
    ):
        for record in library.ask(Engine(runner, sizes=sizes), questions, how, journal):
            records.append(record)
            right += record["right"]
            bar.update()
            bar.set_postfix_str(f"{right} right")
            cli.check_interrupt()
    found = library.report(records)
    width = max(len(task) for task in found)
    print(f"{'task':<{width}} {'questions':>9} {'answers':>8} {'pass@1':>18} {'cut':>6}")
    for task, of in found.items():
        value, error = of["pass_at_1"]
        passed = f"{100 * value:.1f} ± {100 * error:.1f} %".replace("nan", "?")  # of one answer there is no error
        print(f"{task:<{width}} {of['questions']:>9} {of['answers']:>8} {passed:>18} {of['cut']:>6}")
    if any(of["cut"] for of in found.values()):
        print("note: answers were cut off; a larger --max_tokens would let them end", file=sys.stderr)
    if folder is not None:
        cli.write_json(folder / "report.json", {"model": checkpoint.file.path.name, "tasks": found})
