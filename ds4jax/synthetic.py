"""`python -m ds4jax.synthetic`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("ds4jax.io.synthetic", run_name="__main__", alter_sys=True)
