"""`python -m ds4jax.chat`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("ds4jax.tools.chat", run_name="__main__", alter_sys=True)
