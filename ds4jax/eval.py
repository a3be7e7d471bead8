"""`python -m ds4jax.eval`: the tool `ds4jax eval`."""

import sys

from ds4jax.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
