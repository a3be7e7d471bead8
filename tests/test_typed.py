"""The shapes and dtypes that annotations say hold, in every implementation; see `typed`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_arrays_are_what_annotations_say():
    folder = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": str(folder.parent), "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, str(folder / "typed.py")], capture_output=True, text=True, env=env)
    assert done.stdout == "checked\n", done.stderr[-5000:]
