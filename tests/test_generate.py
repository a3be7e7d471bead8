"""ds4jax.tools.generate: its flags, streams, files and exits, on one small model."""

import io
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from kept_runners import KeptRunners
from small import CFG

from ds4jax import paths
from ds4jax.chat import template as chat
from ds4jax.chat.parser import TextDelta, ThinkingDelta
from ds4jax.engine import model_runner as engine
from ds4jax.io import synthetic
from ds4jax.io.tokenizer import Special, byte_tokenizer
from ds4jax.tools import cli, generate

# Prompts have 9 to 16 tokens throughout, so that one bucket is compiled; that takes most of the time.
TOKENIZER = byte_tokenizer()
RUNNER = engine.ModelRunner


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small.gguf"
    synthetic.write_synthetic(path, CFG, 3, synthetic.RECIPES["q8"], TOKENIZER.to_metadata())
    return str(path)


@pytest.fixture(scope="module")
def runners():
    return KeptRunners()


@pytest.fixture
def run(model, runners, monkeypatch, capsys):
    """Runs the tool on the small model: (exit status, stdout, stderr). What is compiled once serves all calls."""
    runners.install(monkeypatch)

    def call(*argv, model=model):
        flags = [f"--model={model}", "--numerics=plain", "--ctx=128", "--think=off", *argv]
        status = cli.run(generate.main, generate.FLAGS, generate.__doc__, flags, generate.ARGUMENT)
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def dumped(run, tmp_path):
    """Runs the tool greedily and returns what --dump_logprobs wrote, and stdout."""

    def call(*argv):
        path = tmp_path / "dump.json"
        status, out, _ = run("--temperature=0", f"--dump_logprobs={path}", *argv)
        assert status == 0
        return json.loads(path.read_text()), out

    return call


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C when the third decode step from now on begins, before the second one is read; steps are of one token."""
    decode, calls = RUNNER.decode_block, []

    def step(self, tokens, n):
        assert n == 1
        calls.append(tokens)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(self, tokens, n)

    monkeypatch.setattr(engine, "BLOCK_SECONDS", 1e-9)
    monkeypatch.setattr(RUNNER, "decode_block", step)


# ---- one prompt ------------------------------------------------------------------------------------------------------
def test_the_stream_is_the_text_of_the_tokens(dumped):
    dump, out = dumped("--prompt=Hello", "--max_tokens=20")
    ids = [step["id"] for step in dump["steps"]]
    assert len(ids) == 20
    assert out == TOKENIZER.decode(ids) + "\n"
    assert out.startswith("".join(step["text"] for step in dump["steps"]))  # but for what the end cut off


def test_thoughts_are_no_part_of_the_answer(run, dumped, monkeypatch, tmp_path):
    flags = "--think=on", "--temperature=0", "--max_tokens=6", "Hello"
    status, out, err = run(*flags)
    assert (status, out) == (0, "\n") and "note: the answer ended within its thought" in err and "seed" not in err
    ids = [step["id"] for step in dumped(*flags)[0]["steps"]]
    closing = byte_tokenizer()
    closing._control[Special.THINK_CLOSE.value] = ids[2]  # what the random model says third
    monkeypatch.setattr(generate.Tokenizer, "from_metadata", lambda _: closing)
    thought, answer = TOKENIZER.decode(ids[:2]), TOKENIZER.decode(ids[3:]).strip()
    assert len({*ids[:3]}) == 3 and answer
    assert run(*flags)[1].strip() == answer and run(*flags)[2].startswith("prefill")
    status, out, err = run(*flags, "--show-thinking")
    assert out.strip() == answer and err.startswith(thought + "\n\n") and "</think>" not in out + err
    with monkeypatch.context() as terminal:
        for name in "ds4jax.tools.generate.is_terminal", "ds4jax.terminal.has_colours":
            terminal.setattr(name, lambda _: True)
        shown = run(*flags)[2]
    assert "\x1b[2m" in shown and re.sub(r"\x1b\[\dm", "", shown).startswith(thought + "\n\n")
    _, (result,), _ = job(run, tmp_path, [{"prompt": "Hello"}], *flags[:-1])
    assert (result["reasoning"], result["text"].strip(), result["tokens"]) == (thought, answer, ids)


def test_a_model_does_not_command_the_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    generate.FLAGS.unparse_flags()
    generate.FLAGS(["ds4jax", "--show_thinking"])
    monkeypatch.setenv("NO_COLOR", "1")
    for stream, thought, answer in (Terminal, "a␛[2J", "b␛[2J�2J"), (io.StringIO, "a\x1b[2J", "b\x1b[2J\x9b2J"):
        out, err = stream(), stream()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        output = generate._Output()
        output.show([ThinkingDelta("a\x1b[2J"), TextDelta("b\x1b[2J\x9b2J")])
        output.end()
        assert (err.getvalue(), out.getvalue()) == (f"{thought}\n\n", f"{answer}\n")


def test_a_seed_is_random_unless_given(run, tmp_path):
    flags = "--max_tokens=12", "--min_p=0"
    (_, first, err), (_, second, _) = run("Hello", *flags), run("Hello", *flags)
    assert first != second and run("Hello", *flags, "--seed", err.split()[-1])[1] == first
    assert job(run, tmp_path, [{"prompt": "Hello"}], *flags)[1] == job(run, tmp_path, [{"prompt": "Hello"}], *flags)[1]


def test_speed_memory_and_progress_go_to_stderr(run):
    status, _, err = run("--prompt=Hello", "--max_tokens=3")
    assert status == 0
    assert re.search(r"prefill: \d+ tokens in [\d.]+ s, [\d.]+ tokens/s\ndecode: 2 tokens in [\d.]+ s, ", err)
    assert re.search(r"compilation: [\d.]+ s; peak process memory: [\d.]+ GiB", err)


def test_dumped_logits_are_the_models(dumped, runners):
    dump, _ = dumped("--raw", "--prompt=Once upon a time", "--max_tokens=8", "--logprobs_top_k=512")
    prompt, steps = dump["prompt_tokens"], dump["steps"]
    assert prompt == TOKENIZER.encode_raw("Once upon a time")
    ids = [step["id"] for step in steps]
    logits = next(iter(runners.made.values())).logits(prompt + ids)[len(prompt) - 1 : -1]
    for step, expected in zip(steps, logits, strict=True):
        top = np.array(step["top"])
        assert sorted(top[:, 0]) == list(range(CFG.vocab_size))  # no more than there are, and each once
        assert (np.diff(top[:, 1]) <= 0).all()
        found = np.empty(CFG.vocab_size)
        found[top[:, 0].astype(int)] = top[:, 1]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        np.testing.assert_array_equal(found.astype(np.float32), found)  # float32, to the last bit
        np.testing.assert_allclose(np.exp(top[:, 2]).sum(), 1, atol=1e-5)  # float32 logprobs
        np.testing.assert_allclose(top[:, 1] - top[:, 2], step["logit"] - step["logprob"], atol=1e-5)
        assert [step["id"], step["logit"], step["logprob"]] == step["top"][0]  # greedy


def test_logprobs_top_k_cuts(dumped):
    full, _ = dumped("--prompt=Hello", "--max_tokens=2", "--logprobs_top_k=384")
    for k in (0, 3):
        dump, _ = dumped("--prompt=Hello", "--max_tokens=2", f"--logprobs_top_k={k}")
        assert [step["top"] for step in dump["steps"]] == [step["top"][:k] for step in full["steps"]]


def test_sampling_flags_and_the_seed_reach_the_sampler(run):
    flags = ["--prompt=Hello", "--max_tokens=12"]
    greedy, sampled = run(*flags, "--temperature=0")[1], run(*flags, "--min_p=0", "--seed=1")[1]
    assert sampled == run(*flags, "--min_p=0", "--seed=1")[1]
    assert len({greedy, sampled, run(*flags, "--min_p=0", "--seed=2")[1]}) == 3
    for only_one in ("--top_k=1", "--top_p=1e-9", "--min_p=1", "--temperature=1e-9"):
        assert run(*flags, "--seed=1", only_one)[1] == greedy


def test_an_answer_ends_at_the_end_token(run, dumped, monkeypatch):
    dump, _ = dumped("--prompt=Hello", "--max_tokens=6")
    ids = [step["id"] for step in dump["steps"]]
    ending = byte_tokenizer()
    ending.eos_id = ids[3]
    monkeypatch.setattr(generate.Tokenizer, "from_metadata", lambda _: ending)
    dump, out = dumped("--prompt=Hello", "--max_tokens=6")
    end = ids.index(ids[3])
    assert [step["id"] for step in dump["steps"]] == ids[: end + 1]
    assert dump["steps"][-1]["text"] == ""
    assert out == TOKENIZER.decode(ids[:end]) + "\n"


# ---- prompts ---------------------------------------------------------------------------------------------------------
def tokens_of(run, *argv):
    status, out, _ = run("--dump_tokens", *argv)
    assert status == 0
    return [int(line.split("\t")[0]) for line in out.splitlines()]


def test_prompts_are_rendered(run, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "ModelRunner", lambda *_: pytest.fail("no inference was asked for"))
    user = [{"role": "user", "content": "Hi\r\n"}]
    system = [{"role": "system", "content": "Be brief."}]
    (tmp_path / "prompt.txt").write_bytes(b"Hi\r\n")
    file = f"--prompt_file={tmp_path}/prompt.txt"
    off = chat.render_ids(TOKENIZER, user, think="off")
    assert tokens_of(run, "--prompt=Hi\r\n") == tokens_of(run, "Hi\r\n", "--ctx=64") == off
    assert tokens_of(run, file, "--think=on") == chat.render_ids(TOKENIZER, user)
    with open(tmp_path / "prompt.txt") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert tokens_of(run, "--prompt-file", "-", "--dump-tokens") == off
    assert tokens_of(run, file, "--system=Be brief.") == chat.render_ids(TOKENIZER, system + user, think="off")
    assert tokens_of(run, file, "--think=off") == chat.render_ids(TOKENIZER, user, think="off")
    assert tokens_of(run, file, "--raw") == TOKENIZER.encode_raw("Hi\r\n")
    default = [{"role": "user", "content": generate.DEFAULT_PROMPT}]
    assert tokens_of(run) == chat.render_ids(TOKENIZER, default, think="off")


def test_dumped_tokens_show_their_pieces(run):
    assert run("--dump_tokens", "--raw", "--prompt=é\n")[1] == (
        "376\t<｜begin▁of▁sentence｜>\n195\t\\xc3\n169\t\\xa9\n10\t\\n\n"
    )


def test_maximal_thinking_is_lost_below_its_context(run):
    flags = ["--dump_tokens", "--think=max", "--prompt=Hi"]
    status, short, err = run(*flags)
    assert status == 0 and "note: --think=max acts as on: this model's instruction for it needs a ctx of 393216" in err
    _, long, err = run(*flags, "--ctx=393216")
    assert not err and "Absolute maximum" in TOKENIZER.decode([int(x.split("\t")[0]) for x in long.splitlines()])
    assert len(short) < len(long)


def test_the_profile_is_that_of_the_file_unless_a_flag_says_otherwise(run, model, tmp_path):
    newer = tmp_path / "small-0731.gguf"
    newer.symlink_to(model)  # as in a cache, where the name is a link's

    def begins(*argv, model=model):
        status, out, err = run("--dump_tokens", "--prompt=Hi", "--think=on", *argv, model=model)
        assert status == 0 and "acts as on" not in err
        return TOKENIZER.decode([int(line.split("\t")[0]) for line in out.splitlines()])[21:51]

    assert begins().startswith("<｜User｜>Hi") and begins("--think=high").startswith("<｜User｜>Hi")
    assert begins(model=newer) == begins("--profile=0731") == "Reasoning Effort: Absolute max"
    assert begins("--think=max", model=newer) == "Reasoning Effort: Beyond maximu"[:30]
    assert begins("--think=low", model=newer).startswith("<｜User｜>Hi")
    assert begins("--profile=original", model=newer) == begins()
    status, _, err = run("--profile=0801")
    assert status == 1 and "0801" in err and "original" in err


# ---- batch jobs ------------------------------------------------------------------------------------------------------
def job(run, tmp_path, lines, *argv):
    """Runs a batch job of dicts or raw lines: (status, result objects, stderr)."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    status, _, err = run(f"--prompts_file={source}", f"--out={out}", *argv)
    return status, [json.loads(line) for line in out.read_text().splitlines()], err


