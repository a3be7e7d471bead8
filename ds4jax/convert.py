"""`python -m ds4jax.convert`: the tool `ds4jax convert`."""

import sys

from ds4jax.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
