"""Model files from Hugging Face, and where they lie on this machine.

huggingface_hub supplies the transfer, the credentials and the cache, where other programs find the file too. Its own
`hf_hub_download` starts over after an interruption (huggingface_hub issue 4196), which for 81 GiB will not do: so the
bytes are collected here, in a partial file that the next run continues, and handed to it when they are complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any, BinaryIO

from ds4jax.errors import Ds4Error
from ds4jax.io.split import part_names
from ds4jax.paths import EMBEDDED, embedded_model
from ds4jax.settings import Settings
from ds4jax.terminal import Progress, is_terminal, meter

MARGIN = 2**30  # bytes of disk that must stay free
_GIB = 2**30


def resolve_model(settings: Settings) -> Path:
    """The model file on this machine; nothing is ever downloaded.

    Raises Ds4Error saying how to get the file where it is missing.
    """
    if settings.model in EMBEDDED:
        return embedded_model(settings.model)
    if settings.hf_file is None:
        path = Path(settings.model).expanduser()
        if not path.exists():
            raise Ds4Error(
                f"model {path}: no such file; python -m ds4jax.download --config NAME fetches a published one, "
                "--config tiny has one embedded"
            )
        return path
    from huggingface_hub import try_to_load_from_cache

    repo, file = settings.hf_file
    try:
        paths = {name: try_to_load_from_cache(repo, name) for name in part_names(file)}
    except ValueError as error:  # not the name of a repository
        raise Ds4Error(f"model {settings.model}: {error}") from None
    if not all(isinstance(path, str) for path in paths.values()):
        raise Ds4Error(
            f"model {settings.model}: not on this machine; get it with: "
            f"python -m ds4jax.download --model {settings.model}"
        )
    return Path(str(paths[file]))


def download(repo: str, file: str) -> Path:
    """Fetch a file of a Hugging Face repository into the local cache, unless it is there; → its path.

    Of a split file, NAME-00001-of-00003.gguf, all parts are fetched, whichever is named. Raises Ds4Error: no such file
    or repository, no network, not enough disk.
    """
    return {name: _fetch(repo, name) for name in part_names(file)}[file]


def _fetch(repo: str, file: str) -> Path:
    """Fetch one file, unless it is there; → its path.

    Continues what an earlier call left incomplete. The result has the size and, for large files, the SHA-256 that the
    repository states.
    """
    from huggingface_hub import (
        constants,
        errors,
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )
    from huggingface_hub.file_download import http_get, repo_folder_name
    from huggingface_hub.utils import build_hf_headers

    name = f"hf:{repo}/{file}"
    try:
        if isinstance(path := try_to_load_from_cache(repo, file), str):
            return Path(path)
        url = hf_hub_url(repo, file)
        meta = get_hf_file_metadata(url)
        if not (meta.commit_hash and meta.size and meta.etag and re.fullmatch(r"\w[\w.-]*", meta.etag)):
            raise Ds4Error(f"{name}: {constants.ENDPOINT} does not state revision, size and ETag as Hugging Face does")
        blobs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model") / "blobs"
        blob, partial = blobs / meta.etag, blobs / f"{meta.etag}.partial"
        if not blob.exists():
            blobs.mkdir(parents=True, exist_ok=True)
            with open(partial, "ab") as out:
                _lock(out, partial)
                have = out.tell()
                _check_disk(blobs, meta.size - have, name)
                print(f"{name}: {meta.size / _GIB:.1f} GiB, {have / _GIB:.1f} of it here already", file=sys.stderr)
                if have < meta.size:
                    # No expected_size: with it, files above 50 GB are refused. Size and content are checked below.
                    # On a terminal there is http_get's own bar; in a log it says nothing.
                    with meter(meta.size, "downloading", "B", show=not is_terminal(sys.stderr)) as bar:
                        bar.update(have)
                        into: Any = _Counted(out, bar)
                        http_get(url, into, resume_size=have, headers=build_hf_headers(), displayed_filename=file)
                out.flush()
                _verify(partial, meta.size, meta.etag, name)
                os.replace(partial, blob)
        return Path(hf_hub_download(repo, file))  # finds the content, and files it under its name and revision
    except Ds4Error:
        raise
    except errors.GatedRepoError:
        raise Ds4Error(
            f"{name}: access is restricted: accept its terms on {constants.ENDPOINT}/{repo}, set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise Ds4Error(
            f"{name}: found no repository {repo} at {constants.ENDPOINT} (a private one needs HF_TOKEN)"
        ) from None
    except errors.EntryNotFoundError:
        raise Ds4Error(f"{name}: the repository {repo} at {constants.ENDPOINT} has no file {file}") from None
    except Exception as error:  # which HTTP library can fail here depends on huggingface_hub's version
        what = str(error).strip().split("\n")[0]
        raise Ds4Error(
            f"{name}: cannot be fetched from {constants.ENDPOINT}: {type(error).__name__}: {what}"
        ) from error


class _Counted:
    """A file whose bar counts what is written."""

    def __init__(self, file: BinaryIO, bar: Progress):
        self._file, self._bar = file, bar

    def write(self, data: bytes) -> int:
        self._bar.update(len(data))
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _lock(file, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Ds4Error(f"{path}: another process is downloading this file") from None


def _check_disk(folder: Path, need: int, name: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < need + MARGIN:
        raise Ds4Error(
            f"{name}: found {free / _GIB:.1f} GiB free in {folder}, expected {need / _GIB:.1f} GiB for the file "
            f"and {MARGIN / _GIB:.0f} GiB to spare (HF_HOME moves the cache elsewhere)"
        )


def _verify(partial: Path, size: int, etag: str, name: str) -> None:
    """Raises Ds4Error, and deletes a file that no further download can complete."""
    found = partial.stat().st_size
    if found < size:
        raise Ds4Error(f"{name}: the transfer ended at byte {found} of {size}; run the command again to continue")
    if re.fullmatch("[0-9a-f]{64}", etag):  # large files: the SHA-256
        print("checking the SHA-256 ...", file=sys.stderr)
        with open(partial, "rb") as file:
            good = hashlib.file_digest(file, "sha256").hexdigest() == etag
    else:
        good = found == size
    if not good:
        partial.unlink()
        raise Ds4Error(f"{name}: what was received is not the file that the repository states; deleted it, try again")