def test_a_batch_job_gives_what_single_runs_give(run, tmp_path):
    lines = [
        {"prompt": "Hello", "id": "a"},
        {"prompt": "Hi", "system": "Be brief.", "max_tokens": 3},
        {"messages": [{"role": "user", "content": "question"}], "think": "off", "id": 7},
        {"prompt": "Hello", "temperature": 1, "min_p": 0, "seed": 5, "id": "d"},
        {"prompt": "Hello", "id": "e"},
    ]
    status, results, _ = job(run, tmp_path, lines, "--temperature=0", "--max_tokens=9")
    assert status == 0
    by_id = {result["id"]: result for result in results}
    singles = {
        "a": ["--prompt=Hello"],
        2: ["--prompt=Hi", "--system=Be brief.", "--max_tokens=3"],
        7: ["--prompt=question", "--think=off"],
        "d": ["--prompt=Hello", "--temperature=1", "--min_p=0", "--seed=5"],
        "e": ["--prompt=Hello"],
    }
    assert by_id.keys() == singles.keys()
    for id, flags in singles.items():
        _, out, _ = run("--temperature=0", "--max_tokens=9", *flags)
        result = by_id[id]
        assert result["text"] + "\n" == out == TOKENIZER.decode(result["tokens"]) + "\n"
        assert (result["finish_reason"], len(result["tokens"])) == ("length", 3 if id == 2 else 9)
        prompt = [flag for flag in flags if flag.startswith(("--prompt", "--system", "--think"))]
        assert result["n_prompt_tokens"] == len(tokens_of(run, *prompt))


