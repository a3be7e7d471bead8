"""`python -m ds4jax.imatrix`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("ds4jax.tools.imatrix", run_name="__main__", alter_sys=True)
