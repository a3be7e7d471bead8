"""ds4jax eval: what counts as right, files, reports, interruptions."""

import json
import math
import signal
from pathlib import Path

import numpy as np
import pytest
from kept_runners import KeptRunners
from small import write

from ds4jax.engine import model_runner
from ds4jax.errors import Ds4Error
from ds4jax.quality import tasks
from ds4jax.tools import cli
from ds4jax.tools import eval as tool

RUNNER = model_runner.ModelRunner


def question(folder, **line):
    path = folder / "q.jsonl"
    path.write_text(json.dumps({"prompt": "?"} | line))
    (found,) = tasks.read_questions(path)
    return found


# ---- what is right ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "line, right, wrong",
    [
        ({"exact": "Paris"}, ["Paris", " Paris\n"], ["paris", "It is Paris", ""]),
        ({"exact": ["4", "four"]}, ["4", "four "], ["44", "five"]),
        ({"regex": r"(?i)\bparis\b"}, ["It is PARIS.", "paris"], ["Parish", ""]),
        ({"regex": r"= *(\d+)", "exact": "12"}, ["3·4 = 12", "2 = 2, no, = 12"], ["= 12, no, = 13", "12", "= 120"]),
        ({"regex": r"\d+", "exact": ["7"]}, ["first 6, then 7"], ["7 then 8", "none"]),
        (
            {"choice": "B"},
            ["B", "The answer is (B).", "**Answer: B**", "Answer is B, not A", "A or B? B"],
            ["A", "Before", "", "The answer is A, not B", "b"],
        ),
        ({"choice": "C"}, ["C. I think so", "I'm for (C), I’m sure", "I say: C"], ["C or I", "I", "C, no, I is right"]),
        ({"choice": "I"}, ["I", "I.", "I is right", "(I)"], ["I think it is clear"]),
        ({"choice": "B", "choices": ["x", "y"]}, ["B. y", "B, unlike D"], ["A", "C"]),
    ],
)
def test_right_answers(tmp_path, line, right, wrong):
    asked = question(tmp_path, **line)
    assert [answer for answer in right if not asked.right(answer)] == []
    assert [answer for answer in wrong if asked.right(answer)] == []


def test_choices_are_shown(tmp_path):
    asked = question(tmp_path, prompt="Which?", choices=["one", "two"], choice="B", system="Be brief.")
    assert [message["content"] for message in asked.messages] == ["Be brief.", "Which?\n\nA. one\nB. two"]
    assert question(tmp_path, exact="x").task == "q"


@pytest.mark.parametrize(
    "line, problem",
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: found [1], expected an object"),
        ({"prompt": "x"}, "line 2: expected exact, regex, both of these, or choice"),
        ({"prompt": "x", "exact": "a", "choice": "A"}, "expected exact, regex, both of these, or choice"),
        ({"exact": "a"}, "expected either prompt, perhaps with system and choices, or messages"),
        ({"prompt": "x", "messages": [], "exact": "a"}, "expected either prompt"),
        ({"messages": [{"role": "robot"}], "exact": "a"}, "messages[0].role: found 'robot'"),
        ({"prompt": "x", "regex": "("}, "regex: found '(', which does not compile"),
        ({"prompt": "x", "answer": "a"}, "found the key 'answer', expected some of prompt"),
        ({"prompt": 1, "exact": "a"}, "prompt: found 1, expected a string"),
        ({"prompt": "x", "exact": []}, "exact: found [], expected strings"),
        ({"prompt": "x", "exact": [1]}, "exact: found [1], expected strings"),
        ({"prompt": "x", "exact": " "}, "exact: found [' '], expected strings that are not empty"),
        ({"prompt": "x", "exact": "a", "id": 1}, "id: found 1, expected another than that of"),
        ({"prompt": "x", "choices": ["a"], "choice": "B"}, "choice: found 'B', expected a letter from A to A"),
        ({"prompt": "x", "choices": ["a"] * 27, "choice": "B"}, "choices: found 27, expected at most 26"),
        ({"prompt": "x", "exact": "a", "task": "\ud800"}, "not JSON: 'utf-8' codec can't encode character"),
        ({"prompt": "x", "exact": "a", "samples": 0}, "samples: found 0, expected at least 1"),
        ({"prompt": "x", "exact": "a", "max_tokens": True}, "max_tokens: found True, expected a whole number"),
        ({"prompt": "x", "exact": "a", "think": "hard"}, "think: found 'hard', expected one of off"),
    ],
)
def test_wrong_lines_are_named(tmp_path, line, problem):
    path = tmp_path / "q.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    path.write_text(json.dumps({"prompt": "x", "exact": "a"}) + "\n" + text)
    with pytest.raises(Ds4Error) as error:
        tasks.read_questions(path)
    assert str(error.value).startswith(f"{path} line 2: ") and problem in str(error.value)


