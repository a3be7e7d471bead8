"""`python -m ds4jax.imatrix`: the tool `ds4jax imatrix`."""

import sys

from ds4jax.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["imatrix", *sys.argv[1:]]))
