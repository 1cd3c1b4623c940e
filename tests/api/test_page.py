"""The page at /, as its users meet it: in a real browser, with mouse and keyboard, before a real server and a scripted one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmv1.api.page import content_security_policy
from mmv1.api.settings import ServerSettings
from tests.api.fake_llm import FakeLLM, client_of
from tests.api.test_server import served, until
from tests.browser import Browser, running_browser
from tests.integration.server import Server, serving

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = "qwen2.5-vl-demo"
PICTURES = ROOT / "examples" / "pictures"
ANSWERED = "document.querySelector('.assistant:last-child .figures') && document.getElementById('stop').disabled"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ("--served-model-name", MODEL)
    with serving(ROOT / "demo_model" / MODEL, tmp_path_factory.mktemp("server"), *options) as server:
        yield server


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running_browser(tmp_path_factory.mktemp("chromium")) as started:
        yield started


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    chromium.problems.clear()
    chromium.resize(1000, 800)
    chromium.prefer("light")
    yield chromium
    assert chromium.problems == []


def open_page(browser: Browser, url: str) -> None:
    browser.open("about:blank")
    browser.open(f"{url}/")
    browser.wait_for("document.getElementById('model').value")


def fill(browser: Browser, selector: str, text: str) -> None:
    browser.click(selector)
    browser.evaluate("document.activeElement.select()")
    browser.type(text)


def set_temperature_0(browser: Browser) -> None:
    browser.click("summary")
    fill(browser, "#temperature", "0")
    browser.click("summary")


def ask(browser: Browser, question: str) -> str:
    """With the keyboard. The text of the answer."""
    browser.click("#text")
    browser.type(question)
    browser.press("Enter")
    browser.wait_for(f"[...document.querySelectorAll('.user')].at(-1)?.innerText.includes({json.dumps(question)})")
    browser.wait_for(ANSWERED)
    return browser.text(".assistant:last-child p")


def figures(browser: Browser) -> str:
    return browser.text(".assistant:last-child .figures")


def test_two_turns_about_a_picture(browser: Browser, demo: Server) -> None:
    open_page(browser, demo.url)
    set_temperature_0(browser)
    browser.choose_files("#files", PICTURES / "shapes.jpg")
    browser.wait_for("document.querySelector('#pictures span')?.textContent === '162 prompt tokens'")  # the two around it are two
    answer = ask(browser, "Describe this image.")
    assert answer == "a small yellow star, a large orange triangle, a small black square and a small blue triangle"
    first = figures(browser)
    assert re.search(r"first token after \d+ ms", first) and re.search(r"\d+ tokens, \d+ tokens/s", first)
    assert "prompt: 0 of 188 tokens from the prefix cache" in first and "pictures: 160 tokens" in first
    assert "decoded: 1, found processed: 0" in first and "encoded: 1, found in the encoder cache: 0" in first
    assert ask(browser, "What color is the star?") == "yellow"
    second = figures(browser)
    cached, total = map(int, re.search(r"prompt: (\d+) of (\d+) tokens", second).groups())
    assert 160 < cached < total and "decoded: 0" in second and "encoded: 0" in second
    assert browser.evaluate("document.querySelectorAll('.user img').length") == 1
    assert browser.evaluate("document.getElementById('status').textContent") == "yellow"


@pytest.mark.parametrize(("last", "rate"), [("{at: 60.6, tokens: 2}", "33"), ("{at: 560, tokens: 26}", "50")])
def test_the_rate_of_an_answer_that_came_nearly_in_one_piece_is_that_of_all_it_took(
    last: str, rate: str, browser: Browser, demo: Server
) -> None:
    open_page(browser, demo.url)
    usage = "{prompt_tokens: 9, completion_tokens: 2, prompt_tokens_details: {cached_tokens: 0, image_tokens: 0}}"
    answer = f"{{usage: {usage}, startedAt: 0, first: {{at: 60, tokens: 1}}, last: {last}}}"
    assert f"2 tokens, {rate} tokens/s" in browser.evaluate(f"figures({answer}).textContent")


def test_pictures_are_dropped_pasted_removed_and_forgotten(browser: Browser, demo: Server) -> None:
    open_page(browser, demo.url)
    set_temperature_0(browser)
    browser.drop_files(PICTURES / "shapes.jpg", PICTURES / "word.jpg")
    browser.wait_for("document.querySelectorAll('#pictures img').length === 2")
    browser.click("#pictures li:first-child button")
    browser.wait_for("[...document.querySelectorAll('#pictures img')].map((n) => n.alt).join() === 'word.jpg'")
    assert ask(browser, "Which word is shown?") == "HORSE"
    browser.click("#new")
    browser.wait_for("!document.querySelector('article') && !document.getElementById('hint').hidden")
    browser.evaluate("""(async () => {
        const canvas = new OffscreenCanvas(112, 112);
        canvas.getContext("2d").fillRect(0, 0, 112, 112);
        const data = new DataTransfer();
        data.items.add(new File([await canvas.convertToBlob()], "pasted.png", { type: "image/png" }));
        document.getElementById("text").dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true }));
    })()""")
    browser.wait_for("document.querySelector('#pictures img')?.alt === 'pasted.png'")
    ask(browser, "Describe this image.")
    assert "prompt: " in figures(browser) and "pictures: 16 tokens" in figures(browser)


def test_system_prompt_and_settings_go_with_the_request(browser: Browser, demo: Server) -> None:
    open_page(browser, demo.url)
    set_temperature_0(browser)
    ask(browser, "Repeat the word LAMP.")
    without = int(re.search(r"of (\d+) tokens", figures(browser))[1])
    browser.click("#new")
    browser.click("summary")
    fill(browser, "#max_tokens", "1")
    fill(browser, "#system", "You are a lamp and so are they. " * 3)
    ask(browser, "Repeat the word LAMP.")
    assert "1 token\n" in figures(browser) and int(re.search(r"of (\d+) tokens", figures(browser))[1]) > without


def test_faults_are_said_in_words_and_the_question_is_kept(browser: Browser, demo: Server, tmp_path: Path) -> None:
    open_page(browser, demo.url)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture at all")
    browser.choose_files("#files", broken)
    browser.wait_for("document.querySelectorAll('#pictures li').length === 1")
    ask(browser, "What is it?")
    fault = browser.text(".fault")
    status = demo.post({"model": MODEL, "messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,bm8gcGljdHVyZSBhdCBhbGw="}}]}]})  # fmt: skip
    assert status.status_code == 400 and fault == status.json()["error"]["message"]
    assert browser.evaluate("document.getElementById('text').value") == "What is it?"
    browser.wait_for("document.querySelectorAll('#pictures li').length === 1")
    text = tmp_path / "letter.txt"
    text.write_text("hello")
    browser.drop_files(text)
    browser.wait_for("[...document.querySelectorAll('.fault')].at(-1).textContent === 'letter.txt is not a picture.'")
    browser.click("#pictures button")
    browser.evaluate("document.getElementById('text').value = ''")
    assert ask(browser, "Repeat the word LAMP.") != ""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_can_be_read(browser: Browser, demo: Server, scheme: str) -> None:
    """Contrasts by WCAG 2, 4.5 for text."""
    browser.prefer(scheme)
    open_page(browser, demo.url)
    colors = browser.evaluate("""(() => {
        const style = getComputedStyle(document.documentElement);
        const names = ["ground", "raised", "text", "quiet", "fault", "accent", "on-accent"];
        return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
    })()""")

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    assert (luminance(colors["ground"]) < 0.1) == (scheme == "dark")
    texts = [("text", "ground"), ("text", "raised"), ("quiet", "ground"), ("quiet", "raised"), ("fault", "ground")]
    for pair in [*texts, ("on-accent", "accent")]:
        low, high = sorted(luminance(colors[name]) for name in pair)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, pair)


def test_a_phone_is_wide_enough(browser: Browser, demo: Server) -> None:
    browser.resize(360, 640)
    open_page(browser, demo.url)
    browser.click("summary")
    browser.choose_files("#files", PICTURES / "shapes.jpg", PICTURES / "word.jpg", PICTURES / "shapes.jpg", PICTURES / "word.jpg")
    browser.wait_for("document.querySelectorAll('#pictures img').length === 4")
    browser.click("summary")
    ask(browser, "W" * 200)
    wide = "[...document.querySelectorAll('body *')].filter((n) => n.getBoundingClientRect().right > 360)"
    assert browser.evaluate(f"{wide}.map((n) => n.outerHTML)") == []
    assert browser.evaluate("document.scrollingElement.scrollWidth") == 360
    assert browser.evaluate("document.getElementById('send').getBoundingClientRect().bottom") <= 640
    assert browser.evaluate("document.getElementById('log').scrollWidth <= document.getElementById('log').clientWidth")


def test_keyboard_and_screen_reader(browser: Browser, demo: Server) -> None:
    open_page(browser, demo.url)
    assert browser.evaluate("document.activeElement.id") == "text"
    browser.click("summary")
    controls = {"button", "textbox", "spinbutton", "combobox", "region", "form", "DisclosureTriangle", "img"}
    unnamed = [node for node in browser.nodes() if node[0] in controls and not node[1]]
    assert unnamed == []
    names = {name for role, name in browser.nodes() if role in controls}
    assert {"Message", "Model", "Send", "System prompt", "Conversation", "Temperature (0 to 2)", "Pictures…"} <= names
    browser.evaluate("document.getElementById('model').focus()")
    order = ["new", "summary", "system", "temperature", "max_tokens", "key", "log", "text", "choose", "send"]
    for name in order:
        browser.press("Tab")
        assert browser.evaluate("document.activeElement.id || document.activeElement.tagName.toLowerCase()") == name
        assert browser.evaluate("document.activeElement.matches(':focus-visible')")


def test_an_api_key_is_asked_for_and_kept_for_the_session(browser: Browser, llm: FakeLLM) -> None:
    def use(url: str) -> None:
        browser.open(f"{url}/")
        browser.wait_for("document.querySelector('.fault')?.textContent.startsWith('The server asks for an API key')")
        assert browser.evaluate("document.activeElement.id") == "key"
        browser.type("right-key")
        browser.press("Tab")
        browser.wait_for("document.getElementById('model').value")
        assert ask(browser, "hi") == "".join(llm.pieces)
        open_page(browser, url)
        assert browser.evaluate("document.getElementById('key').value") == "right-key"
        assert browser.evaluate("sessionStorage.length") == 1 and browser.evaluate("localStorage.length") == 0

    async def main() -> None:
        async with served(llm, ServerSettings(api_keys=("right-key",))) as server:
            await asyncio.to_thread(use, server.url)

    asyncio.run(main())


def test_the_page_works_below_a_path(browser: Browser, llm: FakeLLM) -> None:
    async def main() -> None:
        async with served(llm, ServerSettings(root_path="/below")) as server:
            await asyncio.to_thread(open_page, browser, f"{server.url}/below")
            assert await asyncio.to_thread(ask, browser, "hi") == "".join(llm.pieces)

    asyncio.run(main())


def test_what_streams_is_shown_and_can_be_stopped(browser: Browser, llm: FakeLLM) -> None:
    llm.pieces, llm.pause_before = ("Hello", " there", "never"), 2

    async def main() -> None:
        async with served(llm) as server:
            await asyncio.to_thread(open_page, browser, server.url)
            await asyncio.to_thread(start, browser)
            assert llm.running and not llm.aborted
            await asyncio.to_thread(stop, browser)
            await until(lambda: bool(llm.aborted))

    def start(browser: Browser) -> None:
        browser.type("hi")
        browser.click("#send")
        browser.wait_for("document.querySelector('.assistant p')?.textContent === 'Hello there'")

    def stop(browser: Browser) -> None:
        assert browser.evaluate("document.getElementById('send').disabled")
        browser.click("#stop")
        browser.wait_for(ANSWERED)
        assert browser.text(".assistant p").split("\n") == ["Hello there", "Stopped."]
        assert "2 tokens" in figures(browser)

    asyncio.run(main())


def test_what_a_model_says_is_text(browser: Browser, llm: FakeLLM) -> None:
    markup = "<img src=x onerror='document.title=1'><script>document.title=2</script>"
    llm.pieces = (markup, "\n& more")

    async def main() -> None:
        async with served(llm) as server:
            await asyncio.to_thread(open_page, browser, server.url)
            assert await asyncio.to_thread(ask, browser, "hi") == f"{markup}\n& more"

    asyncio.run(main())
    assert browser.evaluate("document.title") == "mmv1" and browser.evaluate("document.querySelector('article img')") is None


def test_a_fault_in_the_middle_and_a_server_that_is_gone(browser: Browser, llm: FakeLLM) -> None:
    llm.fail_before = 2

    async def main() -> None:
        async with served(llm) as server:
            await asyncio.to_thread(open_page, browser, server.url)
            words = await asyncio.to_thread(ask, browser, "hi")
            assert words.split("\n") == ["Hello, ", "The engine is not available"]

    asyncio.run(main())
    assert ask(browser, "again").endswith("The server cannot be reached.")
    assert browser.evaluate("document.getElementById('text').value") == "again"


def test_the_policy_allows_this_page_only(browser: Browser, llm: FakeLLM) -> None:
    async def main() -> None:
        async with client_of(llm) as client:
            reply = await client.get("/")
            policy = reply.headers["content-security-policy"]
            assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/html")
            assert policy == content_security_policy(reply.text) and policy.startswith("default-src 'none'; ")
            assert "unsafe" not in policy and "*" not in policy and "http" not in policy
            assert not re.search(r"(src|href)=\"(?!data:)|https?://|innerHTML", reply.text)
        async with served(llm) as server:
            await asyncio.to_thread(open_page, browser, server.url)

    asyncio.run(main())
    for forbidden in ("document.body.innerHTML = '<b>x</b>'", "await fetch('https://example.com/')", "new Function('1')()"):
        with contextlib.suppress(AssertionError):
            browser.evaluate(f"(async () => {{ {forbidden} }})()")
            pytest.fail(f"{forbidden} was let through")
    assert browser.evaluate("document.querySelector('b')") is None
    assert browser.problems
    browser.problems.clear()
