"""Coding agents, as they are, edit a file through the server; the model's part is scripted.

They come from npm: `npm install @openai/codex @anthropic-ai/claude-code opencode-ai`, with node_modules/.bin in PATH.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from fake_engine import FakeEngine, ids, serving

pytestmark = pytest.mark.slow
TASK, EDIT = "Change hello to goodbye in greet.py", "sed -i s/hello/goodbye/ greet.py"
# The tool that runs a command, by agent: its name, and its parameter for the command.
TOOLS = {"codex": ("exec_command", "cmd"), "claude": ("Bash", "command"), "opencode": ("bash", "command")}


def command(agent: str, url: str, home: Path) -> tuple[list[str], dict[str, str]]:
    """How the agent is run with the server, and the environment it needs."""
    match agent:
        case "codex":
            provider = f'{{name = "ds4jax", base_url = "{url}/v1", wire_api = "responses"}}'
            options = ["-c", f"model_providers.ds4jax={provider}", "-c", "model_provider=ds4jax", "-m", "ds4jax"]
            free = ["--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
            return ["exec", *options, *free, TASK], {}
        case "claude":
            env = {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": "k", "ANTHROPIC_MODEL": "ds4jax"}
            return ["-p", TASK, "--allowedTools", "Bash"], env | {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}
        case _:
            provider = {"npm": "@ai-sdk/openai-compatible", "options": {"baseURL": f"{url}/v1", "apiKey": "k"}}
            config = {
                "autoupdate": False,
                "permission": {"bash": "allow"},
                "provider": {"ds4jax": provider | {"models": {"ds4jax": {"reasoning": True}}}},
                "small_model": "ds4jax/ds4jax",
            }
            (home / "opencode.json").write_text(json.dumps(config))
            return ["run", "-m", "ds4jax/ds4jax", TASK], {"OPENCODE_CONFIG": str(home / "opencode.json")}


@pytest.mark.parametrize("agent", TOOLS)
def test_an_agent_edits_a_file(agent, tmp_path):
    if not (program := shutil.which(agent)):
        pytest.skip(f"{agent} is not installed")
    tool, parameter = TOOLS[agent]
    call = "\n".join(
        (
            "I will edit the file.\n\n<｜DSML｜tool_calls>",
            f'<｜DSML｜invoke name="{tool}">',
            f'<｜DSML｜parameter name="{parameter}" string="true">{EDIT}</｜DSML｜parameter>',
            '<｜DSML｜parameter name="description" string="true">Edit the file</｜DSML｜parameter>'
            if tool != "exec_command"
            else '<｜DSML｜parameter name="yield_time_ms" string="false">1000</｜DSML｜parameter>',
            "</｜DSML｜invoke>\n</｜DSML｜tool_calls>",
        )
    )

    def script(request) -> str:
        text = engine.tokenizer.decode(request.tokens)
        thought = "Let me see.</think>" if text.endswith("<think>") else ""
        if not re.search(f'^{{"name": "{tool}"', text, re.MULTILINE):
            return thought + "A title"  # what opencode asks for beside the task
        done = "<tool_result>" in text.rsplit("<｜User｜>", 1)[1]
        answer = thought + ("It says goodbye now." if done else call)
        turns.append((list(request.tokens), ids(answer)))
        return answer

    engine, turns = FakeEngine(script, ctx=2**18), []
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    (work / "greet.py").write_text('print("hello")\n')
    with serving(engine) as url:
        arguments, env = command(agent, url, home)
        env |= {"HOME": str(home), "PATH": f"{Path(program).parent}:/usr/bin:/bin"}
        run = subprocess.run(
            [program, *arguments],
            cwd=work,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert "It says goodbye now." in run.stdout, run.stdout + run.stderr
    assert (work / "greet.py").read_text() == 'print("goodbye")\n'
    assert len(turns) == 2 and not engine.running
    for (before, said), (after, _) in itertools.pairwise(turns):  # nothing is read again
        assert after[: len(before) + len(said)] == before + said
