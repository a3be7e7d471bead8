"""The one error type for everything a user can get wrong with a file, a config or a request."""


class Ds4Error(Exception):
    """A problem in the user's input: names the thing, what was found and what was expected.

    Command-line entry points print it as one line, without a stack trace, and exit with status 1.
    """


class GGUFError(Ds4Error):
    """A GGUF file that is missing, truncated, contradictory, oversized or unsupported."""


class ConfigError(Ds4Error):
    """A runtime config, flag or combination of them that cannot be honoured."""
