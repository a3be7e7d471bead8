"""Make the pictures of README, `docs/page.png` and `docs/status.png`: ``python scripts/screenshots.py``.

A server of the embedded model answers in Chromium (`apt install chromium`). The first picture is of a conversation, the
second of the plots after some minutes of requests.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from absl import flags

from ds4jax.errors import Ds4Error
from ds4jax.tools import cli

DOCS = Path(__file__).parents[1] / "docs"
QUESTIONS = ["What is the capital of France?", "What is 12 + 7?"]

FLAGS = flags.FlagValues()
flags.DEFINE_float("minutes", 3.0, "Of requests before the plots are taken.", flag_values=FLAGS)
flags.DEFINE_string("out", str(DOCS), "The folder of the pictures.", flag_values=FLAGS)


def main() -> None:
    """Take both pictures. Raises Ds4Error."""
    command = [sys.executable, "-m", "ds4jax.serve", "--port", "0", "--max_seqs", "4", "--draft", "auto"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr
            for line in server.stderr:
                if line.startswith("serving "):
                    threading.Thread(target=server.stderr.read, daemon=True).start()
                    return _take(line.split()[-1])
            raise Ds4Error("the server ended before it served")
        finally:
            server.terminate()


def _take(url: str) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 760}, device_scale_factor=1.5)
        page.goto(url)
        page.wait_for_selector("#model:has-text('tokens')")
        page.click("#show-settings")
        page.fill("[name=temperature]", "0")
        page.click("#show-settings")
        for n, question in enumerate(QUESTIONS, 1):
            page.fill("#input", question)
            page.click("#send")
            page.locator(".note", has_text="tokens used").nth(n - 1).wait_for(timeout=120_000)
        page.click(".thoughts summary >> nth=0")
        page.evaluate("document.getElementById('main').scrollTop = 0")
        page.wait_for_timeout(300)
        page.screenshot(path=f"{FLAGS.out}/page.png")
        end = time.monotonic() + 60 * FLAGS.minutes
        while time.monotonic() < end:
            _ask(page, url, 1 + int(time.monotonic()) // 20 % 4)
        page.click("#show-status")
        page.wait_for_selector("polyline")
        page.screenshot(path=f"{FLAGS.out}/status.png")
        browser.close()


def _ask(page, url: str, n: int) -> None:
    """Let n questions be answered at once, and wait for the answers."""
    message = [{"role": "user", "content": "Tell me about the capital of Peru, and what 7 + 8 is."}]
    asked = "([url, body, n]) => Promise.all(Array.from({length: n}, () => fetch(url, {method: 'POST', body: body,"
    asked += " headers: {'content-type': 'application/json'}}).then(r => r.text())))"
    body = f'{{"messages": {message!r}, "max_tokens": 120}}'.replace("'", '"')
    page.evaluate(asked, [f"{url}/v1/chat/completions", body, n])


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
