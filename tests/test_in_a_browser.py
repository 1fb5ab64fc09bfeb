"""The web pages in a real browser: an operator signs in, looks, and acts."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser import chromium, needs_chromium, sign_in, take_pictures, watch
from tests.live import LiveGateway

pytestmark = needs_chromium


@pytest.fixture
def page(live_gateway: LiveGateway) -> Iterator[Page]:
    """A page that is signed in as the administrator of the first start."""
    with chromium(live_gateway) as browser:
        page = browser.new_page()
        page.goto("/admin/")
        sign_in(page, "admin", live_gateway.admin_password)
        expect(page.get_by_role("heading", name="How things stand")).to_be_visible()
        yield page


@pytest.fixture
def screenshot(page: Page) -> Callable[[str], None]:
    """Keep pictures of the page; see `take_pictures`."""
    return lambda name: take_pictures(page, name)


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
    page.wait_for_timeout(1000)  # by then the gateway knows of it
    page.get_by_role("button", name="Requeue dead letters").click()
    expect(page.get_by_text("1 dead letter requeued.")).to_be_visible()
    for _ in range(100):
        page.goto("/admin/wake/heartbeat/")
        if page.locator("#result_list").get_by_text("delivered", exact=True).count():
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


def test_an_agents_form_asks_what_its_runner_needs(
    live_gateway: LiveGateway, page: Page, screenshot: Callable[[str], None]
) -> None:
    problems = watch(page)
    page.goto("/admin/wake/agent/main/change/")
    names = ("url", "model", "key_variable", "transcript_bytes")
    for runner, asked in (
        ("command", ()),
        ("http", names[:1]),
        ("inbox", ()),
        ("openclaw", ("url", "key_variable")),
        ("chat", names),
    ):
        page.locator("[name=runner]").select_option(runner)
        for name in names:
            expect(page.locator(f"[name={name}]")).to_be_visible(visible=name in asked)
        command = page.get_by_text("Set on the command line only")
        expect(command).to_be_visible(visible=runner == "command")
    screenshot("agent")
    # What is wrong is shown, even where the runner does not ask for it.
    page.locator("[name=url]").fill("nonsense")
    page.locator("[name=runner]").select_option("inbox")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.get_by_text("Enter a URL such as")).to_be_visible()
    assert problems == []


def test_a_github_hook_from_the_preset_to_a_replay(
    live_gateway: LiveGateway, page: Page, screenshot: Callable[[str], None]
) -> None:
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))

    # A token, shown once, with a line to try it.
    page.goto("/admin/hooks/hooktoken/add/")
    page.get_by_label("Name").fill("laptop")
    page.get_by_role("button", name="Save", exact=True).click()
    token = page.locator("#secret").inner_text()
    assert token.startswith("och_")
    expect(page.get_by_text(f"Authorization: Bearer {token}")).to_be_visible()
    screenshot("token")

    # A mapping in two clicks: the preset, and Save. Its secret is made with it.
    page.goto("/admin/hooks/hookmapping/")
    page.get_by_role("link", name="Add from preset").click()
    screenshot("presets")
    page.get_by_role("link", name="GitHub", exact=True).click()
    expect(page.get_by_text(f"{live_gateway.url}/hooks/github")).to_be_visible()
    screenshot("mapping")
    page.get_by_role("button", name="Save", exact=True).click()
    secret = page.locator("#secret").inner_text()
    screenshot("secret")

    # What it would make of the sample, step by step.
    page.get_by_role("link", name="I have copied it").click()
    page.get_by_role("link", name="GitHub", exact=True).click()
    page.get_by_role("link", name="Simulate").click()
    page.get_by_role("button", name="Simulate").click()
    expect(page.locator("#answer")).to_contain_text("200 OK")
    expect(page.get_by_text("agent:main:hook:github").first).to_be_visible()
    screenshot("simulation")
    assert live_gateway.events() == 0

    # For real, as the sender does it: once signed, once with the token.
    body = (
        '{"action": "opened", "repository": {"full_name": "octo/app"}, "sender": {"login": "al"}}'
    )
    signing = subprocess.run(
        ["openssl", "dgst", "-sha256", "-hmac", secret],
        input=body.encode(),
        capture_output=True,
        check=True,
    )
    signature = signing.stdout.decode().split()[-1]

    def curl(*headers: str) -> str:
        options = [part for header in headers for part in ("-H", header)]
        address = f"{live_gateway.url}/hooks/github"
        return subprocess.run(
            ["curl", "-s", *options, "-d", body, address],
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    event = "X-GitHub-Event: issues"
    assert '"eventOutcome":"queued"' in curl(event, f"X-Hub-Signature-256: sha256={signature}")
    assert '"eventOutcome":"coalesced"' in curl(event, f"Authorization: Bearer {token}")
    assert curl(event, f"X-Hub-Signature-256: sha256={signature[::-1]}") == "Unauthorized\n"

    # Both are on record. The first one is sent again.
    page.goto("/admin/hooks/hookdelivery/")
    expect(page.get_by_text("signature of GitHub")).to_be_visible()
    expect(page.get_by_text("token laptop")).to_be_visible()
    screenshot("deliveries")
    page.locator("#result_list tbody tr").last.get_by_role("link").first.click()
    expect(page.get_by_text("issues opened in octo/app by al").first).to_be_visible()
    page.get_by_role("button", name="Replay").click()
    expect(page.get_by_text("1 coalesced")).to_be_visible()
    screenshot("delivery")
    assert live_gateway.events() == 1
    assert problems == []
