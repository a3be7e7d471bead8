"""`python -m ds4jax.generate`: the tool `ds4jax generate`."""

import sys

from ds4jax.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
