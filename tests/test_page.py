"""The chat page, in headless Chromium: `apt install chromium` or `playwright install chromium` once."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator

import pytest
from fake_engine import CALL, FakeEngine, serving

pytestmark = pytest.mark.slow
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser) -> Iterator[Callable]:
    """A function: engine → page. At the end nothing may have been logged or asked of another host."""
    problems: list[str] = []
    with contextlib.ExitStack() as stack, browser.new_context() as context:

        def opened(engine):
            url = stack.enter_context(serving(engine))
            page = context.new_page()
            page.set_default_timeout(10_000)
            page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("request", lambda r: problems.append(r.url) if not r.url.startswith((url, "data:")) else None)
            page.goto(url)
            return page

        yield opened
    assert not problems


def say(page, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")


def test_a_conversation(open_page):
    engine = FakeEngine(lambda _: "Let me <b>think</b>.</think>Hello & <i>welcome</i>!", delay=0.01)
    page = open_page(engine)
    page.wait_for_selector("text=fake · 4,096 tokens")
    say(page, "Hi")
    page.wait_for_selector("text=tokens/s · ")
    assert page.inner_text(".message .text") == "Hello & <i>welcome</i>!"  # never as HTML
    thoughts = page.locator("details")
    assert not thoughts.locator("div").is_visible()
    thoughts.locator("summary").click()
    assert thoughts.locator("div").inner_text() == "Let me <b>think</b>."
    say(page, "And?")
    page.locator(".note", has_text="reused").nth(1).wait_for()
    history = engine.tokenizer.decode(engine.requests[1].tokens)
    assert "<｜User｜>Hi<｜Assistant｜></think>Hello & <i>welcome</i>!<｜end▁of▁sentence｜><｜User｜>And?" in history
    page.click("#fresh")
    assert page.locator(".message").count() == 0


def test_stop_and_settings(open_page):
    engine = FakeEngine(lambda _: "word " * 1000, delay=0.01)
    page = open_page(engine)
    page.click("#show-settings")
    page.select_option("select[name=effort]", "none")
    page.fill("[name=temperature]", "0.25")
    page.fill("[name=seed]", "7")
    page.fill("[name=system]", "Be brief.")
    say(page, "Hi")
    page.wait_for_selector(".text")
    page.click("#stop")
    page.wait_for_selector("text=stopped")
    page.wait_for_timeout(300)
    assert not engine.running
    (request,) = engine.requests
    assert (request.sampling.temperature, request.sampling.seed) == (0.25, 7)
    assert engine.tokenizer.decode(request.tokens).endswith("Be brief.<｜User｜>Hi<｜Assistant｜></think>")
    page.reload()
    assert page.input_value("[name=system]") == "Be brief."


def test_tool_calls(open_page):
    answers = iter([f"Hm.</think>Looking.\n\n{CALL}", "</think>Sunny."])
    engine = FakeEngine(lambda _: next(answers))
    page = open_page(engine)
    page.click("#show-settings")
    page.fill("[name=tools]", json.dumps([WEATHER]))
    say(page, "Weather?")
    page.wait_for_selector("button:text('Send results')")
    assert page.inner_text(".call b") == "weather" and json.loads(page.inner_text(".call code")) == {"city": "Oslo"}
    page.fill("form:not(#settings) textarea", "25 °C")
    page.click("button:text('Send results')")
    page.wait_for_selector("text=Sunny.")
    assert "<tool_result>25 °C</tool_result>" in engine.tokenizer.decode(engine.requests[1].tokens)


def test_errors_and_status(open_page):
    page = open_page(FakeEngine(lambda _: "</think>x", ctx=64))
    page.click("#show-settings")
    page.fill("[name=tools]", "[")
    say(page, "Hi")
    page.wait_for_selector(".error")
    page.fill("[name=tools]", "")
    say(page, "Hi")
    page.wait_for_selector(".text")
    page.click("#show-status")
    page.locator("polyline[points*=' ']").first.wait_for(state="attached")
    captions = page.inner_text("#status")
    assert "Tokens per second" in captions and "answering 0" in captions and "process" in captions
