"""Who may call: keys, names of the server, pages of other origins; and files that are read within bounds."""

from __future__ import annotations

import ipaddress
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from fake_engine import FakeEngine, serving
from starlette.datastructures import URL
from starlette.requests import Request

from ds4jax import files
from ds4jax.errors import ConfigError, Ds4Error
from ds4jax.server.access import LOOPBACK, Access, Keys
from ds4jax.server.app import Options
from ds4jax.settings import Settings
from ds4jax.tools import generate, serve

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import serve_sharded  # noqa: E402

PATH = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "Hi"}]}
KEYS = Keys.of([("anna", "key-of-anna"), ("ben", "key-of-ben")])


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(lambda _: "</think>Hello")


# ---- keys ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR "])
def test_the_scheme_of_a_key_in_any_case(engine, scheme):
    with serving(engine, Options(keys=KEYS)) as url:
        for key, status in (("key-of-anna", 200), ("key-of-ben", 200), ("key-of-an", 401), ("x", 401)):
            sent = {"authorization": f"{scheme} {key}"}
            assert httpx.post(url + PATH, json=HI, headers=sent).status_code == status
        for value in ("key-of-anna", "Basic key-of-anna", "Bearerkey-of-anna"):
            answer = httpx.post(url + PATH, json=HI, headers={"authorization": value})
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"


def test_the_application_is_told_who_calls():
    import asyncio

    seen = []

    async def app(scope, receive, send):
        seen.append(scope["state"]["client"])

    async def call(keys: Keys, path: str = "/metrics", **headers: str) -> None:
        raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": raw}
        await Access(app, keys=keys)(scope, None, None)  # type: ignore[arg-type]

    async def calls() -> None:
        await call(KEYS, authorization="Bearer key-of-anna")
        await call(KEYS, x_api_key="key-of-ben")
        await call(KEYS, x_api_key="wrong", authorization="Bearer key-of-ben")
        await call(KEYS, path="/health")
        await call(Keys(), authorization="Bearer any")

    asyncio.run(calls())
    assert seen == ["anna", "ben", "ben", "", ""]


def test_a_host_that_holds_a_path_needs_a_key_as_others(engine, monkeypatch):
    """As `Request.url` may be made of the Host header, whatever that says."""
    monkeypatch.setattr(
        Request, "url", property(lambda self: URL(f"http://{self.headers['host']}{self.scope['path']}"))
    )
    with serving(engine, Options(keys=KEYS)) as url:
        for host in ("x/health?", "x/health#", "x/ping/", "a@b", "[", "a b", "a:b", "[g]", "x\u00e9"):
            answer = httpx.post(url + PATH, json=HI, headers={b"host": host.encode()})
            assert answer.status_code == 400 and "expected a name or an address" in answer.text, host
            assert httpx.get(f"{url}/health", headers={b"host": host.encode()}).status_code == 400, host
        for host in ("x", "x:", "X.example.:8000", "a_b:1", "[::1]:80", "[fe80::1%eth0]", "", ":80"):
            assert httpx.post(url + PATH, json=HI, headers={"host": host}).status_code == 401, host
    assert not engine.requests
    # Without the check of the Host header, too.
    monkeypatch.setattr(Access, "_check_host", lambda self, request: None)
    with serving(engine, Options(keys=KEYS)) as url:
        assert httpx.post(url + PATH, json=HI, headers={"host": "x/health?"}).status_code == 401
        answer = httpx.post(f"{url}/v1/messages", json=HI, headers={"host": "x/health?"})
        assert answer.status_code == 401 and answer.json()["type"] == "error"  # in Anthropic's form
        assert "found no /none" in httpx.get(f"{url}/none", headers={"host": "x/y?", "x-api-key": "key-of-ben"}).text


def test_every_key_is_compared_whichever_is_right(monkeypatch):
    import hmac

    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or a == b)
    for key in ("key-of-anna", "key-of-ben", "x", "", "x" * 999):
        KEYS.client([key])
    assert compared == [(32, 32)] * 10