def test_a_regex_without_end(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tasks, "SECONDS", 0.1)
    asked = question(tmp_path, regex="(a+)+$", id="slow")
    assert tasks._grade(asked, "aaa") and not tasks._grade(asked, "a" * 40 + "b")
    assert caplog.messages == ["question slow: found no end of the regex in 0.1 s; the answer counts as wrong"]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0) and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_pass_at_1_by_hand():
    right = {0: [1, 1, 0, 0], 1: [1, 1, 1, 1], 2: [0]}
    records = [
        {"question": q, "task": "t" if q else "u", "right": bool(r), "finish_reason": "stop", "tokens": 3}
        for q, results in right.items()
        for r in results
    ]
    parts = [0.5, 1.0, 0.0]
    found = tasks.report(records)
    assert found.keys() == {"t", "u", "all"}
    assert found["all"] | {"pass_at_1": 0} == {"questions": 3, "answers": 9, "pass_at_1": 0, "cut": 0, "tokens": 27}
    assert found["all"]["pass_at_1"] == pytest.approx((0.5, np.std(parts, ddof=1) / math.sqrt(3)))
    # A single question: over its samples.
    assert found["u"]["pass_at_1"] == pytest.approx((0.5, np.std(right[0], ddof=1) / math.sqrt(4)))


# ---- the tool, on a small model --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    path = write(folder)
    lines = [
        {"prompt": "How many?", "regex": "", "task": "easy"},
        {"prompt": "Say so.", "exact": "nobody says this", "task": "hard", "id": "h", "max_tokens": 2},
        {"messages": [{"role": "user", "content": "Well?"}], "regex": ".", "task": "easy", "think": "on", "samples": 3},
    ]
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (folder / "c.toml").write_text(f'model = "{path}"\nnumerics = "plain"\nctx = 128\nbatch = 2\nmax_tokens = 4\n')
    return folder


@pytest.fixture(scope="module")
def runners():
    return KeptRunners()


@pytest.fixture
def run(model, runners, monkeypatch, capsys):
    """Runs the tool: (status, stdout, the last line of stderr). What is compiled once serves all calls."""
    runners.install(monkeypatch)

    def call(*argv):
        flags = [f"--config={model}/c.toml", f"--tasks={model}/q.jsonl", "--think=off", *map(str, argv)]
        status = cli.run(tool.main, tool.FLAGS, tool.__doc__, flags)
        out, err = capsys.readouterr()
        return status, out, err.splitlines()[-1]

    return call


def transcript(folder):
    return [json.loads(line) for line in (folder / "transcript.jsonl").read_text().splitlines()][1:]


