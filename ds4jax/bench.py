"""`python -m ds4jax.bench`: the tool `ds4jax bench`."""

import sys

from ds4jax.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
