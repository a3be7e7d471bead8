"""ds4jax vectors: in every layout, against transformers' logits of a golden model, and beyond its bounds."""

import json

import numpy as np
import oracle
import pytest
from kept_runners import KeptRunners

from ds4jax.chat import template as chat
from ds4jax.engine.types import Sampling
from ds4jax.errors import Ds4Error
from ds4jax.io import synthetic
from ds4jax.io.tokenizer import byte_tokenizer
from ds4jax.quality import vectors
from ds4jax.tools import cli
from ds4jax.tools import vectors as tool

CASE = oracle.CASES[0]
TOKENIZER = byte_tokenizer(CASE.cfg.vocab_size)
# All prompts have 129 to 256 tokens, so that one bucket is compiled; that takes most of the time.
PROMPT = "Which of these numbers is the largest? " + " ".join(map(str, range(70, 110)))
STRICT = ("--max_gap=0", "--min_same=1", "--max_kl=1e-6")  # what the golden's tolerance leaves: see test_transformers


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    synthetic.write_synthetic(
        folder / "m.gguf", CASE.cfg, CASE.seed, synthetic.RECIPES[CASE.recipe], TOKENIZER.to_metadata()
    )
    (folder / "c.toml").write_text(f'model = "{folder}/m.gguf"\nnumerics = "plain"\nprefill_chunk = 256\nctx = 512\n')
    return folder


@pytest.fixture(scope="module")
def runners():
    return KeptRunners()


@pytest.fixture
def run(model, runners, monkeypatch, capsys):
    """Runs the tool: (status, its lines, those of stderr). What is compiled once serves all calls."""
    runners.install(monkeypatch)

    def call(folder, *argv):
        flags = [str(folder), f"--config={model}/c.toml", *argv]
        status = cli.run(tool.main, tool.FLAGS, tool.__doc__, flags, tool.ARGUMENT)
        out, err = capsys.readouterr()
        return status, out.splitlines(), [line for line in err.splitlines() if line.startswith(("error", "beyond"))]

    return call


def dumped(tokens, steps):
    """A vector as generate --dump_logprobs writes it; steps: (id, logprob, [(id, logprob), ...])."""
    return {
        "prompt_tokens": [int(i) for i in tokens],
        "steps": [
            {"id": int(i), "text": "", "logit": 0.0, "logprob": p, "top": [[int(j), 0.0, q] for j, q in top]}
            for i, p, top in steps
        ],
    }


def likeliest(logits, n=20):
    """(id, logprob) of the likeliest tokens of (vocab,) logits."""
    wide = logits.astype(np.float64)
    logprobs = wide - np.log(np.exp(wide).sum())
    return [(int(i), float(logprobs[i])) for i in np.argsort(-logprobs)[:n]]


@pytest.fixture
def golden(tmp_path):
    """A folder of vectors made of transformers' logits; → it and the content of its files by name."""
    golden, n = oracle.Golden.load(CASE), 130
    files = {}
    for row, t in enumerate(oracle.full_positions(n)):
        if t >= 128:
            top = likeliest(golden.arrays[f"{n}/full"][row])
            files[f"one-{t}"] = dumped(golden.arrays[f"{n}/tokens"][: t + 1], [(*top[0], top)])
    tokens, prompt = golden.arrays["greedy/tokens"], oracle.GREEDY_PROMPT
    files["greedy"] = dumped(
        tokens[:prompt], [(i, 0.0, []) for i in tokens[prompt:]]
    )  # of these only the order is kept
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path, files


# ---- agreement -------------------------------------------------------------------------------------------------------
def test_transformers(run, golden):
    """The golden's logits agree to 1e-4 relative; some 1e-8 nats of divergence, and 1e-4 of a log-probability."""
    folder, files = golden
    status, out, err = run(folder, *STRICT)
    assert (status, err) == (0, []) and len(out) == 2 + len(files) == 5
    bounds = "100% of all steps the same, gap at most 0 nats, KL at most 1e-06 nats"
    assert out[-1] == f"10 of 10 steps the same; bounds: {bounds}"
    rows = {name: values for name, *values in (line.split() for line in out[1:-1])}
    assert rows["greedy"] == ["130", "8", "of", "8", "0.0000", "-", "-"]
    for t in (128, 129):
        prompt, same, _, steps, gap, kl, off = rows[f"one-{t}"]
        assert (int(prompt), same, steps, gap) == (t + 1, "1", "1", "0.0000") and float(kl) <= 1e-4 >= float(off)


