"""`python -m ds4jax.checkpoint`: the tool `ds4jax checkpoint`."""

import sys

from ds4jax.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["checkpoint", *sys.argv[1:]]))
