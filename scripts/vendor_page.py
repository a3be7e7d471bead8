"""Fetch the libraries of the chat page from npm into ``ds4jax/server/page/vendor``: ``python scripts/vendor_page.py``.

LIBRARIES says which versions, and which of their files; beside them, ``vendor.json`` keeps versions, licences, npm's
hash of every package and the hash of every file. A package whose hash is another than the one kept is refused. A test
compares the files with their hashes. This needs npm; nothing else in the project does.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from ds4jax.errors import Ds4Error
from ds4jax.tools import cli

FOLDER = Path(__file__).parents[1] / "ds4jax" / "server" / "page" / "vendor"
MANIFEST = FOLDER / "vendor.json"


@dataclasses.dataclass(frozen=True)
class Library:
    """A package of npm.

    folder: where its files go, below FOLDER. files: path in the package, or a pattern of paths → path in that folder;
    where it ends in a slash, or is empty, files keep their names.
    """

    package: str
    version: str
    folder: str
    files: dict[str, str]


LIBRARIES = (
    Library("marked", "18.2.1", "marked", {"lib/marked.esm.js": "marked.js", "LICENSE*": ""}),
    Library("dompurify", "3.5.0", "dompurify", {"dist/purify.min.js": "purify.js", "LICENSE": ""}),
    Library(
        "@highlightjs/cdn-assets",
        "11.12.0",
        "highlight",
        {"es/highlight.min.js": "highlight.js", "LICENSE": ""},
    ),
    Library(
        "katex",
        "0.19.1",
        "katex",
        {
            "dist/katex.min.js": "katex.js",
            "dist/katex.min.css": "katex.css",
            "dist/fonts/*.woff2": "fonts/",
            "LICENSE": "",
        },
    ),
)


def main() -> None:
    """Fetch all libraries. Raises Ds4Error."""
    known = {one["package"]: one for one in json.loads(MANIFEST.read_text())} if MANIFEST.exists() else {}
    entries = [_fetch(library, known.get(library.package, {})) for library in LIBRARIES]
    kept = {FOLDER / path for entry in entries for path in entry["files"]} | {MANIFEST}
    for path in FOLDER.rglob("*"):
        if path.is_file() and path not in kept:
            path.unlink()
    MANIFEST.write_text(json.dumps(entries, indent=1) + "\n")
    size = sum(path.stat().st_size for path in kept)
    print(f"{len(kept)} files, {size / 2**20:.2f} MiB, in {FOLDER}")


def _fetch(library: Library, known: dict) -> dict:
    """Write the files of a library; → its entry in the manifest. known: the entry that is there."""
    name = f"{library.package}@{library.version}"
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", name, "--json", "--pack-destination", folder]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise Ds4Error(f"{name}: npm pack failed: {run.stderr.strip()[-500:]}")
        said = json.loads(run.stdout)
        (about,) = said.values() if isinstance(said, dict) else said
        if known.get("version") == library.version and known["integrity"] != about["integrity"]:
            raise Ds4Error(f"{name}: found the hash {about['integrity']}, expected {known['integrity']}")
        (archive,) = Path(folder).iterdir()
        with tarfile.open(archive) as tar:
            content = {
                member.name.partition("/")[2]: file.read() for member in tar if (file := tar.extractfile(member))
            }
    package, files = json.loads(content["package.json"]), {}
    for pattern, to in library.files.items():
        found = fnmatch.filter(content, pattern)
        if not found:
            raise Ds4Error(f"{name}: found no {pattern}")
        for path in found:
            target = f"{library.folder}/{to if to and not to.endswith('/') else to + Path(path).name}"
            (FOLDER / target).parent.mkdir(parents=True, exist_ok=True)
            (FOLDER / target).write_bytes(content[path])
            files[target] = hashlib.sha256(content[path]).hexdigest()
    about = {"version": library.version, "license": package["license"], "integrity": about["integrity"]}
    return {"package": library.package, **about, "files": files}


if __name__ == "__main__":
    sys.exit(cli.exit_status(main))
