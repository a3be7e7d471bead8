"""The wheel is complete: installed elsewhere, it serves the embedded model."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from ds4jax.paths import EMBEDDED, embedded_drafter

ROOT = Path(__file__).parents[1]


def test_wheel_outside_the_checkout(tmp_path):
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, ROOT], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = [p for top in ("ds4jax", "pallas_kernels") for p in (ROOT / top).rglob("*.py")]
    modules = {p.relative_to(ROOT).as_posix() for p in sources}
    configs = {f"ds4jax/configs/{p.name}" for p in (ROOT / "configs").glob("*.toml")}
    models = {f"ds4jax/models/{name}.{end}" for name in (*EMBEDDED, embedded_drafter().stem) for end in ("gguf", "md")}
    typed = {"ds4jax/py.typed", "pallas_kernels/py.typed"}
    page = {p.relative_to(ROOT).as_posix() for p in (ROOT / "ds4jax/server/page").rglob("*") if p.is_file()}
    assert modules | configs | models | typed | page <= names and "ds4jax/server/page/index.html" in page

    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    env = os.environ | {"PYTHONPATH": str(site), "XDG_CACHE_HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-P", "-m", "ds4jax.generate", "--config", "tiny", "--prompt", "Hi", "--max_tokens", "2"],
        env=env, cwd=tmp_path,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "decode: 1 tokens" in run.stderr
    where = "import ds4jax; print(ds4jax.__file__)"
    run = subprocess.run([sys.executable, "-P", "-c", where], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.startswith(str(site))
