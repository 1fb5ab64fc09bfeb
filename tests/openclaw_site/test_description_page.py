"""The page that describes the HTTP door, in a real browser."""

from __future__ import annotations

import shutil
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect, sync_playwright

from tests.live import LiveGateway

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_it_is_readable_and_tries_a_hook_out(live_gateway: LiveGateway) -> None:
    problems: list[str] = []
    asked: set[str] = set()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(base_url=live_gateway.url)
        page.on("console", lambda said: problems.append(said.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda sent: asked.add(urlsplit(sent.url).netloc))
        page.goto("/api/")
        page.get_by_text("Hand in an event").click()
        page.get_by_role("button", name="Authorize").first.click()
        page.get_by_label("auth-bearer-value").fill(live_gateway.hook_token)
        page.get_by_label("Apply credentials").first.click()
        page.get_by_role("button", name="Close").last.click()
        page.get_by_role("button", name="Try it out").click()
        page.get_by_role("button", name="Execute").click()
        expect(page.locator(".live-responses-table")).to_contain_text("eventId")
        browser.close()
    assert problems == []
    assert asked <= {urlsplit(live_gateway.url).netloc, ""}  # the latter: images in the style sheet
