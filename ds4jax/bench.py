"""`python -m ds4jax.bench`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("ds4jax.tools.bench", run_name="__main__", alter_sys=True)
