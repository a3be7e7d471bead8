"""The one error type for everything a user can get wrong with a file, a config or a request."""

from typing import Any

import numpy as np


class Ds4Error(Exception):
    """A problem in the user's input: names the thing, what was found and what was expected.

    Command-line entry points print it as one line, without a stack trace, and exit with status 1.
    """


class GGUFError(Ds4Error):
    """A GGUF file that is missing, truncated, contradictory, oversized or unsupported."""


class ConfigError(Ds4Error):
    """A runtime config, flag or combination of them that cannot be honoured."""


def show(value: Any) -> str:
    """`value` for an error message: its repr, cut to a length that fits one line."""
    text = " ".join(repr(value[:100] if isinstance(value, str | bytes | list | np.ndarray) else value).split())
    return text if len(text) <= 100 else text[:97] + "..."
