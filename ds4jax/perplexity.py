"""`python -m ds4jax.perplexity`: the tool `ds4jax perplexity`."""

import sys

from ds4jax.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["perplexity", *sys.argv[1:]]))
