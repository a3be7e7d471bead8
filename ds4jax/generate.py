"""`python -m ds4jax.generate`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("ds4jax.tools.generate", run_name="__main__", alter_sys=True)
