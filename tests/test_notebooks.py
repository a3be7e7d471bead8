"""Every notebook runs from its first cell to its last."""

import json
from pathlib import Path

import pytest


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("notebooks/*.ipynb")), ids=lambda p: p.stem)
def test_notebook(path, capsys):
    names = {}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert capsys.readouterr().out
