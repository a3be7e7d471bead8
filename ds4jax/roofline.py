"""`python -m ds4jax.roofline`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("ds4jax.tools.roofline", run_name="__main__", alter_sys=True)
