"""How likely a text is to a model, and how far the model is from another one.

    ds4jax perplexity --text F [--window 1024] [--windows N] [--out DIR]
    ds4jax perplexity --text F --against G.gguf [--out DIR]        # read by G first, then by the model
    ds4jax perplexity --text F --save_logits DIR --model G.gguf    # the same in two runs
    ds4jax perplexity --text F --compare DIR --model F.gguf

Prints perplexity and bits per byte with their standard errors; compared with another model also the Kullback-Leibler
divergence from it, how often both find the same token likeliest, and the positions where they differ most. The text is
read in windows of --window tokens behind BOS, and every token of it is scored once; --context makes a window begin with
tokens of the one before, which are not scored again. F is a text, a .jsonl file with an object with "text" in each
line, or a .json file with a list of such objects.

With --out (or --save_logits), what is done is kept: the same command goes on where it was interrupted, or reads more
windows. DIR has journal.jsonl (nats, likeliest token and divergence of every token) and report.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from ds4jax.errors import ConfigError, Ds4Error
from ds4jax.io.checkpoint import Checkpoint, open_checkpoint
from ds4jax.io.download import resolve_model
from ds4jax.io.tokenizer import Tokenizer
from ds4jax.settings import Settings
from ds4jax.terminal import meter
from ds4jax.tools import cli

if TYPE_CHECKING:  # JAX must not be imported before `Settings.set_environment`
    from ds4jax.quality.perplexity import Distributions, Reference, Window
    from ds4jax.quality.statistics import Estimate

FLAGS = flags.FlagValues()
cli.define_model(FLAGS)
flags.DEFINE_string("text", None, "The file to read: text, .jsonl or .json.", flag_values=FLAGS)
flags.DEFINE_integer("window", 1024, "Tokens that are read together, behind BOS.", flag_values=FLAGS)
flags.DEFINE_integer("context", 0, "Of these, so many repeat the window before and are not scored.", flag_values=FLAGS)
flags.DEFINE_integer("windows", None, "Read no more than this many windows.", flag_values=FLAGS)
text = "Compare with this model: a GGUF file, a name or hf:OWNER/REPO/FILE, run first, as --config says."
flags.DEFINE_string("against", None, text, flag_values=FLAGS)
text = "Keep the distributions in this folder: --precision bytes for each scored token and id of the vocabulary."
flags.DEFINE_string("save_logits", None, text, flag_values=FLAGS)
flags.DEFINE_string("compare", None, "Compare with the model that --save_logits kept here.", flag_values=FLAGS)
text = "Of saved distributions: float32 has 4 bytes, float16 has 2."
flags.DEFINE_enum("precision", "float32", ["float32", "float16"], text, flag_values=FLAGS)
flags.DEFINE_string("out", None, "A folder for journal and report; the same command goes on there.", flag_values=FLAGS)
flags.DEFINE_integer("worst", 10, "How many of the worst positions to show.", flag_values=FLAGS)
cli.define_compute(FLAGS)


@dataclasses.dataclass(frozen=True)
class _Model:
    """A model's file, and the windows that it is to read."""

    settings: Settings
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    windows: list[Window]
    key: dict[str, Any]

    @property
    def name(self) -> str:
        return self.checkpoint.file.path.name


def main() -> None:
    """Run the tool as FLAGS say. Raises Ds4Error."""
    _check_flags()
    overrides = {name: FLAGS[name].value for name in ("model", "numerics", "kernels")}
    settings = Settings.load(FLAGS.config, draft="off", **overrides)
    settings.set_environment()
    from ds4jax.quality import perplexity as library

    texts = library.read_texts(Path(FLAGS.text))
    model = _open(settings, texts)
    out = FLAGS.out or FLAGS.save_logits
    folder = Path(out) if out else None
    with contextlib.ExitStack() as stack:
        compare = Path(FLAGS.compare) if FLAGS.compare else None
        if FLAGS.against is not None:
            other = _open(dataclasses.replace(settings, model=FLAGS.against), texts)
            for name, expected in model.key.items():
                if (found := other.key[name]) != expected:
                    raise Ds4Error(f"{other.name}: {name}: found {found}, expected {expected}, as in {model.name}")
            compare = folder / "against" if folder else Path(stack.enter_context(tempfile.TemporaryDirectory()))
            _read(other, compare, save=True)
        reference = None
        if compare is not None:
            reference = library.Reference.open(compare, model.key, model.windows, model.checkpoint.cfg.vocab_size)
        records = _read(model, folder, FLAGS.save_logits is not None, reference)
        found = library.summary(records, model.windows, model.tokenizer, reference)
        worst = library.worst(records, model.windows, model.tokenizer, FLAGS.worst)
        _print(model, found, worst)
        if folder is not None:
            cli.write_json(folder / "report.json", {"model": model.name, **found, "worst": worst})
        if FLAGS.against is not None and compare is not None:  # they have served
            shutil.rmtree(compare / "distributions", ignore_errors=True)