def test_bad_lines_are_reported_and_lose_nothing(run, tmp_path):
    lines = [
        '{"prompt": "cut off',
        {"prompt": "Hello", "id": "good"},
        "",
        {"prompt": "x", "id": "odd", "temprature": 1},
        {"prompt": 5},
        [1],
        {"system": "nothing else"},
        {"prompt": "x" * 1000},
        {"prompt": "x", "top_p": 2.0},
        {"prompt": "x", "max_tokens": 0},
        {"prompt": "x", "seed": True},
        {"messages": [{"role": "robot", "content": "x"}]},
        "[" * 100_000,
    ]
    status, results, err = job(run, tmp_path, lines, "--max_tokens=2")
    assert status == 1
    assert [result.get("id") for result in results if "text" in result] == ["good"]
    problems = {result["line"]: result["error"] for result in results if "error" in result}
    expected = {
        1: "not JSON",
        4: "found the key 'temprature'",
        5: "prompt: found 5",
        6: "found [1], expected an object",
        7: "expected either prompt or messages",
        8: "prompt: found 1",
        9: "top_p: found 2.0",
        10: "max_tokens: found 0",
        11: "seed: found true",
        12: "messages[0].role: found 'robot'",
        13: "not JSON",
    }
    assert problems.keys() == expected.keys()
    for line, problem in expected.items():
        assert problem in problems[line]
        assert f"in.jsonl line {line}: {problems[line]}\n" in err
    assert next(result["id"] for result in results if result.get("line") == 4) == "odd"
    assert "1 of 12 prompts finished" in err


