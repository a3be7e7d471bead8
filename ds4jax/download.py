"""`python -m ds4jax.download`: the tool `ds4jax download`."""

import sys

from ds4jax.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["download", *sys.argv[1:]]))
