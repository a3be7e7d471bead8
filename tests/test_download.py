"""ds4jax.io.download against a local server that speaks as much of the Hugging Face protocol as a download needs."""

from __future__ import annotations

import fcntl
import hashlib
import http.server
import os
import random
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest

from ds4jax.errors import Ds4Error
from ds4jax.io import download
from ds4jax.settings import Settings

MODEL = "hf:owner/repo/model.gguf"
PARTS = [f"q2/m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]  # the server has the same content for each
CONTENT = random.Random(0).randbytes(25 * 10**6)  # huggingface_hub writes in pieces of 10 MiB
STATED = hashlib.sha256(CONTENT).hexdigest()


class Hub(http.server.ThreadingHTTPServer):
    """Serves owner/repo/model.gguf. `gets` are the Range headers (or None) of the GET requests so far.

    stop_at: the byte before which the first GET stalls, or hangs up if `hang_up`.
    etag, size, headers: what HEAD states.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.gets, self.stop_at, self.hang_up, self.resume = [], None, False, threading.Event()
        self.etag, self.size = STATED, len(CONTENT)
        self.headers = {"X-Repo-Commit": "c" * 40}


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def head(self, status, length, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **self.server.headers, **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def refused(self):
        """404 and 401 as the Hub has them."""
        code = {
            "/owner/repo/resolve/main/model.gguf": None,
            **{f"/owner/repo/resolve/main/{part}": None for part in PARTS},
            "/owner/repo/resolve/main/other.gguf": "EntryNotFound",
            "/owner/gated/resolve/main/model.gguf": "GatedRepo",
        }.get(self.path, "RepoNotFound")
        if code:
            self.head(401 if code == "GatedRepo" else 404, 0, **{"X-Error-Code": code})
        return code

    def do_HEAD(self):
        if not self.refused():
            self.head(200, self.server.size, ETag=f'"{self.server.etag}"')

    def do_GET(self):
        if self.refused():
            return
        hub, start = self.server, 0
        hub.gets.append(self.headers.get("Range"))
        if hub.gets[-1]:
            start = int(hub.gets[-1].removeprefix("bytes=").removesuffix("-"))
            self.head(
                206, len(CONTENT) - start, **{"Content-Range": f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"}
            )
        else:
            self.head(200, len(CONTENT))
        stop = hub.stop_at if len(hub.gets) == 1 and hub.stop_at else len(CONTENT)
        self.wfile.write(CONTENT[start:stop])
        if stop < len(CONTENT):
            if not hub.hang_up:
                hub.resume.wait(60)
            self.close_connection = True


@pytest.fixture
def hub():
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.01,))
        thread.start()
        yield hub
        hub.resume.set()
        hub.shutdown()
        thread.join()


@pytest.fixture
def environment(hub, tmp_path):
    own = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*"}
    return {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | own


@pytest.fixture
def fetch(environment):
    """Runs the tool: (exit status, stdout, stderr)."""

    def call(*argv):
        command = [sys.executable, "-m", "ds4jax.download", *argv]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout, done.stderr

    return call


def blobs(tmp_path):
    return tmp_path / "hf" / "hub" / "models--owner--repo" / "blobs"


def printed(out):
    return Path(out.removesuffix("\n"))


def test_a_file_is_fetched_once_and_found_again(fetch, hub, environment, tmp_path, monkeypatch):
    status, out, err = fetch(f"--model={MODEL}")
    assert status == 0, err
    path = printed(out)
    assert path.read_bytes() == CONTENT
    assert hub.gets == [None]
    assert "downloading: 23.8 of 23.8 MiB\n" in err and "\r" not in err
    environment["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nothing listens there
    assert fetch(f"--model={MODEL}") == (0, out, "")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    assert download.resolve_model(Settings(MODEL)) == path


def test_a_terminal_shows_progress(hub, environment):
    terminal, stderr = os.openpty()
    termios.tcsetwinsize(stderr, (24, 100))
    command = [sys.executable, "-m", "ds4jax.download", f"--model={MODEL}"]
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr, check=True, timeout=60)
    shown = os.read(terminal, 2**16).decode()
    os.close(terminal)
    os.close(stderr)
    assert "model.gguf" in shown and "100%" in shown and "25.0M/25.0M" in shown


def test_a_killed_download_continues_where_it_was(fetch, hub, environment, tmp_path):
    hub.stop_at = 15 * 10**6
    process = subprocess.Popen(
        [sys.executable, "-m", "ds4jax.download", f"--model={MODEL}"], env=environment, stderr=subprocess.DEVNULL
    )
    partial = blobs(tmp_path) / f"{STATED}.partial"
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    have = partial.stat().st_size
    assert 0 < have < 15 * 10**6

    status, out, err = fetch(f"--model={MODEL}")
    assert status == 0, err
    assert hub.gets == [None, f"bytes={have}-"]
    assert printed(out).read_bytes() == CONTENT
    assert not partial.exists()


def test_a_broken_connection_is_taken_up_again(fetch, hub):
    hub.stop_at, hub.hang_up = 15 * 10**6, True
    status, out, err = fetch(f"--model={MODEL}")
    assert status == 0, err
    assert len(hub.gets) == 2 and hub.gets[1].startswith("bytes=")
    assert printed(out).read_bytes() == CONTENT


def test_a_complete_partial_file_needs_no_transfer(fetch, hub, tmp_path):
    blobs(tmp_path).mkdir(parents=True)
    (blobs(tmp_path) / f"{STATED}.partial").write_bytes(CONTENT)
    status, out, _ = fetch(f"--model={MODEL}")
    assert status == 0 and printed(out).read_bytes() == CONTENT and not hub.gets


def test_wrong_content_is_deleted(fetch, hub, tmp_path):
    hub.etag = "0" * 64
    status, out, err = fetch(f"--model={MODEL}")
    assert (status, out) == (1, "")
    assert f"error: {MODEL}: what was received is not the file that the repository states; deleted it" in err
    assert not list(blobs(tmp_path).iterdir())


def test_a_full_disk_is_refused_with_numbers(fetch, hub):
    hub.size = 2**60
    status, _, err = fetch(f"--model={MODEL}")
    assert status == 1 and not hub.gets
    assert f"error: {MODEL}: found " in err and " GiB free in " in err
    assert "expected 1073741824.0 GiB for the file and 1 GiB to spare (HF_HOME moves the cache elsewhere)\n" in err


def test_a_download_in_progress_is_left_alone(fetch, tmp_path):
    blobs(tmp_path).mkdir(parents=True)
    with open(blobs(tmp_path) / f"{STATED}.partial", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        status, _, err = fetch(f"--model={MODEL}")
    assert status == 1 and err.endswith("another process is downloading this file\n")


@pytest.mark.parametrize(
    "model, problem",
    [
        ("hf:owner/repo/other.gguf", "the repository owner/repo at http://127.0.0.1:PORT has no file other.gguf"),
        ("hf:owner/none/model.gguf", "found no repository owner/none at http://127.0.0.1:PORT"),
        ("hf:owner/gated/model.gguf", "access is restricted: accept its terms on http://127.0.0.1:PORT/owner/gated"),
        ("hf:not a/repo/file", "cannot be fetched from http://127.0.0.1:PORT: HFValidationError: "),
    ],
)
def test_what_is_not_there_is_one_line(fetch, hub, model, problem):
    status, out, err = fetch(f"--model={model}")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"error: {model}: " + problem.replace("PORT", str(hub.server_port)))


def test_no_network_is_one_line(fetch, environment):
    environment["HF_ENDPOINT"] = "http://127.0.0.1:9"  # the discard port: nothing listens
    status, out, err = fetch(f"--model={MODEL}")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"error: {MODEL}: cannot be fetched from http://127.0.0.1:9: Connect")


@pytest.mark.parametrize("wrong", [{"headers": {}}, {"etag": "../../up"}, {"etag": ""}, {"size": 0}])
def test_other_servers_are_refused(fetch, hub, wrong):
    vars(hub).update(wrong)
    status, _, err = fetch(f"--model={MODEL}")
    expected = f"error: {MODEL}: http://127.0.0.1:{hub.server_port} does not state revision, size and ETag"
    assert status == 1 and err.startswith(expected) and not hub.gets


def test_models_that_need_no_download(fetch, environment, tmp_path):
    environment["XDG_CACHE_HOME"] = str(tmp_path)
    status, out, _ = fetch("--config=tiny")
    assert status == 0 and printed(out).stat().st_size
    status, _, err = fetch("--model=none.gguf")
    assert status == 1 and err.startswith("error: model none.gguf: no such file; python -m ds4jax.download --config")


def test_all_parts_of_a_split_file_are_fetched(fetch, hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    model = f"hf:owner/repo/{PARTS[1]}"
    status, out, _ = fetch(f"--model={model}")
    assert status == 0 and printed(out).name == "m-00002-of-00003.gguf"
    paths = sorted(printed(out).parent.iterdir())
    assert [path.name for path in paths] == [Path(name).name for name in PARTS]
    assert all(path.read_bytes() == CONTENT for path in paths)
    assert download.resolve_model(Settings(model)) == printed(out)
    paths[2].unlink()
    with pytest.raises(Ds4Error, match=f"model {model}: not on this machine; get it with"):
        download.resolve_model(Settings(model))


def test_resolving_a_model_never_downloads(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(download, "download", lambda *_: pytest.fail("downloaded"))
    with pytest.raises(Ds4Error, match=f"not on this machine; get it with: python -m ds4jax.download --model {MODEL}"):
        download.resolve_model(Settings(MODEL))
    with pytest.raises(Ds4Error, match="model hf:not a/repo/file: Repo id must"):
        download.resolve_model(Settings("hf:not a/repo/file"))
    (tmp_path / "here.gguf").touch()
    assert download.resolve_model(Settings(str(tmp_path / "here.gguf"))) == tmp_path / "here.gguf"
