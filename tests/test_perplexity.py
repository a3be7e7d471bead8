"""ds4jax perplexity: likelihoods against the engine's, divergences against NumPy, interruptions, wrong input."""

import contextlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
from gguf import GGUFReader
from small import CFG

from ds4jax.engine import model_runner
from ds4jax.engine.engine import Engine
from ds4jax.engine.model_runner import ModelRunner
from ds4jax.engine.types import Request, Sampling, Scored
from ds4jax.errors import Ds4Error
from ds4jax.io import synthetic, tokenizer
from ds4jax.quality import perplexity as library
from ds4jax.quality.journal import Journal
from ds4jax.settings import Settings
from ds4jax.tools import cli, perplexity

TOKENIZER = tokenizer.byte_tokenizer()
TEXTS = [
    "The question is in the context, and the answer was there: äöü.\n" * 3,
    "",
    "def forward(params):\n    return 1\n",
]
WINDOW = 40


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A model, one that differs a little, and one of another vocabulary; and the texts."""
    folder = tmp_path_factory.mktemp("model")
    other = tokenizer._lay_out([("t", "h")], CFG.vocab_size)
    for name, tok in (("a", TOKENIZER), ("b", TOKENIZER), ("other", other)):
        synthetic.write_synthetic(folder / f"{name}.gguf", CFG, 3, synthetic.RECIPES["q8"], tok.to_metadata())
    norm = next(t for t in GGUFReader(folder / "b.gguf", "r+").tensors if t.name == "output_norm.weight")
    assert isinstance(norm.data, np.memmap)
    norm.data[:] *= np.random.default_rng(0).uniform(0.6, 1.4, norm.data.shape).astype(np.float32)
    norm.data.flush()
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def runners(paths):
    settings = Settings("x", ctx=128, numerics="plain", prefill_chunk=32)
    return {
        name: ModelRunner.load(Settings(**{**settings.__dict__, "model": str(paths[name])}), batch=1) for name in "ab"
    }


@pytest.fixture(scope="module")
def windows():
    return library.windows(TEXTS, TOKENIZER, WINDOW, 8)


@pytest.fixture
def run(paths, capsys, tmp_path):
    """Runs the tool on the texts with model a: (status, stdout, stderr without progress)."""
    config = tmp_path / "c.toml"
    config.write_text(f'model = "{paths["a"]}"\nnumerics = "plain"\nprefill_chunk = 32\n')

    def call(*argv, text=paths["texts"]):
        flags = [f"--config={config}", f"--text={text}", f"--window={WINDOW}", "--context=8", *map(str, argv)]
        status = cli.run(perplexity.main, perplexity.FLAGS, perplexity.__doc__, flags)
        out, err = capsys.readouterr()
        return status, out, [line for line in err.splitlines() if line and "B/s" not in line and "token/s" not in line]

    return call


# ---- windows ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("length, context", [(40, 0), (40, 8), (1, 0), (10_000, 3)])
def test_every_token_is_scored_once(length, context):
    windows = library.windows(TEXTS, TOKENIZER, length, context)
    for number, text in enumerate(TEXTS):
        ids = TOKENIZER.encode_text(text)
        mine = [window for window in windows if window.text == number]
        assert [i for window in mine for i in window.ids[-window.scored :]] == ids
        for window in mine:
            assert window.ids[0] == TOKENIZER.bos_id and len(window.ids) <= length + 1
            before = len(window.ids) - 1 - window.scored
            assert before == (context if window.start else 0)
            assert list(window.ids[1:]) == ids[window.start - before : window.start + window.scored]


# ---- numbers ---------------------------------------------------------------------------------------------------------
def test_the_costs_are_the_log_probabilities_of_the_prompt(runners, windows):
    records = list(library.read(runners["a"], windows, Journal(None, {})))
    engine = Engine(runners["a"])
    assert len(records) == len(windows) > 3
    for record, window in zip(records, windows, strict=True):
        events = []
        engine.add(Request(window.ids, 0, Sampling(temperature=0.0), prompt_logprobs=1), events.append)
        while len(engine):
            engine.step()
        tokens = [token for event in events if isinstance(event, Scored) for token in event.tokens][-window.scored :]
        # Sums in another order: the engine pads its chunks to other lengths.
        np.testing.assert_allclose(record["nats"], [-np.float64(token.logprob) for token in tokens], atol=2e-5)
        assert record["top"] == [token.top[0][0] for token in tokens]


def by_hand(runners, windows):
    """nats, kl of b from a, likeliest of a and b, in float64 from whole logits."""
    found = []
    for window in windows:
        p, q = (
            x - np.log(np.exp(x).sum(-1, keepdims=True))
            for x in (runners[name].logits(window.ids[:-1]).astype(np.float64) for name in "ab")
        )
        nats = -np.take_along_axis(q, np.array(window.ids[1:])[:, None], 1)[:, 0]
        rows = nats, (np.exp(p) * (p - q)).sum(-1), p.argmax(-1), q.argmax(-1)
        found.append(np.stack([row[-window.scored :] for row in rows]))
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-6), ("float16", 1e-3)])
def test_divergence_from_a_saved_model(runners, windows, tmp_path, precision, tolerance):
    saved = library.Distributions(tmp_path, CFG.vocab_size, precision)
    with contextlib.closing(Journal(tmp_path / library.JOURNAL, {"text": "t"})) as journal:
        list(library.read(runners["a"], windows, journal, saved))
    size = sum(path.stat().st_size for path in (tmp_path / "distributions").iterdir())
    assert size == saved.nbytes(windows) + 128 * len(windows)  # the head of each file

    reference = library.Reference.open(tmp_path, {"text": "t"}, windows, CFG.vocab_size)
    records = list(library.read(runners["b"], windows, Journal(None, {}), None, reference))
    nats, kl, top_a, top_b = by_hand(runners, windows)
    np.testing.assert_allclose(library._all(records, "nats"), nats, atol=1e-5)
    np.testing.assert_allclose(library._all(records, "kl"), kl, atol=tolerance)
    assert kl.mean() > 0.01  # there is something to measure

    found = library.summary(records, windows, TOKENIZER, reference)
    n, size = len(nats), sum(len(text.encode()) for text in TEXTS)
    assert (found["tokens"], found["bytes"]) == (n, size)
    error = nats.std(ddof=1) / math.sqrt(n)
    assert found["perplexity"] == pytest.approx((math.exp(nats.mean()), math.exp(nats.mean()) * error), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx((nats.sum() / math.log(2) / size, n * error / math.log(2) / size))
    assert found["kl"] == pytest.approx((kl.mean(), kl.std(ddof=1) / math.sqrt(n)), rel=tolerance * 100)
    assert found["kl_median"] == pytest.approx(np.median(kl), abs=tolerance)
    assert found["kl_99"] == pytest.approx(np.quantile(kl, 0.99), abs=tolerance)
    assert found["kl_max"] == pytest.approx(kl.max(), abs=tolerance)
    same = top_a == top_b
    assert 0 < same.mean() < 1 and found["same_top"].value == same.mean()

    (worst,) = library.worst(records, windows, TOKENIZER, 1)
    ids = TOKENIZER.encode_text(TEXTS[worst["text"]])
    at = worst["token"]
    assert worst["kl"] == found["kl_max"] and worst["was"] == TOKENIZER.piece(ids[at])
    assert worst["before"] in {TOKENIZER.pieces(ids[i:at]) for i in range(at)}


def report(folder):
    return json.loads((folder / "report.json").read_text())


def test_two_runs_are_one_comparison(run, paths, tmp_path):
    status, out, _ = run(f"--against={paths['b']}", f"--out={tmp_path}/one")
    assert status == 0 and re.search(r"^KL divergence +\d+\.\d+ ± \d+\.\d+ nats per token$", out, re.M)
    assert out.count("likeliest [") == 10 and not list(tmp_path.glob("one/against/distributions"))
    assert run(f"--model={paths['b']}", f"--save_logits={tmp_path}/b")[0] == 0
    assert run(f"--compare={tmp_path}/b", f"--out={tmp_path}/two")[:2] == (0, out)
    assert report(tmp_path / "one") == report(tmp_path / "two")


def test_the_same_model_is_the_same(run, paths):
    status, out, _ = run(f"--against={paths['a']}", "--worst=0")
    assert status == 0 and "KL divergence               0.0000 ± 0.0000" in out
    assert "same likeliest token      100.0000 ± 0.0000 %" in out


# ---- interruptions ---------------------------------------------------------------------------------------------------
@pytest.fixture
def counted(monkeypatch):
    """Ctrl-C in the reading of the third window from now on; → the windows read, by their ids."""
    read, calls = ModelRunner.logit_blocks, []

    def blocks(self, tokens):
        calls.append(tokens)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(self, tokens)

    monkeypatch.setattr(model_runner.ModelRunner, "logit_blocks", blocks)
    return calls


def test_an_interrupted_run_goes_on(run, paths, tmp_path, counted):
    flags = f"--model={paths['b']}", f"--save_logits={tmp_path}/b"
    assert run(*flags)[0] == 130
    status, out, _ = run(*flags)
    expected = [window.ids[:-1] for window in library.windows(TEXTS, TOKENIZER, WINDOW, 8)]
    assert status == 0 and counted == [*expected[:3], *expected[2:]]
    assert run(f"--model={paths['b']}", f"--save_logits={tmp_path}/whole")[:2] == (0, out)
    assert report(tmp_path / "b") == report(tmp_path / "whole")
    assert not list(tmp_path.glob("b/distributions/*.tmp"))


def test_a_run_can_be_extended_and_its_last_line_be_cut(run, tmp_path):
    flags = (f"--out={tmp_path}/out", "--worst=1")
    assert run(*flags, "--windows=2")[0] == 0
    journal = tmp_path / "out" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    journal.write_bytes(b"".join(lines)[:-20])
    status, out, _ = run(*flags)
    assert (status, out) == run("--worst=1")[:2]
    assert journal.read_bytes().startswith(b"".join(lines))

    without_top = json.dumps({"window": 0, "nats": json.loads(lines[1])["nats"]}).encode()
    for damage, problem in (
        (b"{}", "another record for window 0"),
        (b'{"window": 0, "nats": 5}', "another record for window 0"),
        (without_top, "another record for window 0"),
        (b"[1]", "line 2: found [1], expected an object"),
    ):
        journal.write_bytes(lines[0] + damage + b"\n")
        status, out, err = run(*flags)
        assert (status, out) == (1, "") and problem in err[-1]


def test_two_processes_do_not_share_a_journal(run, tmp_path):
    """The second is refused while the first is at work, and its line being written is left alone; later it goes on."""
    path = tmp_path / "out" / library.JOURNAL
    hold = (
        "import sys; from pathlib import Path; from ds4jax.quality.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]), {}); print('held', flush=True); sys.stdin.read()"
    )
    path.parent.mkdir()
    first = subprocess.Popen(
        [sys.executable, "-c", hold, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    assert first.stdin and first.stdout and first.stdout.readline() == "held\n"
    path.write_text('{"a": 1}\n{"cut')
    status, out, err = run(f"--out={tmp_path}/out")
    assert (status, out) == (1, "") and f"{path}: in use by another process; wait for its end" in err[-1]
    assert Journal.read(path).key == {"a": 1} and path.read_text() == '{"a": 1}\n{"cut'
    first.communicate()
    path.write_text("")
    assert run(f"--out={tmp_path}/out")[0] == 0


def test_another_runs_journal_is_refused(run, paths, tmp_path):
    assert run(f"--out={tmp_path}/out")[0] == 0
    other = tmp_path / "other.txt"
    other.write_text("something else")
    for flag, name in (
        (f"--model={paths['b']}", "content"),
        ("--window=30", "window"),
        ("--numerics=official", "numerics"),
        (f"--text={other}", "text"),
        (f"--against={paths['b']}", "against"),
    ):
        status, _, err = run(f"--out={tmp_path}/out", flag)
        assert status == 1 and f"out/journal.jsonl: {name}: found" in err[-1], flag
        assert "another run's" in err[-1]


def test_a_comparison_needs_a_whole_run_of_the_same_tokens(run, tmp_path):
    assert run(f"--save_logits={tmp_path}/a", "--windows=2")[0] == 0
    compare = f"--compare={tmp_path}/a"
    assert run(compare, "--windows=2")[0] == 0
    assert "found 2 windows, expected" in run(compare)[2][-1]
    assert "context: found 8, expected 9, as here" in run(compare, "--windows=2", "--context=9")[2][-1]
    journal = tmp_path / "a" / library.JOURNAL
    lines = journal.read_text()
    journal.write_text(lines.replace('"window": 1', '"window": 2'))
    assert f"error: {journal}: found another record for window 1" in run(compare, "--windows=2")[2][-1]
    journal.write_text(lines)
    saved = tmp_path / "a" / "distributions" / "000001.npy"
    whole = np.load(saved)
    for cut in (b"", b"\x93NUMPY", saved.read_bytes()[:-1]):
        saved.write_bytes(cut)
        assert "000001.npy: not a file of distributions" in run(compare, "--windows=2")[2][-1]
    np.save(saved, np.zeros((2, 3), np.float32))
    assert "000001.npy: found float32 (2, 3), expected" in run(compare, "--windows=2")[2][-1]
    np.save(saved, np.where(whole == 0, np.nan, whole))
    assert "a: found numbers in window 1 that are not finite" in run(compare, "--windows=2")[2][-1]
    saved.unlink()
    assert "000001.npy: cannot be read: No such file" in run(compare, "--windows=2")[2][-1]


# ---- wrong input -----------------------------------------------------------------------------------------------------
def test_a_full_disk_is_noticed_before(run, tmp_path, monkeypatch):
    usage = library.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(library.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(ModelRunner, "logit_blocks", lambda self, tokens: pytest.fail("it was read"))
    status, _, err = run(f"--save_logits={tmp_path}/a")
    assert status == 1 and "found 1e-06 GB free, expected " in err[-1] and " GB for the distributions of" in err[-1]
    assert "over 384 (float32); --precision float16 takes half" in err[-1]


@pytest.mark.parametrize(
    "name, content, problem",
    [
        ("t.txt", b"", "found no text"),
        ("t.txt", b"a", "text: found 1 tokens, expected at least 2"),
        ("t.txt", b"caf\xe9", "found 0xe9 at byte 3, expected UTF-8"),
        ("t.jsonl", b'{"text": "a"}\n\n{"text": 1}', "t.jsonl line 3: found {'text': 1}, expected an object with text"),
        ("t.jsonl", b'{"text": "a"}\n{', "t.jsonl line 2: not JSON"),
        ("t.jsonl", b"[]", "t.jsonl line 1: found [], expected an object"),
        ("t.jsonl", b'{"text": "\\ud800"}', "t.jsonl line 1: not JSON: 'utf-8' codec can't encode"),
        ("t.json", b"{}", "t.json: found {}, expected a list"),
        ("t.json", b"{", "t.json: not JSON"),
        ("t.json", b'["a"]', "t.json [0]: found 'a', expected an object with text"),
        ("none", None, "none: cannot be read: No such file"),
    ],
)
def test_wrong_texts_are_one_line(run, tmp_path, name, content, problem):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    status, out, err = run(text=tmp_path / name)
    assert (status, out) == (1, "") and len(err) == 1 and err[0].startswith("error: ") and problem in err[0]


@pytest.mark.parametrize(
    "argv, problem",
    [
        (["--text="], "text: found nothing, expected --text FILE"),
        (["--against=a", "--compare=b"], "found --against and --compare, expected one of them"),
        (["--save_logits=a", "--out=b"], "found --save_logits and --out"),
        (["--window=0"], "window: found 0, expected at least 1"),
        (["--context=40"], "context: found 40, expected 0 to 39"),
        (["--window=1", "--context=0", "--windows=1"], "text: found 1 tokens, expected at least 2"),
        (["--windows=0"], "windows: found 0, expected at least 1"),
        (["--against=/none"], "model /none: no such file"),
        (["--compare=/none"], "/none/journal.jsonl: cannot be read: No such file"),
        (["--out=/dev/null/x"], "/dev/null/x: cannot be made a folder: Not a directory"),
        (["--precision=int8"], "float32"),
        (["--precision=float16"], "precision: found float16, expected it with --against or --save_logits"),
        (
            ["--kernels=pallas,mhc=xla", "--numerics=official"],
            "expected xla, or pallas_interpret to test",
        ),
    ],
)
def test_wrong_flags_are_one_line(run, argv, problem):
    status, out, err = run(*argv)
    assert (status, out) == (1, "") and err[-1].startswith("error: ") and problem in err[-1]
    assert sum(line.startswith("error") for line in err) == 1


def test_models_of_two_vocabularies_are_not_compared(run, paths):
    status, _, err = run(f"--against={paths['other']}")
    assert status == 1 and len(err) == 1
    assert "other.gguf: vocabulary: found 384 tokens, " in err[0] and "as in a.gguf" in err[0]


def test_a_perplexity_beyond_float64():
    assert library.perplexity(np.full(2, 1000.0)).value == math.inf


def test_logits_that_are_not_finite(runners, windows, monkeypatch):
    def blocks(self, tokens):
        yield np.full((64, CFG.vocab_size), np.nan, np.float32), len(tokens)

    monkeypatch.setattr(ModelRunner, "logit_blocks", blocks)
    with pytest.raises(Ds4Error, match="window 0: found logits that are not finite"):
        list(library.read(runners["a"], windows, Journal(None, {})))


def test_likelihoods_below_all_bounds(run, monkeypatch):
    def blocks(self, tokens):
        yield np.eye(1, CFG.vocab_size, dtype=np.float32).repeat(64, 0) * 1e30, len(tokens)

    monkeypatch.setattr(ModelRunner, "logit_blocks", blocks)
    status, out, _ = run("--worst=0")
    assert status == 0 and re.search(r"^perplexity +inf ", out, re.M)


def test_a_window_larger_than_the_texts(run):
    status, out, _ = run("--window=1000000000", "--windows=1", "--worst=0")
    assert status == 0 and " in 1 windows\n" in out


def test_what_was_read_before_is_shown_in_whole_characters():
    text = "äöü"
    (window,) = library.windows([text], TOKENIZER, WINDOW)
    nats = [0.0] * 5 + [1.0]
    (worst,) = library.worst([{"window": 0, "nats": nats, "top": [65] * 6}], [window], TOKENIZER, 1)
    assert (worst["before"], worst["was"], worst["said"]) == ("äö\\xc3", "\\xbc", "A")


# ---- what the cards and transformers say -----------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "tiny_q2"])
def test_bits_per_byte_are_the_cards(name, tmp_path, capsys):
    text = Path(__file__).parent / "tiny" / "heldout.json"
    flags = [f"--config={name}", f"--text={text}", f"--out={tmp_path}/out"]
    assert cli.run(perplexity.main, perplexity.FLAGS, None, flags) == 0
    card = (Path(library.__file__).parent.parent / "models" / f"{name}.md").read_text()
    (columns,) = re.findall(r"^\|  \| (.*) \|$", card, re.M)
    (values,) = re.findall(r"^\| bits per byte, held-out text \| (.*) \|$", card, re.M)
    expected = float(dict(zip(columns.split(" | "), values.split(" | "), strict=True))[name])
    # The cards leave out what follows the last whole window of a text if that is a single token.
    assert report(tmp_path / "out")["bits_per_byte"][0] == pytest.approx(expected, abs=2e-4)


@pytest.mark.slow
def test_divergence_from_transformers(tmp_path):
    """Of tiny_q2, computed here, from tiny as transformers computed it in float32: where goldens have all logits."""
    golden = oracle.Golden.load(next(case for case in oracle.CASES if case.name == "tiny"))
    n = 130
    ids = tuple(golden.arrays[f"{n}/tokens"].tolist())
    windows = [library.Window((*ids, 0), n, 0, 0)]
    settings = Settings("tiny", ctx=256, numerics="plain")
    saved = library.Distributions(tmp_path, 2048)
    with contextlib.closing(Journal(tmp_path / library.JOURNAL, {"x": 1})) as journal:
        list(library.read(ModelRunner.load(settings), windows, journal, saved))
    reference = library.Reference.open(tmp_path, {}, windows, 2048)
    runner = ModelRunner.load(Settings("tiny_q2", ctx=256, numerics="plain"))
    (record,) = library.read(runner, windows, Journal(None, {}), None, reference)
    at = oracle.full_positions(n)
    p, q = (
        x - np.log(np.exp(x).sum(-1, keepdims=True))
        for x in (golden.arrays[f"{n}/full"].astype(np.float64), runner.logits(ids)[at].astype(np.float64))
    )
    expected = (np.exp(p) * (p - q)).sum(-1)
    assert expected.mean() > 0.05
    np.testing.assert_allclose(np.array(record["kl"])[at], expected, atol=1e-4)
