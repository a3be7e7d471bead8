"""`python -m ds4jax.memory`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("ds4jax.engine.memory", run_name="__main__", alter_sys=True)
