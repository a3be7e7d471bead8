"""`python -m ds4jax.roofline`: the tool `ds4jax roofline`."""

import sys

from ds4jax.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["roofline", *sys.argv[1:]]))
