"""`python -m ds4jax.download`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("ds4jax.io.download", run_name="__main__", alter_sys=True)
