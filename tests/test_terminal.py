"""Chat in the terminal, with scripted answers."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
from fake_engine import FakeEngine

from ds4jax.errors import Ds4Error
from ds4jax.settings import Settings
from ds4jax.tools import markdown
from ds4jax.tools.chat import FLAGS, Session

# A terminal of its own takes a fork, after which the child runs another program at once.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")


@pytest.fixture
def loop() -> Iterator[asyncio.Runner]:
    FLAGS.unparse_flags()
    FLAGS(["ds4jax", "--system=Be brief.", "--temperature=0"])
    with asyncio.Runner() as runner:
        yield runner


def session_with(engine, run) -> Session:
    return Session(run, Settings("tiny"), lambda _: engine)


def prompt(engine: FakeEngine) -> str:
    return engine.tokenizer.decode(engine.requests[-1].tokens)


def test_turns_and_commands(loop, tmp_path, capsys):
    engine = FakeEngine(lambda _: "I think.</think>Hello\x1b[2J!")
    session = session_with(engine, loop.run)
    assert session.enter("Hi") and session.enter("   ")
    out = capsys.readouterr()
    assert "I think.\n\nHello␛[2J!" in out.out and "tokens used" in out.err
    assert prompt(engine) == "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜><think>"
    session.enter("/nothink")
    session.enter(" /not a command")
    assert prompt(engine).endswith("<｜end▁of▁sentence｜><｜User｜> /not a command<｜Assistant｜></think>")
    session.enter("/think-max")
    assert "acts as /think on" in capsys.readouterr().err
    newer = session_with(FakeEngine(lambda _: "</think>x", profile="0731"), loop.run)
    newer.enter("/think-max")
    assert not capsys.readouterr().err
    text = tmp_path / "text.txt"
    text.write_text("From a file")
    session.enter(f"/read {text}")
    assert prompt(engine).endswith("<｜User｜>From a file<｜Assistant｜><think>")
    saved = tmp_path / "saved.json"
    session.enter(f"/save {saved}")
    session.enter("/new")
    assert session.messages == [{"role": "system", "content": "Be brief."}]
    session.enter(f"/load {saved}")
    assert [m["role"] for m in session.messages] == ["system", *["user", "assistant"] * 3] and session.think == "max"
    assert not session.enter("/quit")
    capsys.readouterr()
    saved.write_text(json.dumps({"messages": [{"role": "wizard"}], "think": "on"}))
    for wrong in (
        "/bogus",
        "/read",
        f"/read {tmp_path}",
        f"/load {text}",
        f"/load {saved}",
        "/ctx x",
        "/ctx 1",
        "/save",
    ):
        n = len(session.messages)
        assert session.enter(wrong) and capsys.readouterr().err.startswith("error: ") and len(session.messages) == n


def test_ctrl_c_stops_the_answer_only(loop, capsys):
    engine = FakeEngine(lambda _: "</think>" + "word " * 500, delay=0.01)

    def interrupted(coroutine):
        """As asyncio.Runner does it, 0.4 seconds on."""

        async def run():
            task = asyncio.create_task(coroutine)
            await asyncio.sleep(0.4)
            task.cancel()
            await asyncio.wait([task])

        loop.run(run())
        raise KeyboardInterrupt

    session = session_with(engine, interrupted)
    assert session.enter("Hi") and "(stopped)" in capsys.readouterr().err and not engine.running
    assert session.messages[-1]["role"] == "assistant" and session.messages[-1]["content"].startswith("word ")


def test_an_answer_that_fails_is_no_turn(loop, capsys):
    session = session_with(FakeEngine(lambda _: "x", ctx=5), loop.run)
    session.enter("Hi, this is too long")
    assert "prompt is too long" in capsys.readouterr().err and session.messages[-1]["role"] == "system"


def test_reopening(loop, capsys):
    opened = []

    def open_engine(settings):
        if settings.ctx > 10**6:
            raise Ds4Error("memory: found too little")
        opened.append(FakeEngine(lambda _: "</think>x", ctx=settings.ctx))
        return opened[-1]

    session = Session(loop.run, Settings("tiny"), open_engine)
    session.enter("Hi")
    session.enter("/ctx 100")
    session.enter("/ctx 2000000")
    assert "too little" in capsys.readouterr().err
    session.enter("And?")
    assert [engine.ctx for engine in opened] == [4096, 100, 100] and [e.closed for e in opened] == [True, True, False]
    assert "<｜User｜>Hi<｜Assistant｜></think>x<｜end▁of▁sentence｜><｜User｜>And?" in prompt(opened[-1])


def test_the_module_is_the_chat_and_imports_no_jax():
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    run = [sys.executable, "-m", "ds4jax.chat"]
    shown = subprocess.run([*run, "--help"], capture_output=True, text=True, env=env)
    assert shown.returncode == 0 and "/think off" in shown.stdout and "--kv_dir" in shown.stdout
    wrong = subprocess.run([*run, "--config=x"], capture_output=True, text=True, env=env)
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: config: ")
    code = "import sys, ds4jax.chat.template, ds4jax.tools.chat; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


HERE = Path(__file__).parent


def environment(cache: Path, **others: str) -> dict[str, str]:
    """What `scripted_chat` runs in."""
    return os.environ | {"PYTHONPATH": f"{HERE.parent}:{HERE}", "XDG_CACHE_HOME": str(cache)} | others


PROMPT = ">[\x08 ]"  # as a terminal with line editing is sent it


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Iterator[pexpect.spawn]:
    """A chat in a pseudo-terminal, with the answers of `scripted_chat`."""
    env = environment(tmp_path_factory.mktemp("cache"), TERM="xterm-256color", COLUMNS="100", LINES="30")
    env.pop("NO_COLOR", None)
    child = pexpect.spawn(
        sys.executable, [str(HERE / "scripted_chat.py")], env=env, encoding="utf-8", timeout=20, dimensions=(30, 100)
    )
    child.expect("ds4jax .* fake")
    child.expect(PROMPT)
    yield child
    child.close(force=True)


def last_turn(child: pexpect.spawn, name: Path) -> list[dict]:
    child.send(f"/save {name}\r")
    child.expect("written to")
    child.expect(PROMPT)
    return json.loads(name.read_text())["messages"]


def test_ctrl_c_in_a_terminal_stops_the_answer_for_good(chat, tmp_path):
    chat.send("a long one\r")
    chat.expect("word20")
    chat.send("\x03")
    chat.expect("stopped", timeout=2)
    chat.expect(PROMPT)
    *_, message = last_turn(chat, tmp_path / "a.json")
    assert message["role"] == "assistant" and message["content"].startswith("word0 word1 ")
    chat.send("next\r")
    chat.expect("You said .*next")
    assert "word" not in chat.before.rpartition("next")[2]
    chat.expect("tokens used")
    chat.send("\x03")  # at the prompt
    chat.expect("/quit leaves")
    chat.send("a long one\r")
    chat.expect("word2")
    for _ in range(3):  # an impatient one
        chat.send("\x03")
    chat.expect(PROMPT)
    assert last_turn(chat, tmp_path / "again.json")[-2]["content"] == "a long one"


def test_several_pasted_lines_are_one_message(chat, tmp_path):
    chat.send("\x1b[200~one\ntwo\r\nthree\x1b[201~\r")
    chat.expect("tokens used")
    assert last_turn(chat, tmp_path / "b.json")[-2]["content"] == "one\ntwo\nthree"
    chat.send('"""\rfour\rfive\r"""\r')
    chat.expect("tokens used")
    assert last_turn(chat, tmp_path / "c.json")[-2]["content"] == "four\nfive"
    chat.send("six\x1b\rseven\r")  # Alt+Enter
    chat.expect("tokens used")
    assert last_turn(chat, tmp_path / "d.json")[-2]["content"] == "six\nseven"


def test_markdown_and_thoughts_in_a_terminal(chat):
    chat.send("markdown\r")
    chat.expect("The end.*tokens used")
    shown = chat.before + chat.after
    assert "\x1b[2mS\x1b[0m" in shown and "**bold**" not in shown.rpartition("Title")[2]
    chat.send("/thi\t")
    chat.expect("nk")
    chat.send(" high\r")
    chat.send("/show\r")
    chat.expect("think +high")


def test_regenerating_and_editing(chat, tmp_path):
    chat.send("hello\r")
    chat.expect("You said .*hello")
    chat.expect(PROMPT)
    n = len(last_turn(chat, tmp_path / "e.json"))
    chat.send("/regen\r")
    chat.expect("You said .*hello")
    chat.expect(PROMPT)
    chat.send("/edit\r")
    chat.expect("hello")
    chat.send(" there\r")
    chat.expect("You said .*hello there")
    chat.expect(PROMPT)
    messages = last_turn(chat, tmp_path / "f.json")
    assert len(messages) == n and messages[-2]["content"] == "hello there"


def test_leaving(chat):
    chat.send("\x04")
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0 and "Traceback" not in chat.before


def test_blocks_that_are_complete_are_printed_once():
    for done, rest in [
        ("", "one line"),
        ("# Title\n\n", "text"),
        ("text\n\n", "```python\nx\n\ny"),
        ("text\n\n```\nx\n```\n", "- a\n\n- b"),
        ("a\n\n", "| a |\n|---|\n| b |"),
    ]:
        assert markdown._complete(done + rest) == len(done), rest


def test_no_colours_where_none_are_wanted(tmp_path):
    env = environment(tmp_path, TERM="dumb")
    shown, status = pexpect.run(
        f"{sys.executable} {HERE}/scripted_chat.py",
        env=env,
        events={"> ": "markdown\n", "tokens used.*> ": "\x03", "leaves\\)\r\n> ": "\x04"},
        withexitstatus=True,
        encoding="utf-8",
    )
    assert status == 0 and "\x1b" not in shown and "**bold**" in shown and "Some thought.\r\n\r\n#" in shown
    run = subprocess.run(
        [sys.executable, HERE / "scripted_chat.py"],
        input='"""\na\nb\n"""\n/save\n',
        capture_output=True,
        text=True,
        env=env,
    )
    assert "You said [a\nb]." in run.stdout and "\r" not in run.stdout + run.stderr and "\x1b" not in run.stderr
    assert "error: /save: found no name of a file, expected /save FILE" in run.stderr
