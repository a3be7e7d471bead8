"""The chat page in Chromium, with scripted answers: `apt install chromium` or `playwright install chromium` once.

One browser and one server serve all tests. At the end of each, nothing may have been logged, asked of another host, or
refused by the page's policy.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_engine import CALL, FakeEngine, ids, serving

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
RICH = """A thought.</think># Title

Some **bold** text, `code`, a [link](https://example.org/), $x^2$ for $5 or $6, <b>no tag</b> &amp; 1 < 2.

- one
- two

| a | b |
|---|--:|
| 1 | 2<br>3 |

```python
def f(): return 1
```

$$\\sum_{i=1}^n i$$

> quoted
"""
HOSTILE = """<img src=x onerror=hacked()><script>hacked()</script>
[a](javascript:hacked()) [b](data:text/html,<script>hacked()</script>) <javascript:hacked()>
![c](https://elsewhere.invalid/x.png) [d]( javascript:hacked() "x" onclick=hacked() )
`<script>hacked()</script>` <svg onload=hacked()> &lt;script&gt;hacked()&lt;/script&gt;

```html"><img src=x onerror=hacked()>
<img src=x onerror=hacked()>
```

```xml
<img src=x onerror=hacked()><script>hacked()</script>
```

$\\href{javascript:hacked()}{x}$ $\\includegraphics{https://elsewhere.invalid/x.png}$
$\\htmlData{a=b}{x}$ $$\\url{javascript:hacked()}$$ $\\htmlStyle{color:red}{x}$ $\\fcolorbox{red}{blue}{q}$
$\\frac{1}{0$ $\\unknown$

| <img src=x onerror=hacked()> | b |
|---|---|
| <iframe src=javascript:hacked()> | <a href=javascript:hacked()>x</a> |

<style>*{display:none}</style><base href=https://elsewhere.invalid/>
"""


class Script:
    """What the engine answers; a test sets `say`, a text or a function of the user's last message."""

    say: str | Callable[[str], str] = ""

    def __call__(self, request) -> str:
        return self.say if isinstance(self.say, str) else self.say(FakeEngine.said(request))


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[FakeEngine, str]]:
    engine = FakeEngine(Script(), ctx=100_000)
    with serving(engine) as url:
        yield engine, url


@pytest.fixture(scope="module")
def browser() -> Iterator:
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        try:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error:
            pytest.skip("no Chromium here: apt install chromium, or playwright install chromium")
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, server) -> Iterator[Callable]:
    """A function → a page. say: what is answered. delay: seconds from token to token. expected: a part of what may be
    logged. others: options of the browser's window."""
    engine, url = server
    contexts, problems = [], []

    def opened(say="", delay=0.0, expected="\0", **options):
        engine.script.say, engine._delay = say, delay
        engine.requests.clear()
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.add_init_script("window.hacked = () => { window.wasHacked = true; }")
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" and expected not in m.text else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else problems.append(r.url))
        page.goto(url)
        page.wait_for_selector("text=fake · 100,000 tokens")
        return page

    yield opened
    for context in contexts:
        assert not any(page.evaluate("window.wasHacked") for page in context.pages)
        context.close()
    assert not problems


def say(page, text: str) -> None:
    page.fill("#input", text)
    page.click("#send")


def answered(page, n: int = 1) -> None:
    """Wait for the line below the n-th answer that is complete."""
    page.locator(".note", has_text="tokens used").nth(n - 1).wait_for()


def prompt(engine: FakeEngine, i: int = -1) -> str:
    return engine.tokenizer.decode(engine.requests[i].tokens)


# ---- answers and failures --------------------------------------------------------------------------------------------
def test_the_rest_of_an_answer_belongs_to_its_own_conversation(open_page):
    page = open_page(lambda said: "</think>" + (f"{said} " * 150 if "apple" in said else "Other."), delay=0.002)
    say(page, "apple")
    page.wait_for_selector(".text:has-text('apple apple')")
    page.click("#fresh")
    say(page, "second")
    page.wait_for_selector(".text :text-is('Other.')")
    assert "apple" not in page.inner_text("#chat")
    page.click("#conversations .open:has-text('apple')")
    answered(page)
    text = page.inner_text(".assistant .text")
    assert text.count("apple") == 150 and "Other" not in page.inner_text("#chat")


@pytest.mark.parametrize(
    "status, type, body, shown",
    [
        (400, "application/json", '{"error": {"message": "the prompt is too long"}}', "the prompt is too long"),
        (502, "text/html", "<html><h1>Bad gateway</h1></html>", "status 502 (Bad Gateway)"),
        (200, "text/event-stream", ": nothing\n\n", "the stream ended before the answer was complete"),
        (0, "", "", "the server cannot be reached"),
    ],
)
def test_a_message_that_fails_goes_back_to_its_box(open_page, server, status, type, body, shown):
    page = open_page("</think>Well.", expected="Failed to load resource")
    page.route(
        "**/completions", lambda r: r.fulfill(status=status, content_type=type, body=body) if status else r.abort()
    )
    say(page, "precious words")
    page.wait_for_selector(f"#banner :text-is('{shown}')")
    assert page.input_value("#input") == "precious words" and not page.locator(".message").count()
    page.unroute("**/completions")
    page.click("#banner button:text('Retry')")
    answered(page)
    assert page.input_value("#input") == "" and not page.is_visible("#banner")
    assert prompt(server[0]).count("precious words") == 1


def test_a_stream_without_its_end_says_so(open_page, server):
    chunk = {"choices": [{"index": 0, "delta": {"content": "Half of"}, "finish_reason": None}]}
    page = open_page("</think>Whole.")
    page.route(
        "**/completions", lambda r: r.fulfill(content_type="text/event-stream", body=f"data: {json.dumps(chunk)}\n\n")
    )
    say(page, "Hi")
    page.wait_for_selector(".note.error:text-is('the stream ended before the answer was complete')")
    assert page.inner_text(".assistant .text") == "Half of"
    page.unroute("**/completions")
    page.click("button:text-is('Retry')")
    answered(page)
    assert page.inner_text(".assistant .text") == "Whole." and "Half" not in prompt(server[0])


def test_a_wrong_key_is_asked_for(open_page):
    page = open_page("</think>In.", expected="Failed to load resource")

    def guard(route):
        if route.request.headers.get("authorization") == "Bearer right":
            return route.continue_()
        return route.fulfill(status=401, json={"error": {"message": "the API key is missing or wrong"}})

    page.route("**/completions", guard)
    say(page, "Hi")
    page.wait_for_selector("#banner :text('missing or wrong')")
    assert page.input_value("#input") == "Hi"
    page.fill("#banner input", "right")
    page.press("#banner input", "Enter")
    answered(page)


def test_twenty_thousand_tokens_leave_the_page_usable(open_page):
    text = "".join(f"- **{i}** and `some` more of it\n" for i in range(970))
    assert len(ids(text)) > 20_000
    page = open_page(f"</think>{text}")
    page.evaluate("""() => { let last = performance.now(); window.gaps = [];
        const frame = now => { window.gaps.push(now - last); last = now; requestAnimationFrame(frame); };
        requestAnimationFrame(frame); }""")
    say(page, "Go on")
    page.wait_for_selector(".text li")
    page.type("#input", "typed while it streams")
    page.set_default_timeout(60_000)
    answered(page)
    assert page.input_value("#input") == "typed while it streams"
    assert page.locator(".text li").count() == 970
    gaps = sorted(page.evaluate("window.gaps"))
    assert gaps[-1] < 1500 and gaps[len(gaps) * 9 // 10] < 250, (gaps[-5:], len(gaps))


# ---- text ------------------------------------------------------------------------------------------------------------
def test_markdown_becomes_elements(open_page, server):
    page = open_page(RICH)
    say(page, "Hi")
    answered(page)
    text = page.locator(".assistant .text")
    for selector, n in {
        "h3": 1,
        "strong": 1,
        "ul li": 2,
        "table td": 2,
        "td br": 1,
        "blockquote": 1,
        ".katex": 2,
    }.items():
        text.locator(f"{selector} >> nth={n - 1}").wait_for(state="attached")
        assert text.locator(selector).count() == n, selector
    page.wait_for_selector(".hljs-keyword:text-is('def')")
    assert "for $5 or $6, <b>no tag</b> & 1 < 2." in text.inner_text()
    link = page.locator(".assistant a")
    assert [link.get_attribute(name) for name in ("target", "rel")] == ["_blank", "noopener noreferrer"]
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click(".code button")
    assert page.evaluate("navigator.clipboard.readText()") == "def f(): return 1"
    page.click(".thoughts summary")
    assert page.inner_text(".thoughts > div") == "A thought." and "2 words" in page.inner_text(".thoughts summary")
    say(page, "And?")
    answered(page, 2)
    assert "<｜User｜>Hi<｜Assistant｜></think># Title" in prompt(server[0])


def test_hostile_outputs_do_nothing(open_page):
    tool = CALL.replace("Oslo", "<img src=x onerror=hacked()>")
    page = open_page(lambda said: f"{HOSTILE}</think>{HOSTILE}" + ("" if "again" in said else f"\n\n{tool}"))
    page.click("#show-settings")
    page.fill("[name=tools]", json.dumps([WEATHER]))
    say(page, HOSTILE)
    page.wait_for_selector("text=Send results")
    page.fill(".results textarea", HOSTILE)
    page.click("text=Send results")
    answered(page, 2)
    page.wait_for_selector(".katex")
    page.wait_for_timeout(200)
    inside = page.locator("#chat")
    assert not inside.locator("img, script, iframe, style, base, svg:not(.katex svg), [onerror], [onload]").count()
    assert "$\\frac{1}{0$" in page.inner_text(".assistant .text >> nth=0")  # no formula: as it was written
    hrefs = page.eval_on_selector_all("#chat a", "nodes => nodes.map(node => node.protocol)")
    assert set(hrefs) <= {"https:", "http:", "mailto:"}
    for selector in ".user .text", ".call code", ".thoughts > div":
        assert "<img src=x onerror=hacked()>" in inside.locator(selector).first.text_content()


def test_text_that_streams_is_what_it_is_in_the_end(open_page):
    page = open_page(RICH, delay=0.001)
    say(page, "Hi")
    answered(page)
    page.wait_for_selector(".katex >> nth=1")
    page.wait_for_selector(".hljs-keyword")
    streamed = page.inner_html(".assistant .text")
    page.reload()
    page.wait_for_selector(".katex >> nth=1")
    page.wait_for_selector(".hljs-keyword")
    assert page.inner_html(".assistant .text") == streamed


def test_probabilities_of_tokens_are_shown_on_hover(open_page):
    page = open_page("</think>ab")
    page.click("#show-settings")
    page.check("[name=logprobs]")
    say(page, "Hi")
    answered(page)
    page.hover(".tokens span:text-is('b')")
    assert page.get_attribute(".tokens span:text-is('b')", "title").startswith('"b" 60.7 %')
    page.click("button:text-is('Formatted')")
    assert page.inner_text(".text p") == "ab"


# ---- conversations ---------------------------------------------------------------------------------------------------
def test_conversations_are_kept(open_page, tmp_path):
    page = open_page(lambda said: f"</think>About {said}")
    for text in "apples", "pears":
        page.click("#fresh")
        say(page, text)
        answered(page)
    page.fill("#input", "a draft")
    page.wait_for_timeout(500)
    page.reload()
    page.wait_for_selector(".text :text-is('About pears')")
    assert page.input_value("#input") == "a draft"
    page.fill("#search", "about app")
    assert page.locator("#conversations .open").all_inner_texts() == ["apples"]
    page.click("#conversations .open")
    page.wait_for_selector(".text :text-is('About apples')")
    page.fill("#search", "")
    row = page.locator("#conversations li", has_text="apples")
    row.hover()
    row.locator("summary").click()
    row.locator("text=Rename").click()
    page.fill("#conversations input", "Fruit")
    page.press("#conversations input", "Enter")
    assert page.inner_text("#title") == "Fruit"
    row = page.locator("#conversations li", has_text="Fruit")
    row.hover()
    row.locator("summary").click()
    with page.expect_download() as one:
        row.locator("text=Export as Markdown").click()
    assert Path(one.value.path()).read_text() == "# Fruit\n\n## You\n\napples\n\n## Answer\n\nAbout apples\n"
    with page.expect_download() as one:
        page.click("#export")
    (tmp_path / "all.json").write_bytes(Path(one.value.path()).read_bytes())
    row.locator("summary").click()
    row.locator("text=Delete").click()
    assert page.locator("#conversations .open").all_inner_texts() == ["pears"]
    page.click("#toasts button:text-is('Undo')")
    assert page.locator("#conversations .open").count() == 2
    page.click("#fresh")
    page.fill("#input", "x")
    page.fill("#input", "")
    page.set_input_files("#import-file", tmp_path / "all.json")
    page.wait_for_selector("text=2 conversations imported")
    assert page.locator("#conversations .open").count() == 4
    (tmp_path / "wrong.json").write_text('{"conversations": [{"messages": {"a": {"role": "user", "parent": "a"}}}]}')
    page.set_input_files("#import-file", tmp_path / "wrong.json")
    page.wait_for_selector("#toasts :text('expected an exported one')")


def test_editing_branching_regenerating_and_continuing(open_page, server):
    answers = iter(["One.", "Two.", "Three.", "Half of", " whole."])
    page = open_page(lambda _: f"</think>{next(answers)}")
    say(page, "Question")
    answered(page)
    page.click("button:text-is('Regenerate')")
    page.wait_for_selector(".text :text-is('Two.')")
    page.wait_for_selector(".branches :text-is('2 / 2')")
    page.click("button[aria-label='Version before']")
    assert page.inner_text(".assistant .text") == "One."
    page.click(".user button:text-is('Edit')")
    page.fill(".edit textarea", "Another question")
    page.press(".edit textarea", "Enter")
    page.wait_for_selector(".text :text-is('Three.')")
    assert prompt(server[0]).count("uestion") == 1
    page.click(".user button[aria-label='Version before']")
    page.wait_for_selector(".text :text-is('Two.')")
    page.click("#show-settings")
    page.fill("[name=max_tokens]", "5")
    page.click("#fresh")
    say(page, "Long")
    page.wait_for_selector("text=cut off by the limit")
    page.fill("[name=max_tokens]", "")
    half = page.inner_text(".assistant .text")
    page.click("button:text-is('Continue')")
    page.wait_for_selector(".assistant .text:has-text('whole.')")
    assert prompt(server[0]).endswith(f"<｜Assistant｜></think>{half}") and "Half of".startswith(half)


def test_stopping_and_settings(open_page, server):
    page = open_page("word " * 1000, delay=0.01)
    page.click("#show-settings")
    page.select_option("select[name=effort]", "none")
    for name, value in {"temperature": "0.25", "seed": "7", "system": "Be brief."}.items():
        page.fill(f"[name={name}]", value)
    page.fill("#input", "Hi")
    page.press("#input", "Enter")
    page.wait_for_selector(".assistant .text")
    assert page.evaluate("document.activeElement.id") == "input"
    page.keyboard.press("Escape")
    page.wait_for_selector(".note:text-is('stopped')")
    page.wait_for_timeout(100)
    assert not server[0].running and page.is_visible("#send")
    (request,) = server[0].requests
    assert (request.sampling.temperature, request.sampling.seed) == (0.25, 7)
    assert prompt(server[0]).endswith("Be brief.<｜User｜>Hi<｜Assistant｜></think>")
    page.reload()
    page.wait_for_selector(".note:text-is('stopped')")
    assert page.input_value("[name=system]") == "Be brief."
    page.click("#show-settings")
    page.fill("[name=tools]", "[")
    assert page.is_visible("#tools-problem:has-text('tools:')")
    say(page, "Hi")
    page.wait_for_selector("#banner :text('tools:')")


def test_tool_calls(open_page, server):
    answers = iter([f"Hm.</think>Looking.\n\n{CALL}", "</think>Sunny."])
    page = open_page(lambda _: next(answers))
    page.click("#show-settings")
    page.fill("[name=tools]", json.dumps([WEATHER]))
    say(page, "Weather?")
    page.wait_for_selector("button:text('Send results')")
    assert page.inner_text(".call b") == "weather" and json.loads(page.inner_text(".call code")) == {"city": "Oslo"}
    page.fill(".results textarea", "25 °C")
    page.click("button:text('Send results')")
    page.wait_for_selector("text=Sunny.")
    assert page.inner_text(".result b") == "weather"
    assert "<tool_result>25 °C</tool_result>" in prompt(server[0])


def test_files_are_part_of_the_message(open_page, server, tmp_path):
    page = open_page("</think>Read.")
    (tmp_path / "notes.txt").write_text("some\n```\nnotes\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\xff")
    page.set_input_files("#file", [tmp_path / "notes.txt", tmp_path / "picture.png"])
    page.wait_for_selector("#banner :text('expected a text file')")
    say(page, "What is it?")
    answered(page)
    assert "<｜User｜>notes.txt:\n````\nsome\n```\nnotes\n````\n\nWhat is it?" in prompt(server[0])


def test_a_prompt_that_is_read_and_the_end_of_a_long_answer(open_page, server):
    engine, _ = server
    page = open_page("Thinking about it.</think>" + "line\n\n" * 60, delay=0.3)
    engine._chunks = 4
    try:
        say(page, "A question that takes long to read")
        page.wait_for_selector(".note:has-text('reading ')")
        assert "tokens" in page.inner_text(".note")
        page.wait_for_selector(".thoughts .label:has-text('Thinking…')")
        engine._delay = 0.002
    finally:
        engine._chunks = 1
    answered(page)
    assert page.evaluate("() => { const m = document.getElementById('main'); return m.scrollTop > 500; }")
    page.evaluate("document.getElementById('main').scrollTop = 0")
    page.click("#to-end")
    page.wait_for_selector("#to-end", state="hidden")
    page.wait_for_timeout(1100)
    assert "The answer is complete." in page.inner_text("#live")


# ---- the status ------------------------------------------------------------------------------------------------------
def test_the_status_has_a_past_when_it_is_opened(open_page):
    page = open_page()
    page.click("#show-status")
    page.locator("polyline").first.wait_for(state="attached")
    assert page.locator("#plots figure").count() == 8
    text = page.inner_text("#status")
    assert "Tokens per second" in text and re.search(r"answering \d", text) and re.search(r"−\d+ s\n|now", text)
    plot = page.locator("#plots svg").first
    assert plot.get_attribute("aria-label").startswith("Requests: answering ")
    plot.focus()
    page.keyboard.press("ArrowLeft")
    page.locator("line.cursor").first.wait_for(state="attached")
    assert ":" in page.inner_text("figcaption .time >> nth=0")
    page.click("#show-status")
    assert page.is_visible("#composer")


# ---- accessibility ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", [{}, {"color_scheme": "dark"}, PHONE], ids=["desktop", "dark", "phone"])
def test_the_page_is_accessible(open_page, how):
    from axe_playwright_python.sync_playwright import Axe

    page = open_page(RICH, **how)
    say(page, "Hi")
    answered(page)
    page.wait_for_selector(".hljs-keyword")
    if how is PHONE:
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        small = """nodes => nodes.filter(node => node.checkVisibility() &&
            Math.min(node.getBoundingClientRect().height, node.getBoundingClientRect().width) < 44)
            .map(node => node.textContent || node.id)"""
        assert page.eval_on_selector_all("button, #input, summary", small) == []
        tiny = "nodes => nodes.map(node => parseFloat(getComputedStyle(node).fontSize)).filter(size => size < 16)"
        assert page.eval_on_selector_all("input, textarea, select", tiny) == []
        page.click("#show-list")
        page.click("#shade", position={"x": 350, "y": 300})
    for state in "chat", "settings", "status":
        if state != "chat":
            page.click(f"#show-{state}")
            page.wait_for_timeout(250)
        if state == "status":
            page.wait_for_selector("#facts")
        found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
        serious = [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")]
        assert not serious, state
        if state == "settings":
            page.click("#close-settings")


def test_motion_is_reduced_where_it_is_asked_for(open_page):
    page = open_page(reduced_motion="reduce")
    assert page.evaluate("getComputedStyle(document.getElementById('fresh')).transitionProperty") == "none"