def test_a_report_and_its_transcript(run, tmp_path):
    status, out, note = run(f"--out={tmp_path}/out", "--samples=2")
    assert status == 0 and "answers were cut off" in note
    assert [line.split()[:3] for line in out.splitlines()[1:]] == [
        ["easy", "2", "5"],
        ["hard", "1", "2"],
        ["all", "3", "7"],
    ]
    assert "0.0 ± 0.0 %" in out.splitlines()[2]
    records = transcript(tmp_path / "out")
    assert sorted((r["question"], r["sample"]) for r in records) == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (2, 0),
        (2, 1),
        (2, 2),
    ]
    for record in records:
        limit, cut = 2 if record["id"] == "h" else 4, record["finish_reason"] == "length"
        assert record["tokens"] == limit if cut else record["tokens"] <= limit
        assert bool(record["thought"]) == (record["question"] == 2)  # which was cut off in its thought
        assert record["right"] == (record["question"] == 0)
    texts = {record["text"] for record in records if record["question"] == 0}
    assert len(texts) == 2  # each sample has a seed of its own
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["tasks"]["easy"]["pass_at_1"][0] == 0.5 and report["tasks"]["all"]["cut"] > 3


def test_an_interrupted_run_goes_on_and_takes_more_samples(run, tmp_path, monkeypatch):
    decode, calls = RUNNER.decode_block, []

    def step(self, tokens, n):
        calls.append(n)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return decode(self, tokens, n)

    monkeypatch.setattr(model_runner, "BLOCK_SECONDS", 1e-9)
    monkeypatch.setattr(RUNNER, "decode_block", step)
    flags = f"--out={tmp_path}/out", "--seed=5"
    assert run(*flags)[0] == 130
    kept = transcript(tmp_path / "out")
    assert 0 < len(kept) < 5
    status, _, _ = run(*flags, "--samples=2")
    records = transcript(tmp_path / "out")
    assert status == 0 and records[: len(kept)] == kept and len(records) == 7
    assert run(f"--out={tmp_path}/whole", "--seed=5", "--samples=2")[0] == 0

    def texts(records):
        return {(r["question"], r["sample"]): r["text"] for r in records}

    assert texts(records) == texts(transcript(tmp_path / "whole"))
    before = len(calls)
    assert run(*flags, "--samples=2")[0] == 0 and len(calls) == before  # there is nothing left to do
    status, _, err = run(*flags, "--temperature=0.5")
    assert status == 1 and "transcript.jsonl: temperature: found 1.0, expected 0.5" in err
    with open(tmp_path / "out" / "transcript.jsonl", "a") as file:
        file.write('{"question": 1}\n')
    assert "transcript.jsonl: found the record {'question': 1}; a damaged journal?" in run(*flags)[2]


@pytest.mark.parametrize(
    "argv, problem",
    [
        (["--tasks="], "tasks: found nothing, expected --tasks FILE"),
        (["--tasks=/none"], "/none: cannot be read: No such file"),
        (["--tasks=/dev/null"], "/dev/null: found no questions"),
        (["--samples=0"], "samples: found 0, expected at least 1"),
        (["--samples=2", "--temperature=0"], "samples: found 2 with temperature 0"),
        (["--ctx=3"], "question 1: found"),
        (["--out=/dev/null/x"], "/dev/null/x: cannot be made a folder"),
        (["--top_p=2"], "top_p: found 2.0"),
    ],
)
def test_wrong_flags_are_one_line(run, argv, problem):
    status, out, err = run(*argv)
    assert (status, out) == (1, "") and err.startswith("error: ") and problem in err


@pytest.mark.slow
def test_the_questions_of_the_card(tmp_path, capsys):
    """All forty, greedily and with thinking: the card says 100 %."""
    questions = json.loads((Path(__file__).parent / "tiny" / "questions.json").read_text())
    lines = [{"prompt": q["question"], "regex": rf"(?i)(?<!\w){q['answer']}(?!\w)"} for q in questions]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = ["--config=tiny_q2", f"--tasks={tmp_path}/q.jsonl", "--temperature=0", "--ctx=512", "--batch=20"]
    assert cli.run(tool.main, tool.FLAGS, None, [*flags, "--max_tokens=200", f"--out={tmp_path}"]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["tasks"]["q"]["pass_at_1"][0] == 1.0
