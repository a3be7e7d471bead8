"""What the server gives to the chat page: its files, and the samples of its plots. No browser."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine, serving

from ds4jax.engine.counters import Histogram
from ds4jax.server import history, page
from ds4jax.server.access import Keys
from ds4jax.server.app import Options
from ds4jax.server.history import History, quantile
from ds4jax.server.replay import Replay

FOLDER = Path(page.__file__).parent / "page"


def test_files_come_with_their_hash_and_a_strict_policy_without_a_key():
    with serving(FakeEngine(lambda _: ""), Options(keys=Keys.of([("one", "secret")]))) as url:
        with httpx.Client(base_url=url) as http:
            start = http.get("/")
            assert start.status_code == 200 and start.headers["content-type"] == "text/html; charset=utf-8"
            policy = start.headers["content-security-policy"]
            assert "unsafe" not in policy and "http" not in policy and policy.startswith("default-src 'none'; ")
            for path in re.findall(r'(?:href|src)="(page/[^"]+)"', start.text):
                assert http.get(path).status_code == 200, path
            etag = http.get("/page/app.js").headers["etag"]
            same = http.get("/page/app.js", headers={"if-none-match": f'"x", W/{etag}'})
            assert same.status_code == 304 and not same.content
            for path in "/page/none.js", "/page/../app.py", "/page/%2e%2e/app.py", "/page/vendor/vendor.json":
                assert http.get(path).status_code in (401, 404), path
            assert http.get("/history").status_code == 401
            answer = http.get(
                "/history", headers={"authorization": "Bearer secret"}, params={"since": 0, "last": 1}
            ).json()
            assert len(answer["samples"]) == 1 and answer["samples"][0]["waiting"] == 0
            assert http.get("/history?since=x", headers={"x-api-key": "secret"}).status_code == 400


def test_the_page_has_no_code_of_its_own_in_html_and_loads_nothing_from_elsewhere():
    html = (FOLDER / "index.html").read_text()
    assert not re.search(r"<script(?! type=\"module\" src=)|\son\w+=|\sstyle=|javascript:", html)
    for path in [*FOLDER.glob("*.js"), *FOLDER.glob("*.css"), FOLDER / "index.html"]:
        text = path.read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            path
        )
        assert not re.search(r"https?://(?!www\.w3\.org/)", text), path
        for name in re.findall(r'(?:from|import\()\s*"(\./[^"]+)"', text):
            assert (path.parent / name).is_file(), name


def test_vendored_libraries_are_what_the_manifest_says():
    vendor = FOLDER / "vendor"
    manifest = json.loads((vendor / "vendor.json").read_text())
    listed = {name: digest for one in manifest for name, digest in one["files"].items()}
    assert all(one["license"] and one["integrity"].startswith("sha512-") for one in manifest)
    found = {p.relative_to(vendor).as_posix(): p.read_bytes() for p in vendor.rglob("*") if p.is_file()}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in found.items() if name != "vendor.json"}
    assert listed == hashes
    assert sum(map(len, found.values())) < 1.5e6


def test_samples_are_rates_shares_and_quantiles_of_what_came_since(monkeypatch):
    engine: Any
    engine, now = FakeEngine(lambda _: ""), [1000.0]
    monkeypatch.setattr(history.time, "time", lambda: now[0])
    state = {"generated_tokens": 0, "prompt_tokens": 0, "cached_tokens": 0, "drafts_by_place": [(0, 0)]}
    gaps = Histogram("Gaps", (0.1, 0.2))
    monkeypatch.setattr(engine, "metrics", lambda: state | {"histograms": {"inter_token_latency_seconds": gaps}})
    sampled = History(engine, Replay())
    sampled.sample()
    now[0] += 2
    state |= {"generated_tokens": 100, "prompt_tokens": 40, "cached_tokens": 10, "drafts_by_place": [(8, 6), (2, 1)]}
    for seconds in 0.15, 0.15, 0.15, 5.0:
        gaps.observe(seconds)
    sampled.sample()
    first, second = sampled.since(0)["samples"]
    assert first["gap_p50"] is None and first["accepted"] is None and "reused" not in first
    assert (second["answer_tokens"], second["reused"], second["accepted"]) == (50, 25, 70)
    assert second["gap_p50"] == pytest.approx(0.1 + 0.1 * 2 / 3) and second["gap_p95"] == 0.2
    assert sampled.since(1000.0)["samples"] == sampled.since(0, last=1)["samples"] == [second]
    assert (
        quantile(Histogram("x", (1.0,)), [0, 0], 0.5) is None and quantile(Histogram("x", (1.0,)), [4, 0], 0.5) == 0.5
    )