def test_what_is_beyond_the_bounds(run, golden):
    folder, files = golden
    one = files["one-128"]["steps"][0]
    best, second = one["top"][:2]
    files["one-128"]["steps"][0] |= {"id": second[0], "logprob": second[2]}
    flat = [[i, 0.0, -np.log(len(one["top"]))] for i, *_ in one["top"]]
    files["one-129"]["steps"][0] |= {"logprob": flat[0][2], "top": flat}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    gap = best[2] - second[2]
    status, _, err = run(folder, f"--max_gap={gap * 0.99}", "--min_same=0.95", "--max_kl=0.1")
    assert status == 1 and len(err) == 3
    assert err[0].startswith(f"beyond bounds: one-128: gap: found {gap:.4f} nats, expected at most")
    assert "one-129: KL: found" in err[1] and "same: found 9 of 10 steps, expected at least 95% of them" in err[2]
    assert run(folder, f"--max_gap={gap * 1.01}", "--min_same=0.9", "--max_kl=9")[0] == 0


def test_agreement_of_a_step_by_hand():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal(50).astype(np.float32)
    p = rng.dirichlet(np.ones(50))
    q = np.exp(logits.astype(np.float64))
    q /= q.sum()
    listed = [3, 7, 20]
    step = vectors.Step(7, {i: float(np.log(p[i])) for i in listed})
    same, gap, kl, off = vectors.agreement(logits, step)
    coarse = [np.append(x[listed], 1 - x[listed].sum()) for x in (p, q)]
    assert kl == pytest.approx((coarse[0] * np.log(coarse[0] / coarse[1])).sum())
    assert kl is not None and 0 < kl < (p * np.log(p / q)).sum()
    assert off == pytest.approx(abs(np.log(p[7] / q[7])))
    assert gap == pytest.approx(np.log(q.max() / q[7])) and same == (q.argmax() == 7)
    with pytest.raises(Ds4Error, match="not finite"):
        vectors.agreement(np.full(50, np.nan), step)


# ---- ds4's layouts ---------------------------------------------------------------------------------------------------
def data(id):
    return TOKENIZER.id_to_bytes(id)


@pytest.fixture
def steps(run, golden, runners):
    """The model's own greedy continuation of PROMPT: ids and their (id, logprob)."""
    run(golden[0])  # so that there is a runner
    (runner,) = runners.made.values()
    tokens = chat.render_ids(TOKENIZER, [{"role": "user", "content": PROMPT}], think="off")
    assert 128 < len(tokens) < 240
    greedy, out = Sampling(temperature=0.0), []
    for i in range(3):
        sampled = runner.decode({0: out[-1][0][0]})[0] if i else runner.prefill(0, tokens, greedy)
        out.append(likeliest(sampled.logits))
    return tokens, out


def official(tokens, steps):
    def entry(i, p):
        return {"token": {"text": data(i).decode("utf-8", "replace"), "bytes": list(data(i))}, "logprob": p}

    return {
        "schema": "ds4-official-logprobs-v1",
        "id": "case",
        "prompt": PROMPT,
        "request": {"messages": [{"role": "user", "content": PROMPT}], "thinking": {"type": "disabled"}},
        "usage": {"prompt_tokens": len(tokens)},
        "steps": [entry(*top[0]) | {"top_logprobs": [entry(*x) for x in top]} for top in steps],
    }


def as_text(steps):
    """The lines of a .vec file, without prompt and end."""
    lines = []
    for i, top in enumerate(steps):
        lines += [f"step {i} {data(top[0][0]).hex()} {len(top)}", *(f"top {data(j).hex()} {p}" for j, p in top)]
    return lines