def test_keys_are_not_shown():
    assert "key-of" not in repr(Options(keys=KEYS)) and "key-of" not in repr(KEYS.names)


def test_a_file_of_keys():
    text = "# those who may\nanna  key-of-anna\n\n  key-of-nobody\n\tben\tkey-of-ben  \n#x y\nkey-of-other"
    assert Keys.parse(text) == [
        ("anna", "key-of-anna"),
        ("key2", "key-of-nobody"),
        ("ben", "key-of-ben"),
        ("key4", "key-of-other"),
    ]
    with pytest.raises(Ds4Error, match="^api_key_file: line 2: found 3 words, expected NAME KEY, or KEY$"):
        Keys.parse("a b\na secret key")
    with pytest.raises(Ds4Error, match="^api_key_file: found no key"):
        Keys.parse("# none\n")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([("a", "")], "found an empty one"),
        ([("a", "secret key")], "found one with a space"),
        ([("a", "sécret")], "found one with a space or a character that is not ASCII"),
        ([("a", "secret"), ("a", "secret2")], "found the name 'a' twice"),
        ([("a", "secret"), ("b", "secret")], "found the same key for 'a' and 'b'"),
    ],
)
def test_keys_that_cannot_be_are_refused_unquoted(keys, message):
    with pytest.raises(Ds4Error, match=f"^api_key: {message}") as error:
        Keys.of(keys)
    assert "secret" not in str(error.value)


@pytest.fixture
def flags(monkeypatch):
    def parse(*argv: str) -> None:
        monkeypatch.delenv("DS4JAX_API_KEY", raising=False)
        serve.FLAGS.unparse_flags()
        for name in serve.FLAGS:
            serve.FLAGS[name].unparse()
        serve.FLAGS(["serve", *argv])

    monkeypatch.setattr(Settings, "load", lambda *args, **kwargs: pytest.fail("the flags were taken"))
    return parse


def test_keys_of_a_file_and_of_the_environment(flags, monkeypatch, tmp_path, capsys):
    path = tmp_path / "keys"
    path.write_text("anna key-of-anna\n")
    path.chmod(0o600)
    flags(f"--api_key_file={path}")
    monkeypatch.setenv("DS4JAX_API_KEY", "key-of-all")
    assert serve._keys() == Keys.of([("default", "key-of-all"), ("anna", "key-of-anna")])
    assert capsys.readouterr().err == ""
    path.chmod(0o604)
    serve._keys()
    assert capsys.readouterr().err == f"warning: {path}: others can read the keys (chmod o-r)\n"
    monkeypatch.setenv("DS4JAX_API_KEY", "")
    with pytest.raises(Ds4Error, match="^api_key: found an empty one"):
        serve._keys()
    monkeypatch.delenv("DS4JAX_API_KEY")
    for wrong in (tmp_path / "none", tmp_path):
        flags(f"--api_key_file={wrong}")
        with pytest.raises(Ds4Error, match=f"^api_key_file: {wrong}: cannot be read: "):
            serve._keys()


