"""The checker of jaxtyping's import hook: a function whose annotations have shapes is checked in every call."""

from beartype import beartype


def check(f):
    if f.__name__ == "__init__":  # of a dataclass, which may hold structures instead of arrays
        return f
    return beartype(f) if "[Array" in str(f.__annotations__) else f
