"""`python -m ds4jax.chat`: the tool `ds4jax chat`."""

import sys

from ds4jax.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["chat", *sys.argv[1:]]))
