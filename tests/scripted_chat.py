"""`ds4jax chat` with scripted answers, as a process for tests through a pseudo-terminal: no model, no JAX."""

import sys

from fake_engine import FakeEngine

from ds4jax.tools import chat, cli

MARKDOWN = "Some thought.</think># Title\n\nSome **bold** `code`.\n\n- one\n- two\n\n```python\nx = 1\n```\n\nThe end."


def script(request) -> str:
    """What is answered: to "long", many words; to "repeat", the last message; to "markdown", some of it."""
    text = FakeEngine.said(request)
    if "long" in text:
        return "</think>" + "".join(f"word{i} " for i in range(2000))
    return MARKDOWN if "markdown" in text else f"Hm.</think>You said [{text}]."


if __name__ == "__main__":
    engine = FakeEngine(script, delay=0.003)
    chat._open = lambda settings: engine
    sys.exit(cli.run(chat.main, chat.FLAGS, chat.__doc__))
