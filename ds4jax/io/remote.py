"""The header of a GGUF file on a server, read by HTTP range requests: metadata and shapes, no tensor. No JAX here."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ds4jax.errors import Ds4Error, GGUFError, show
from ds4jax.io import split
from ds4jax.io.gguf import MAGIC, GGUFFile, Header, Short

FIRST, MOST = 8 * 2**20, 64 * 2**20  # bytes of a header: asked for first, and at most. DeepSeek-V4-Flash's has 5.3 MB.
_SECONDS = 30  # without a byte


class RemoteFile(GGUFFile):
    """A GGUF file of which only the header is here."""

    has_data = False

    def __init__(self, name: str, header: Header):
        self.path, self.version, self.status = Path(name), header.version, os.stat_result((0,) * 10)
        self.metadata, self.tensors = header.metadata, header.tensors
        self.parts: list[GGUFFile] = [self]

    def close(self) -> None:
        """Nothing is open."""


def is_url(model: str) -> bool:
    """Whether a model is named by the address of its file."""
    return model.startswith(("http://", "https://"))


def open_url(url: str) -> GGUFFile:
    """The header of a file on a server; of a split one any part may be named, the others are beside it.

    Raises Ds4Error: unreachable, not there, a server without range requests, not a GGUF file. At most MOST bytes of a
    part are fetched. Where huggingface_hub has a token for the server, it is sent.
    """
    folder, slash, name = url.rpartition("/")
    parts: list[GGUFFile] = [RemoteFile(part, _header(f"{folder}{slash}{part}")) for part in split.part_names(name)]
    if len(parts) == 1:
        return parts[0]
    split.check(parts)
    return split.SplitFile(parts)


def open_hf(repo: str, file: str) -> GGUFFile:
    """`open_url` for a file of a Hugging Face repository."""
    from huggingface_hub import hf_hub_url

    return open_url(hf_hub_url(repo, file))


def _header(url: str) -> Header:
    """The header of one file, of which as little as possible is fetched."""
    have, size, want = b"", 0, FIRST
    while True:
        got, size = _bytes(url, len(have), want)
        have += got
        try:
            return Header(have, size)
        except Short as error:
            if len(have) >= size or not have.startswith(MAGIC):
                raise GGUFError(f"{url}: {error}") from None
            if len(have) >= MOST:
                raise GGUFError(f"{url}: found no end of the header in {len(have)} bytes: {error}") from None
        except GGUFError as error:
            raise GGUFError(f"{url}: {error}") from None
        want = min(2 * len(have), MOST)


def _bytes(url: str, start: int, stop: int) -> tuple[bytes, int]:
    """Bytes [start, stop) of a file, fewer where it ends, and its size."""
    from huggingface_hub.utils import build_hf_headers, get_session

    headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    if _is_hub(url):
        headers |= build_hf_headers()
    with (
        _answers(url),
        get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=_SECONDS) as reply,
    ):
        if reply.status_code == 416:
            raise Ds4Error(f"{url}: found no byte {start}, expected a GGUF file")
        if reply.status_code >= 400:
            raise Ds4Error(f"{url}: found status {reply.status_code} ({reply.reason_phrase}), expected a GGUF file")
        if reply.status_code != 206:
            raise Ds4Error(
                f"{url}: found status {reply.status_code}, expected 206: the server must answer range requests"
            )
        range_ = reply.headers.get("content-range")
        stated = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", range_ or "")
        if not stated or int(stated[1]) != start:
            raise Ds4Error(f"{url}: found the range {show(range_)}, expected 'bytes {start}-LAST/SIZE'")
        size, out = int(stated[3]), bytearray()
        expected = min(stop, size) - start
        for piece in reply.iter_raw():
            out += piece
            if len(out) > expected:
                raise Ds4Error(f"{url}: found more bytes than the {expected} asked for")
        if len(out) < expected:
            raise Ds4Error(f"{url}: the transfer ended at byte {start + len(out)} of {start + expected}")
        return bytes(out), size


def _is_hub(url: str) -> bool:
    from huggingface_hub import constants

    return url.startswith(constants.ENDPOINT + "/")


@contextlib.contextmanager
def _answers(url: str) -> Iterator[Any]:
    """Makes what the HTTP library raises one line."""
    try:
        yield
    except Ds4Error:
        raise
    except Exception as error:  # which HTTP library can fail here depends on huggingface_hub's version
        what = str(error).strip().split("\n")[0]
        raise Ds4Error(f"{url}: cannot be fetched: {type(error).__name__}: {what}") from error
