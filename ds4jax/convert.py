"""`python -m ds4jax.convert`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("ds4jax.tools.convert", run_name="__main__", alter_sys=True)
