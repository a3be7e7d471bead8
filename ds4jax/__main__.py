"""The command `ds4jax`: one tool for each first argument, as in ``ds4jax generate Hi``."""

from __future__ import annotations

import importlib
import sys

from ds4jax.errors import ConfigError
from ds4jax.tools import cli

GROUPS = {
    "Talk to a model": {
        "generate": "answer a prompt, or every prompt of a file",
        "chat": "chat in the terminal",
        "serve": "serve a model over HTTP: OpenAI's and Anthropic's APIs, and a chat page",
    },
    "Get a model, and see whether it fits": {
        "download": "fetch a model file from Hugging Face",
        "memory": "show what a model needs of each device's memory",
    },
    "Make a model": {
        "checkpoint": "make a folder of a GGUF file, so that each GPU reads its part alone",
        "convert": "make a GGUF file of a Hugging Face checkpoint, or of a GGUF file of other types",
        "imatrix": "measure which columns of the weights matter, for convert",
        "synthetic": "write a GGUF file of random weights",
    },
    "Measure a model": {
        "bench": "measure the speed of prefill and decoding over the context",
        "roofline": "show what a step must read and compute, and where its time goes",
        "perplexity": "measure how likely a text is to a model, and how far it is from another model",
        "vectors": "compare a model with reference vectors: prompts, their continuations, log-probabilities",
        "eval": "ask a model questions and count the right answers",
    },
}
"""What --help lists, in groups: name → what it does."""
TOOLS = {name: what for tools in GROUPS.values() for name, what in tools.items()}
"""Name → what it does. Each is the module of its name in `ds4jax.tools`, with `main`, FLAGS and a docstring;
ARGUMENT is the flag that an argument without a name stands for, if it takes one."""
_EXAMPLES = """
Examples, with the small model that is in the package:
  ds4jax generate "What is the capital of France?"
  ds4jax chat
  ds4jax serve --port 8000        # then open http://127.0.0.1:8000"""


def main(argv: list[str] | None = None) -> int:
    """Run the tool that the first argument names with the others; → the exit status, see `cli.exit_status`.

    argv: arguments without the program's name, by default the process's.
    """
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name not in TOOLS:
        return cli.exit_status(lambda: _list_tools(name))
    tool = importlib.import_module(f"ds4jax.tools.{name}")
    return cli.run(tool.main, tool.FLAGS, tool.__doc__, rest, getattr(tool, "ARGUMENT", None))


def _list_tools(argument: str) -> None:
    """Print the tools. Raises ConfigError unless the argument asks for that."""
    if argument not in ("--help", "-help", "-h", "help"):
        raise ConfigError(f"found the tool {argument!r}, expected one of {', '.join(TOOLS)}")
    print("usage: ds4jax TOOL [FLAGS]; ds4jax TOOL --help lists a tool's flags")
    for title, tools in GROUPS.items():
        print(f"\n{title}:")
        print(*(f"  {tool:<10} {what}" for tool, what in tools.items()), sep="\n")
    print(_EXAMPLES)


if __name__ == "__main__":
    sys.exit(main())