@pytest.fixture
def written(tmp_path):
    folder = tmp_path / "vectors"
    (folder / "prompts").mkdir(parents=True)
    (folder / "official").mkdir()
    (folder / "prompts" / "p.txt").write_text(PROMPT)
    return folder


def test_the_layouts_of_ds4(run, written, steps):
    tokens, steps = steps
    lines = ["# comment", "", f"case other 4096 {len(steps)} tests/somewhere/prompts/p.txt", *as_text(steps), "end"]
    told_nothing = [[(i, 0.0 if i == top[0][0] else -9999.0) for i, _ in top] for top in steps]
    lines += ["case sure 4096 1 p.txt", *as_text(told_nothing[:1]), "end", "case case 1 1 prompts/p.txt", "end"]
    (written / "p.txt").write_text(PROMPT)
    (written / "official.vec").write_text("\n".join(lines))
    (written / "official" / "case.json").write_text(json.dumps(official(tokens, steps)))
    (written / "manifest.json").write_text(json.dumps({"schema": "ds4-test-vector-manifest-v1", "prompts": []}))
    status, out, err = run(written, *STRICT)
    assert (status, err) == (0, [])
    n = str(len(tokens))
    assert [line.split() for line in out[1:-1]] == [
        ["case", n, "3", "of", "3", "0.0000", "0.0000", "0.0000"],
        ["other", n, "3", "of", "3", "0.0000", "0.0000", "0.0000"],
        ["sure", n, "1", "of", "1", "0.0000", "-", "-"],
    ]
    (written / "official" / "case.json").write_text(json.dumps(official([0], steps)))
    status, _, err = run(written, *STRICT)
    assert status == 1 and f"case: prompt: found {n} tokens, expected 1; another template or tokenizer?" in err[0]
    (vector,) = [v for v in vectors.read_vectors(written, TOKENIZER, raw=True) if v.name == "case"]
    assert vector.tokens == TOKENIZER.encode_raw(PROMPT)


def test_control_tokens_as_the_api_spells_them(written):
    end = {"token": {"text": "<｜｜end▁of▁sentence｜｜>", "bytes": None}, "logprob": -0.5}
    (written / "a.json").write_text(json.dumps(official([0], []) | {"steps": [end]}))
    (vector,) = vectors.read_vectors(written, TOKENIZER)
    assert vector.steps == (vectors.Step(TOKENIZER.eos_id, {TOKENIZER.eos_id: -0.5}),)


def test_ds4s_own_logits_are_left_out(written, caplog):
    """In ds4's folder they lie beside the reference's vectors: by rank, id and logit."""
    lines = "# ds4-local-golden-v1", "case a plain 4096 30 prompts/p.txt 1", "top 0 65 17.25"
    (written / "local-golden.vec").write_text("\n".join(lines))
    with pytest.raises(Ds4Error, match="found no vectors"):
        vectors.read_vectors(written, TOKENIZER)
    assert "local-golden.vec: left out: logits of one of ds4's builds" in caplog.text


