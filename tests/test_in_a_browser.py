"""The web pages in a real browser: an operator signs in, looks, and acts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests.live import LiveGateway

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture
def page(live_gateway: LiveGateway) -> Iterator[Page]:
    """A page that is signed in as the administrator of the first start."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(base_url=live_gateway.url)
        page.goto("/")
        page.get_by_label("Username").fill("admin")
        page.get_by_label("Password").fill(live_gateway.admin_password)
        page.get_by_role("button", name="Log in").click()
        expect(page.get_by_role("heading", name="How things stand")).to_be_visible()
        yield page
        browser.close()


def test_a_dead_letter_is_found_and_requeued_once_its_agent_is_well(
    live_gateway: LiveGateway, page: Page, tmp_path: Path
) -> None:
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    expect(page.get_by_text("agent main has no runner")).to_be_visible()

    failing = ("/bin/sh", "-c", "echo no disk >&2; exit 1")
    live_gateway.manage("agents", "set", "main", "--max-attempts", "1", "--", *failing)
    text = "<script>alert(1)</script> deploy is done"
    live_gateway.manage("system_event", text, "--session-key", "hook:deploy")
    for _ in range(100):
        page.goto("/admin/wake/systemevent/?state__exact=dead")
        if page.get_by_text(text).count():
            break
    page.get_by_role("link", name=text).click()
    expect(page.get_by_text("every attempt failed")).to_be_visible()

    inbox = tmp_path / "inbox.txt"
    live_gateway.manage("agents", "set", "main", "--", "/bin/sh", "-c", 'cat >> "$0"', str(inbox))
    page.get_by_role("button", name="Requeue dead letters").click()
    expect(page.get_by_text("1 dead letter requeued.")).to_be_visible()
    for _ in range(100):
        page.goto("/admin/wake/heartbeat/")
        if page.get_by_text("delivered", exact=True).count():
            break
    assert text in inbox.read_text()
    assert problems == []


def test_a_program_cannot_be_set_in_a_page(live_gateway: LiveGateway, page: Page) -> None:
    live_gateway.manage("agents", "set", "main", "--", "/bin/echo", "hello")
    page.goto("/admin/wake/agent/main/change/")
    expect(page.get_by_text("/bin/echo hello")).to_be_visible()
    expect(page.get_by_text("Set on the command line only")).to_be_visible()
    fields = page.locator("form [name]").evaluate_all("all => all.map(one => one.name)")
    assert "runner" in fields
    assert not [name for name in fields if "command" in name]
