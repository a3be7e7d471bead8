"""`python -m ds4jax.serve`: the tool `ds4jax serve`."""

import sys

from ds4jax.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
