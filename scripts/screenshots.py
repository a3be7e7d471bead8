"""Make the pictures of README, `docs/page.png` and `docs/status.png`: ``python scripts/screenshots.py``.

A server of the embedded model answers in Chromium (`apt install chromium`). The first picture is of a conversation, the
second of the plots after some minutes of requests.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import time
from pathlib import Path

import serving
from absl import flags

from ds4jax.tools import cli

DOCS = Path(__file__).parents[1] / "docs"
QUESTIONS = ["What is the capital of France?", "What is 12 + 7?"]

FLAGS = flags.FlagValues()
flags.DEFINE_float("minutes", 3.0, "Of requests before the plots are taken.", flag_values=FLAGS)
flags.DEFINE_string("out", str(DOCS), "The folder of the pictures.", flag_values=FLAGS)


def main() -> None:
    """Take both pictures."""
    asyncio.run(_serve_and_take())


async def _serve_and_take() -> None:
    command = ["-m", "ds4jax.serve", "--port", "0", "--max_seqs", "4", "--draft", "auto"]
    async with serving.server(command) as url:
        await _take(url)


async def _take(url: str) -> None:
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        browser = await playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = await browser.new_page(viewport={"width": 1200, "height": 760}, device_scale_factor=1.5)
        await page.goto(url)
        await page.wait_for_selector("#model:has-text('tokens')")
        await page.click("#show-settings")
        await page.fill("[name=temperature]", "0")
        await page.click("#show-settings")
        for n, question in enumerate(QUESTIONS, 1):
            await page.fill("#input", question)
            await page.click("#send")
            await page.locator(".note", has_text="tokens used").nth(n - 1).wait_for(timeout=120_000)
        await page.click(".thoughts summary >> nth=0")
        await page.evaluate("document.getElementById('main').scrollTop = 0")
        await page.wait_for_timeout(300)
        await page.screenshot(path=f"{FLAGS.out}/page.png")
        end = time.monotonic() + 60 * FLAGS.minutes
        while time.monotonic() < end:
            await _ask(page, url, 1 + int(time.monotonic()) // 20 % 4)
        await page.click("#show-status")
        await page.wait_for_selector("polyline")
        await page.screenshot(path=f"{FLAGS.out}/status.png")
        await browser.close()


async def _ask(page, url: str, n: int) -> None:
    """Let n questions be answered at once, and wait for the answers."""
    message = {"role": "user", "content": "Tell me about the capital of Peru, and what 7 + 8 is."}
    asked = "([url, body, n]) => Promise.all(Array.from({length: n}, () => fetch(url, {method: 'POST', body: body,"
    asked += " headers: {'content-type': 'application/json'}}).then(r => r.text())))"
    body = json.dumps({"messages": [message], "max_tokens": 120})
    await page.evaluate(asked, [f"{url}/v1/chat/completions", body, n])


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
