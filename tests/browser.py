"""Chromium, for the tests of what people see."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, ConsoleMessage, Page, expect, sync_playwright

from tests.live import LiveGateway

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
WIDE, NARROW = 1280, 390
WAIT_MILLISECONDS = 8000

expect.set_options(timeout=WAIT_MILLISECONDS)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@contextmanager
def chromium(gateway: LiveGateway) -> Iterator[BrowserContext]:
    """A browser of one person; addresses are the gateway's."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        context = browser.new_context(
            base_url=gateway.url, viewport={"width": WIDE, "height": 900}, color_scheme="light"
        )
        context.set_default_timeout(WAIT_MILLISECONDS)
        yield context
        browser.close()


def sign_in(page: Page, username: str, password: str) -> None:
    """Fill in the login page that is shown."""
    page.get_by_label("Username").fill(username)
    page.get_by_label("Password").fill(password)
    page.get_by_role("button", name="Log in").click()


def watch(page: Page) -> list[str]:
    """Return a list to which errors of a page are added, breaches of its policy among them."""
    problems: list[str] = []

    def note(said: ConsoleMessage) -> None:
        if said.type == "error":
            problems.append(said.text)

    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", note)
    return problems


def take_pictures(page: Page, name: str) -> None:
    """Keep pictures of a page, light and dark, wide and narrow, in the directory SCREENSHOTS."""
    directory = os.environ.get("SCREENSHOTS")
    if not directory:
        return
    for scheme in ("light", "dark"):
        page.evaluate(
            "dark => document.documentElement.classList.toggle('dark', dark)", scheme == "dark"
        )
        for width in (WIDE, NARROW):
            page.set_viewport_size({"width": width, "height": 900})
            picture = Path(directory) / f"{name}-{scheme}-{width}.png"
            page.screenshot(path=picture, full_page=True)
    page.evaluate("document.documentElement.classList.remove('dark')")
    page.set_viewport_size({"width": WIDE, "height": 900})
