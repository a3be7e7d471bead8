"""Ds4Error, the base of all errors in a user's files, configs and requests; and how they show a value."""

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
    """The repr of a value, cut to at most 100 characters in one line, for an error message."""
    text = " ".join(repr(value[:100] if isinstance(value, str | bytes | list | np.ndarray) else value).split())
    return text if len(text) <= 100 else text[:97] + "..."