def _check_flags() -> None:
    if not FLAGS.text:
        raise ConfigError("text: found nothing, expected --text FILE")
    given = [name for name in ("against", "save_logits", "compare") if FLAGS[name].value is not None]
    if len(given) > 1:
        raise ConfigError(f"found --{given[0]} and --{given[1]}, expected one of them")
    if FLAGS.precision != "float32" and not (FLAGS.against or FLAGS.save_logits):
        raise ConfigError(f"precision: found {FLAGS.precision}, expected it with --against or --save_logits")
    if FLAGS.save_logits and FLAGS.out:
        raise ConfigError("found --save_logits and --out, expected one of them: either folder has journal and report")
    for name, least in (("window", 1), ("windows", 1), ("worst", 0)):
        if (found := FLAGS[name].value) is not None and found < least:
            raise ConfigError(f"{name}: found {found}, expected at least {least}")


def _open(settings: Settings, texts: Sequence[str]) -> _Model:
    from ds4jax.quality import perplexity as library

    checkpoint = open_checkpoint(resolve_model(settings))
    tokenizer = Tokenizer.from_metadata(checkpoint.file.metadata)
    shape = FLAGS.window, FLAGS.context
    windows = library.windows(texts, tokenizer, *shape, FLAGS.windows)
    longest = max(len(window.ids) - 1 for window in windows)  # the last token is not read
    settings = dataclasses.replace(settings, ctx=-(-longest // 128) * 128)
    return _Model(settings, checkpoint, tokenizer, windows, library.text_key(texts, tokenizer, *shape))


def _read(model: _Model, folder: Path | None, save: bool = False, reference: Reference | None = None) -> list[dict]:
    """Read the windows with a model; → their records. Journal and distributions go to the folder, if there is one."""
    from ds4jax.engine import compile_cache
    from ds4jax.engine.model_runner import ModelRunner
    from ds4jax.quality import perplexity as library
    from ds4jax.quality.journal import Journal, model_key

    compile_cache.keep_compilations()
    saved: Distributions | None = None
    if folder is not None:
        cli.make_folder(folder)
    if save and folder is not None:
        saved = library.Distributions(folder, model.checkpoint.cfg.vocab_size, FLAGS.precision)
        print(
            f"{folder}: {saved.nbytes(model.windows) / 1e9:.3f} GB of distributions in {FLAGS.precision}",
            file=sys.stderr,
        )
    runner = ModelRunner(model.checkpoint, model.settings, batch=1, progress=True)
    key = {"journal": "perplexity", **model.key, **model_key(runner)}
    key |= {"precision": FLAGS.precision} if save else {}
    key |= {"against": reference.key} if reference else {}
    records, nats = [], 0.0
    scored = sum(window.scored for window in model.windows)
    with (
        contextlib.closing(Journal(folder / library.JOURNAL if folder else None, key)) as journal,
        meter(scored, model.name, "token") as bar,
    ):
        if saved is not None:
            saved.check_disk(model.windows[len(journal.records) :])
        for record in library.read(runner, model.windows, journal, saved, reference):
            records.append(record)
            nats += sum(record["nats"])
            bar.update(len(record["nats"]))
            bar.set_postfix_str(f"{nats / bar.n:.4f} nats per token")
            cli.check_interrupt()
    del runner
    gc.collect()  # the device has room for one model
    return records


def _print(model: _Model, found: dict[str, Any], worst: Sequence[dict[str, Any]]) -> None:
    def line(name: str, estimate: Estimate, unit: str = "", factor: float = 1) -> None:
        print(f"{name:<24}{factor * estimate.value:10.4f} ± {factor * estimate.error:.4f}{unit}")

    size = f"{found['tokens']} tokens, {found['bytes']} bytes"
    print(f"{model.name}: {size} of {FLAGS.text} in {len(model.windows)} windows")
    line("perplexity", found["perplexity"])
    line("bits per byte", found["bits_per_byte"])
    if "kl" in found:
        line("perplexity, reference", found["reference_perplexity"])
        line("nats more per token", found["nats_more"])
        line("KL divergence", found["kl"], " nats per token")
        print(f"{'':<24}median {found['kl_median']:.4f}, 99 % {found['kl_99']:.4f}, largest {found['kl_max']:.4f}")
        line("same likeliest token", found["same_top"], " %", 100)
    for at in worst:
        by = f"KL {at['kl']:.3f}, {at['nats']:.3f} nats" if "kl" in at else f"{at['nats']:.3f} nats"
        print(f"{by}, text {at['text']} token {at['token']}: {at['before']}[{at['was']}] likeliest [{at['said']}]")
