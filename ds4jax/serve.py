"""`python -m ds4jax.serve`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("ds4jax.tools.serve", run_name="__main__", alter_sys=True)
