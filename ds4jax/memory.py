"""`python -m ds4jax.memory`: the tool `ds4jax memory`."""

import sys

from ds4jax.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["memory", *sys.argv[1:]]))
