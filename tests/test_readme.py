"""README's commands: every tool and flag is there, every file that is named, and the Python runs as far as names go."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

import ds4jax
from ds4jax.__main__ import TOOLS
from ds4jax.tools import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
COMMANDS = [line for kind, block in BLOCKS if kind == "sh" for line in block.replace("\\\n", " ").splitlines()]


def split(line: str) -> list[list[str]]:
    """The words of each simple command of a line, without redirections."""
    commands, words = [], shlex.split(line, comments=True)
    for word in words:
        if not commands or word in ("|", "&&", ">", "<"):
            commands.append([])
        if word not in ("|", "&&", ">", "<"):
            commands[-1].append(word)
    return commands


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_has_tools_flags_and_files_that_are_there(line):
    assert "|off" not in line and "[--" not in line, "commands are to be run as they stand"
    for words in split(line):
        while words and re.fullmatch(r"[A-Z_0-9]+=\S*", words[0]):
            words = words[1:]
        if not words:
            continue
        match = re.fullmatch(r"(?:\.venv/bin/)?python -m ds4jax\.(\w+)", " ".join(words[:3]))
        if match or words[0] == "ds4jax":
            name, argv = (match[1], words[3:]) if match else (words[1], words[2:])
            if name.startswith("--"):
                continue
            assert name in TOOLS
            tool = importlib.import_module(f"ds4jax.tools.{name}")
            assert cli.run(lambda: 0, tool.FLAGS, "", argv, getattr(tool, "ARGUMENT", None)) == 0, words
        for script in [word for word in words if re.fullmatch(r"(scripts|tests|docs)/[\w/.]+", word)]:
            assert (ROOT / script).exists(), script


def test_python_is_python_and_names_are_there():
    for kind, block in BLOCKS:
        if kind == "python":
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ds4jax"):
                    module = importlib.import_module(node.module or "")
                    assert all(hasattr(module, name.name) for name in node.names)
                elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    if isinstance(node.func.value, ast.Name) and node.func.value.id == "model":
                        assert hasattr(ds4jax.Model, node.func.attr)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