# ---- names of the server, and pages ----------------------------------------------------------------------------------
def test_other_hosts_are_refused_where_only_this_machine_can_connect(engine):
    with serving(engine, Options(hosts=(*LOOPBACK, "gpu.example", "*.lan"))) as url:
        ours = ["localhost:8000", "LOCALHOST", "127.0.0.1", "[::1]:9", "a.localhost", "gpu.example:1", "b.lan"]
        ours += ["localhost.", "gpu.example.:80", "127.0.0.2", "[0:0:0:0:0:0:0:1]:8000"]
        for host in ours:
            assert httpx.get(f"{url}/version", headers={"host": host}).status_code == 200, host
        for host in (
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "[::2]",
            "128.0.0.1",
            "localhost..",
            "",
            "lan",
        ):
            answer = httpx.get(url, headers={"host": host})
            assert answer.status_code == 421, host
            assert answer.json()["error"]["message"].startswith(f"host: found {host!r}, expected one of localhost, ")
        answer = httpx.post(f"{url}/v1/messages", json=HI, headers={"host": "evil.example"})
        assert answer.status_code == 421 and answer.json()["type"] == "error"
        for path in ("/health", "/v1/health", "/ping", "/ready"):  # a load balancer knows an address only
            assert httpx.get(url + path, headers={"host": "10.0.0.5:8000"}).status_code == 200
        address = url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1]))) as sock:  # as a load balancer checks
            sock.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            assert sock.recv(99).startswith(b"HTTP/1.1 200 ")
    with serving(engine) as url:
        assert httpx.get(f"{url}/health", headers={"host": "evil.example"}).status_code == 200


def test_the_names_that_are_the_servers_own():
    def hosts(host: str, address: str, *more: str) -> tuple[str, ...]:
        return serve._hosts(host, ipaddress.ip_address(address), list(more) or None)

    assert hosts("0.0.0.0", "0.0.0.0") == hosts("gpu.lan", "10.0.0.5") == ()
    assert hosts("0.0.0.0", "0.0.0.0", "a.example") == hosts("::", "::", "a.example") == (*LOOPBACK, "a.example")
    assert hosts("gpu.lan", "10.0.0.5", "a.example") == (*LOOPBACK, "gpu.lan", "a.example")
    assert hosts("localhost", "127.0.0.1") == hosts("127.0.0.1", "127.0.0.1") == hosts("::1", "::1") == LOOPBACK
    assert hosts("gpu", "127.0.1.1") == (*LOOPBACK, "gpu")


@pytest.mark.parametrize("content", ["application/json", "text/plain", "application/x-www-form-urlencoded"])
def test_pages_of_other_origins_cannot_post(engine, content):
    """Browsers send what needs no preflight whatever the answer to it will be."""
    with serving(engine, Options(cors=("https://good.example",))) as url:
        for origin, status in (
            (None, 200),
            (url, 200),
            (url.replace("http:", "https:"), 200),  # behind a proxy that speaks TLS
            ("https://good.example", 200),
            ("http://good.example", 403),
            ("https://evil.example", 403),
            ("http://127.0.0.1", 403),
            ("null", 403),
            ("", 403),
        ):
            headers = {"content-type": content} | ({} if origin is None else {"origin": origin})
            before = len(engine.requests)
            answer = httpx.post(url + PATH, json=HI, headers=headers)
            assert answer.status_code == status, origin
            assert len(engine.requests) == before + (status == 200)
            assert ("access-control-allow-origin" in answer.headers) == (origin == "https://good.example")
            assert httpx.get(f"{url}/health", headers=headers).status_code == 200
        foreign = {"origin": "https://evil.example"}
        assert httpx.delete(f"{url}/v1/responses/x", headers=foreign).status_code == 403
        assert httpx.delete(f"{url}/v1/responses/x").status_code == 404
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
        assert httpx.options(url + PATH, headers=foreign | asked).status_code == 400
        assert httpx.options(url + PATH, headers={"origin": "https://good.example"} | asked).status_code == 200
    with serving(engine, Options(cors=("*",))) as url:
        assert httpx.post(url + PATH, json=HI, headers={"origin": "null"}).status_code == 200


@pytest.mark.parametrize("origin", ["good.example", "https://good.example/", "https://", "'*'", "https://a.example,"])
def test_what_is_no_origin_is_refused(flags, origin):
    flags(f"--cors_origins={origin}")
    with pytest.raises(ConfigError, match="^cors_origins: found '?.*'?, expected SCHEME://HOST"):
        serve.main()


@pytest.mark.parametrize("host", ["https://a.example", "a.example:80", "a*.example", ""])
def test_what_is_no_host_is_refused(flags, host):
    flags(f"--allowed_hosts=b.example,{host},::1")
    with pytest.raises(ConfigError, match="^allowed_hosts: found '.*', expected the name of a host without a port"):
        serve.main()


