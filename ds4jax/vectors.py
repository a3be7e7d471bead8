"""`python -m ds4jax.vectors`: the tool `ds4jax vectors`."""

import sys

from ds4jax.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["vectors", *sys.argv[1:]]))
