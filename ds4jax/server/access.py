"""Who may call: keys of clients, names of this server, and pages of other origins."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Self

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from ds4jax.errors import Ds4Error
from ds4jax.server import page
from ds4jax.server.errors import ApiError, respond

LOOPBACK = ("localhost", "*.localhost", "127.0.0.0/8", "::1")
"""The names of a server that only this machine reaches. After DNS rebinding the Host header still names the attacker's
site."""
PROBES = ("/health", "/v1/health", "/ping", "/ready")
"""Paths that a load balancer asks under whatever name, mostly an address."""
WITHOUT_KEY = ("/", *PROBES)
_HOST = re.compile(r"([\w.-]*|\[[0-9a-f:.]+(?:%[\w.-]+)?\])(:[0-9]*)?", re.ASCII | re.IGNORECASE)
_KEY = re.compile(r"[!-~]+")


@dataclasses.dataclass(frozen=True)
class Keys:
    """The API keys of clients: without any, everyone may call. Not the keys are kept, but their SHA-256.

    names: the name of the client by the digest of its key.
    """

    names: Mapping[bytes, str] = dataclasses.field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, keys: Iterable[tuple[str, str]]) -> Self:
        """keys: the name and the key of each client. Raises Ds4Error, which never quotes a key."""
        names: dict[bytes, str] = {}
        for name, key in keys:
            if not _KEY.fullmatch(key):
                found = "an empty one" if not key else "one with a space or a character that is not ASCII"
                raise Ds4Error(f"api_key: found {found}, expected printable ASCII; without any, anyone may call")
            if name in names.values():
                raise Ds4Error(f"api_key: found the name {name!r} twice, expected a name for each key")
            if (other := names.setdefault(_digest(key), name)) != name:
                raise Ds4Error(f"api_key: found the same key for {other!r} and {name!r}, expected different ones")
        return cls(names)

    @classmethod
    def parse(cls, text: str) -> list[tuple[str, str]]:
        """What a file of keys holds, for `of`. Each line is ``NAME KEY``, or ``KEY``, whose name is that of its place,
        ``key1``, ``key2``; empty lines and those that begin with # are left out. Raises Ds4Error."""
        keys: list[tuple[str, str]] = []
        for n, line in enumerate(text.splitlines(), 1):
            match line.split():
                case []:
                    pass
                case [first, *_] if first.startswith("#"):
                    pass
                case [key]:
                    keys.append((f"key{len(keys) + 1}", key))
                case [name, key]:
                    keys.append((name, key))
                case words:
                    raise Ds4Error(f"api_key_file: line {n}: found {len(words)} words, expected NAME KEY, or KEY")
        if not keys:
            raise Ds4Error("api_key_file: found no key, expected lines NAME KEY")
        return keys

    def client(self, sent: Iterable[str]) -> str | None:
        """The name of the client that sent one of these keys, or None. Takes as long whichever it is."""
        found = None
        for key in sent:
            digest = _digest(key)
            for known, name in self.names.items():
                if hmac.compare_digest(known, digest):
                    found = name
        return found


class Access:
    """Around the application: refuses what names another host, what a page of another origin sends, and wrong keys.

    hosts: names and addresses of this server without ports, ``*.NAME`` for all names below one, ``ADDRESS/BITS`` for a
    network; without any, every name will do. origins: of other pages that may call, or "*". The name of the client is
    in the scope: ``scope["state"]["client"]``, and "" where no key is needed. Paths are those of the scope, by which
    the application routes: `Request.url` is made of the Host header, which may say anything.
    """

    def __init__(self, app: ASGIApp, *, keys: Keys, hosts: tuple[str, ...] = (), origins: tuple[str, ...] = ()):
        self._app, self._keys, self._origins = app, keys, origins
        self._hosts = hosts
        self._names = {_plain(host) for host in hosts}
        self._networks = [network for host in hosts if (network := _read(ipaddress.ip_network, _plain(host)))]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            request = Request(scope)
            try:
                self._check_host(request)
                self._check_origin(request)
                scope.setdefault("state", {})["client"] = self._client(request)
            except ApiError as error:
                return await respond(request, error)(scope, receive, send)
        await self._app(scope, receive, send)

    def _check_host(self, request: Request) -> None:
        """Against DNS rebinding. What has no Host header, as HTTP/1.0 may, comes from no browser."""
        sent = request.headers.get("host")
        if sent is None:
            return
        if not (found := _HOST.fullmatch(sent)):
            raise ApiError(f"host: found {sent[:100]!r}, expected a name or an address, with or without :PORT")
        if self._hosts and request.scope["path"] not in PROBES and not self._is_ours(_plain(found[1])):
            text = f"host: found {sent[:100]!r}, expected one of {', '.join(self._hosts)} (--allowed_hosts adds others)"
            raise ApiError(text, 421)

    def _is_ours(self, name: str) -> bool:
        if address := _read(ipaddress.ip_address, name):
            return any(address in network for network in self._networks)
        return name in self._names or any(known[:1] == "*" and name.endswith(known[1:]) for known in self._names)

    def _check_origin(self, request: Request) -> None:
        """Browsers send a cross-origin POST; CORS only hides the answer, so it is refused here."""
        origin = request.headers.get("origin")
        if origin is None or request.method in ("GET", "HEAD", "OPTIONS") or "*" in self._origins:
            return
        same = origin.lower().partition("://")[2] == request.headers.get("host", "").lower() != ""
        if not same and origin not in self._origins:
            text = f"origin: found {origin[:100]!r}, expected this server's or one that --cors_origins names"
            raise ApiError(text, 403)

    def _client(self, request: Request) -> str:
        path = request.scope["path"]
        if not self._keys.names or path in WITHOUT_KEY or path.startswith(page.PREFIX):
            return ""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        sent = (request.headers.get("x-api-key", ""), token.strip() if scheme.lower() == "bearer" else "")
        if (name := self._keys.client(sent)) is None:
            raise ApiError("the API key is missing or wrong", 401, code="invalid_api_key")
        return name


def _plain(host: str) -> str:
    """A host in the form in which it is compared: in lower case, without brackets and a final dot."""
    return host.lower().strip("[]").removesuffix(".")


def _read[T](kind: Callable[[str], T], text: str) -> T | None:
    """An address or a network, or None if the text is none."""
    try:
        return kind(text)
    except ValueError:
        return None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
