"""The chat page: the files in ``page/``, as they are, each with its hash as ETag.

Their Content-Security-Policy allows the page to load from this server and call it, and no other; to run the code in its
files, and no other; and to turn text into HTML through the sanitizer alone (trusted types).
"""

from __future__ import annotations

import dataclasses
import hashlib
from importlib import resources
from importlib.resources.abc import Traversable

from starlette.requests import Request
from starlette.responses import Response

PREFIX = "/page/"
"""The paths of the page's files; the page itself is at ``/``."""
_HEADERS = {
    "cache-control": "no-cache",  # asked for anew every time, and mostly answered with 304
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types dompurify"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "woff2": "font/woff2",
}


@dataclasses.dataclass(frozen=True)
class _File:
    content: bytes
    type: str
    etag: str


class Page:
    """The files of the page, read once, and the answers to requests for them."""

    def __init__(self):
        self._files: dict[str, _File] = {}
        self._read(resources.files("ds4jax.server") / "page", "")

    def _read(self, folder: Traversable, prefix: str) -> None:
        for entry in folder.iterdir():
            if entry.is_dir():
                self._read(entry, f"{prefix}{entry.name}/")
            elif type := _TYPES.get(entry.name.rpartition(".")[2]):
                content = entry.read_bytes()
                etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
                self._files[prefix + entry.name] = _File(content, type, etag)

    def answer(self, request: Request, path: str) -> Response | None:
        """The file at a path, or 304 if the client has it; None if there is none."""
        if (file := self._files.get(path)) is None:
            return None
        headers = {**_HEADERS, "etag": file.etag}
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if file.etag in known:
            return Response(status_code=304, headers=headers)
        return Response(file.content, headers=headers, media_type=file.type)