def test_without_out_a_batch_job_prints_its_results(run, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "Hello"}\n')
    status, out, _ = run(f"--prompts_file={tmp_path}/in.jsonl", "--max_tokens=2")
    assert status == 0 and json.loads(out)["id"] == 1


# ---- ends ------------------------------------------------------------------------------------------------------------
def test_an_interrupted_answer_keeps_what_it_has(run, tmp_path, interrupted):
    path = tmp_path / "dump.json"
    status, out, err = run("--prompt=Hello", "--max_tokens=9", f"--dump_logprobs={path}", "--temperature=0")
    assert status == 130 and err.endswith("interrupted\n") and "decode: 2 tokens" in err
    ids = [step["id"] for step in json.loads(path.read_text())["steps"]]
    assert len(ids) == 2 and out == TOKENIZER.decode(ids) + "\n"


def test_an_interrupted_batch_job_keeps_what_it_finished(run, tmp_path, interrupted):
    lines = [{"prompt": "Hello", "max_tokens": 2}, {"prompt": "Hello", "max_tokens": 9}]
    status, results, err = job(run, tmp_path, lines)
    assert status == 130 and [result["id"] for result in results] == [1]
    assert "1 of 2 prompts finished" in err


@pytest.mark.parametrize(
    "argv, problem",
    [
        (["--config=huge"], "config: found 'huge', expected one of gpu24"),
        (["--ctx=1"], "ctx: found 1, expected 2 to"),
        (["--max_tokens=0"], "max_tokens: found 0, expected 1 to"),
        (["--temperature=-1", "--prompt=x"], "temperature: found -1.0, expected"),
        (["--prompt=x", "--prompt_file=y"], "found --prompt and --prompt_file, expected one of them"),
        (["--prompts_file=y", "--dump_tokens"], "found --dump_tokens with --prompts_file"),
        (["--out=y"], "found --out without --prompts_file"),
        (["--prompt_file=/none"], "/none: cannot be read: No such file"),
        (["--prompt=x", "--raw", "--system=y"], "found --raw with a system prompt, expected only a prompt"),
        (["--prompt=x", "--dump_logprobs=/none/x"], "dump_logprobs: found /none/x, expected a file in an existing"),
        (["--prompt=x", "--dump_logprobs=x", "--logprobs_top_k=-1"], "logprobs_top_k: found -1"),
        (["--prompt=" + "x" * 200], "prompt: found 204 tokens, expected 1 to 127 (ctx is 128)"),
        (["--prompt=x", "--kernels=pallas"], "kernels: found 'pallas with numerics"),
        (["--think=hard"], "flag --think=hard: value should be one of <off|on|low|high|max>"),
        (["--nonsense"], "Unknown command line flag 'nonsense'"),
        (["Hello", "you"], "found a second argument 'you', expected one: quote what has spaces"),
        (["Hello", "--prompt=x"], "found the argument 'Hello', expected only flags"),
    ],
)
def test_wrong_flags_are_one_line(run, argv, problem):
    status, out, err = run(*argv)
    assert (status, out) == (1, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and problem in err


def test_missing_models_say_how_to_get_them(run, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    status, _, err = run(model="hf:owner/repo/file.gguf")
    assert status == 1
    assert err == (
        "error: model hf:owner/repo/file.gguf: not on this machine; get it with: "
        "python -m ds4jax.download --model hf:owner/repo/file.gguf\n"
    )
    status, _, err = run(model="/none.gguf")
    assert status == 1 and "model /none.gguf: no such file; python -m ds4jax.download --config" in err


def test_a_file_without_a_tokenizer_is_refused_by_name(run, tmp_path):
    path = tmp_path / "bare.gguf"
    synthetic.write_synthetic(path, CFG, 3, synthetic.RECIPES["q8"])
    status, _, err = run("--prompt=x", model=path)
    assert status == 1 and f"{path}: metadata key tokenizer.ggml.model is missing" in err


def test_undecodable_prompts_are_refused(run, tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    status, _, err = run(f"--prompt_file={tmp_path}/latin")
    assert status == 1 and "latin: found 0xe9 at byte 3, expected UTF-8" in err


def test_help_lists_the_flags(capsys):
    assert cli.run(generate.main, generate.FLAGS, generate.__doc__, ["--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Generate text") and all(f"{name}:" in out for name in generate.FLAGS)


# ---- the process -----------------------------------------------------------------------------------------------------
def test_a_cache_directory_that_cannot_be(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert paths.cache_dir() == tmp_path / "ds4jax" and (tmp_path / "ds4jax").is_dir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(generate.Ds4Error, match="cannot be created: Not a directory .XDG_CACHE_HOME moves it"):
        paths.cache_dir()


def test_ctrl_c_in_a_process_of_its_own(model, tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "LC_ALL": "C"}
    # What is started in the background of a shell ignores SIGINT, and so would what it starts.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "ds4jax.generate", f"--model={model}"]
    command += ["--think=off", "Hi", "--seed=22"]
    process = subprocess.Popen(
        [*command, "--max_tokens=4000"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout
    text = process.stdout.read(1)  # it streams
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130, err.decode()
    assert text and rest.endswith(b"\n")
    assert b"Traceback" not in err and err.endswith(b"interrupted\n")


def test_ctrl_c_is_not_lost_where_python_drops_the_exception(monkeypatch):
    monkeypatch.setattr(cli, "_interrupted", False)
    cli.check_interrupt()
    with pytest.raises(KeyboardInterrupt):
        cli.end_at_interrupt(signal.SIGINT, None)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            cli.check_interrupt()