# ---- the process -----------------------------------------------------------------------------------------------------
PROGRAM = """
import sys
sys.path.insert(0, "tests")
from fake_engine import FakeEngine
from ds4jax.__main__ import main
from ds4jax.engine.async_engine import AsyncEngine
AsyncEngine.open = lambda *args, **kwargs: FakeEngine(lambda _: "</think>Hello")
main(["serve", "--port=0", *sys.argv[1:]])
"""


def log_of(*flags: str, key: str | None = None) -> str:
    """The stderr of a server that has refused a request and answered one."""
    env = os.environ | ({"DS4JAX_API_KEY": key} if key else {})
    command = [sys.executable, "-c", PROGRAM, *flags]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env)
    assert server.stderr is not None
    log = ""
    for line in server.stderr:
        log += line
        if line.startswith("serving "):
            url = line.split()[-1].replace("0.0.0.0", "127.0.0.1")
            command = Path(f"/proc/{server.pid}/cmdline").read_text()
            assert key is None or key not in command
            for sent in (key or "any", "wrong"):
                answer = httpx.post(url + PATH, json=HI | {"unknown": 1}, headers={"authorization": f"bearer {sent}"})
                assert answer.status_code == (401 if key and sent != key else 200)
            server.send_signal(signal.SIGTERM)
    server.wait()
    server.stderr.close()
    return log


def test_a_public_address_without_a_key_warns():
    warning = "warning: whoever reaches 0.0.0.0 may call: no key is set (--api_key_file, DS4JAX_API_KEY)\n"
    assert log_of("--host=0.0.0.0").count(warning) == 1
    assert "may call" not in (quiet := log_of()) and "profile: original (no sign of 0731)\nserving fake at " in quiet
    log = log_of("--host=0.0.0.0", key="a-secret-key")
    assert "may call" not in log and "fields of a request" in log and "a-secret-key" not in log


# ---- small files -----------------------------------------------------------------------------------------------------
def test_configs_are_read_within_bounds(tmp_path):
    link = tmp_path / "endless.toml"
    link.symlink_to("/dev/zero")
    with pytest.raises(Ds4Error, match=f"^{link}: found more than {1 << 20} bytes, expected at most that$"):
        Settings.load(link)


def test_small_files_are_read_within_bounds(tmp_path, flags):
    path = tmp_path / "f"
    path.write_bytes(b"x" * 9)
    assert files.read_small(path, 9) == b"x" * 9
    for wrong, limit in ((path, 8), ("/dev/zero", 1 << 20), ("/dev/full", 1 << 20)):
        with pytest.raises(Ds4Error, match=f"^{wrong}: found more than {limit} bytes, expected at most that$"):
            files.read_small(wrong, limit)
    flags("--api_key_file=/dev/zero")
    with pytest.raises(Ds4Error, match="^/dev/zero: found more than"):
        serve._keys()


def test_a_pipe_is_read_to_its_end():
    """As `--prompt_file <(command)` makes one, which sends in pieces."""
    out, into = os.pipe()

    def write() -> None:
        for piece in (b"one ", b"two ", b"three"):
            os.write(into, piece)
        os.close(into)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert generate._read(f"/dev/fd/{out}") == "one two three"
    finally:
        writer.join()
        os.close(out)


# ---- how it is run ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "SECURITY.md", *(ROOT / "docs/deploy").iterdir()], ids=str)
def test_flags_that_are_written_of_are_there(path):
    text = path.read_text("utf-8")
    if path.name == "README.md":
        text = text.partition("## Chat and serve")[2].partition("### Agents")[0]
    written = set(re.findall(r"--([a-z]+_[a-z_]+)", text))
    assert written and written <= {*serve.FLAGS, *serve_sharded.FLAGS}
