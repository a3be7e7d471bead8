"""`python -m ds4jax.synthetic`: the tool `ds4jax synthetic`."""

import sys

from ds4jax.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["synthetic", *sys.argv[1:]]))