def test_files_of_the_same_name_in_two_folders(tmp_path):
    for folder, token in (("x", 65), ("y", 66)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.json").write_text(json.dumps(dumped([token], [(65, -0.5, [])])))
    found = vectors.read_vectors(tmp_path, TOKENIZER)
    assert [(vector.name, vector.tokens) for vector in found] == [("a", [65]), ("y/a.json", [66])]


# ---- wrong input -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, content, problem",
    [
        ("a.json", "{", "a.json: not JSON"),
        ("a.json", "{}", "a.json: found the keys [], expected prompt or prompt_tokens, and steps"),
        ("a.json", '{"prompt": "x", "steps": [{"token": 1}]}', "a.json: found another layout than a vector's"),
        ("a.json", '{"prompt_tokens": [1], "steps": [{"id": 1}]}', "found another layout than a vector's: KeyError"),
        (
            "a.json",
            '{"prompt_tokens": [1e999], "steps": []}',
            "a.json prompt_tokens: found token id inf, expected 0 to",
        ),
        (
            "a.json",
            '{"prompt_tokens": [true], "steps": []}',
            "a.json prompt_tokens: found token id True, expected 0 to",
        ),
        (
            "a.json",
            '{"prompt_tokens": [1], "steps": [{"id": 1.5, "logprob": -1, "top": []}]}',
            "a.json step 0: found token id 1.5, expected 0 to 511",
        ),
        ("a.vec", "step 0 61 1", "a.vec line 1: found 'step 0 61 1', expected case"),
        ("a.vec", "case a 1 1 prompts/p.txt\nstep 1 61 1", "a.vec line 2: found"),
        ("a.vec", "case a 1 1 prompts/p.txt\nstep 0 6x 1", "a.vec line 2: found"),
        ("a.vec", "case a 1 1 prompts/p.txt\ntop 61 -1", "a.vec line 2: found"),
        (
            "a.vec",
            "case a 1 1 prompts/p.txt\nstep 0 61 2\ntop 61 -1\nend",
            "a.vec line 4: found 'end', expected 1 more of top",
        ),
        (
            "a.vec",
            "case a 1 1 prompts/p.txt\nstep 0 61 1\ntop 61 -1\ntop 62 -1\nend",
            "a.vec line 4: found 'top 62 -1', expected case, step, top and end, in this order",
        ),
        ("a.vec", "case a 1 1 prompts/p.txt\nstep 0 ff00 1", r"line 2: found no token b'\xff\x00' in the vocabulary"),
        ("a.vec", "case a 1 1 prompts/p.txt\nstep 0 61 1", "a.vec: found no end of case a"),
        ("a.vec", "case a 1 1 prompts/q.txt\nend", "q.txt: cannot be read: No such file"),
        ("none", "", "found no vectors in *.json and *.vec"),
        ("a.vec", "case a 1 1 prompts/p.txt\nend", ": a: found no steps, expected at least one"),
        (
            "a.json",
            '{"prompt_tokens": [], "steps": [{"id": 1, "logprob": 0, "top": []}]}',
            "found no tokens in the prompt, expected at least one",
        ),
        (
            "a.json",
            '{"prompt_tokens": [1], "steps": [{"id": 1, "logprob": -1, "top": [[2, 0, Infinity]]}]}',
            "a.json step 0: found the log-probability inf, expected none above 0",
        ),
        (
            "a.json",
            '{"prompt_tokens": [1], "steps": [{"id": 1, "logprob": NaN, "top": []}]}',
            "a.json step 0: found the log-probability nan, expected none above 0",
        ),
        (
            "a.vec",
            "case a 1 1 prompts/p.txt\nstep 0 61 1\ntop 61 0.5\nend",
            "a.vec case a: found the log-probability 0.5, expected none above 0",
        ),
        (
            "a.json",
            '{"prompt_tokens": [512], "steps": [{"id": 1, "logprob": 0, "top": []}]}',
            "a.json prompt_tokens: found token id 512, expected 0 to 511",
        ),
    ],
)
def test_wrong_vectors_are_one_line(run, written, monkeypatch, name, content, problem):
    (written / name).write_text(content)
    status, _, err = run(written)
    assert status == 1 and len(err) == 1 and err[0].startswith("error: ") and problem in err[0]


def test_wrong_flags_are_one_line(run, tmp_path, capsys):
    assert "x: found no such folder" in run(tmp_path / "x")[2][0]
    assert "min_same: found 1.5, expected a number from 0 to 1" in run(tmp_path, "--min_same=1.5")[2][0]
    assert "max_gap: found -1.0, expected" in run(tmp_path, "--max_gap=-1")[2][0]
    assert "found a second argument 'b', expected one" in run(tmp_path, "b")[2][0]
    assert cli.run(tool.main, tool.FLAGS, None, [], tool.ARGUMENT) == 1
    assert "found no folder, expected ds4jax vectors DIR" in capsys.readouterr().err
